"""What mkdocs calls while it builds: pages from outside of ``docs/``, and the reference, made from the code."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# mkdocs runs this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import reference
from tools.site import prose, sources


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what does not lie in ``docs/``."""
    for name, path in sources.gathered().items():
        files.append(File.generated(config, name, content=sources.shown(path)))
    for name, make in reference.PAGES.items():
        files.append(File.generated(config, name, content=make()))
    placed = repr(config.nav)
    new = [
        file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri and file.src_uri not in placed
    ]
    _guides(config.nav or []).extend(sorted(new))
    return files


def _guides(nav: list[Any]) -> list[Any]:
    """Where a page goes that ``nav`` does not name: nobody's page is missing because somebody forgot a line."""
    return next(section["Guides"] for section in nav if "Guides" in section)


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Links as the site has them, and blocks without the words that are meant for tests."""
    name = page.file.src_uri
    if name in reference.PAGES:
        return markdown
    path = sources.gathered().get(name, PurePosixPath("docs") / name)
    return prose.fit(sources.relink(markdown, path))

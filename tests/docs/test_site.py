"""What the site is made with: links that work in a checkout and on the site, a reference that misses nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

import msgspec
import pytest

import streamworker
from streamworker import Settings
from streamworker.codec import Document
from streamworker.settings.environment import PREFIX
from tools import changelog, links, pictures
from tools.reference import api, cli, keys, metrics, scripts, settings, wire
from tools.site import prose, sources

ROOT = Path(__file__).parents[2]


def test_every_setting_has_its_line():
    page = settings.page()
    for line in Settings().describe():
        assert f"`{PREFIX}{line.name.removeprefix(PREFIX)}`" in page, line.name


@pytest.mark.all
def test_every_command_has_its_heading():
    from streamworker.cli import _COMMANDS

    page = cli.page()
    assert all(f"## streamworker {name}\n" in page for name, *_ in _COMMANDS)
    assert "## streamworker dead retry\n" in page.replace("### ", "## ") and "`--rate" in page
    assert "| 78 |" in page and "| 69 |" in page


def test_every_public_name_has_its_heading():
    page = api.page()
    assert all(f"## {name}\n" in page for name in streamworker.__all__)
    assert "drain" in api.testing_page() and "plugin" in api.testing_page()


def test_every_field_and_key_and_script_is_there():
    page = wire.page()
    assert all(f"| `{field.encode_name}` |" in page for field in msgspec.structs.fields(Document))
    assert "`stream:{Q}:due`" in keys.page() and "`queue:Q:claimed:ID`" in keys.page()
    page = scripts.page()
    assert all(f"## {path.stem}\n" in page for path in (ROOT / "streamworker/broker/lua").glob("*.lua"))


def test_every_metric_is_there():
    names = {each.name for each in metrics.families()}
    assert len(names) > 20 and all(f"| `{name}` |" in metrics.page() for name in names)


def test_pictures_are_what_their_tool_draws():
    for name, draw in pictures.PICTURES.items():
        assert (pictures.FOLDER / f"concept-{name}.svg").read_text() == draw().svg(), "./dev picture"


@pytest.mark.parametrize(
    ("page", "text", "made"),
    [
        ("README.md", "[a](docs/tutorial.md#1-a-job)", "[a](tutorial.md#1-a-job)"),
        ("README.md", "![a](docs/images/x.png)", "![a](images/x.png)"),
        ("docs/tutorial.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/tutorial.md", "[a](../examples/mailer/README.md)", "[a](source/examples/mailer/index.md)"),
        ("docs/concepts/claim.md", "[a](../runbook.md) [b](https://x.example/y)", "[a](../runbook.md) [b](https://x.example/y)"),
        ("README.md", "[a](examples/producers)", "[a](source/examples/producers/index.md)"),
        ("examples/mailer/README.md", "[a](mailer/smtp.py)", "[a](mailer/smtp.py.md)"),
        ("README.md", "`[a](docs/x.md)`\n```\n[a](docs/x.md)\n```", "`[a](docs/x.md)`\n```\n[a](docs/x.md)\n```"),
    ],
)  # fmt: skip
def test_a_link_of_a_checkout_becomes_one_of_the_site(page: str, text: str, made: str):
    assert sources.relink(text, PurePosixPath(page)) == made


def test_blocks_lose_what_only_tests_need():
    text = "```sh run\nls\n```\n\n1. one\n\n   ```sh\n   ls\n   ```\n2. two\n\n```python app.py\nx\n```\n"
    assert prose.fit(text) == (
        '```sh\nls\n```\n\n1. one\n\n    ```sh\n    ls\n    ```\n2. two\n\n```python title="app.py"\nx\n```\n'
    )


def test_no_link_leads_nowhere():
    assert [text for page in links.pages() for text in links.broken(page)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.md").write_text("# One thing\n[x](b.md) [y](#one-thing) [z](#two)\n\n`[c](c.md)`\n")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    assert links.broken(PurePosixPath("a.md")) == ["a.md:2: there is no b.md", "a.md:2: a.md has no heading #two"]


CHANGES = """# Changelog

## [Unreleased]

### Added

- By hand.

## [0.1.0] - 2026-01-01

### Added

- First.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "changes").mkdir()
    (tmp_path / "changes/README.md").write_text("what this is")
    (tmp_path / "changes/levels.added.md").write_text("Levels\nin two lines.\n")
    (tmp_path / "changes/leak.fixed.md").write_text("- A leak.\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0.1.0"\n')
    return tmp_path


def test_a_release_takes_fragments_and_what_stands_by_hand(project: Path):
    changelog.release(project, "0.2.0", "2026-02-02")
    assert (project / "CHANGELOG.md").read_text() == CHANGES.replace(
        "## [Unreleased]\n\n### Added\n\n- By hand.\n",
        "## [Unreleased]\n\n## [0.2.0] - 2026-02-02\n\n### Added\n\n- By hand.\n- Levels\n  in two lines.\n\n### Fixed\n\n- A leak.\n",
    )
    assert 'version = "0.2.0"' in (project / "pyproject.toml").read_text()
    assert [path.name for path in (project / "changes").iterdir()] == ["README.md"]
    with pytest.raises(ValueError, match="nothing is unreleased"):
        changelog.release(project, "0.3.0", "2026-03-03")


@pytest.mark.parametrize("name", ["levels.md", "levels.new.md", "levels.added.txt"])
def test_what_is_no_fragment_is_refused(project: Path, name: str):
    (project / "changes" / name).write_text("x")
    with pytest.raises(ValueError, match="is no fragment"):
        changelog.release(project, "0.2.0", "2026-02-02")
    assert (project / "CHANGELOG.md").read_text() == CHANGES


def test_the_changelog_of_today_can_be_released():
    text = (ROOT / "CHANGELOG.md").read_text()
    said = changelog.unreleased(text, changelog.fragments(ROOT / "changes"))
    made = changelog.released(text, changelog.fragments(ROOT / "changes"), "99.0.0", "2026-01-01")
    assert said in made
    old = [line for line in text.splitlines() if line.strip()]
    assert [line for line in old if line not in made] == [], "a line would get lost"


def test_words_are_spelled():
    done = subprocess.run(["codespell", "README.md", "docs", "CHANGELOG.md"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

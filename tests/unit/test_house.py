"""The project's own checks find what they are there for: imports that point up, host names, and nothing else."""

import subprocess
from pathlib import Path

import grimp
import pytest

from tools import contracts, hosts


def graph(*imports: str) -> grimp.ImportGraph:
    """``"a.b -> a.c"`` and so on, as a graph; ``"a.b"`` alone is a module that imports nothing."""
    made = grimp.ImportGraph()
    for line in imports:
        importer, _, imported = line.partition(" -> ")
        made.add_module(importer)
        if imported:
            made.add_module(imported)
            made.add_import(importer=importer, imported=imported, line_number=1, line_contents=line)
    return made


def check(contract: type[contracts.Contract], options: dict[str, list[str]], *imports: str) -> list[str]:
    rule = contract("rule", {"root_packages": ["house"]}, options)
    return rule.check(graph("house", *imports), verbose=False).metadata["lines"]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("house.settings -> house.errors", True),
        ("house.settings -> house.errors.tree", True),
        ("house.settings -> houses", True),
        ("house.settings.env -> house.settings.rules", True),
        ("house.other -> house.app", True),
        ("house.settings -> house.app", False),
        ("house.settings.env -> house.app", False),
    ],
)
def test_imports_only(line: str, kept: bool):
    options = {"modules": ["house.settings", "house.absent"], "may_import": ["house.errors", "house.missing"]}
    modules = ["house.settings", "house.errors"]
    assert check(contracts.ImportsOnly, options, *modules, line) == ([] if kept else [f"{line} (line 1)"])


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("house.app -> house.broker.stream", True),
        ("house.broker -> house.broker.stream", True),
        ("house.broker.stream -> house.broker.keys", True),
        ("house.worker -> house.broker", True),
        ("house.worker -> house.broker.stream", False),
        ("house.cli.main -> house.broker.stream.deep", False),
    ],
)
def test_imported_only_by(line: str, kept: bool):
    options = {
        "modules": ["house.broker.*", "house.absent.*", "house.missing"],
        "importers": ["house.app", "house.broker"],
    }
    modules = ["house.app", "house.broker", "house.broker.stream", "house.broker.keys"]
    assert check(contracts.ImportedOnlyBy, options, *modules, line) == ([] if kept else [f"{line} (line 1)"])


def test_host_names_are_found_in_tracked_files_only(tmp_path: Path):
    host = "py" + "pi" + ".org"
    (tmp_path / "note.md").write_text(f"fine\nsee {host}/simple\n")
    (tmp_path / "untracked.md").write_text(host)
    (tmp_path / "plain.md").write_text("http://localhost:6379 is nobody's registry\n")
    (tmp_path / "some.lock").write_text("x @ http://localhost/x.whl\n")
    (tmp_path / "binary.rdb").write_bytes(b"\xff\xfe" + host.encode())
    (tmp_path / "deleted.md").write_text(host)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "note.md", "plain.md", "some.lock", "binary.rdb", "deleted.md"], check=True)
    (tmp_path / "deleted.md").unlink()

    found = [offence for path in hosts.tracked_files(tmp_path) for offence in hosts.offences(path)]
    assert found == [f"{tmp_path}/note.md:2: see {host}/simple", f"{tmp_path}/some.lock:1: x @ http://localhost/x.whl"]

"""What is published is the same bytes whoever builds it. (`./dev release` also installs it, which takes minutes.)"""

import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import release


@pytest.mark.all
@pytest.mark.timeout(300)
def test_two_builds_are_the_same_bytes_and_complete(tmp_path: Path):
    sdist, wheel = release.build(tmp_path)  # ends the process if they differ
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {
        "streamworker/py.typed",
        "streamworker/_migrations/0001_ledger.sql",
        "streamworker/broker/lua/claim.lua",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or name.endswith(".pyc")]
    with tarfile.open(sdist) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "docs/quickstart.md",
        "migrations/0001_ledger.sql",
        "pyproject.toml",
    } <= inside


@pytest.mark.all
@pytest.mark.timeout(300)
def test_builds_that_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, moments = release.exported, iter(["1700000000", "1700086400"])
    monkeypatch.setattr(release, "exported", lambda folder: (real(folder)[0], next(moments)))
    with pytest.raises(SystemExit, match="two builds differ"):
        release.build(tmp_path)

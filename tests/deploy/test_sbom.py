"""The bill of materials: complete, valid in shape, the same for the same image."""

import json
from importlib.metadata import distributions, version
from typing import Any

import pytest

from tools import sbom


@pytest.fixture(scope="module")
def packages() -> list[dict[str, Any]]:
    return list(sbom.python_packages())


def test_every_installed_package_is_listed_once(packages):
    listed = sbom.bill()["components"]
    components = {each["bom-ref"]: each for each in listed}
    assert len(components) == len(listed)
    assert components[f"pkg:pypi/redis@{version('redis')}"]["name"] == "redis"
    assert {each["name"] for each in packages} == {
        each.metadata["Name"].lower().replace("_", "-") for each in distributions()
    }


def test_licences_are_in_one_of_the_two_forms(packages):
    for each in packages:
        for choice in each.get("licenses", []):
            assert list(choice) in (["expression"], ["license"])
    declared = [each for each in packages if "licenses" in each]
    assert len(declared) > len(packages) / 2


def test_debian_packages_that_are_installed(tmp_path):
    status = tmp_path / "status"
    status.write_text(
        "Package: bash\nStatus: install ok installed\nArchitecture: amd64\nVersion: 5.2.15-2+b8\nDescription: a shell\n"
        " with: more lines\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    (bash,) = sbom.debian_packages(status)
    assert bash["purl"] == "pkg:deb/debian/bash@5.2.15-2%2Bb8?arch=amd64"
    assert list(sbom.debian_packages(tmp_path / "none")) == []


def test_the_document_is_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sbom.py", str(tmp_path / "a.json")])
    assert sbom.main() == 0
    monkeypatch.setattr("sys.argv", ["sbom.py", str(tmp_path / "b.json")])
    assert sbom.main() == 0
    first = (tmp_path / "a.json").read_text()
    assert first == (tmp_path / "b.json").read_text()
    assert json.loads(first)["specVersion"] == "1.6"

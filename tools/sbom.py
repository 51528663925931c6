"""A software bill of materials (CycloneDX 1.6, JSON) of the environment it runs in: Python packages and Debian's.

``python tools/sbom.py FILE``; with ``--wheel`` only what a wheel brings along, which no Debian package is. Only the
standard library, so that making the list adds nothing to it. Without times and random numbers: the same image gives the
same list.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

DPKG = Path("/var/lib/dpkg/status")


def library(purl: str, name: str, version: str) -> dict[str, Any]:
    """One component."""
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def python_packages() -> Iterator[dict[str, Any]]:
    """Every installed distribution, with the licence it declares."""
    texts = (each.metadata for each in distributions())  # each access would parse it anew
    found = {text["Name"].lower().replace("_", "-"): text for text in texts}
    for name, text in sorted(found.items()):
        component = library(f"pkg:pypi/{name}@{text['Version']}", name, text["Version"])
        declared = text.json  # unlike `text[...]`, a field may be missing here
        expression, licence = declared.get("license_expression"), declared.get("license")
        if isinstance(expression, str):
            component["licenses"] = [{"expression": expression}]
        elif isinstance(licence, str) and licence and "\n" not in licence:
            component["licenses"] = [{"license": {"name": licence}}]
        yield component


def debian_packages(status: Path = DPKG) -> Iterator[dict[str, Any]]:
    """Every installed package of the base image; none where dpkg is not.

    Args:
        status: dpkg's list.
    """
    if not status.exists():
        return
    for paragraph in status.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/debian/{name}@{version.replace('+', '%2B').replace(':', '%3A')}?arch={fields['Architecture']}"
        yield library(purl, name, version)


def bill(*, wheel: bool = False) -> dict[str, Any]:
    """The document.

    Args:
        wheel: it is about a wheel and its requirements, not about an image.
    """
    packages = list(python_packages())
    ours = next((each for each in packages if each["name"] == "streamworker"), {"version": "0"})
    others = (each for each in packages if not (wheel and each["name"] == "streamworker"))
    interpreter = {
        "type": "platform",
        "bom-ref": f"pkg:generic/python@{platform.python_version()}",
        "name": "python",
        "version": platform.python_version(),
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library" if wheel else "container",
                "bom-ref": "wheel" if wheel else "image",
                "name": "streamworker",
                "version": ours["version"],
            }
        },
        "components": [*others] if wheel else [interpreter, *others, *debian_packages()],
    }


def main() -> int:
    """Write the document to the file that is named, or to standard output."""
    words = sys.argv[1:]
    wheel = "--wheel" in words
    text = json.dumps(bill(wheel=wheel), indent=1) + "\n"
    names = [word for word in words if word != "--wheel"]
    if names:
        Path(names[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

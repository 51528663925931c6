"""``./dev pin-images`` against a stand-in of the program that asks the registry."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tools import pin_images

ROOT = Path(__file__).parents[2]
STAND_IN = """#!{python}
import hashlib, sys
image = sys.argv[4]
assert sys.argv[1:4] == ["buildx", "imagetools", "inspect"] and "Digest" in sys.argv[-1]
if image in {unknown!r}:
    sys.exit("ERROR: " + image + ": not found")
print("sha256:" + hashlib.sha256(({salt!r} + image).encode()).hexdigest())
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / pin_images.FILE).parent.mkdir()
    shutil.copy(ROOT / pin_images.FILE, tmp_path / pin_images.FILE)
    return tmp_path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def says(salt: str = "", unknown: tuple[str, ...] = ()) -> None:
        (folder / "docker").write_text(STAND_IN.format(python=sys.executable, salt=salt, unknown=unknown))
        (folder / "docker").chmod(0o755)

    return says


def text(checkout):
    return (checkout / pin_images.FILE).read_text()


def test_every_image_is_pinned_and_nothing_else_changes(checkout, registry):
    registry()
    before = text(checkout)
    assert [match["image"] for match in pin_images.IMAGE.finditer(before)] == [
        "python:3.13-slim",
        "redis:8",
        "postgres:17",
    ]
    assert pin_images.main(checkout) == 0
    after = text(checkout)
    assert after != before and pin_images.DIGEST.sub("", after) == pin_images.DIGEST.sub("", before)
    assert after.count("@sha256:") == 3 == len(set(pin_images.DIGEST.findall(after)))


def test_an_image_without_a_digest_gets_one(checkout, registry):
    registry()
    pin_images.main(checkout)
    pinned = text(checkout)
    (checkout / pin_images.FILE).write_text(re.sub(r"@sha256:\w+", "", pinned))
    pin_images.main(checkout)
    assert text(checkout) == pinned


def test_a_tag_that_cannot_be_looked_up_changes_nothing(checkout, registry):
    registry(unknown=("redis:8",))
    before = text(checkout)
    with pytest.raises(
        SystemExit, match=r"redis:8 cannot be looked up: ERROR: redis:8: not found; nothing was changed"
    ):
        pin_images.main(checkout)
    assert text(checkout) == before

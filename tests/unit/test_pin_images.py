"""``./dev pin-images`` against a stand-in of the program that asks the registry."""

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
    for name in pin_images.FILES:
        shutil.copy(ROOT / name, tmp_path / name)
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


def texts(checkout):
    return [(checkout / name).read_text() for name in pin_images.FILES]


def test_every_image_of_others_is_pinned_and_nothing_else_changes(checkout, registry):
    registry()
    before = texts(checkout)
    assert set().union(*map(pin_images.images, before)) == {"python:3.13-slim", "redis:8", "postgres:17"}
    assert pin_images.main(checkout) == 0
    after = texts(checkout)
    assert after != before
    for old, new in zip(before, after, strict=True):
        assert pin_images.DIGEST.sub("", new).replace("@", "") == pin_images.DIGEST.sub("", old).replace("@", "")
        pins = [line for line in new.splitlines() if "@sha256:" in line]
        assert len(pins) == sum(len(pin_images.IMAGE.findall(line)) for line in pins) >= 2
        assert not any("streamworker" in line for line in pins)


def test_pinning_again_renews_the_digests(checkout, registry):
    registry()
    pin_images.main(checkout)
    first = texts(checkout)
    pin_images.main(checkout)
    assert texts(checkout) == first
    registry(salt="another day")
    pin_images.main(checkout)
    second = texts(checkout)
    assert second != first and [text.count("@sha256:") for text in second] == [text.count("@sha256:") for text in first]


def test_a_tag_that_cannot_be_looked_up_changes_nothing(checkout, registry):
    registry(unknown=("redis:8",))
    before = texts(checkout)
    with pytest.raises(
        SystemExit, match=r"redis:8 cannot be looked up: ERROR: redis:8: not found; nothing was changed"
    ):
        pin_images.main(checkout)
    assert texts(checkout) == before

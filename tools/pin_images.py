"""Pin the base images of the Dockerfile and of compose.yaml by digest: ``./dev pin-images``.

Asks the registry that Docker is configured for (``docker buildx imagetools inspect``) what each tag is now, and writes
``NAME:TAG@sha256:…`` in its place; a digest that is there already is renewed. All or nothing: if one tag cannot be
looked up, no file changes.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "compose.yaml")
# An image that somebody else builds has a tag, and none of ours has one that is written out here.
IMAGE = re.compile(
    r"^(?P<head>FROM +|\s+image: +)(?P<image>[a-z0-9][a-z0-9./_-]*:[\w.-]+)(?:@sha256:[0-9a-f]{64})?(?= |$)",
    re.MULTILINE,
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
OURS = "streamworker:"


def images(text: str) -> set[str]:
    """The images of a file, without digests."""
    return {match["image"] for match in IMAGE.finditer(text) if not match["image"].startswith(OURS)}


def digest_of(image: str) -> str:
    """The digest of a tag, of the index for all platforms where there is one.

    Raises:
        SystemExit: no registry tells.
    """
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{.Manifest.Digest}}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemExit(f"pin-images: {image} cannot be looked up: {error}; nothing was changed") from None
    found = DIGEST.fullmatch(asked.stdout.strip())
    if asked.returncode or found is None:
        why = (asked.stderr.strip().splitlines() or ["no digest in the answer"])[-1]
        raise SystemExit(f"pin-images: {image} cannot be looked up: {why}; nothing was changed")
    return found[0]


def pinned(text: str, digests: dict[str, str]) -> str:
    """A file's text with these digests behind their images."""

    def put(match: re.Match[str]) -> str:
        digest = digests.get(match["image"])
        return f"{match['head']}{match['image']}@{digest}" if digest is not None else match[0]

    return IMAGE.sub(put, text)


def main(folder: Path = ROOT, files: Iterable[str] = FILES) -> int:
    """Look up all tags, then write the files."""
    texts = {folder / name: (folder / name).read_text(encoding="utf-8") for name in files}
    digests = {image: digest_of(image) for image in sorted(set().union(*map(images, texts.values())))}
    for path, text in texts.items():
        path.write_text(pinned(text, digests), encoding="utf-8")
    for image, digest in digests.items():
        print(f"{image}@{digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

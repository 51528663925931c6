"""Renew the digests of the base images in deploy/base-images.env: ``./dev pin-images``.

Asks the registry that Docker is configured for (``docker buildx imagetools inspect``) what each tag is now, and writes
``NAME:TAG@sha256:…`` in its place. All or nothing: if one tag cannot be looked up, the file does not change.
compose.yaml and the Dockerfile name the tags, and take the images of this file where it is given.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = Path("deploy/base-images.env")
IMAGE = re.compile(
    r"^(?P<variable>[A-Z]+_IMAGE)=(?P<image>[a-z0-9][a-z0-9./_-]*:[\w.-]+)(?:@sha256:[0-9a-f]{64})?$", re.MULTILINE
)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


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


def main(folder: Path = ROOT) -> int:
    """Look up all tags, then write the file."""
    path = folder / FILE
    text = path.read_text(encoding="utf-8")
    digests = {match["image"]: digest_of(match["image"]) for match in IMAGE.finditer(text)}
    path.write_text(
        IMAGE.sub(lambda match: f"{match['variable']}={match['image']}@{digests[match['image']]}", text),
        encoding="utf-8",
    )
    for image, digest in digests.items():
        print(f"{image}@{digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

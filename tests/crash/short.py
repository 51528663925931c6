"""``python -m tests.crash.short``: the fixed short set with pytest, then half a minute of soak for the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.crash import soak
from tests.crash.rig import SHIFT

SEED = 4711


def main(arguments: Sequence[str]) -> int:
    folder = str(Path(__file__).parent)
    chosen = ["-m", "crash or not crash", "-n", "2", "--dist", "worksteal", "-q", folder, *arguments]
    code = subprocess.run([sys.executable, "-m", "pytest", *chosen], check=False).returncode
    if code:
        return code
    return soak.main(
        ["--minutes", "0.4", "--seed", str(SEED + SHIFT), "--workers", "4", "--lease", "1", "--every", "0.6"]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

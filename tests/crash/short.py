"""``python -m tests.crash.short [--mode list]``: the fixed short set with pytest, then half a minute of soak for the table.

Without ``--mode`` both modes, one after the other; in list mode then without the tests marked ``mode_free``, whose faults
do not care what jobs lie in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.crash.ground import GROUNDS
from tests.crash.rig import SHIFT

SEED = 4711


def main(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if words[:1] == ["--mode"]:
        return _run(words[1], "crash or not crash", words[2:])
    for mode in GROUNDS:
        left_out = "" if mode == "stream" else " and not mode_free"
        code = _run(mode, f"(crash or not crash){left_out}", words)
        if code:
            return code
    return 0


def _run(mode: str, marks: str, arguments: Sequence[str]) -> int:
    print(f"crash: {mode} mode", flush=True)
    environment = {**os.environ, "CRASH_MODE": mode}
    folder = str(Path(__file__).parent)
    chosen = ["-m", marks, "-n", "2", "--dist", "worksteal", "-q", folder, *arguments]
    seed = str(SEED + SHIFT)
    soak = ["--minutes", "0.4", "--seed", seed, "--workers", "4", "--lease", "1", "--every", "0.6"]
    for command in (["pytest", *chosen], ["tests.crash.soak", *soak]):
        code = subprocess.run([sys.executable, "-m", *command], check=False, env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

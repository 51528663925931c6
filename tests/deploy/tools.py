"""Checkers of files, run as people run them."""

import subprocess
import sys


def jsonschema_complaints(how, *files):
    """What check-jsonschema says; empty if all is well."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *map(str, how), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr

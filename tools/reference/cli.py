"""Every command with its flags, as the program's own help has them."""

from __future__ import annotations

import re
from typing import Final

from streamworker import errors
from streamworker.cli import command_tree
from tools.reference.tables import table

# Flags of settings are the same everywhere, and have a page.
_SETTINGS: Final = re.compile(r"^\*\*Settings\*\*:\n\n.*?(?=^#|\Z)", re.MULTILINE | re.DOTALL)
_CONTENTS: Final = re.compile(r"^## Table of Contents\n.*?(?=^\*\*)", re.MULTILINE | re.DOTALL)


def page() -> str:
    """The page."""
    text = command_tree().generate_docs(output_format="markdown")
    text = _SETTINGS.sub("Takes [settings](settings.md) as flags.\n\n", _CONTENTS.sub("", text))
    text = text.replace("# streamworker\n", "# Command line\n", 1).replace("```console\n", "```text\n")
    codes = {error.exit_code: error for error in errors.StreamworkerError.__subclasses__() if error.exit_code > 1}
    rows = [
        ["0", "ok; a worker that drained or handed back what it held too"],
        ["1", "a check found trouble, or the command failed"],
        *([str(number), first_line(error.__doc__ or "")] for number, error in sorted(codes.items())),
        ["130, 143", "interrupted; a second signal did not wait"],
    ]
    return f"""{text.rstrip()}

## Exit codes

{table(["code", "means"], rows)}
Errors are one sentence on standard error that says what to do next. Listings print tables for people and, with `--json`,
one object per line; logs go to standard error.
"""


def first_line(doc: str) -> str:
    """A docstring's first line."""
    return doc.strip().splitlines()[0].rstrip(".")

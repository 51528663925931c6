"""Draws what a command shows on a terminal, from a real run: ``python tools/terminal.py FILE.svg COMMAND...``.

The command runs on a terminal of its own; what stands on the screen when it has ended becomes an SVG, colours and all.
The picture of the demo: ``./dev picture``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import shlex
import struct
import sys
import termios
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS: Final = 104
ROWS: Final = 60
_NAMED: Final = {"brown": "yellow", "default": "default"}


def show(command: list[str]) -> pyte.Screen:
    """Run a command on a terminal; the screen afterwards.

    Args:
        command: the program and its arguments.

    Raises:
        OSError: the terminal broke.
        RuntimeError: the command failed.
    """
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.environ.pop("NO_COLOR", None)
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # how Linux says that the other side has closed
                raise
            data = b""
        if not data:
            break
        stream.feed(data)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {code}")
    return screen


def lines(screen: pyte.Screen) -> list[Text]:
    """What stands on the screen, without the empty lines below it."""
    found = []
    for row in range(ROWS):
        line = Text()
        cells: list[Any] = [screen.buffer[row][column] for column in range(COLUMNS)]
        for style, some in groupby(cells, _style):
            line.append("".join(cell.data for cell in some), style)
        line.rstrip()
        found.append(line)
    while found and not found[-1].plain:
        found.pop()
    return found


def _style(cell: Any) -> Style:
    return Style(
        color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold, italic=cell.italics, reverse=cell.reverse
    )


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    if len(name) == 6 and all(letter in "0123456789abcdef" for letter in name):
        return f"#{name}"
    name = _NAMED.get(name, name)
    return name.replace("bright", "bright_") if name.startswith("bright") else name


def main() -> int:
    """Run, and draw."""
    path, command = Path(sys.argv[1]), sys.argv[2:]
    shown = lines(show(command))
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    console.print(Text("$ ", "bold green").append(shlex.join(command), "bold"))
    for line in shown:
        console.print(line, soft_wrap=False, overflow="crop", no_wrap=True)
    svg = console.export_svg(title=shlex.join(command), unique_id="terminal")
    # The fonts of rich's template come from a stranger's server: whoever reads the page shall not ask there.
    head, _, rest = svg.partition("    @font-face")
    path.write_text(head + "    " + rest[rest.index(".terminal-matrix") :] if rest else svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

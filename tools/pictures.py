"""Draws the pictures of docs/concepts: ``python tools/pictures.py``. One small vocabulary, so that they look alike.

Colours are chosen to be read on light and on dark pages; a test fails if the pictures are not what this file draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).resolve().parents[1] / "docs/images"
INK: Final = "#57606a"
RED: Final = "#c0392b"
GREEN: Final = "#1f883d"
BLUE: Final = "#0969da"
WIDTH: Final = 760


class Drawing:
    """Boxes, arrows and words on a grid of pixels."""

    def __init__(self, height: int, title: str) -> None:
        self._height = height
        self._title = title
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, *lines: str, colour: str = INK, dashed: bool = False
    ) -> None:
        """A rounded box with centred lines; the first is bold."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colour}" fill-opacity="0.07" '
            f'stroke="{colour}" stroke-width="1.5"{dash}/>'
        )
        top = y + height / 2 - 8 * (len(lines) - 1) + 4
        for number, line in enumerate(lines):
            self.say(x + width / 2, top + 16 * number, line, colour=colour, bold=number == 0, anchor="middle")

    def say(
        self,
        x: float,
        y: float,
        text: str,
        *,
        colour: str = INK,
        bold: bool = False,
        anchor: str = "start",
        size: int = 12,
    ) -> None:
        """Words."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{weight}>{escape(text)}</text>'
        )

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, text: str = "", *, colour: str = INK, dashed: bool = False
    ) -> None:
        """A line with a head, and words above its middle."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5" '
            f'marker-end="url(#{colour[1:]})"{dash}/>'
        )
        if text:
            self.say((x1 + x2) / 2, (y1 + y2) / 2 - 6, text, colour=colour, anchor="middle", size=11)

    def line(self, x1: float, y1: float, x2: float, y2: float, *, colour: str = INK, width: float = 1.5) -> None:
        """A line."""
        self._parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>')

    def dot(self, x: float, y: float, colour: str = INK) -> None:
        """A moment on a line of time."""
        self._parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour}"/>')

    def svg(self) -> str:
        """The file."""
        heads = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
            for colour in (INK, RED, GREEN, BLUE)
        )
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}" width="{WIDTH}" height="{self._height}" '
            f'font-family="system-ui, -apple-system, Segoe UI, sans-serif" role="img">\n<title>{escape(self._title)}</title>\n'
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )


def claim() -> Drawing:
    """Three streams, the pending list, two workers."""
    d = Drawing(300, "A claim moves a job from a stream into the pending list of the group, under the name of a worker")
    d.say(20, 24, "waits", bold=True)
    for row, (key, jobs) in enumerate(
        (("stream:{billing}:high", 1), ("stream:{billing}", 4), ("stream:{billing}:low", 2))
    ):
        y = 40 + 46 * row
        d.box(20, y, 230, 34, colour=BLUE)
        d.say(32, y + 21, key, colour=BLUE)
        for number in range(jobs):
            d.box(236 - 17 * (number + 1), y + 9, 12, 16, colour=BLUE)
    d.say(330, 24, "is held (the group's pending list)", bold=True)
    d.box(330, 40, 230, 126, colour=INK)
    for row, (job, owner) in enumerate(
        (("7-0", "worker-a · delivery 1"), ("5-0", "worker-a · delivery 1"), ("2-0", "worker-b · delivery 2"))
    ):
        d.say(345, 68 + 34 * row, f"{job}   {owner}", colour=RED if "delivery 2" in owner else INK)
    d.arrow(250, 103, 330, 103, "claim", colour=GREEN)
    d.box(620, 40, 120, 54, "worker-a", "2 slots busy", colour=GREEN)
    d.box(620, 112, 120, 54, "worker-b", "1 slot busy", colour=GREEN)
    d.arrow(620, 67, 560, 67)
    d.arrow(620, 139, 560, 139)
    d.box(330, 216, 230, 54, "token of the claim", "stream · entry · worker · delivery", colour=RED)
    d.arrow(445, 166, 445, 216)
    d.say(20, 216, "A worker asks for as many jobs as it has")
    d.say(20, 234, "free slots, levels in order, and holds no more.")
    d.say(20, 252, "The job stays in its stream until it is done:")
    d.say(20, 270, "done means deleted.")
    return d


def lease() -> Drawing:
    """One worker renews, is killed, another takes over."""
    d = Drawing(
        280, "A lease is renewed every third of its length; when the worker dies it runs out, and another takes over"
    )
    d.say(20, 64, "worker-a", bold=True, colour=GREEN)
    d.say(20, 164, "worker-b", bold=True, colour=GREEN)
    d.line(110, 60, 390, 60, colour=GREEN, width=9)
    for x in (110, 180, 250, 320):
        d.dot(x, 60, INK)
        d.say(x, 38, "claims" if x == 110 else "renews", anchor="middle", size=11)
    d.say(390, 66, "✕", colour=RED, bold=True, anchor="middle", size=20)
    d.say(398, 38, "SIGKILL", colour=RED, bold=True, size=11)
    d.box(320, 84, 210, 26, "lease: 15 s unrenewed", colour=RED, dashed=True)
    d.line(320, 66, 320, 110, colour=RED)
    d.line(530, 110, 530, 160, colour=RED)
    d.line(530, 160, 730, 160, colour=GREEN, width=9)
    d.dot(530, 160, INK)
    d.say(538, 146, "takes it over: delivery 2", size=11)
    d.line(20, 220, 730, 220)
    d.arrow(20, 220, 738, 220)
    d.say(730, 240, "time", anchor="end", size=11)
    d.say(20, 244, "The thread that renews is not the event loop: a handler that runs for an hour, or blocks the loop,")
    d.say(20, 262, "keeps its job. Only silence ends a lease, never slowness.")
    return d


def fence() -> Drawing:
    """A frozen worker comes back too late."""
    d = Drawing(
        300, "A worker that was frozen comes back and is refused, because its token is no longer the current one"
    )
    d.say(20, 54, "worker-a", bold=True, colour=GREEN)
    d.say(20, 134, "worker-b", bold=True, colour=GREEN)
    d.line(100, 50, 220, 50, colour=GREEN, width=9)
    d.box(220, 36, 260, 28, "frozen (SIGSTOP, swap, a paused VM)", colour=INK, dashed=True)
    d.line(480, 50, 560, 50, colour=GREEN, width=9)
    d.line(330, 130, 520, 130, colour=GREEN, width=9)
    d.dot(330, 130)
    d.say(338, 116, "takes over: delivery 2", size=11)
    d.box(
        120,
        200,
        520,
        60,
        "Redis: entry 2-0 belongs to worker-b, delivery 2",
        "every ending shows its token, in the script that applies it",
        colour=BLUE,
    )
    d.arrow(520, 134, 520, 200, colour=GREEN)
    d.say(512, 172, "“done”, b · 2: deleted", colour=GREEN, size=11, anchor="end")
    d.arrow(560, 54, 600, 200, colour=RED)
    d.say(612, 90, "“done”, a · 1:", colour=RED, size=11)
    d.say(612, 106, "refused, counted", colour=RED, size=11)
    d.say(612, 122, "as lost", colour=RED, size=11)
    d.say(
        20,
        286,
        "In PostgreSQL the same: the row of the job knows the latest (hop, delivery), and an older one writes nothing.",
    )
    return d


def verdict() -> Drawing:
    """Outcomes on the left, verdicts on the right."""
    d = Drawing(400, "What a handler's run ended with, and what follows from it")
    d.say(20, 24, "outcome: what happened", bold=True)
    d.say(540, 24, "verdict: what to do", bold=True)
    rows = (
        ("returned", "Done", GREEN, 46),
        ("raised, or timed out", "", INK, 92),
        ("raised Retry(after)", "", INK, 130),
        ("raised Snooze(after)", "", INK, 176),
        ("shutdown, lost lease", "", INK, 214),
        ("unknown kind", "", INK, 252),
        ("raised Discard(reason)", "", INK, 298),
        ("unreadable", "", INK, 336),
    )
    for text, _, colour, y in rows:
        d.box(20, y, 210, 30, text, colour=colour)
    d.box(540, 46, 180, 30, "Done: deleted", colour=GREEN)
    d.box(540, 92, 180, 66, "Retry", "later; an attempt charged;", "none left: dead", colour=BLUE)
    d.box(540, 190, 180, 76, "Release", "back, or later;", "nothing charged", colour=BLUE)
    d.box(540, 298, 180, 68, "Dead letter", "kept with its reason", "until somebody acts", colour=RED)
    d.arrow(230, 61, 540, 61, colour=GREEN)
    d.arrow(230, 107, 540, 118, colour=BLUE)
    d.arrow(230, 145, 540, 134, colour=BLUE)
    d.arrow(230, 191, 540, 214, colour=BLUE)
    d.arrow(230, 229, 540, 229, colour=BLUE)
    d.arrow(230, 267, 540, 246, colour=BLUE)
    d.arrow(230, 313, 540, 322, colour=RED)
    d.arrow(230, 351, 540, 342, colour=RED)
    d.line(720, 125, 740, 125, colour=RED)
    d.line(740, 125, 740, 332, colour=RED)
    d.arrow(740, 332, 720, 332, colour=RED)
    d.say(385, 276, "unknown for a day", colour=RED, size=11, anchor="middle")
    d.arrow(230, 275, 540, 312, colour=RED, dashed=True)
    d.say(20, 390, "Workers that died: delivered more than 5 times, a job is dead before it runs once more.")
    return d


PICTURES: Final[dict[str, Callable[[], Drawing]]] = {"claim": claim, "lease": lease, "fence": fence, "verdict": verdict}


def main() -> int:
    """Draw all of them."""
    for name, draw in PICTURES.items():
        (FOLDER / f"concept-{name}.svg").write_text(draw().svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

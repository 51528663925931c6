"""Text in the dashboard's colors can be read: at least 4.5:1 (WCAG 2.2, 1.4.3), and 3:1 for marks (1.4.11), light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streamworker.web import site

CSS = (Path(site.__file__).parent / "static" / "app.css").read_text()
SCHEMES = {
    selector.strip(): dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})\b", block))
    for selector, block in re.findall(r"(:root[^{]*)\{([^}]*--bg:[^}]*)\}", CSS)
}
GROUNDS = ("bg", "panel", "hover", "accent-soft")
TEXTS = [
    *((text, ground) for text in ("text", "dim", "bad", "warn", "accent") for ground in GROUNDS),
    ("bad", "bad-soft"), ("warn", "warn-soft"), ("bg", "accent"), ("bg", "bad"), ("bg", "text"),
]  # fmt: skip
MARKS = [(mark, ground) for mark in ("zero", "ok", "c1", "c2") for ground in ("bg", "panel")]


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_contrast_is():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_can_be_read(scheme):
    colors = SCHEMES[scheme]
    poor = {(text, ground): round(contrast(colors[text], colors[ground]), 2) for text, ground in TEXTS
            if contrast(colors[text], colors[ground]) < 4.5}  # fmt: skip
    poor |= {(mark, ground): round(contrast(colors[mark], colors[ground]), 2) for mark, ground in MARKS
             if contrast(colors[mark], colors[ground]) < 3}  # fmt: skip
    assert poor == {}


def test_there_are_a_light_and_a_dark_scheme_and_marks_are_no_text():
    assert len(SCHEMES) == 3  # light, dark by the system, dark by choice
    assert list(SCHEMES.values())[1] == list(SCHEMES.values())[2]
    assert not re.search(r"[{; ]color:\s*var\(--zero\)", CSS), "3:1 is enough for marks, not for text"
    assert "placeholder { color: var(--dim); opacity: 1; }" in CSS

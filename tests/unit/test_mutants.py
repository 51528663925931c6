"""``./dev mutants`` takes lines out of the sources by their words; whoever changes such a line hears of it here."""

from __future__ import annotations

import pytest

from tests.crash.mutants import MUTANTS, ROOT

EDITS = [(mutant.name, *edit[:2]) for mutant in MUTANTS for edit in mutant.edits]


@pytest.mark.parametrize(("name", "file", "words"), EDITS)
def test_what_a_mutant_takes_out_is_there(name, file, words):
    assert (ROOT / "streamworker" / file).read_text().count(words) == 1, name

"""Tables of the command line: what a pipe gets without rich is what rich prints."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.cli.tables import UNBOUNDED, Column, plain_table
from streamworker.cli.terminal import console, table
from tests.conftest import examples

COLUMNS = [
    Column("queue", lambda row: row[0], short=3),
    Column("ready", lambda row: row[1], right=True),
    Column("wide", lambda row: row[2], wide=True),
    Column("fold", lambda row: row[3], fold=True),
    Column("", lambda row: row[4], rest=True),
]
TEXT = st.text(max_size=12) | st.sampled_from(
    ["", " ", "a b", "日本語", "e\u0301", "👩‍👩‍👧", "[bold]x[/]", ":smile:", "a\tb\nc"]
)


def drawn(rows, payload):
    out = console()
    out.file = io.StringIO()
    out.print(table(rows, COLUMNS, out.width, payload=payload))
    return out.file.getvalue()


@settings(max_examples=examples(30))
@given(
    st.lists(
        st.tuples(st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT), st.none() | st.binary(max_size=9)), min_size=1, max_size=4
    ),
    st.booleans(),
)
def test_a_pipe_gets_what_rich_prints(rows, payload):
    assert plain_table(rows, COLUMNS, payload=payload) == drawn(rows, payload)


@pytest.mark.parametrize(("size", "fits"), [(UNBOUNDED - 100, True), (UNBOUNDED, False)])
def test_what_is_wider_than_a_line_is_left_to_rich(size, fits):
    rows = [(("q", "1", "w", "f", "r"), b"x" * size)]
    text = plain_table(rows, COLUMNS, payload=True)
    assert (text is not None) is fits
    if fits:
        assert text == drawn(rows, True)

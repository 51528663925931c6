"""traceparent, as W3C Trace Context has it."""

import pytest

from streamworker.codec import trace_id

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", TRACE),
        (f"01-{TRACE}-b7ad6b7169203331-01-more", TRACE),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-b7ad6b7169203331", None),
        (f"00-{TRACE}-b7ad6b7169203331-01\n", None),
        ("", None),
        (17, None),
    ],
)
def test_the_trace_of_a_header(value, found):
    assert trace_id({"traceparent": value}) == found


def test_without_headers_there_is_none():
    assert trace_id(None) is trace_id({}) is None

"""The witnesses read the scripts' arguments; a script that takes others now must tell them."""

from __future__ import annotations

import re

import pytest

from streamworker.broker import scripts
from tests.crash.witness import _LIST_SHAPES, _SHAPES

SIZE = "tonumber(ARGV[1])"
"""What list_bury calls its size."""


@pytest.mark.parametrize(("name", "shape"), [*_SHAPES.items(), *_LIST_SHAPES.items()])
def test_a_witness_walks_the_arguments_as_its_script_does(name, shape):
    walks = re.findall(r"^for i = (\d+), #ARGV, (.+) do$", getattr(scripts, name).text, re.MULTILINE)
    if "step" not in shape:
        assert not walks
        return
    # The last walk settles; one before it may look ahead.
    assert (str(shape["first"]), str(shape["step"]).replace(SIZE, "size")) == walks[-1]

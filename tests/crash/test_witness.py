"""The witnesses read the scripts' arguments; a script that takes others now must tell them."""

from __future__ import annotations

import re

import pytest

from streamworker.broker import scripts
from tests.crash.witness import _LIST_SHAPES, _SHAPES, _loop

SIZE = "tonumber(ARGV[1])"
"""What list_bury calls its size."""


@pytest.mark.parametrize(("name", "shape"), [*_SHAPES.items(), *_LIST_SHAPES.items()])
def test_a_witness_walks_the_arguments_as_its_script_does(name, shape):
    walks = re.findall(r"^for i = (\d+), #ARGV, (.+) do$", getattr(scripts, name).text, re.MULTILINE)
    loop = {**_loop(getattr(scripts, name).text), **shape}
    if "step" not in loop:
        assert not walks
        return
    # The last walk settles; one before it may look ahead.
    step = str(loop["step"]).replace(SIZE, "size").replace("(tonumber(ARGV[3]) and 1 or 2)", "step")
    assert (str(loop["first"]), step) == walks[-1]

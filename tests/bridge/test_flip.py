"""A live fleet changes its mode and back again: nothing is lost, and nothing runs twice without a reason."""

from __future__ import annotations

import pytest

from tests.bridge.flip import Flip, play


@pytest.mark.all
@pytest.mark.timeout(400)
async def test_there_and_back_while_producers_push_hundreds_of_jobs_a_second(tmp_path):
    flip = Flip(tmp_path, workers=3, rate=300, lease=5.0, seed=1, later=1.0)
    tally = await play(flip, dwell=0.5)
    assert not flip.violations
    assert tally["lost"] == tally["repeated because of a kill"] == 0
    # Nobody was killed: the few that run twice were handed back by a worker that shut down.
    assert tally["handed back"] < tally["acknowledged"] / 100
    assert min(tally["ran in list mode"], tally["ran in stream mode"], tally["in both modes"]) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
async def test_there_and_back_while_workers_and_bridges_are_killed(tmp_path, seed):
    flip = Flip(tmp_path, workers=4, rate=1000, lease=2.0, seed=seed)
    tally = await play(flip, seconds=60, dwell=4, kill_every=1.0)
    assert not flip.violations
    assert tally["lost"] == 0
    assert tally["kills of workers"] > 5 and tally["kills of bridges"] > 0

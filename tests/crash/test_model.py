"""The broker's verbs in any order, by two consumers on one server, against a model of what must hold."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from streamworker.job import LEVELS, Claim, Settled
from tests.conftest import examples
from tests.contract.ground import GROUP, Ground, StreamGround
from tests.contract.helpers import BODIES, DEAD, DUE, ENDINGS, job

T = TypeVar("T")
STREAMS = ("stream:{q}:high", "stream:{q}", "stream:{q}:low")
NAMES = ("ada", "bob")


class Verbs(RuleBasedStateMachine):
    """The model: which claim of each entry is the last one that was handed out, and who has it."""

    url = ""
    ground_of: type[Ground] = StreamGround
    total: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.raw = redis.Redis.from_url(self.url, protocol=2)
        self.raw.flushall()
        self.ground = self.ground_of(self.raw)
        # Only what is made ripe may be so, however long this machine takes over an example.
        self.brokers = {name: self.ground.broker(self.url, (("q", None),), lease=600.0) for name in NAMES}
        self.held: dict[str, list[Claim]] = {name: [] for name in NAMES}
        self.valid: dict[tuple[str, bytes], tuple[str, int]] = {}
        self.seen: Counter[str] = Counter()
        self.stored = self.ended = self.dead = self.number = 0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def open(self) -> None:
        for name, broker in self.brokers.items():
            self.do(broker.open())
            self.do(broker.join(name))

    def teardown(self) -> None:
        type(self).total.update(self.seen)
        for broker in self.brokers.values():
            self.do(broker.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()
        self.raw.close()

    # -- what happens

    @rule(level=st.sampled_from(LEVELS), count=st.integers(1, 3))
    def publish(self, level: Any, count: int) -> None:
        jobs = [job(f"j{self.number + n}", level=level) for n in range(count)]
        self.number += count
        self.stored += count
        self.do(self.brokers["ada"].publish(jobs))

    @rule(name=st.sampled_from(NAMES), limit=st.integers(1, 4), sweeping=st.booleans())
    def claim(self, name: str, limit: int, sweeping: bool) -> None:
        broker = self.brokers[name]
        self.ground.forget_pace()
        self.ground.sweep_soon(broker)
        if not sweeping:
            broker._source.rest(60)
        claims = self.do(broker.claim(limit, 0, list(self.held[name])))
        assert len(claims) <= limit
        for claim in claims:
            self._taken(name, claim)

    def _taken(self, name: str, claim: Claim) -> None:
        key = (claim.place, claim.entry)
        former = self.valid.get(key)
        if former is not None:
            # Only what is ripe may change hands, and the fence changes with it: the count, or for a suspect the owner.
            assert key in self.ripe, "taken from somebody whose lease was alive"
            # A suspect that was only reserved may come back to whom it was reserved for.
            assert former != (name, claim.count) or claim.suspect
        self.ripe.discard(key)
        self.valid[key] = (name, claim.count)
        if any((mine.place, mine.entry) == key for mine in self.held[name]):
            # Only a new group delivers what runs here; the worker goes on with the run it has.
            assert former is None, "claimed what runs here"
        else:
            self.held[name].append(claim)

    ripe: set[tuple[str, bytes]]

    @initialize()
    def nothing_is_ripe(self) -> None:
        self.ripe = set()

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), times=st.integers(1, 2))
    def lease_runs_out(self, data: Any, times: int) -> None:
        """Its worker froze: it still believes in its claim."""
        name = data.draw(st.sampled_from([name for name in NAMES if self.held[name]]))
        claim = data.draw(st.sampled_from(self.held[name]))
        if self._holds(name, claim):
            self.ground.ripen(claim)
            self.ripe.add((claim.place, claim.entry))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), limit=st.integers(1, 4))
    def is_taken_over(self, data: Any, limit: int) -> None:
        """The way zombies come about, in one step, or examples would seldom find it."""
        self.lease_runs_out(data, 1)
        for name in NAMES:
            self.claim(name, limit, sweeping=True)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def renew(self, data: Any) -> None:
        name = data.draw(st.sampled_from([name for name in NAMES if self.held[name]]))
        lost = self.do(self.brokers[name].renew(self.held[name]))
        expected = [claim for claim in self.held[name] if not self._holds(name, claim)]
        assert sorted(lost, key=repr) == sorted(expected, key=repr)
        for claim in self.held[name]:
            if claim not in lost:
                self.ripe.discard((claim.place, claim.entry))
                self.valid[claim.place, claim.entry] = (name, claim.count)
        self.held[name] = [claim for claim in self.held[name] if claim not in lost]

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), ending=st.sampled_from(sorted(ENDINGS)))
    def settle(self, data: Any, ending: str) -> None:
        name = data.draw(st.sampled_from([name for name in NAMES if self.held[name]]))
        self._settle(name, data.draw(st.lists(st.sampled_from(self.held[name]), unique_by=repr, min_size=1)), ending)

    @rule(endings=st.lists(st.sampled_from(sorted(ENDINGS)), min_size=2, max_size=2), zombie_first=st.booleans())
    def zombie_and_successor_settle(self, endings: list[str], zombie_first: bool) -> None:
        """Publish, claim, freeze, take over, and both come with their endings."""
        self.publish("normal", 1)
        self.claim("ada", 4, sweeping=False)
        for claim in self.held["ada"]:
            if self._holds("ada", claim):
                self.ground.ripen(claim)
                self.ripe.add((claim.place, claim.entry))
        self.claim("bob", 4, sweeping=True)
        names = NAMES if zombie_first else NAMES[::-1]
        for name, ending in zip(names, endings, strict=True):
            self._settle(name, list(self.held[name]), ending)

    def _settle(self, name: str, chosen: list[Claim], ending: str) -> None:
        held = [self._holds(name, claim) for claim in chosen]
        results = self.do(self.brokers[name].settle([ENDINGS[ending](claim) for claim in chosen]))
        for claim, result, mine in zip(chosen, results, held, strict=True):
            self.seen[f"{ending} {result.value}"] += 1
            assert result is (Settled.SETTLED if mine else Settled.LOST)
            self.held[name].remove(claim)
            if result is Settled.SETTLED:
                del self.valid[claim.place, claim.entry]
                self.ripe.discard((claim.place, claim.entry))
                self.ended += ending == "done"
                self.dead += ending == "dead"

    @precondition(lambda self: any(claim.suspect for claims in self.held.values() for claim in claims))
    @rule(data=st.data())
    def confirm(self, data: Any) -> None:
        name, claim = data.draw(
            st.sampled_from([(name, claim) for name in NAMES for claim in self.held[name] if claim.suspect])
        )
        mine = self._holds(name, claim)
        counted = self.do(self.brokers[name].confirm(claim))
        assert (counted is not None) == mine
        self.held[name].remove(claim)
        if counted is not None:
            assert (counted.count, counted.suspect) == (claim.count + 1, False)
            self.held[name].append(counted)
            self.valid[claim.place, claim.entry] = (name, counted.count)
            self.ripe.discard((claim.place, claim.entry))

    @rule(name=st.sampled_from(NAMES))
    def forget_and_find(self, name: str) -> None:
        """A reply was lost: what the server holds under our name comes back, once."""
        if not self.held[name]:
            return
        forgotten = self.held[name].pop()
        if not self._holds(name, forgotten):
            return
        found = self.do(self.brokers[name].own_pending(self.held[name]))
        (same,) = [claim for claim in found if (claim.place, claim.entry) == (forgotten.place, forgotten.entry)]
        assert same.count == forgotten.count
        self.held[name].append(same)
        self.valid[same.place, same.entry] = (name, same.count)

    @rule()
    def scripts_are_forgotten(self) -> None:
        self.raw.script_flush()

    @precondition(lambda self: self.ground.mode == "stream")
    @rule(stream=st.sampled_from(STREAMS))
    def group_is_destroyed(self, stream: str) -> None:
        """Its entries are delivered anew, from the first one on."""
        self.raw.xgroup_destroy(stream, GROUP)
        self.valid = {key: value for key, value in self.valid.items() if key[0] != stream}
        self.ripe = {key for key in self.ripe if key[0] != stream}

    @rule()
    def tick(self) -> None:
        self.do(self.brokers["bob"].promote())

    @rule(name=st.sampled_from(NAMES))
    def leave_and_come_back(self, name: str) -> None:
        """A name that holds something is not deleted."""
        mine = any(self._on_server(*key)[0] == name for key in self.valid)
        assert not mine or not self.do(self.brokers[name].leave())

    def _holds(self, name: str, claim: Claim) -> bool:
        key = (claim.place, claim.entry)
        if key not in self.valid or key not in self.ripe:
            return self.valid.get(key) == (name, claim.count)
        # A sweep that has a suspect already passes ripe ones on: nobody has them then, or again who had only reserved
        # it before. Nobody can have run it meanwhile, because that is counted.
        return self._on_server(*key) == (name, claim.count)

    def _on_server(self, place: str, entry: bytes) -> tuple[str, int]:
        """Who has an entry; nobody, where it was given back to a list and waits there."""
        owner, count = self.ground.owner_of(place, entry) or (b"", 0)
        return owner.decode(), count

    # -- what must hold

    @invariant()
    def no_job_is_lost(self) -> None:
        delayed, dead, bodies = self.raw.pipeline().zcard(DUE).xlen(DEAD).hlen(BODIES).execute()
        assert self.ground.open_jobs() + delayed + self.ended + self.dead == self.stored
        assert dead == self.dead
        assert delayed == bodies

    @invariant()
    def the_server_agrees_about_every_claim(self) -> None:
        certain = {key: fence for key, fence in self.valid.items() if key not in self.ripe}
        found = self.ground.owners(certain)
        assert {key: (owner.decode(), count) for key, (owner, count) in found.items()} == certain


@pytest.mark.timeout(1800 if os.environ.get("CRASH_LONG") else 400)
def test_verbs_in_any_order(redis_url, ground):
    sequences = 1000 if os.environ.get("CRASH_LONG") else max(30, examples(60))
    machine = type("Machine", (Verbs,), {"url": redis_url, "ground_of": type(ground), "total": Counter()})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=40,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
    # What was never tried was not tested.
    for ending in ENDINGS:
        assert machine.total[f"{ending} settled"] > 5 and machine.total[f"{ending} lost"] > 5, machine.total

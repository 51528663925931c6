"""The server dies, forgets, refuses, stalls and lies, and the network between does the same. Then all is as before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis

from tests.conftest import Server
from tests.crash.app import Gated, Work
from tests.crash.checker import Verdict
from tests.crash.clock import Clock
from tests.crash.ground import MODE, PARTITIONS, ground
from tests.crash.rig import Rig, fine

pytestmark = [pytest.mark.crash, pytest.mark.timeout(400)]


@asynccontextmanager
async def busy(rig: Rig, *, workers: int = 3, rate: float = 60) -> AsyncIterator[None]:
    """Workers that work and producers that produce, until the block is left."""
    for _ in range(workers):
        await rig.fleet.start()
    await rig.all_ready()
    stop = asyncio.Event()
    producing = asyncio.create_task(rig.produce(stop, rate))
    await rig.until(lambda: rig.done_lines() > 20, 30, "work being done")
    try:
        yield
        # Throughput is back without anybody's help.
        before = rig.done_lines()
        await rig.until(lambda: rig.done_lines() > before + 20, 45, "work being done again")
        # Not only something: as much as comes in, and what waited is made up for.
        await rig.until(lambda: rig.ground.backlog() < rate, 45, "the throughput of before")
    finally:
        stop.set()
        await producing


def nobody_restarted(rig: Rig, verdict: Verdict) -> None:
    assert [worker.code for worker in rig.fleet.workers] == [0] * len(rig.fleet.workers)
    assert verdict.done


async def test_killed_and_restarted_with_its_file(tmp_path):
    async with Rig(tmp_path, seed=20) as rig:
        async with busy(rig):
            for _ in range(3):
                await rig.restart_server()
                await asyncio.sleep(rig.random.uniform(0.2, 1.0))
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


async def test_an_outage_of_several_leases_ends_no_running_job(tmp_path):
    async with Rig(tmp_path, seed=21) as rig:
        for _ in range(3):
            await rig.fleet.start()
        await rig.all_ready()
        jobs = await rig.put(*(Gated(gate="g") for _ in range(6)))
        await rig.until(lambda: rig.running() == 6, 20, "running jobs")
        await rig.restart_server(3 * rig.lease)
        await rig.until(
            lambda: sum(len(worker.said("renewal_failed")) for worker in rig.fleet.workers), 20, "a renewal"
        )
        ready = time.monotonic()
        # Past the rest that everybody gets, the leases are alive again and nobody was taken for dead.
        await rig.until(lambda: time.monotonic() > ready + 3 * rig.lease, 20, "three leases")
        rig.open_gate("g")
        verdict = fine(await rig.finish(workers=3), rig.seed)
        assert verdict.starved or [rig.runs_of(job) for job in jobs] == [1] * 6
        nobody_restarted(rig, verdict)
    assert not verdict.duplicates


async def test_groups_and_keys_are_deleted_underneath(tmp_path):
    async with Rig(tmp_path, seed=22) as rig:
        async with busy(rig):
            keys, places = rig.ground.keys, rig.ground.places
            for place in places:
                rig.forget_group(place)
                await asyncio.sleep(0.3)
            rig.delete_keys(*places)
            await asyncio.sleep(0.5)
            rig.delete_keys(places[1], keys.due, keys.bodies, keys.meta)
        if PARTITIONS > 1:  # a key whose job was deleted is found when its next job waits
            await rig.put(*rig.next_in_lines())
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))
        if MODE == "stream":
            assert sum(len(worker.said("group_recreated")) for worker in rig.fleet.workers)


@pytest.mark.mode_free
async def test_it_forgets_everything(tmp_path):
    """FLUSHALL: what it held is gone, and everything enqueued after it is done."""
    async with Rig(tmp_path, seed=23) as rig:
        async with busy(rig):
            rig.flush()
        nobody_restarted(rig, fine(await rig.finish(look=True), rig.seed))


async def test_killed_and_restarted_with_nothing(tmp_path):
    """Without persistence: what it held is gone, everything enqueued after it is done, and no worker needs help."""
    async with Rig(tmp_path, seed=34, forgetful=True) as rig:
        async with busy(rig):
            for _ in range(2):
                await rig.restart_server(0.2)
                await asyncio.sleep(1.0)
        nobody_restarted(rig, fine(await rig.finish(look=True), rig.seed))


@pytest.mark.parametrize("ahead", [3600, -3600])
async def test_its_clock_jumps(tmp_path, ahead):
    """Who lives is not taken for dead, and who dies is: leases are counted on, whatever the clock shows."""
    async with Rig(tmp_path, seed=35, clock=(clock := Clock(tmp_path))) as rig:
        victim = await rig.fleet.start()
        doomed = await rig.put(*(Gated(gate="g") for _ in range(2)))
        await rig.until(lambda: all(map(rig.runs_of, doomed)), 20, "jobs of the victim")
        others = [await rig.fleet.start() for _ in range(2)]
        await rig.all_ready()  # whoever comes right after a leap cannot know of it
        rig.kill(victim)
        spared = await rig.put(*(Gated(gate="g") for _ in range(4)))
        await rig.until(lambda: all(map(rig.runs_of, spared)), 20, "jobs of those who live")
        clock.show(ahead)
        # A blocking read that waits by a clock that was put back ends by our own, 10 s later at most.
        # By each of them: a worker that has not looked at the clock in between sees no leap when it is put right again.
        await rig.until(lambda: all(each.said("server_clock_jumped") for each in others), 30, "the leap being noticed")
        await rig.until(lambda: all(rig.runs_of(job) == 2 for job in doomed), 30, "the rescue")
        await asyncio.sleep(2 * rig.lease)
        rig.open_gate("g")
        if ahead < 0:
            clock.show(0)  # or the dead worker's name and heartbeat, which end by that clock, would last for an hour
        verdict = fine(await rig.finish(look=True), rig.seed)
        assert verdict.starved or [rig.runs_of(job) for job in spared] == [1] * 4
    assert verdict.done == 6


async def test_connections_are_killed_and_scripts_forgotten(tmp_path):
    async with Rig(tmp_path, seed=24) as rig:
        async with busy(rig):
            for _ in range(25):
                began = time.monotonic()
                rig.raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                rig.raw.script_flush()
                rig.fault("client kill", began=began, tail=2 * rig.lease + 2)
                await asyncio.sleep(rig.random.uniform(0.0, 0.15))
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


@pytest.mark.mode_free
@pytest.mark.parametrize("mode", ["WRITE", "ALL"])
async def test_it_pauses_for_two_leases(tmp_path, mode):
    async with Rig(tmp_path, seed=25) as rig:
        async with busy(rig):
            began = time.monotonic()
            rig.raw.execute_command("CLIENT", "PAUSE", int(2000 * rig.lease), mode)
            await asyncio.sleep(2 * rig.lease)
            rig.fault("client pause", began=began, tail=2 * rig.lease + 6)
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


async def test_it_is_out_of_memory(tmp_path):
    """Finishing goes on, retries wait; nothing is dropped."""
    async with Rig(tmp_path, seed=26) as rig:
        async with busy(rig):
            began = time.monotonic()
            # In their handlers when the memory ends, and in want of a place for their retry after it.
            await rig.put(*(Work(seconds=0.5, fails=1) for _ in range(5)), *(Work(seconds=0.2) for _ in range(20)))
            rig.raw.config_set("maxmemory", 1)
            await rig.until(lambda: any(worker.said("settle_refused") for worker in rig.fleet.workers), 30, "a refusal")
            await rig.until(
                lambda: sum(map(rig.ground.length, rig.ground.places)) <= rig.running(), 30, "all else done"
            )
            rig.raw.config_set("maxmemory", 0)
            rig.fault("out of memory", began=began, tail=2 * rig.lease)
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


async def test_keys_of_a_wrong_type_stop_nobody_else(tmp_path):
    async with Rig(tmp_path, seed=27) as rig:
        worker = await rig.fleet.start()
        await rig.until(lambda: worker.said("worker_ready"), 20, "a worker")
        high, normal, *_ = rig.ground.places
        rig.raw.delete(high)
        rig.raw.set(high, "nothing that jobs lie in")
        await rig.put(*(Work() for _ in range(50)))
        await rig.until(lambda: rig.ground.length(normal) == 0, 20, "the other level being done")
        await rig.until(lambda: worker.said("key_unreadable"), 20, "a complaint")
        rig.raw.delete(high)
        await rig.put(*(Work() for _ in range(20)), priority="high")
        nobody_restarted(rig, fine(await rig.finish(timeout=90, workers=1), rig.seed))


async def test_it_becomes_a_replica_and_another_one_takes_over(tmp_path):
    """READONLY: the connections are given up, and the address leads elsewhere."""
    (tmp_path / "other").mkdir()
    other = await asyncio.to_thread(Server, tmp_path / "other", aof=True)
    try:
        async with Rig(tmp_path, seed=28, proxied=True) as rig:
            assert rig.proxy is not None
            workers = [await rig.fleet.start() for _ in range(2)]
            await rig.put(*(Work() for _ in range(20)))
            await rig.at_rest()
            rig.proxy.target = other.port
            rig.raw.replicaof("127.0.0.1", other.port)
            with redis.Redis.from_url(other.url, protocol=2, decode_responses=True) as client:
                there = ground(client)
                client.execute_command(*there.keys.adding("normal", b'{"id":"there","kind":"work","payload":{}}'))
                await rig.until(lambda: there.backlog() == 0, 30, "work at the new place")
            assert rig.runs_of("there") == 1
            for worker in workers:
                worker.terminate()
                assert await worker.wait() == 0
    finally:
        other.kill()


@pytest.mark.mode_free
async def test_it_cannot_save(tmp_path):
    """MISCONF: writes are refused until somebody makes room on the disk."""
    async with Rig(tmp_path, seed=29) as rig:
        async with busy(rig):
            began = time.monotonic()
            rig.fail_to_save()
            await rig.until(lambda: rig.refuses("MISCONF"), 20, "MISCONF")
            await asyncio.sleep(2 * rig.lease)
            rig.raw.config_set("stop-writes-on-bgsave-error", "no")
            rig.fault("misconf", began=began, tail=2 * rig.lease + 6)
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


@pytest.mark.mode_free
async def test_a_script_of_somebody_keeps_it_busy(tmp_path):
    async with Rig(tmp_path, seed=30) as rig:
        async with busy(rig):
            began = time.monotonic()
            rig.raw.config_set("busy-reply-threshold", 100)
            endless = asyncio.create_task(asyncio.to_thread(rig.endless_script))
            await rig.until(lambda: rig.refuses("BUSY"), 20, "BUSY")
            await asyncio.sleep(1.5 * rig.lease)
            rig.raw.script_kill()
            await endless
            rig.fault("busy", began=began, tail=2 * rig.lease + 6)
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))


@pytest.mark.mode_free
@pytest.mark.parametrize("change", ["permission", "password"])
async def test_a_refusal_for_good_ends_the_worker_with_78(tmp_path, change):
    async with Rig(tmp_path, seed=31) as rig:
        rig.raw.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
        url = rig.server.url.replace("//", "//w:p@")
        worker = await rig.fleet.start(url=url)
        rig.expected_codes = {78}
        (job,) = await rig.put(Gated(gate="g"))
        await rig.until(lambda: rig.runs_of(job) == 1, 20, "a running job")
        began = time.monotonic()
        if change == "permission":
            rig.raw.execute_command("ACL", "SETUSER", "w", f"-{rig.ground.taking}")
        else:
            rig.raw.execute_command("ACL", "SETUSER", "w", "resetpass", ">other")
            rig.raw.execute_command("CLIENT", "KILL", "USER", "w")
        await rig.until(lambda: worker.said("worker_refused"), 30, "giving up")
        assert worker.alive  # it drains first
        rig.open_gate("g")
        assert await worker.wait() == 78
        assert "extend the ACL" in worker.text or "check the user and password" in worker.text
        rig.fault("refusal", worker.name, began=began, tail=10)
        fine(await rig.finish(workers=1), rig.seed)


@pytest.mark.mode_free
async def test_refused_and_granted_again_is_only_a_pause(tmp_path):
    async with Rig(tmp_path, seed=32) as rig:
        rig.raw.execute_command("ACL", "SETUSER", "w", "on", ">p", "~*", "&*", "+@all")
        worker = await rig.fleet.start(url=rig.server.url.replace("//", "//w:p@"))
        await rig.until(lambda: worker.said("worker_ready"), 20, "a worker")
        rig.raw.execute_command("ACL", "SETUSER", "w", f"-{rig.ground.taking}")
        await rig.put(Work())
        await rig.until(lambda: worker.said("main_loop_error"), 20, "an error")
        rig.raw.execute_command("ACL", "SETUSER", "w", "+@all")
        nobody_restarted(rig, fine(await rig.finish(workers=1), rig.seed))


FAULTS = {"delay": 0.4, "truncate": 0.2, "drop": 0.1, "reset": 0.2}


@pytest.mark.parametrize("fault", [*FAULTS, "black hole", "reset all"])
async def test_the_network_between(tmp_path, fault):
    async with Rig(tmp_path, seed=33, proxied=True) as rig:
        proxy = rig.proxy
        assert proxy is not None
        async with busy(rig):
            began = time.monotonic()
            if fault == "reset all":
                for _ in range(20):
                    proxy.reset_all()
                    await asyncio.sleep(rig.random.uniform(0.0, 0.2))
            elif fault == "black hole":
                proxy.swallow()
                await asyncio.sleep(2 * rig.lease)
            else:
                setattr(proxy, fault, FAULTS[fault])
                await asyncio.sleep(4)
            proxy.calm()
            rig.fault(fault, began=began, tail=2 * rig.lease + 8)
        nobody_restarted(rig, fine(await rig.finish(), rig.seed))

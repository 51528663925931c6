"""``python -m tests.crash.mutants [NAME…]``: takes one safety out of a copy of the sources, and shows that the suite fails without it.

A suite that passes proves nothing unless it can fail. Each mutant is the checkout with one rule removed; the tests that
guard the rule run against it, after the same tests ran green against an unchanged copy. ``--whole`` runs all of the
suite on each mutant, which takes minutes a piece.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
LIMIT: Final = 900
"""Seconds one run may take; ``--whole`` twice as many."""


@dataclass(frozen=True)
class Mutant:
    """One rule less.

    Attributes:
        name: of the rule.
        mode: whose suite runs.
        without: what is gone, in words.
        edits: (file below ``streamworker/``, text that stands there once, what stands there instead).
        tests: what guards the rule.
    """

    name: str
    mode: str
    without: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


_LUA: Final = "broker/lua/"
_ZOMBIES: Final = (
    "test_model.py",
    "test_workers.py::test_a_zombie_wakes_among_its_successors",
    "test_workers.py::test_the_zombies_settle_is_refused",
)
_HELD: Final = "local function holds(member, wrapper)\n"

MUTANTS: Final = (
    Mutant(
        "fence",
        "stream",
        "done, park and bury ask nobody whether the claim still holds",
        (
            (
                _LUA + "done.lua",
                "if counts[id] == (same or tonumber(ARGV[i + 1])) then",
                "if true then",
            ),
            (
                _LUA + "park.lua",
                "if not pending or pending[2] ~= ARGV[i] or pending[4] ~= tonumber(ARGV[i + 2]) then",
                "if false then",
            ),
            (
                _LUA + "bury.lua",
                "if not pending or pending[2] ~= ARGV[i] or pending[4] ~= tonumber(ARGV[i + 2]) then",
                "if false then",
            ),
        ),
        _ZOMBIES,
    ),
    Mutant(
        "renewal",
        "stream",
        "a renewal is a plain XCLAIM, which takes the entry back from whoever rescued it",
        (
            (
                _LUA + "renew.lua",
                "if pending and pending[2] == ARGV[2] and pending[4] == tonumber(ARGV[i + 1]) then",
                "if true then",
            ),
        ),
        _ZOMBIES,
    ),
    Mutant(
        "nogroup",
        "stream",
        "a missing consumer group is not made again",
        (("broker/stream_claim.py", "if index > len(self._keys) and reaction is Reaction.HEAL:", "if index < 0:"),),
        ("test_model.py", "test_servers.py::test_groups_and_keys_are_deleted_underneath"),
    ),
    Mutant(
        "list fence",
        "list",
        "done, park and bury ask nobody whether the claim still holds",
        (
            (_LUA + "list_done.lua", "if gone == 1 then redis.call(", "gone = 1\n  if gone == 1 then redis.call("),
            (_LUA + "list_park.lua", _HELD, _HELD + "  if wrapper ~= '' then return true end\n"),
            (_LUA + "list_bury.lua", _HELD, _HELD + "  if wrapper ~= '' then return true end\n"),
        ),
        _ZOMBIES,
    ),
    Mutant(
        "order",
        "stream",
        "a job that is done keeps its order key",
        ((_LUA + "done_in_order.lua", "if orders[1] then pass_on(", "if false then pass_on("),),
        ("test_order.py",),
    ),
    Mutant(
        "list order",
        "list",
        "a job that is done keeps its order key",
        ((_LUA + "list_done_in_order.lua", "if orders[1] then pass_on(", "if false then pass_on("),),
        ("test_order.py",),
    ),
    Mutant(
        "share",
        "stream",
        "a tenant is served twice where the others are served once",
        ((_LUA + "prelude.lua", "start + 1 / (tonumber", "start + (fair == 'flood' and 0.5 or 1) / (tonumber"),),
        ("test_flow.py::test_workers_that_are_killed_keep_to_the_shares",),
    ),
    Mutant(
        "list share",
        "list",
        "a tenant whose last job has not ended starts now, as if it were idle",
        ((_LUA + "prelude.lua", "math.max(tonumber(told[1] or 0), tonumber(ends or 0))", "tonumber(told[1] or 0)"),),
        ("test_flow.py::test_workers_that_are_killed_keep_to_the_shares",),
    ),
    Mutant(
        "expiry",
        "stream",
        "a job that has expired starts",
        (
            (
                "execution.py",
                "return self.facts is not None and self.facts.expires is not None and monotonic()",
                "return False and monotonic()",
            ),
        ),
        ("test_flow.py::test_what_has_expired_while_workers_die_never_starts",),
    ),
    Mutant(
        "held key",
        "stream",
        "a job starts though another one has its key",
        (
            (
                _LUA + "unique.lua",
                "local earlier, word = redis.call('GET', KEYS[k]), 'new'",
                "local earlier, word = false, 'new'",
            ),
        ),
        ("test_flow.py::test_keys_that_are_held_until_their_jobs_are_done",),
    ),
    Mutant(
        "freed key",
        "list",
        "a job that has ended keeps its deduplication key",
        ((_LUA + "list_finish.lua", "if k > 0 then let_go(", "if false then let_go("),),
        ("test_flow.py::test_keys_that_are_held_until_their_jobs_are_done",),
    ),
    Mutant(
        "list renewal",
        "list",
        "a renewal writes a lease for a claim that somebody else took over",
        ((_LUA + "list_renew.lua", "if redis.call('ZSCORE', KEYS[1], member) then", "if true then"),),
        _ZOMBIES,
    ),
    Mutant(
        "step fence",
        "stream",
        "a step is recorded whichever run has the job by now",
        (
            (
                "postgres/steps.py",
                "    and hop = $3::text::bigint and deliveries = $4::text::integer and status = 'running'\n",
                "",
            ),
        ),
        ("../postgres/test_steps.py",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="mutants", description="Shows that the crash suite fails without each safety."
    )
    options.add_argument("names", nargs="*", metavar="NAME", help=", ".join(mutant.name for mutant in MUTANTS))
    options.add_argument("--whole", action="store_true", help="all of the suite on each mutant")
    chosen = options.parse_args(arguments)
    wanted = [mutant for mutant in MUTANTS if not chosen.names or mutant.name in chosen.names]
    if not wanted:
        options.error(f"there is no mutant of that name: {', '.join(mutant.name for mutant in MUTANTS)}")
    survivors = []
    place = Path(tempfile.mkdtemp(prefix="streamworker-mutants-"))
    for mode in dict.fromkeys(mutant.mode for mutant in wanted):
        tests = sorted({test for mutant in wanted if mutant.mode == mode for test in mutant.tests})
        code, seconds, output = _run(_copy(place / f"whole-{mode}"), mode, tests, LIMIT, all_of_them=True)
        print(f"unchanged, {mode} mode: {'passed' if code == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
        if code:
            print(f"{output[-4000:]}\nwhat it left is in {place}")
            return 1
    for mutant in wanted:
        root = _copy(place / mutant.name.replace(" ", "-"))
        for edit in mutant.edits:
            _mutate(root, *edit)
        tests = ["."] if chosen.whole else list(mutant.tests)
        code, seconds, output = _run(root, mutant.mode, tests, LIMIT * (1 + 2 * chosen.whole), all_of_them=chosen.whole)
        print(f"without {mutant.name!r} ({mutant.without}), {mutant.mode} mode, {seconds:.0f} s:")
        print(_told(output), flush=True)
        if code not in (1, 2) or not re.search(r"^FAILED ", output, re.MULTILINE):  # 2: it stopped at the first one
            survivors.append(mutant.name)
            print(output[-2000:] if code else "  every test passed", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    if survivors:
        print(f"mutants: the suite does not see what is missing: {', '.join(survivors)}")
        return 1
    print(f"mutants: {len(wanted)} of {len(wanted)} make the suite fail")
    return 0


def _copy(target: Path) -> Path:
    target.mkdir()
    for folder in ("streamworker", "tests", "migrations"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", target)
    (target / "examples" / "mailer").mkdir(parents=True)  # pytest's pythonpath names it
    return target


def _mutate(root: Path, file: str, old: str, new: str) -> None:
    path = root / "streamworker" / file
    text = path.read_text()
    if text.count(old) != 1:
        sys.exit(
            f"mutants: {file} holds {old!r} {text.count(old)} times: the sources have changed, change the mutant too"
        )
    path.write_text(text.replace(old, new))


def _run(root: Path, mode: str, tests: Sequence[str], limit: float, *, all_of_them: bool) -> tuple[int, float, str]:
    """(pytest's exit code, seconds, what it said); the copy's sources come before the installed ones."""
    environment = {**os.environ, "CRASH_MODE": mode, "PYTHONPATH": str(root)}
    # The model runs in both modes from one source; what it says of the other one is nobody's business here.
    chosen = ["--all", "-m", "crash or not crash", "-k", f"not test_verbs_in_any_order or {mode}"]
    house = ["-p", "no:cacheprovider", "-n", "2", "-q", "--tb=short", "--basetemp", str(root / "left")]
    house += [] if all_of_them else ["--maxfail=1"]  # one is enough
    files = [str(root / "tests" / "crash" / test) for test in tests]
    command = [sys.executable, "-m", "pytest", *chosen, *house, *files]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return -1, time.monotonic() - began, f"{output.decode(errors='replace')}\nit did not end in {limit:g} s"
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


def _told(output: str) -> str:
    """The tests that failed, each with the first words of why."""
    lines = re.findall(r"^(?:FAILED|ERROR) .*$", output, re.MULTILINE)
    reasons = re.findall(r"^E +((?:fence|lost|once|truth|limits|order|duplicate|rest|exit): .*)$", output, re.MULTILINE)
    return "\n".join(f"  {line[:240]}" for line in [*lines, *reasons[:3]]) or "  nothing failed"


if __name__ == "__main__":
    sys.exit(main())

"""Rows of checks beside each other (tools/check.py, ./dev check), and how they stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import eventually_blocking
from tools.check import Checks

PROGRAM = """
echo "this is $*"
case $1 in
poor) echo "not run: 1 skipped (needs Chromium: apt-get install chromium)"; echo "7 passed" ;;
shaky) [ -e shaky.begun ] || { echo >shaky.begun; exit 1; } ;;
broken) exit 1 ;;
long)
    trap 'echo cleaned up >long.end; exit 130' INT
    echo $$ >long.begun
    while :; do sleep 0.05; done ;;
after) until [ -e long.begun ]; do sleep 0.02; done; exit 3 ;;
esac
"""


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checks:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program").write_text(PROGRAM)
    return Checks(["sh", "program"], tmp_path)


def test_all_rows_run_to_their_end(checks: Checks, capfd: pytest.CaptureFixture[str]):
    assert checks.run([("one --with words", "two"), ("three",)]) == 0
    lines = capfd.readouterr().out.splitlines()
    for check in ("one --with words", "two", "three"):
        at = lines.index(f"=== ci: {check}")
        assert lines[at + 1] == f"this is {check}"
        assert lines[at + 2].startswith(f"=== ci: {check} passed in ")
    assert lines[-1].startswith("=== ci: 3 checks passed in ")


def test_what_was_not_run_stands_at_the_end(checks: Checks, capfd: pytest.CaptureFixture[str]):
    assert checks.run([("poor", "two")]) == 0
    line = "=== ci: poor: not run: 1 skipped (needs Chromium: apt-get install chromium)"
    assert capfd.readouterr().out.splitlines()[-2] == line


def test_the_first_that_fails_is_named_and_ends_the_others(checks: Checks, capfd: pytest.CaptureFixture[str]):
    assert checks.run([("long", "never"), ("good", "after --hard", "never")]) == 1
    assert Path("long.end").read_text() == "cleaned up\n"
    out = capfd.readouterr().out
    assert "=== ci: after --hard FAILED (exit 3); repeat it with: ./dev after --hard" in out
    assert out.count("FAILED") == 1
    assert "never" not in out
    assert out.splitlines()[-1].startswith("=== ci: stopped after ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_it_ends_what_it_started(checks: Checks, number: signal.Signals):
    program = (
        "import signal, sys; from pathlib import Path; from tools.check import Checks\n"
        # Of both: shells ignore SIGINT for what they run in the background, and that is inherited.
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.default_int_handler)\n"
        "sys.exit(Checks(['sh', 'program'], Path()).run([('long', 'never')]))"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        eventually_blocking(Path("long.begun").exists)
        process.send_signal(number)
        assert process.wait(30) == 1
    assert Path("long.end").read_text() == "cleaned up\n"


def test_what_may_fail_once_is_named_and_run_again(tmp_path: Path, checks: Checks, capfd: pytest.CaptureFixture[str]):
    checks = Checks(["sh", "program"], tmp_path, {"shaky": "shaky --last-failed", "broken": "broken --last-failed"})
    assert checks.run([("shaky --all", "two")]) == 0
    out = capfd.readouterr().out
    assert "=== ci: shaky --all failed once (exit 1), and what failed is run again; it ran" in out
    assert "this is shaky --last-failed" in out and "this is two" in out
    assert checks.run([("broken --all", "never")]) == 1
    out = capfd.readouterr().out
    assert "=== ci: broken --last-failed FAILED (exit 1)" in out and "never" not in out

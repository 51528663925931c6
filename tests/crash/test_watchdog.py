"""A test that hangs beyond every timeout ends, and says where."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.crash.fleet import ROOT
from tests.crash.watchdog import CODE

pytestmark = [pytest.mark.crash, pytest.mark.mode_free]

HANGS = """
import asyncio
from tests.crash.watchdog import watchdog

async def deaf():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def main():
    asyncio.create_task(deaf())

with watchdog(0.5, "this test"):
    asyncio.run(main())
"""


def test_what_no_cancellation_ends_is_ended():
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == CODE
    assert "this test hangs" in done.stderr and "in deaf" in done.stderr and "Current thread" in done.stderr

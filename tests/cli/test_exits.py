"""What a handler's tasks and callbacks raise to end the program ends no worker."""

from __future__ import annotations

import json
import signal

import pytest

from tests.conftest import eventually_blocking

APP = """
import asyncio, os, sys
from streamworker import App, Backoff, Context, Payload

app = App()

class Leave(Payload, kind="leave", queue="notes"):
    how: str

async def leaving(how):
    if how == "interrupt":
        raise KeyboardInterrupt
    sys.exit(3)

@app.handler(max_attempts=1)
async def leave(payload: Leave, ctx: Context) -> None:
    match payload.how:
        case "task" | "interrupt":
            await asyncio.create_task(leaving(payload.how))
        case "group":
            async with asyncio.TaskGroup() as group:
                group.create_task(leaving("group"))
        case "orphan":
            asyncio.get_running_loop().leaving = asyncio.create_task(leaving("orphan"))
        case "callback":
            asyncio.get_running_loop().call_soon(sys.exit, 3)
            await asyncio.sleep(0.05)
        case "direct":
            sys.exit(3)
        case "fine":
            hook = sys.get_asyncgen_hooks().firstiter
            with open(os.environ["SEEN"], "a") as file:
                file.write(type(getattr(hook, "__self__", None)).__name__ + "\\n")
"""
WAYS = ["task", "interrupt", "group", "orphan", "callback", "direct"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_exits_out_of_handlers_end_no_worker(sw, project, ground, raw, tmp_path, loop):
    (project / "exits.py").write_text(APP)
    seen = tmp_path / "seen"
    worker = sw.start("worker", "exits:app", SEEN=str(seen), STREAMWORKER_LOOP=loop)
    eventually_blocking(lambda: worker.saw("worker_ready"))
    for way in WAYS:
        for how in (way, "fine"):
            ground.push(json.dumps({"id": f"{way} {how}", "kind": "leave", "payload": {"how": how}}), queue="notes")
    eventually_blocking(lambda: seen.exists() and len(seen.read_text().split()) == len(WAYS), 30)
    # With the hooks of its jobs' generators, which a loop that begins anew forgets.
    assert set(seen.read_text().split()) == {"AsyncGenerators"}
    # uvloop takes several in one turn of the loop for one.
    eventually_blocking(lambda: worker.saw("exit_ignored"), 20)
    eventually_blocking(lambda: raw.xlen("stream:{notes}:dead") >= 4, 20)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert not raw.xlen("stream:{notes}")

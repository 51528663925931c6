"""``streamworker jobs output``: what a job emits, as people and programs read it."""

from __future__ import annotations

import base64
import json

from tests.cli.conftest import document
from tests.conftest import eventually_blocking

JOBS = """
from pathlib import Path
import anyio
from streamworker import App, Context, Payload

class Talk(Payload, kind="talk", queue="q"):
    gate: str

app = App()

@app.handler
async def talk(payload: Talk, ctx: Context) -> None:
    for chunk in ("how ", "are\\n", b"y\\xffou\\n", {"to": "day"}, "\\x1b[31m?\\n"):
        await ctx.emit(chunk)
    while not Path(payload.gate).exists():
        await anyio.sleep(0.01)
    await ctx.emit("end\\n")
"""


def test_output_is_printed_and_followed_to_the_end(sw, ground, raw):
    gate = sw.directory / "gate"
    (sw.directory / "talk.py").write_text(JOBS)
    body = document("talk", gate=str(gate))
    job_id = json.loads(body)["id"]
    assert sw.ok("jobs", "output", job_id, "--queue", "q").stdout == ""
    following = sw.piped("jobs", "output", job_id, "--queue", "q", "--follow")  # before the job is there
    ground.push(body, queue="q")
    worker = sw.start("worker", "talk:app")
    eventually_blocking(lambda: raw.xlen(f"stream:{{q}}:output:{job_id}"))
    so_far = sw.ok("jobs", "output", job_id, "--queue", "q").stdout
    assert so_far == 'how are\ny\\xffou\n{"to":"day"}\n\\x1b[31m?\n'
    rows = sw.ok("jobs", "output", job_id, "--queue", "q", "--json").rows
    assert [row["chunk"] for row in rows][:2] == ["how ", "are\n"]
    assert (base64.b64decode(rows[2]["chunk"]), rows[2]["encoding"]) == (b"y\xffou\n", "base64")
    gate.touch()
    assert following.wait(20) == 0
    assert following.stdout.read() == so_far + "end\n"
    last = sw.ok("jobs", "output", job_id, "--queue", "q", "--after", rows[-1]["position"]).stdout
    assert last == "end\n"
    assert worker.stop() == 0


def test_what_cannot_be_found_is_one_sentence(sw):
    assert "queue" in sw("jobs", "output", "nothing").sentence
    assert "position" in sw("jobs", "output", "nothing", "--queue", "q", "--after", "-1").sentence

"""The last step of docs/tutorial.md: its container, built from the page's own files and run beside the fleet."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Final

from tests.containers.engine import inspect, run, until
from tests.containers.stage import Findings, Stage
from tests.examples.test_tutorial import BLOCK, TUTORIAL

IMAGE: Final = "streamworker:check-tutorial"
WHEELS: Final = "streamworker:check-wheels"
BASE: Final = "FROM python:3.13-slim\n"
WELCOMED: Final = {"to": "eve@example.org", "name": "Eve"}


def build(directory: Path) -> None:
    """The image, from the last version of each file. streamworker is on no index: its base has this checkout's wheel."""
    files = {word: body for _, word, body in BLOCK.findall(TUTORIAL.read_text()) if "." in word or word == "Dockerfile"}
    assert BASE in files["Dockerfile"]
    files["Dockerfile"] = files["Dockerfile"].replace(BASE, f"FROM {WHEELS}\n")
    for name, body in files.items():
        (directory / name).write_text(body)
    run("docker", "build", "--quiet", "--tag", WHEELS, "--target", "build", ".")
    run("docker", "build", "--quiet", "--tag", IMAGE, str(directory))


def tutorial(stage: Stage, findings: Findings) -> None:
    """Its commands, on the servers of the fleet and in databases of their own."""
    compose = stage.compose
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        compose.sql("create database hello")
        compose.sql((Path(directory) / "tables.sql").read_text(), database="hello")
    name = f"{compose.name}-hello"
    redis, postgres = (compose.settings[f"{server}_PASSWORD"] for server in ("REDIS", "POSTGRES"))
    common = (
        "docker", "run", "--env", f"REDIS_URL=redis://:{redis}@redis:6379/1",
        "--env", f"DATABASE_URL=postgresql://streamworker:{postgres}@postgres:5432/hello",
        # The page's mail server is on the machine itself; here that is the mail catcher's.
        "--network", f"container:{compose.name}-mailbox-1", "--env", "SMTP_PORT=1025",
    )  # fmt: skip
    run(*common, "--rm", IMAGE, "streamworker", "migrate")
    run(*common, "--name", name, "--detach", IMAGE)
    try:
        said = run(*common, "--rm", IMAGE, "streamworker", "enqueue", "welcome.send", json.dumps(WELCOMED), "--json")
        job = json.loads(said)["id"]
        until(lambda: job in stage.mails(), 180, "the tutorial's mail arrives")
        welcomed = until(lambda: compose.sql("select address from welcomed", database="hello"), 180, "it is recorded")
        run("docker", "stop", name)
        (ended,) = inspect(name)
    finally:
        run("docker", "rm", "--force", name)
    findings.holds(
        "the tutorial's container: migrates, sends its mail, records it, and ends with 0 when it is stopped",
        welcomed == [[WELCOMED["to"]]] and ended.exit_code == 0 and ended.user == "10001",
        (welcomed, ended),
    )

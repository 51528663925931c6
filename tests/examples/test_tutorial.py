"""docs/tutorial.md, run from top to bottom in an empty directory: its files, its commands, what it says they print.

It needs what `./dev` has installed and nothing more: no network, no container engine, no free port that is known before.
`./dev containers` builds the page's container and runs it.

The word after a block's language says what it is: a file's name, ``run`` (must succeed), ``fails`` (must not), ``setting``
(variables for all that follows); without a word it is for readers. A ``text`` block names lines that the commands before it
print, in that order.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from streamworker import embedded
from tests import forkserver

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVER = """
import asyncio
from aiosmtpd.smtp import SMTP
class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("nobody"):
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"
    async def handle_DATA(self, server, session, envelope):
        print(*envelope.rcpt_tos, flush=True)
        return "250 OK"
async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(Handler(), loop=loop), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def mail_server() -> Iterator[tuple[int, list[str]]]:
    """A port, and who got mail: complete once the server has ended."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port, mails = int(process.stdout.readline()), []
        reader = threading.Thread(target=lambda: mails.extend(process.stdout.read().split()))
        reader.start()
        try:
            yield port, mails
        finally:
            process.kill()
            reader.join()


# The first block starts the embedded servers with each of its commands and stops them again; then they stay, which saves
# two seconds each.
@pytest.mark.all
@pytest.mark.timeout(900)
def test_the_tutorial_does_what_it_says(tmp_path: Path, pytestconfig: pytest.Config):
    home = tmp_path / "hello"
    home.mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("STREAMWORKER_", "REDIS_", "DATABASE_", "PYTEST_"))
    }
    # With --all each command is a Python of its own the first time; a second one shows no more than a fork.
    programs = forkserver.programs(tmp_path / "bin", fresh_first=pytestconfig.option.run_all)
    environment |= {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), environment["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    with mail_server() as (port, mails):
        environment["SMTP_PORT"] = str(port)
        assert follow(home, environment) >= 8
        the_container_holds_what_it_says(home, environment)
    assert mails.count("ann@example.org") == 1 and mails.count("ben@example.org") == 1
    assert "cat@example.org" in mails and 1 <= mails.count("dan@example.org") <= 3 and "nobody@example.org" not in mails


def follow(home: Path, environment: dict[str, str]) -> int:
    """Do what the page says in an empty directory; how many commands that were."""
    with ExitStack() as stack:
        return _follow(home, environment, lambda: stack.enter_context(embedded.acquire(home / ".streamworker")))


def _follow(home: Path, environment: dict[str, str], stay: Callable[[], object]) -> int:
    said = ""
    ran = 0
    for language, word, body in BLOCK.findall(TUTORIAL.read_text()):
        if word == "setting":
            environment |= dict(re.findall(r"^export (\w+)=(\S+)", body, re.MULTILINE))
        elif word in ("run", "fails"):
            shell = "set -e\n" + body
            done = subprocess.run(
                ["bash", "-c", shell], cwd=home, env=environment, capture_output=True, text=True, timeout=240
            )
            said = done.stdout + done.stderr
            assert (done.returncode == 0) == (word == "run"), f"{body}\n{said}"
            assert "Traceback" not in said, said
            ran += 1
            if ran == 1:
                stay()
        elif word:
            (home / word).write_text(body)
        elif language == "text":
            at = 0
            for line in body.splitlines():
                assert line in said[at:], f"{line!r} is not in what was said:\n{said}"
                at = said.index(line, at) + len(line)
    return ran


def the_container_holds_what_it_says(home: Path, environment: dict[str, str]) -> None:
    """Without an engine: what is copied is there, and the command, as process of its own, ends well on SIGTERM."""
    dockerfile = (home / "Dockerfile").read_text()
    for name in re.findall(r"^COPY (\S+) /app/$", dockerfile, re.MULTILINE):
        assert (home / name).is_file()
    command = json.loads(re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)[0])
    with subprocess.Popen(
        command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if "worker_ready" in line:
                break
        worker.send_signal(signal.SIGTERM)
        worker.stdout.read()
    assert worker.returncode == 0

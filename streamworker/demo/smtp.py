"""The SMTP server of the demo, in a process of its own: it counts what arrives and knows nothing of jobs.

The process prints its port, then answers one line of JSON for every line on its standard input: ``total`` or
``recipients``. It ends when its standard input does, and so with its parent.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import anyio
import anyio.abc
import msgspec
import uvloop
from anyio.streams.buffered import BufferedByteReceiveStream

from streamworker.errors import StreamworkerError

LATENCY: Final = 0.01
"""Seconds the server takes to accept a message. A provider on the internet takes longer; none takes nothing."""
_LONGEST_LINE: Final = 1 << 28
_ANSWER_WITHIN: Final = 30.0


class Mailbox:
    """The SMTP server, as the demo sees it; a context manager that starts and ends the process.

    Args:
        log: file for what the process has to say.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = anyio.Lock()
        self._stack = AsyncExitStack()
        self.port = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._process = await start(stack, __name__, log=self._log)
            if self._process.stdout is None:
                raise AssertionError("the process was started with a pipe")
            self._lines = BufferedByteReceiveStream(self._process.stdout)
            self.port = int(await self._line())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def total(self) -> int:
        """How many messages arrived.

        Raises:
            StreamworkerError: the server does not answer.
        """
        return int(await self._ask("total"))

    async def recipients(self) -> dict[str, int]:
        """How many messages arrived for each recipient.

        Raises:
            StreamworkerError: the server does not answer.
        """
        return msgspec.json.decode(await self._ask("recipients"), type=dict[str, int])

    async def _ask(self, question: str) -> bytes:
        if self._process.stdin is None:
            raise AssertionError("the process was started with a pipe")
        answer = b""
        # Not cancelled halfway, or the next question would get this one's answer.
        async with self._lock:
            with anyio.CancelScope(shield=True):
                try:
                    await self._process.stdin.send(question.encode() + b"\n")
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    raise StreamworkerError("the demo's SMTP server is gone: run the demo again") from None
                answer = await self._line()
        return answer

    async def _line(self) -> bytes:
        try:
            with anyio.fail_after(_ANSWER_WITHIN):
                return await self._lines.receive_until(b"\n", _LONGEST_LINE)
        except (anyio.IncompleteRead, anyio.ClosedResourceError, TimeoutError):
            raise StreamworkerError("the demo's SMTP server does not answer: run the demo again") from None


class MailCounter:
    """Takes every message and counts it, by recipient."""

    def __init__(self) -> None:
        self.total = 0
        self.recipients: Counter[str] = Counter()

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's word
        """A message is complete; from here on it has arrived, whatever becomes of its sender."""
        self.total += 1
        self.recipients.update(envelope.rcpt_tos)
        await asyncio.sleep(LATENCY)
        return "250 OK"


async def serve() -> None:
    """Be the server process, until standard input ends."""
    from aiosmtpd.smtp import SMTP  # noqa: PLC0415 - the demo imports this module too, and needs no server

    loop = asyncio.get_running_loop()
    counting = MailCounter()
    listening = await loop.create_server(
        lambda: SMTP(counting, hostname="localhost", ident="streamworker demo", loop=loop), "127.0.0.1", 0
    )
    _say(listening.sockets[0].getsockname()[1])
    questions = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    while question := await questions.readline():
        _say(counting.total if question.strip() == b"total" else dict(counting.recipients))


def _say(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(serve())


async def start(
    stack: AsyncExitStack, module: str, *, log: Path, env: Mapping[str, str] | None = None
) -> anyio.abc.Process:
    """Start ``python -m module`` with pipes for standard input and output; killed when ``stack`` is left.

    In a session of its own, so that a Ctrl-C in the terminal reaches the demo alone, which ends its children in order.

    Args:
        stack: ends the process.
        module: of ours.
        log: file its standard error is added to.
        env: goes over the environment.
    """
    with log.open("ab") as errors:
        process = await anyio.open_process(
            # -P: a file email.py in the working directory must not become the standard library's.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment(os.environ), **(env or {})},
            start_new_session=True,
        )
    stack.push_async_callback(end, process)
    return process


async def end(process: anyio.abc.Process) -> None:
    """Kill a process if it still runs, and wait for its end."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.kill()
        await process.aclose()


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: the user's without what configures streamworker, and with our module path."""
    ours = ("STREAMWORKER_", "REDIS_URL", "DATABASE_URL", "PYTHONPATH")
    kept = {name: value for name, value in env.items() if not name.startswith(ours)}
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

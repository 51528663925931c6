"""The Lua scripts: run by digest, loaded again when the server does not know them (any more)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, Protocol

from redis.exceptions import NoScriptError

Arg = str | bytes | int | float


_LUA: Final = files("streamworker.broker").joinpath("lua")
_PRELUDE: Final[list[tuple[str, str]]] = re.findall(
    r"^(local function (\w+)\(.*(?:\n  .*|\n)*?(?:\nend| end)$)",
    _LUA.joinpath("prelude.lua").read_text("utf-8"), re.MULTILINE,
)  # fmt: skip
"""(text, name) of the functions that scripts share."""


def _with_prelude(text: str) -> str:
    """A script behind the functions of the prelude that it calls, and those that these call."""
    for function, name in reversed(_PRELUDE):
        if re.search(rf"(?<![\w.]){name}\(", text):
            text = f"{function}\n{text}"
    return text


class AsyncCaller(Protocol):
    """The part of an async client that runs a script."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command and return its raw reply."""


class Script:
    """One Lua file: one atomic move. Its header declares KEYS, ARGV and the reply."""

    def __init__(self, name: str) -> None:
        self.name: Final = name
        self.text: Final = _with_prelude(_LUA.joinpath(f"{name}.lua").read_text("utf-8"))
        self.sha: Final = sha1(self.text.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA asks for

    async def __call__(self, client: AsyncCaller, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run the script. NOSCRIPT (restart, failover, SCRIPT FLUSH) means nothing ran, so sending it again is safe."""
        try:
            return await client.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await client.execute_command("EVAL", self.text, len(keys), *keys, *args)

    def blocking(self, call: Callable[..., Any], keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run the script with a synchronous client's ``execute_command``, for the lease thread."""
        try:
            return call("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return call("EVAL", self.text, len(keys), *keys, *args)


BEAT: Final = Script("beat")
BRIDGE: Final = Script("bridge")
BURY: Final = Script("bury")
CANCEL: Final = Script("cancel")
CANCELS: Final = Script("cancels")
CLAIM: Final = Script("claim")
CONFIRM: Final = Script("confirm")
CRON: Final = Script("cron")
DEPTH: Final = Script("depth")
DISPATCH: Final = Script("dispatch")
DONE: Final = Script("done")
FINISH: Final = Script("finish")
FLOW: Final = Script("flow")
GROUPS: Final = Script("groups")
HOLD: Final = Script("hold")
KEEP: Final = Script("keep")
LEASE: Final = Script("lease")
LEAVE: Final = Script("leave")
LIMIT: Final = Script("limit")
LIST_BURY: Final = Script("list_bury")
LIST_CONFIRM: Final = Script("list_confirm")
LIST_DEPTH: Final = Script("list_depth")
LIST_DONE: Final = Script("list_done")
LIST_FINISH: Final = Script("list_finish")
LIST_KEEP: Final = Script("list_keep")
LIST_OVERDUE: Final = Script("list_overdue")
LIST_PARK: Final = Script("list_park")
LIST_RENEW: Final = Script("list_renew")
LIST_RETURN: Final = Script("list_return")
LIST_TAKE: Final = Script("list_take")
PARK: Final = Script("park")
PAUSE: Final = Script("pause")
PENDING: Final = Script("pending")
PROGRESS: Final = Script("progress")
PROMOTE: Final = Script("promote")
PUBLISH: Final = Script("publish")
PURGE: Final = Script("purge")
PULSE: Final = Script("pulse")
RENEW: Final = Script("renew")
REPLAY: Final = Script("replay")
RETAIN: Final = Script("retain")
SECRET: Final = Script("secret")
STORE: Final = Script("store")
OWN_PENDING: Final = Script("own_pending")
RECLAIM: Final = Script("reclaim")
TELL: Final = Script("tell")
UNPARK: Final = Script("unpark")
ERASE: Final = Script("erase")
CLOCK: Final = Script("clock")
WAIT: Final = Script("wait")

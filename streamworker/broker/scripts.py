"""The Lua scripts: run by digest, loaded again when the server does not know them (any more)."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
        # Most scripts call few of them, and to look for a text is a tenth of a regular expression.
        if f"{name}(" in text and re.search(rf"(?<![\w.]){name}\(", text):
            text = f"{function}\n{text}"
    return text


class AsyncCaller(Protocol):
    """The part of an async client that runs a script."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command and return its raw reply."""


class LuaScript:
    """One Lua file: one atomic move. Its header declares KEYS, ARGV and the reply."""

    def __init__(self, name: str, inner: str = "") -> None:
        self.name: Final = name
        text = _LUA.joinpath(f"{name}.lua").read_text("utf-8")
        if inner:  # another script, which this one calls as a function
            text = f"local function inner(KEYS, ARGV)\n{_LUA.joinpath(f'{inner}.lua').read_text('utf-8')}end\n{text}"
        self.text: Final = _with_prelude(text)
        self.sha: Final = sha1(self.text.encode(), usedforsecurity=False).hexdigest()  # what EVALSHA asks for

    async def __call__(self, client: AsyncCaller, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run the script. NOSCRIPT (restart, failover, SCRIPT FLUSH) means nothing ran, so sending it again is safe."""
        try:
            return await client.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await client.execute_command("EVAL", self.text, len(keys), *keys, *args)


ARRIVE: Final = LuaScript("arrive")
BEAT: Final = LuaScript("beat")
BEGIN: Final = LuaScript("begin")
BRIDGE: Final = LuaScript("bridge")
BURY: Final = LuaScript("bury")
CANCEL: Final = LuaScript("cancel")
CANCELS: Final = LuaScript("cancels")
CHANGE: Final = LuaScript("change")
CLAIM: Final = LuaScript("claim")
CONFIRM: Final = LuaScript("confirm")
CRON: Final = LuaScript("cron")
DEAD_ERRORS: Final = LuaScript("dead_errors")
DEPTH: Final = LuaScript("depth")
DEPART: Final = LuaScript("depart")
DISPATCH: Final = LuaScript("dispatch")
DISPOSE: Final = LuaScript("dispose")
DONE: Final = LuaScript("done")
DONE_IN_ORDER: Final = LuaScript("done_in_order", inner="done")
EMIT: Final = LuaScript("emit")
FAIR_CLAIM: Final = LuaScript("fair_claim", inner="claim")
FAIR_TAKE: Final = LuaScript("fair_take", inner="list_take")
FINISH: Final = LuaScript("finish")
FLOW: Final = LuaScript("flow")
GROUPS: Final = LuaScript("groups")
HISTORY: Final = LuaScript("history")
HOLD: Final = LuaScript("hold")
KEEP: Final = LuaScript("keep")
LEASE: Final = LuaScript("lease")
LEAVE: Final = LuaScript("leave")
LIMIT: Final = LuaScript("limit")
LIST_BURY: Final = LuaScript("list_bury")
LIST_CONFIRM: Final = LuaScript("list_confirm")
LIST_DEPTH: Final = LuaScript("list_depth")
LIST_DONE: Final = LuaScript("list_done")
LIST_DONE_IN_ORDER: Final = LuaScript("list_done_in_order", inner="list_done")
LIST_EMIT: Final = LuaScript("list_emit")
LIST_FINISH: Final = LuaScript("list_finish")
LIST_KEEP: Final = LuaScript("list_keep")
LIST_OVERDUE: Final = LuaScript("list_overdue")
LIST_PARK: Final = LuaScript("list_park")
LIST_RENEW: Final = LuaScript("list_renew")
LIST_RETURN: Final = LuaScript("list_return")
LIST_TAKE: Final = LuaScript("list_take")
PARK: Final = LuaScript("park")
PAUSE: Final = LuaScript("pause")
PENDING: Final = LuaScript("pending")
PROGRESS: Final = LuaScript("progress")
PROMOTE: Final = LuaScript("promote")
PUBLISH: Final = LuaScript("publish")
PULL: Final = LuaScript("pull")
PURGE: Final = LuaScript("purge")
PULSE: Final = LuaScript("pulse")
RENEW: Final = LuaScript("renew")
REMOVE: Final = LuaScript("remove")
REPLAY: Final = LuaScript("replay")
RETAIN: Final = LuaScript("retain")
RETAIN_ALL: Final = LuaScript("retain_all")
SCHEDULE_DUE: Final = LuaScript("schedule_due")
SCHEDULE_FORGET: Final = LuaScript("schedule_forget")
SCHEDULE_PUT: Final = LuaScript("schedule_put")
SCHEDULE_TICK: Final = LuaScript("schedule_tick")
SECRET: Final = LuaScript("secret")
STORE: Final = LuaScript("store")
OWN_PENDING: Final = LuaScript("own_pending")
RECLAIM: Final = LuaScript("reclaim")
RESIZE: Final = LuaScript("resize")
STAY: Final = LuaScript("stay")
SWEEP: Final = LuaScript("sweep")
TELL: Final = LuaScript("tell")
UNIQUE: Final = LuaScript("unique")
UNPARK: Final = LuaScript("unpark")
ERASE: Final = LuaScript("erase")
CLOCK: Final = LuaScript("clock")
WAIT: Final = LuaScript("wait")

"""What addresses and forms say, read strictly: anybody may have written them."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request

from streamworker.errors import LONGEST_WAIT, UsageError
from streamworker.job import LEVELS, Level
from streamworker.operators import JobChange
from streamworker.settings.rules import QUEUE_NAME
from streamworker.views.listing import Selection

MOST_FIELDS: Final = 2000
MOST_LETTERS: Final = 500
MOST_RATE: Final = 100_000.0


class FormRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a listing says of one of its rows, and the fence of what is done to it."""

    queue: str
    handle: str
    level: Level = "normal"
    worker: str = ""
    deliveries: int = 0


class Form:
    """A form, or the query of an address."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs

    @classmethod
    async def of(cls, request: Request) -> Form:
        """The posted form.

        Raises:
            UsageError: it is none.
        """
        try:
            body = (await request.body()).decode()
            return cls(parse_qsl(body, keep_blank_values=True, max_num_fields=MOST_FIELDS))
        except ValueError:
            raise UsageError("this form cannot be read: load the page anew") from None

    def text(self, name: str) -> str | None:
        """A field; ``None`` if it is empty or not there."""
        for key, value in self._pairs:
            if key == name and value.strip():
                if len(value) > MOST_LETTERS or any(not letter.isprintable() for letter in value):
                    raise UsageError(f"{name} has to be up to {MOST_LETTERS} printable characters")
                return value.strip()
        return None

    def flag(self, name: str) -> bool:
        """Whether a box was ticked."""
        return self.text(name) is not None

    def queue(self, name: str = "queue") -> str | None:
        """The name of a queue."""
        text = self.text(name)
        if text is not None and not QUEUE_NAME.fullmatch(text):
            raise UsageError(f"{name} is no name of a queue: use 1 to 100 of A-Z a-z 0-9 . _ : -")
        return text

    def must(self, name: str) -> str:
        """A field that has to be there."""
        text = self.text(name)
        if text is None:
            raise UsageError(f"{name} is missing")
        return text

    def number(self, name: str, most: float = LONGEST_WAIT) -> float | None:
        """A number from 0 up."""
        text = self.text(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise UsageError(f"{name} has to be a number from 0 to {most:,.0f}")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        """A JSON object; it may be longer than other fields."""
        text = next((value for key, value in self._pairs if key == name and value.strip()), None)
        if text is None:
            return None
        try:
            return msgspec.json.decode(text.encode(), type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
            raise UsageError(f"{name} has to be a JSON object: {error}") from None

    def change(self) -> JobChange:
        """What is to be different about jobs that wait."""
        word = self.text("level")
        change = JobChange(
            delay=self.number("in"), queue=self.queue("to"), payload=self.object("payload"), fields=self.object("set"),
            level=next((each for each in LEVELS if each == word), None),
        )  # fmt: skip
        change.check()
        return change

    def rows(self) -> list[FormRow]:
        """The rows that were ticked."""
        try:
            found = [msgspec.json.decode(value, type=FormRow) for name, value in self._pairs if name == "row"]
        except (msgspec.DecodeError, RecursionError):
            raise UsageError("a row cannot be read: load the page anew") from None
        for row in found:
            if not QUEUE_NAME.fullmatch(row.queue):
                raise UsageError("a row names no queue: load the page anew")
        return found

    def selection(self) -> Selection:
        """What a listing was asked for."""
        return Selection(
            queue=self.queue(),
            worker=self.text("worker"),
            min_idle=self.number("idle") or 0.0,
            kind=self.text("kind"),
            reason=self.text("reason"),
            group=self.text("group"),
            text=self.text("search"),
        )


def query(request: Request) -> Form:
    """The query of an address."""
    return Form(request.query_params.multi_items())

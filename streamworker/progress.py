"""How far a running job has come, as its handler says."""

from __future__ import annotations

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """A handler's word.

    Attributes:
        done: how much of it is done.
        total: of how much; ``None`` if nobody knows.
        note: what it is doing.
        at: when it said so, in epoch seconds.
    """

    done: float
    total: float | None
    note: str
    at: float

    @property
    def text(self) -> str:
        """For people: ``37 of 100 (37 %) reading``."""
        parts = [f"{self.done:g}"]
        if self.total is not None:
            parts.append(f"of {self.total:g}")
            if self.total > 0:
                parts.append(f"({100 * self.done / self.total:.0f} %)")
        return " ".join([*parts, *([self.note] if self.note else [])])


_decoder = msgspec.json.Decoder(Progress)


def read(told: bytes | None) -> Progress | None:
    """What was written of it; ``None`` for anything else."""
    try:
        return None if told is None else _decoder.decode(told)
    except msgspec.MsgspecError:
        return None

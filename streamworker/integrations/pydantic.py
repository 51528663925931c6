"""Payloads that are pydantic models (``pip install 'streamworker[pydantic]'``)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec
from pydantic import BaseModel, ValidationError

from streamworker.payload import Fit, PayloadBase

_json: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class PydanticPayload(PayloadBase, BaseModel):
    """Base of models that are payloads: ``class Send(PydanticPayload, kind="...", queue="...")``.

    The class keywords, and the checks at enqueue and in workers, are those of `streamworker.Payload`. A model is
    written with its aliases, and read by its validators: what they refuse is refused at enqueue.
    """

    @classmethod
    def payload_fields(cls) -> Collection[str]:
        """The names of its fields."""
        return list(cls.model_fields)

    @classmethod
    def payload_fit(cls) -> Fit:
        """As pydantic writes and reads it."""
        return Fit(_decoder(cls), finite=False, compares=True, encode=_encode)

    def payload_builtins(self) -> Any:
        """Its fields in dicts and lists."""
        return self.model_dump()


def _encode(payload: PydanticPayload) -> bytes:
    # No warnings, which would quote values: what does not fit is refused when it is read again.
    text: bytes = payload.model_dump_json(by_alias=True, warnings=False).encode()
    try:
        _json.decode(text)  # `ser_json_inf_nan="constants"` and serializers of the user's write what is no JSON object
    except msgspec.MsgspecError as error:
        raise ValueError(f"its serializer writes no JSON object ({error})") from None
    return text


def _decoder(cls: type[PydanticPayload]) -> Callable[[msgspec.Raw], Any]:
    def decode(text: msgspec.Raw) -> Any:
        try:
            return cls.model_validate_json(bytes(text))
        except ValidationError as error:
            raise msgspec.ValidationError(_first_of(error)) from None

    return decode


def _first_of(error: ValidationError) -> str:
    """The first mistake in msgspec's form, without the value: what a payload holds stands in no log."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{first['msg']} - at `${path}`" if path else str(first["msg"])

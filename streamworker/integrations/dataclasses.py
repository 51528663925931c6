"""Payloads that are dataclasses: no extra is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from streamworker.errors import ConfigurationError
from streamworker.payload import Fit, PayloadBase, place_of


class DataclassPayload(PayloadBase):
    """Base of dataclasses that are payloads: ``@dataclass class Send(DataclassPayload, kind="...", queue="...")``.

    The class keywords, and the checks at enqueue and in workers, are those of `streamworker.Payload`.
    """

    @classmethod
    def payload_fields(cls) -> Collection[str]:
        """The names of its fields."""
        return [field.name for field in dataclasses.fields(cls._decorated())]  # type: ignore[arg-type]

    @classmethod
    def payload_fit(cls) -> Fit:
        """As msgspec writes and reads dataclasses."""
        cls._decorated()
        return super().payload_fit()

    @classmethod
    def _decorated(cls) -> type[DataclassPayload]:
        if "__dataclass_fields__" not in vars(cls):
            raise ConfigurationError(
                f"{place_of(cls)}: the payload {cls.__name__} is no dataclass: decorate it with @dataclass"
            )
        return cls

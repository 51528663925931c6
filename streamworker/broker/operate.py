"""What people do by hand, in stream mode."""

from __future__ import annotations

from streamworker.broker.client import Address
from streamworker.broker.stream import StreamOptions


class StreamOperator:
    """Stream mode of the `Operator` protocol."""

    def __init__(self, address: Address, options: StreamOptions) -> None:
        self._address = address
        self._options = options
        self._commands = address.commands()

    async def open(self) -> None:
        """Check that a server answers."""

    async def close(self) -> None:
        """Close the connections."""
        await self._commands.aclose()

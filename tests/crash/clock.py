"""A clock for one server process that a test may set: libfaketime (Debian: ``apt-get install faketime``), preloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

_PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


class Clock:
    """What the server's clock shows, apart from the true time; only the wall clock, as when somebody sets it."""

    def __init__(self, directory: Path) -> None:
        library = next(
            (found for place in _PLACES for found in Path(place).glob("**/faketime/libfaketimeMT.so.1")), None
        )
        if library is None:
            pytest.skip("needs libfaketime: apt-get install faketime")
        self._file = directory / "clock"
        self.show(0)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def show(self, ahead: int) -> None:
        """The server is this many seconds ahead from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{ahead:+d}\n")
        fresh.rename(self._file)

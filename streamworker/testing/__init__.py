"""Helps to test handlers: bare, without Redis, or on real servers.

- `context` makes a `Context`, to call a handler as the plain function it is.
- `run` takes a payload through decoding, middleware, handler and timeout, without Redis, and returns the outcome.
- `drain` runs a worker until nothing is ready any more.
- The pytest plugin (installed with the package) offers ``streamworker_live_app``, ``drain`` and more; see
  `streamworker.testing.plugin`.

Names are imported when they are first used: the plugin lives in here, and is loaded in every pytest run. What type
checkers read is in ``__init__.pyi``.
"""

import importlib

_HOMES = {
    "Drained": "streamworker.testing.harness",
    "JobMemory": "streamworker.testing.harness",
    "context": "streamworker.testing.harness",
    "drain": "streamworker.testing.harness",
    "run": "streamworker.testing.harness",
    "Abandoned": "streamworker.job",
    "Interrupted": "streamworker.job",
    "Ok": "streamworker.job",
    "Outcome": "streamworker.job",
    "Postponed": "streamworker.job",
    "Raised": "streamworker.job",
    "TimedOut": "streamworker.job",
    "Undecodable": "streamworker.job",
    "UnknownKind": "streamworker.job",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

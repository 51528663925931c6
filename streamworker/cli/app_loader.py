"""From ``module:attribute`` to the user's App, or one sentence that says why not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from streamworker.app import App
from streamworker.errors import ConfigurationError, StreamworkerError
from streamworker.settings import Settings
from streamworker.telemetry import logs

_OURS: Final = Path(__file__).parents[1]
HOW = "name it as in `streamworker worker shop.jobs:app`, or set STREAMWORKER_APP=shop.jobs:app"


def load_app(settings: Settings) -> App[Any]:
    """Import the app that the settings name; the working directory is importable.

    Raises:
        ConfigurationError: none is named, it cannot be imported, or it is no App. The user's own error is its cause.
    """
    if settings.app is None:
        raise ConfigurationError(f"There is no app to run: {HOW}.")
    logs.configure_prepared()
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module_name, _, path = settings.app.partition(":")
    module = _import(module_name)
    target: Any = module
    for name in path.split("."):
        try:
            target = getattr(target, name)
        except AttributeError:
            apps = [key for key, value in vars(module).items() if isinstance(value, App)]
            hint = f"; did you mean {module_name}:{apps[0]}?" if apps else f"; {HOW}."
            raise ConfigurationError(f"The module {module_name} has no attribute {path!r}{hint}") from None
    if not isinstance(target, App):
        raise ConfigurationError(f"{settings.app} is a {type(target).__name__} and must be a streamworker.App; {HOW}.")
    return target


def with_own(settings: Settings, app: App[Any]) -> Settings:
    """The settings, with what the app sets in Python wherever neither flag nor variable says otherwise.

    Raises:
        ConfigurationError: together they make no sense.
    """
    own = app.resolve(None)
    said = {name for name, source in settings.sources if not source.startswith("default")}
    values = {name: getattr(own, name) for name in Settings.__struct_fields__}
    values |= {name: getattr(settings, name) for name in (*said, "sources", "warnings")}
    if "log_format" not in said and own.log_format == "json":
        values["log_format"] = settings.log_format
    return Settings(**values)


def loop_options(settings: Settings) -> dict[str, bool]:
    """Which event loop `anyio.run` makes: its ``backend_options``.

    Raises:
        ConfigurationError: uvloop is asked for and not installed.
    """
    there = importlib.util.find_spec("uvloop") is not None
    if settings.loop == "uvloop" and not there:
        raise ConfigurationError("STREAMWORKER_LOOP is 'uvloop' but uvloop is not installed: install it, or use 'auto'")
    return {"use_uvloop": there and settings.loop != "asyncio"}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"There is no module {error.name!r} in {Path.cwd()} or on the Python path: {HOW}."
            ) from error
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: BaseException) -> ConfigurationError:
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    # Our own call comes first; behind it, the deepest line that ran is where to look.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename][1:]
    if isinstance(error, StreamworkerError):  # a sentence about the user's code, that an import of it led to
        last = str(error)
        frames = [frame for frame in frames if not Path(frame.filename).is_relative_to(_OURS)]
    place = f" ({frames[-1].filename} line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename} line {error.lineno})"
    elif frames and last.startswith(f"{frames[-1].filename}:"):
        place = ""  # the sentence knows better
    return ConfigurationError(
        f"The module {name} cannot be imported: {last}{place}; STREAMWORKER_LOG_LEVEL=debug shows the traceback."
    )

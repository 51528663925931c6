"""Every setting: its variable, its flag, what it may be, its default, and what it does (as `.env.example` says it)."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Final

from streamworker import settings
from streamworker.cli.options import ServerFlags, WorkerFlags
from streamworker.settings.environment import PREFIX
from streamworker.settings.rules import to_text
from tools.reference.tables import code, table
from tools.site.sources import ROOT

# What no file of a container sets, or sets in another form.
_OTHERWISE: Final = {
    "redis_url": "Where Redis is; `embedded` starts a private server from wheels. The forms are in [security](../security.md). "
    "`REDIS_URL` without the prefix is read as well.",
    "database_url": "Where PostgreSQL is; a scheme of SQLAlchemy's is understood. `DATABASE_URL` without the prefix is read as "
    "well.",
    "state_dir": "Where the embedded servers keep their data.",
    "http": "Where a worker answers `/healthz`, `/readyz` and `/metrics`.",
}
_LINE: Final = re.compile(r"#?(?P<name>[A-Z_]+)=")


def page() -> str:
    """The page."""
    flags = {field.name for each in (ServerFlags, WorkerFlags) for field in fields(each)}
    rows = []
    for name, rule in settings._RULES.items():
        default = to_text(settings._DEFAULTS[name])
        flag = f"--{name.replace('_', '-')}" if name in flags else ""
        rows.append(
            [code(PREFIX + name.upper()), code(flag), code(default) or "unset", f"{description(name)} *{rule.allowed}*"]
        )
    return f"""# Settings

Made from `streamworker.settings`. A flag goes before the variable, `STREAMWORKER_X` before the plain `REDIS_URL` and
`DATABASE_URL`, a variable before the default. Durations are seconds; fractions are allowed. An empty value counts as unset,
and `X_FILE` names a file that holds the value of X (`STREAMWORKER_REDIS_URL_FILE=/run/secrets/redis`). Everything is checked
at start, all mistakes are reported at once (exit 78), and `streamworker config` shows what is in force and where it came from.

{table(["variable", "flag", "default", "what"], rows)}
The app itself is the argument of `worker`, `dev`, `check` and `bridge`, or `STREAMWORKER_APP`. The dashboard alone reads
`{"`, `".join(settings._READ_ELSEWHERE)}` ([security](../security.md#the-dashboard)).

A name that is within two letters of a known one is a mistake, and an error; any other unknown `{PREFIX}` variable is a
warning. What orchestrators inject (`*_SERVICE_HOST`, `*_PORT` and the like) is ignored.
"""


def description(name: str) -> str:
    """What a setting does, in a sentence or two.

    Raises:
        LookupError: nobody wrote it down.
    """
    text = _OTHERWISE.get(name) or _example().get(PREFIX + name.upper())
    if not text:
        raise LookupError(f"no comment in .env.example says what {PREFIX}{name.upper()} does")
    return text


def _example() -> dict[str, str]:
    """Variables of ``.env.example`` with the comment above each."""
    found: dict[str, str] = {}
    comment: list[str] = []
    for line in (ROOT / ".env.example").read_text(encoding="utf-8").splitlines():
        variable = _LINE.match(line)
        if variable:
            found[variable["name"]] = " ".join(comment)
            comment = []
        elif line.startswith("# "):
            comment.append(line[2:])
        else:
            comment = []
    return found

"""Variables and container secrets of an environment, and the check for misspelled names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from streamworker.errors import ConfigurationError

PREFIX = "STREAMWORKER_"

_FILE = "_FILE"
_FILE_LIMIT = 65_536
# Tests' own switches, and what Kubernetes and Docker links inject for a service named streamworker.
_IGNORED = re.compile(
    rf"{PREFIX}(?:TEST_.*|(?:.*_)?SERVICE_HOST|(?:.*_)?SERVICE_PORT.*|(?:.*_)?PORT|(?:.*_)?PORT_\d+_.*)", re.DOTALL
)


class Found(NamedTuple):
    """A value and where it came from.

    Attributes:
        value: the text as it is.
        source: its name in a message: ``STREAMWORKER_LEASE``, ``--lease``, ``X_FILE (/path)``.
        private: whether the value came from a file of secrets and must not be repeated in a message.
    """

    value: str
    source: str
    private: bool = False


def lookup(env: Mapping[str, str], names: Iterable[str]) -> Found | None:
    """Return the value of the first of the names that is set, directly or through its ``_FILE`` form.

    Args:
        env: the environment; an empty value counts as unset.
        names: full names of variables, the strongest first.

    Raises:
        ConfigurationError: a name is set in both forms, or its file cannot be read or is empty.
    """
    for name in names:
        value, path = env.get(name), env.get(name + _FILE)
        if value and path:
            raise ConfigurationError(f"{name} and {name}{_FILE} are both set; keep one of them.")
        if value:
            return Found(value, name)
        if path:
            return Found(_read(name + _FILE, path), f"{name}{_FILE} ({path})", private=True)
    return None


def judge_names(env: Mapping[str, str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return one sentence per misspelled variable, and one per unknown variable with our prefix.

    A name within two edits of a known one is misspelled, wherever the edits are: ``STREAMWORKR_LEASE`` is as silent a
    mistake as ``STREAMWORKER_LAESE``.

    Args:
        env: the environment; empty variables do not count.
        known: full names of all variables, without their ``_FILE`` forms.
    """
    all_known = {*known, *(name + _FILE for name in known)}
    ours = sorted(name for name in all_known if name.startswith(PREFIX))
    misspelled, unknown = [], []
    for name in sorted(env):
        if name in all_known or not env[name] or not _looks_like_ours(name) or _IGNORED.fullmatch(name):
            continue
        closest = _closest(name.upper(), ours)
        if closest is not None:
            misspelled.append(f"{name} is not a streamworker variable; did you mean {closest}?")
        elif name.startswith(PREFIX):
            unknown.append(f"{name} is not a streamworker variable and has no effect.")
    return misspelled, unknown


def _looks_like_ours(name: str) -> bool:
    # Most of an environment is not ours; this spares it the edit distances.
    upper = name.upper()
    return upper.startswith(PREFIX[:6]) or PREFIX[6:] in upper


def _closest(name: str, known: Iterable[str]) -> str | None:
    near = [(edit_distance(name, other), other) for other in known if abs(len(name) - len(other)) <= 2]
    distance, other = min(near, default=(3, ""))
    return other if distance <= 2 else None


def _read(name: str, path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            text = file.read(_FILE_LIMIT + 1)
    except UnicodeDecodeError:
        # The error quotes the bytes, and the bytes may be a secret.
        raise ConfigurationError(f"{name}={path!r} is not UTF-8 text; store the value there as plain text.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"{name}={path!r} cannot be read ({reason}); is the secret mounted there?") from None
    if len(text) > _FILE_LIMIT:
        raise ConfigurationError(f"{name}={path!r} is longer than {_FILE_LIMIT} characters; is it the right file?")
    text = text.rstrip("\r\n")
    if not text:
        raise ConfigurationError(f"{name}={path!r} is empty; write the value into it or unset the variable.")
    return text


def edit_distance(a: str, b: str) -> int:
    """Return the Damerau-Levenshtein distance: insertions, deletions, replacements and swaps of neighbours."""
    # What both begin with changes nothing, and is half of most names.
    start = next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    width = len(a) + len(b)
    last_row: dict[str, int] = {}  # where each character of `a` was last seen
    # Row and column 0 are a wall: no swap may reach before the first character.
    table: list[list[int]] = [[width] * (len(b) + 2), [width, *range(len(b) + 1)]]
    for i, left in enumerate(a, start=1):
        last_column = 0  # where `left` was last seen in `b`
        row = [width, i]
        for j, right in enumerate(b, start=1):
            swap_row, swap_column = last_row.get(right, 0), last_column
            swap = table[swap_row][swap_column] + (i - swap_row - 1) + 1 + (j - swap_column - 1)
            same = left == right
            if same:
                last_column = j
            row.append(min(table[i][j] + (not same), row[j] + 1, table[i][j + 1] + 1, swap))
        table.append(row)
        last_row[left] = i
    return table[-1][-1]

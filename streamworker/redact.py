"""Foreign text in logs and terminals: passwords hidden (`redact`), controls spelled out (`printable`), bounded (`cut`).

Logs, dead letters, the ledger, the command line and the dashboard use these, and `describe` for an error of a handler.
No function here raises, whatever its argument: the ``__str__`` of an exception is a user's code.

When a URL is ambiguous (an unescaped ``@``, ``/`` or ``?`` in a password), too much is hidden rather than too little.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import unquote

MASK = "***"
MAX_CHARS: Final = 4000
"""Characters of a text from outside that are kept: an error in a dead letter and in the ledger, a value in the log."""

# Characters that a terminal or a browser obeys instead of showing: C0 and C1 controls, line and paragraph separators,
# marks that reorder text (U+061C, U+200E, U+200F, U+202A to U+202E, U+2066 to U+2069), and marks without a width,
# which hide differences. Half a surrogate pair cannot be written at all.
_INVISIBLE: Final = (
    "\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
# `re` compiles them with the first text that holds such a character: classes as large as these take a millisecond each.
_CONTROL: Final = f"[\x00-\x1f{_INVISIBLE}\ud800-\udfff]"
_CONTROL_IN_BLOCK: Final = f"[\x00-\x08\x0b-\x1f{_INVISIBLE}\ud800-\udfff]"
_CONTROL_IN_JSON: Final = f"[{_INVISIBLE}]"  # JSON itself escapes the others

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"[\w.~%+-]*")
_HOST = r"(?:\[[0-9A-Fa-f:.%]*\]|[^\s:@\[\],/?#]*)(?::\d{1,5})?"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*")
_AUTHORITY_END = re.compile(r"[/?#]")
_PARAMETER = re.compile(r"([^?&;#=\s]*)=")
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|auth|cred|api_?key", re.IGNORECASE)

# The scheme's length is bounded and must start at a word: else a long run of letters costs quadratic time.
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,30}://\S+")
_NAMED: Final = r"(?:pass(?:word|wd|phrase)?|pwd|secret(?:_?key)?|token|api_?key)"
_QUOTED: Final = r"""'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)"""
# password=… as in a DSN or a call, and "password": … as in JSON or a dictionary; prose has neither.
_SECRET_IN_TEXT: Final = re.compile(
    rf"""({_NAMED}["']?\s*=\s*|{_NAMED}["']\s*:\s*|\bbearer\s+(?=[\w.~+/-]{{16}}))(\*{{3}}(?=[\s,;&)}}\]]|$)|{_QUOTED}|[^\s,;&)]+)""",
    re.IGNORECASE,
)
_PUNCTUATION = ")]}>'\",.;:"


def mask_url(url: str) -> str:
    """Return the URL without its secrets, fit for logs and error messages.

    The user, hosts and path of a well-formed URL stay readable. Hidden are the password, everything from a password in
    the query to the end of the URL (an unescaped password may hold ``&``), a lone user name of a Redis URL (it is often
    a token), and whatever does not parse: text without ``scheme://`` becomes ``***``.

    Args:
        url: a URL, ``embedded``, or any other text in its place.
    """
    match = _SCHEME.match(url)
    if match is None:
        return url if url in {"", "embedded"} else MASK
    scheme, rest = match.group(), url[match.end() :]
    # The last @ ends the password even if the password itself holds one.
    user_info, at, tail = rest.rpartition("@")
    if _secret_value(user_info) is not None or not _HOSTS.fullmatch(_AUTHORITY_END.split(tail, maxsplit=1)[0]):
        return scheme + MASK
    secret = _secret_value(tail)
    if secret is not None:
        tail = tail[:secret] + MASK
    return scheme + _mask_user_info(scheme, user_info) + at + tail


def redact(text: str) -> str:
    """Return the text with the passwords of all URLs in it hidden, and the values of all ``password=...`` pairs.

    Args:
        text: any text; a URL in it ends at white space.
    """
    if "://" in text:
        text = _URL_IN_TEXT.sub(_mask_match, text)
    if "=" in text or '":' in text or "':" in text or "earer " in text:
        text = _SECRET_IN_TEXT.sub(rf"\1{MASK}", text)
    return text


def printable(text: str) -> str:
    """The text in one line, with every character spelled out that a terminal would obey instead of show."""
    return text if text.isprintable() else re.sub(_CONTROL, _spelled, text)


def clean_block(text: str) -> str:
    """`printable` for a text of several lines: line feeds and tabulators stay."""
    return text if text.isprintable() else re.sub(_CONTROL_IN_BLOCK, _spelled, text)


def clean_json(line: str) -> str:
    """A line of JSON, unchanged in meaning, with every character escaped that a terminal would obey."""
    if line.isascii() and "\x7f" not in line:
        return line
    return re.sub(_CONTROL_IN_JSON, _escaped, line)


def cut(text: str, most: int = MAX_CHARS) -> str:
    """The first ``most`` characters, and how many were cut off."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters more)"


def cut_lines(text: str, most: int) -> str:
    """A block of at most about ``most`` characters: no line above `MAX_CHARS`; then its first and its last lines."""
    if len(text) <= most:
        return text
    if len(text) > 64 * most:
        text = f"{text[: 32 * most]}\n{text[-32 * most :]}"
    text = "\n".join(map(cut, text.split("\n")))
    if len(text) <= most:
        return text
    return f"{text[: most // 4]}\n… ({len(text) - most:,} characters left out)\n{text[-(most - most // 4) :]}"


def fit(text: str, most: int = MAX_CHARS) -> str:
    """Foreign text as it is stored: bounded, passwords hidden, controls spelled out; line feeds stay.

    Args:
        text: from outside.
        most: characters that are kept.
    """
    if len(text) > 2 * most:  # a text of 20 MB is not searched for passwords
        text = text[: 2 * most]
        head, _, word = text.rpartition(" ")
        text = head or MASK if "://" in word else text  # half a URL is no URL, and hides nothing
    return clean_block(redact(text))[:most]


def text_of(value: object, fallback: str = "", how: Callable[[object], str] = str) -> str:
    """``str(value)``, or another text of it; ``fallback``, or a remark, where it cannot be shown. Never raises."""
    try:
        return str.__str__(how(value))  # a subclass of str has methods of its own
    except BaseException:  # noqa: BLE001 - a user's __str__ may raise SystemExit, too, and must not end a worker
        return fallback or f"<unprintable {name_of(value)}>"


def name_of(value: object) -> str:
    """The name of a value's type; never raises."""
    try:
        return str.__str__(type(value).__name__)
    except BaseException:  # noqa: BLE001 - a metaclass may do anything
        return "object"


ACCOUNT: Final = "__streamworker_account__"
"""Attribute of an exception: the text that is kept of it, instead of its type and message."""


def describe(error: BaseException) -> str:
    """An error in a bounded text, its type and message, without passwords; never raises."""
    account = object.__getattribute__(error, "__dict__").get(ACCOUNT)  # past what its class does with attributes
    if isinstance(account, str):
        return fit(account)
    return fit(f"{name_of(error)}: {text_of(error, '(its message cannot be shown)')}")


def _mask_match(match: re.Match[str]) -> str:
    url = match.group()
    if "@" in url or "=" in url:
        return mask_url(url)
    # Nothing secret can stand at the end, so the sentence's own punctuation need not make the URL unreadable.
    bare = url.rstrip(_PUNCTUATION)
    return mask_url(bare) + url[len(bare) :]


def _mask_user_info(scheme: str, user_info: str) -> str:
    user, colon, _ = user_info.partition(":")
    if not _USER.fullmatch(user):
        return MASK
    if colon:
        return f"{user}:{MASK}"
    return user if not user or scheme.startswith("postgres") else MASK


def _secret_value(text: str) -> int | None:
    """Return where the value of the first secret parameter starts."""
    for match in _PARAMETER.finditer(text):
        if _SECRET_NAME.search(unquote(match.group(1))):
            return match.end()
    return None


def _spelled(match: re.Match[str]) -> str:
    return ascii(match.group())[1:-1]


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + (code - 0x10000 >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"

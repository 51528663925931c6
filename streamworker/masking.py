"""Hides passwords in text that people will read: URLs, log lines, error messages.

When a URL is ambiguous (an unescaped ``@``, ``/`` or ``?`` in a password), too much is hidden rather than too little.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

MASK = "***"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_USER = re.compile(r"[\w.~%+-]*")
_HOST = r"(?:\[[0-9A-Fa-f:.%]*\]|[^\s:@\[\],/?#]*)(?::\d{1,5})?"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*")
_AUTHORITY_END = re.compile(r"[/?#]")
_PARAMETER = re.compile(r"([^?&;#=\s]*)=")
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|auth|cred|api_?key", re.IGNORECASE)

# The scheme's length is bounded and must start at a word: else a long run of letters costs quadratic time.
_URL_IN_TEXT = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{0,30}://\S+")
_PASSWORD_IN_TEXT = re.compile(r"(pass(?:word|wd)?\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s,;&)]+)", re.IGNORECASE)
_PUNCTUATION = ")]}>'\",.;:"


def mask_url(url: str) -> str:
    """Return the URL without its secrets, fit for logs and error messages.

    The user, hosts and path of a well-formed URL stay readable. Hidden are the password, everything from a password in
    the query to the end of the URL (an unescaped password may hold ``&``), a lone user name of a Redis URL (it is often
    a token), and whatever does not parse: text without ``scheme://`` becomes ``***``.

    Args:
        url: a URL, ``embedded``, or whatever a person typed in its place.
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
    """Return the text with the passwords of all URLs and all ``password=...`` pairs in it hidden.

    Args:
        text: any text; a URL in it ends at white space.
    """
    if "://" in text:
        text = _URL_IN_TEXT.sub(_mask_match, text)
    if "=" in text:
        text = _PASSWORD_IN_TEXT.sub(rf"\1{MASK}", text)
    return text


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

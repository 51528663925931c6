"""Templates with holes, and nothing else: ``{{name}}``, ``{{#list}}…{{/list}}``, ``{{^empty}}…{{/empty}}``.

Customers write templates, and strangers' data fills them. A sandbox around a language (Jinja's, say) has to keep code
in that was made to get out, and says nothing about a loop in a loop. Here no expression, call or attribute exists
that would have to be forbidden: a name looks into a dict. What is left to limit is size, and that is limited.

The notation is a part of Mustache. Values are escaped for HTML in HTML and never otherwise; a name without a value is
an error, because "Dear ," cannot be called back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any, Final, TypeAlias

MAX_TEMPLATE: Final = 256 * 1024
MAX_OUTPUT: Final = 1024 * 1024
MAX_STEPS: Final = 100_000
MAX_DEPTH: Final = 10

_TAG: Final = re.compile(r"\{\{([#^/]?)\s*([A-Za-z_][A-Za-z0-9_.]{0,99})\s*\}\}")


class TemplateError(ValueError):
    """The template cannot be read, or not be filled with these variables; trying again will not help."""


@dataclass(frozen=True)
class Hole:
    """``{{name}}``."""

    name: str


@dataclass(frozen=True)
class Section:
    """``{{#name}}…{{/name}}``: once per item, or if there is a value; ``{{^name}}…{{/name}}``: if there is none."""

    name: str
    inverted: bool
    inside: tuple[Node, ...]


Node: TypeAlias = str | Hole | Section


def render(template: str, variables: Mapping[str, Any], *, html: bool = False) -> str:
    """Fill a template.

    Args:
        template: its source.
        variables: what names mean; ``a.b`` looks into the dict ``a``.
        html: escape what is put in.

    Raises:
        TemplateError: the template is malformed, a name has no value, or the result is too large.
    """
    filling = _Filling(html=html)
    filling.fill(parse(template), [variables])
    return "".join(filling.out)


@lru_cache(maxsize=256)
def parse(template: str) -> tuple[Node, ...]:
    """A template as a tree. A campaign parses its template once per worker.

    Raises:
        TemplateError: sections do not match, or it is too large.
    """
    if len(template) > MAX_TEMPLATE:
        raise TemplateError(f"the template has {len(template)} characters and {MAX_TEMPLATE} are allowed")
    levels: list[tuple[str, bool, list[Node]]] = [("", False, [])]
    at = 0
    for tag in _TAG.finditer(template):
        sign, name = tag.groups()
        levels[-1][2].append(_text(template[at : tag.start()]))
        at = tag.end()
        if not sign:
            levels[-1][2].append(Hole(name))
        elif sign == "/":
            opened, inverted, inside = levels.pop()
            if not levels or opened != name:
                raise TemplateError(f"{{{{/{name}}}}} closes nothing that is open there")
            levels[-1][2].append(Section(name, inverted, tuple(inside)))
        else:
            levels.append((name, sign == "^", []))
            if len(levels) > MAX_DEPTH:
                raise TemplateError(f"more than {MAX_DEPTH} sections inside each other")
    if len(levels) > 1:
        raise TemplateError(f"{{{{#{levels[-1][0]}}}}} is not closed")
    return (*levels[0][2], _text(template[at:]))


def _text(text: str) -> str:
    """Text between tags; braces that look like a tag and are none are a mistake, not text."""
    if "{{" in text or "}}" in text:
        raise TemplateError("braces that are no tag: names are letters, digits, _ and dots, as in {{customer.name}}")
    return text


class _Filling:
    """One rendering, and how much of its allowance is used."""

    def __init__(self, *, html: bool) -> None:
        self.out: list[str] = []
        self._html = html
        self._size = self._steps = 0

    def fill(self, nodes: tuple[Node, ...], scopes: list[Mapping[str, Any]]) -> None:
        for node in nodes:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise TemplateError(f"filling the template takes more than {MAX_STEPS} steps")
            match node:
                case str():
                    self._put(node)
                case Hole(name=name):
                    value = _look_up(name, scopes)
                    if value is None or not isinstance(value, str | int | float):
                        raise TemplateError(f"there is no value for {{{{{name}}}}}")
                    self._put(escape(str(value)) if self._html else str(value))
                case Section():
                    self._section(node, scopes)

    def _section(self, section: Section, scopes: list[Mapping[str, Any]]) -> None:
        value = _look_up(section.name, scopes)
        if section.inverted:
            if not value:
                self.fill(section.inside, scopes)
        elif isinstance(value, list):
            for item in value:
                inner = item if isinstance(item, Mapping) else {"item": item}
                self.fill(section.inside, [*scopes, inner])
        elif value:
            self.fill(section.inside, [*scopes, value] if isinstance(value, Mapping) else scopes)

    def _put(self, text: str) -> None:
        self._size += len(text)
        if self._size > MAX_OUTPUT:
            raise TemplateError(f"the filled template has more than {MAX_OUTPUT} characters")
        self.out.append(text)


def _look_up(name: str, scopes: list[Mapping[str, Any]]) -> Any:
    """What a name means, innermost section first; ``None`` if nothing."""
    first, *rest = name.split(".")
    value: Any = next((scope[first] for scope in reversed(scopes) if first in scope), None)
    for step in rest:
        # Mappings and never attributes: `x.__class__` is a key like any other, and not there.
        value = value.get(step) if isinstance(value, Mapping) else None
    return value

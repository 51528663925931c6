"""Python blocks as modules, so that they can be type-checked and imported: names they lack come from earlier blocks of their
page, else from `tests.docs.names`; fragments that await something stand in a function."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from pathlib import Path

from tests.docs import names
from tests.docs.blocks import Block

FRAGMENT = "the_fragment"
OFFERED = {name for name in {*vars(names), *names.__annotations__} if not name.startswith("_")}


def write(blocks: list[Block], folder: Path) -> list[tuple[Block, str]]:
    """Write one page's blocks as modules of the package ``folder``; returns them with their names."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    made: list[tuple[Block, str]] = []
    bound: dict[str, str] = {}
    for block in blocks:
        name = f"line_{block.line}"
        text, binds = module(block, bound, folder.name)
        (folder / f"{name}.py").write_text(text)
        bound |= dict.fromkeys(binds, name)
        made.append((block, name))
    return made


def module(block: Block, bound: dict[str, str], package: str) -> tuple[str, set[str]]:
    """A block as the text of a module, and the names it binds."""
    awaits = has_top_level_await(block.body)
    body = block.body
    if awaits:
        head, body = _imports_first(body)
        body = f"{head}async def {FRAGMENT}() -> None:\n" + "".join(
            f"    {line}\n" if line else "\n" for line in body.splitlines()
        )
    ast.parse(body)
    table = symtable.symtable(body, block.where, "exec")
    binds = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    binds |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_namespace()}
    lines: list[str] = []
    for name in sorted(_free(table) - binds - set(dir(builtins)) - {"__name__", "__file__"}):
        if name in bound:
            lines.append(f"from {package}.{bound[name]} import {name}")
        elif name in OFFERED:
            lines.append(f"from tests.docs.names import {name}")
        else:
            raise AssertionError(f"{block.where} uses {name}, which nothing before it on the page says what it is")
    return "\n".join([*lines, body]), binds - {FRAGMENT}


def has_top_level_await(text: str) -> bool:
    try:
        compile(text, "block", "exec")
    except SyntaxError as error:
        if not re.search("outside|await", str(error)):
            raise
        compile(text, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        return True
    return False


def _imports_first(text: str) -> tuple[str, str]:
    """Imports of a fragment belong to its module, so that later blocks have them too."""
    lines = text.splitlines(keepends=True)
    heads = [line for line in lines if re.match(r"(from \S+ )?import [^(]+$", line)]
    return "".join(heads), "".join(line for line in lines if line not in heads)


def _free(table: symtable.SymbolTable) -> set[str]:
    """Names that are looked up in the module and its functions."""
    found = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (symbol.is_global() or table.get_type() == "module")
    }
    for child in table.get_children():
        found |= _free(child)
    return found

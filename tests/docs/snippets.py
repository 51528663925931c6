"""Python blocks as modules, so that they can be type-checked and imported: names they lack come from earlier blocks of their
page, else from `tests.docs.names`; fragments that await something stand in a function."""

from __future__ import annotations

import ast
import builtins
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
    head, tail = split(block.body)
    body = head
    if tail:
        body += f"\n\nasync def {FRAGMENT}() -> None:\n"
        body += "".join(f"    {line}\n" if line else "\n" for line in tail.splitlines())
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


def split(text: str) -> tuple[str, str]:
    """What may stand in a module, and the rest, from the first statement on that awaits something."""
    tree = compile(text, "block", "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    lines = text.splitlines(keepends=True)
    for statement in tree.body:
        if _awaits(statement):
            at = statement.lineno - 1
            return "".join(lines[:at]), "".join(lines[at:])
    return text, ""


def _awaits(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    if isinstance(node, ast.Await | ast.AsyncWith | ast.AsyncFor):
        return True
    return any(_awaits(child) for child in ast.iter_child_nodes(node))


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

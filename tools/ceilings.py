"""The ceilings of the house: 600 lines a file (1,000 with a reason), 50 a function, 6 positional parameters.

``python tools/ceilings.py streamworker`` prints what is above one and exits 1. Whoever has to pass a ceiling writes
the reason beside it: ``# ceiling: <reason>`` between ``def`` and the body, or, for a file, before its first statement.
A reason that is no longer needed is an offence too, so that none outlives its cause.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 600
FILE_LINES_HARD = 1000
FUNCTION_LINES = 50
POSITIONAL = 6

# Three words at least: "# ceiling: long" explains nothing.
REASON = re.compile(r"#\s*ceiling:\s*\S+(\s+\S+){2,}")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def offences(path: Path) -> list[str]:
    """Everything in one Python file that is above a ceiling without a reason, or has a reason and is below."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source, filename=str(path))

    found = list(_judge(f"{path}:1", _too_long_file(lines), excused=_has_reason(_top(tree, lines))))
    if len(lines) > FILE_LINES_HARD:
        found.append(f"{path}:1: {len(lines)} lines, more than {FILE_LINES_HARD}, which no reason excuses")
    for node, is_method in _functions(tree):
        signature = lines[node.lineno - 1 : max(node.body[0].lineno - 1, node.lineno)]
        over = [*_too_long_function(node), *_too_many_parameters(node, is_method=is_method)]
        found += _judge(f"{path}:{node.lineno}: {node.name}", over, excused=_has_reason(signature))
    return found


def _judge(where: str, over: list[str], *, excused: bool) -> Iterator[str]:
    if over and not excused:
        yield from (f"{where}: {complaint}" for complaint in over)
    elif excused and not over:
        yield f"{where}: below every ceiling; remove its '# ceiling:' reason"


def _too_long_file(lines: list[str]) -> list[str]:
    return [f"{len(lines)} lines, more than {FILE_LINES}"] if len(lines) > FILE_LINES else []


def _too_long_function(node: Function) -> list[str]:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    return [f"{length} lines, more than {FUNCTION_LINES}"] if length > FUNCTION_LINES else []


def _too_many_parameters(node: Function, *, is_method: bool) -> list[str]:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if is_method and names[:1] in (["self"], ["cls"]):
        names = names[1:]
    return [f"{len(names)} positional parameters, more than {POSITIONAL}"] if len(names) > POSITIONAL else []


def _functions(tree: ast.AST) -> Iterator[tuple[Function, bool]]:
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, Function):
                yield child, isinstance(parent, ast.ClassDef)


def _top(tree: ast.Module, lines: list[str]) -> list[str]:
    """The lines before the first statement, which the docstring is not."""
    body = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
    start = tree.body[0].end_lineno or 0 if len(body) < len(tree.body) else 0
    end = body[0].lineno - 1 if body else len(lines)
    # Comments may stand above the docstring as well as below.
    return lines[: tree.body[0].lineno - 1 if tree.body else 0] + lines[start:end]


def _has_reason(lines: list[str]) -> bool:
    return any(REASON.search(line) for line in lines)


def python_files(paths: list[Path]) -> Iterator[Path]:
    """Files as they are, folders with everything below them."""
    for path in paths:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def main(arguments: list[str]) -> int:
    """Check files and folders; the exit code is 1 if anything is above a ceiling."""
    found = [offence for path in python_files([Path(name) for name in arguments]) for offence in offences(path)]
    for offence in found:
        print(offence)
    if found:
        print(
            f"ceilings: {len(found)} above; split by idea, or write '# ceiling: <reason>' beside the def "
            "(or at the top of the file).",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["streamworker"]))

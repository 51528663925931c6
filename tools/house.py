"""The figures of the package as a whole, counted from its imports and syntax trees: today's value, and the goal.

``python tools/house.py`` prints them, and the offences by file and line; ``python tools/house.py streamworker/cli``
only the offences below a path. ``--strict`` prints what is above its limit, and exits 1 if anything is. The limit of a
figure is its goal, or, until it is reached, the value in tools/house.toml: that of the day it was last lowered, so that
it can only fall. ``--lower`` writes today's values there. tools/ceilings.py has what one file or function may have.
"""

# ceiling: one table of figures; each is a few lines beside the others
import argparse
import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

FLOOR_LINES = 60
CONSTRUCTOR_CALLABLES = 3
ROW_NAMES = 6
MOST_LISTED = 10
"""Figures with a larger goal are counts; the offences of the others get a line each."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Packages around the core: what people see, what tests and demonstrations use, and the one database behind `postgres`.
AROUND_THE_CORE = frozenset(
    {"cli", "demo", "embedded", "integrations", "postgres", "telemetry", "testing", "views", "web"}
)

# Submodules that users import, and entry points of pyproject.toml: neither small nor singly imported ones can move.
_PINNED = "cli embedded errors observe otel settings telemetry.probe testing testing.plugin web"
PINNED = frozenset(f"streamworker.{name}" for name in _PINNED.split())

_METAPHORS = "ears?|bells?|deaf|rooms?|houses?|doors?|whoever|somebody|nobody"
BANNED = re.compile(rf"\b({_METAPHORS}|(?:is|are) told|lies|comes to|what becomes of)\b", re.IGNORECASE)
MODE_CHOOSERS = ("streamworker.settings", "streamworker.wiring")
BANNED_NAMES = re.compile(_METAPHORS)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# Words on -ing that are nouns of the field.
NOUNS = frozenset(
    (
        "batching",
        "encoding",
        "finding",
        "listing",
        "pending",
        "recording",
        "setting",
        "string",
        "testing",
        "tracing",
        "wiring",
    )
)

SEE_ONLY = re.compile(r"See\s+\S+(\s+\S+){0,4}")

STEP = re.compile(r"^\d+\. .*?`(streamworker/[\w/]+\.py)`", re.MULTILINE)


class Offence(NamedTuple):
    """One place that counts for a figure."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Module:
    """One Python file of the package."""

    path: str
    """From the root of the project, with slashes."""
    name: str
    source: str
    tree: ast.Module

    @property
    def basename(self) -> str:
        return Path(self.path).stem

    @property
    def lines(self) -> int:
        return self.source.count("\n")

    @property
    def is_special(self) -> bool:
        """``__init__`` and ``__main__``, whose names Python chooses."""
        return self.basename.startswith("__")

    @property
    def is_program(self) -> bool:
        """Run by its path, in an interpreter of its own, so that it cannot be part of what starts it."""
        return any(
            isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in self.tree.body
        )

    @property
    def is_core(self) -> bool:
        return not self.is_special and _in_core(self.name)


class House:
    """The package below a root, read once.

    Args:
        root: folder that has ``streamworker/``, ``pyproject.toml`` and ``docs/``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "streamworker"
        self.modules = [self._read(path) for path in sorted(self.package.rglob("*.py"))]
        self.by_name = {module.name: module for module in self.modules}
        self.importers = self._importers()
        self.callable_aliases = {name for module in self.modules for name in _callable_aliases(module.tree)}
        self.attributes = Attributes(self.modules, self.callable_aliases)

    def _read(self, path: Path) -> Module:
        source = path.read_text(encoding="utf-8")
        short = path.relative_to(self.root).as_posix()
        name = short.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return Module(short, name, source, ast.parse(source, filename=short))

    def _importers(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for module in self.modules:
            for imported in self._imports(module.tree):
                if imported != module.name:
                    found[imported].add(module.name)
        return found

    def _imports(self, tree: ast.Module) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in self.by_name else node.module

    # --- layout -----------------------------------------------------------------------------------------------

    def entries(self, folder: str) -> list[Offence]:
        """Files and folders right below a folder of the package, caches and the marker for types aside."""
        where = self.package / folder
        names = (
            sorted(path.name for path in where.iterdir() if not path.is_dir() or _has_files(path))
            if where.is_dir()
            else []
        )
        short = where.relative_to(self.root).as_posix()
        return [Offence(f"{short}/{name}", 1, "entry") for name in names if name not in {"__pycache__", "py.typed"}]

    def files(self) -> list[Offence]:
        """The Python files."""
        return [Offence(module.path, 1, f"{module.lines} lines") for module in self.modules]

    def single_importers(self) -> list[Offence]:
        """Core modules that one other core module imports, and nothing else; none that are programs of their own."""
        found = []
        for module in self.modules:
            importers = self.importers[module.name]
            if (
                module.is_core
                and not module.is_program
                and module.name not in PINNED
                and len(importers) == 1
                and _in_core(min(importers))
            ):
                found.append(Offence(module.path, 1, f"only {min(importers)} imports it"))
        return found

    def small(self) -> list[Offence]:
        """Modules of few lines with one importer, which they could be part of."""
        return [
            Offence(module.path, 1, f"{module.lines} lines, and only {min(self.importers[module.name])} imports it")
            for module in self.modules
            if module.lines < FLOOR_LINES and not module.is_special and module.name not in PINNED
            if len(self.importers[module.name]) == 1
        ]

    def path_of_a_job(self) -> list[Offence] | None:
        """The files that docs/architecture.md lists in the order a job passes them; None without that page."""
        page = self.root / "docs" / "architecture.md"
        if not page.exists():
            return None
        steps = dict.fromkeys(STEP.findall(page.read_text("utf-8")))
        return [Offence(path, 1, "on the way of a job") for path in steps]

    def wide_rows(self) -> list[Offence]:
        """Rows of the layers contract with more names than one takes in at a glance."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text("utf-8"))
        contracts = project.get("tool", {}).get("importlinter", {}).get("contracts", [])
        rows = [row for contract in contracts for row in contract.get("layers", ())]
        return [
            Offence("pyproject.toml", 1, f"layer of {n} names: {row}")
            for row in rows
            if (n := row.count(":") + 1) > ROW_NAMES
        ]

    # --- names ------------------------------------------------------------------------------------------------

    def repeated_basenames(self) -> list[Offence]:
        """Modules named as another one; a command may be named as the resource it is about."""
        named = defaultdict(list)
        for module in self.modules:
            if not module.is_special and not module.path.startswith("streamworker/cli/"):
                named[module.basename].append(module.path)
        return [
            Offence(path, 1, f"named as {_others(path, paths)}")
            for paths in named.values()
            if len(paths) > 1
            for path in paths
        ]

    def repeated_classes(self) -> list[Offence]:
        """Public classes named as another one."""
        named = defaultdict(list)
        for module in self.modules:
            for node in module.tree.body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    named[node.name].append((module.path, node.lineno))
        return [
            Offence(path, line, f"class {name} is also in {_others(path, [each for each, _ in places])}")
            for name, places in named.items() if len(places) > 1
            for path, line in places
        ]  # fmt: skip

    def gerunds(self) -> list[Offence]:
        """Modules and classes whose name says that something goes on, and not what the thing is."""
        found = []
        for module in self.modules:
            classes = [(node.name, node.lineno) for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
            names = [(module.basename, 1), *classes]
            found += [Offence(module.path, line, f"{name} is a gerund") for name, line in names if _is_gerund(name)]
        return found

    def banned_words(self) -> list[Offence]:
        """Words of another trade in docstrings, comments, Lua comments and names."""
        found = []
        for module in self.modules:
            for line, text in sorted([*_docstrings(module.tree), *_comments(module.source)]):
                found += _banned(module.path, line, text)
            names = {module.basename: 1}
            for name, line in _defined_names(module.tree):
                names.setdefault(name, line)
            found += [
                Offence(module.path, line, f"name {name}") for name, line in names.items() if _has_banned_word(name)
            ]
        for script in sorted(self.package.rglob("*.lua")):
            for line, text in enumerate(script.read_text("utf-8").splitlines(), 1):
                if "--" in text:
                    found += _banned(script.relative_to(self.root).as_posix(), line, text.partition("--")[2])
        return found

    def see_only(self) -> list[Offence]:
        """Docstrings that only send the reader elsewhere."""
        return [
            Offence(module.path, line, text.strip())
            for module in self.modules
            for line, text in _docstrings(module.tree)
            if SEE_ONLY.fullmatch(text.strip())
        ]

    # --- hand-offs --------------------------------------------------------------------------------------------

    def foreign_behaviour(self) -> list[Offence]:
        """Functions, methods and lambdas that are assigned into an attribute of another object."""
        return [
            Offence(module.path, node.lineno, ast.unparse(node)[:100])
            for module in self.modules
            for node, scope in self.attributes.assignments(module.tree, self.attributes.scope(module.tree))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if _is_foreign(target) and self.attributes.is_behaviour(target, node.value, scope)
        ]

    def untraceable(self) -> list[Offence]:
        """Methods that only raise NotImplementedError, and lambdas that use what is made after them."""
        found = []
        for module in self.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, Function):
                    if _only_not_implemented(node):
                        found.append(Offence(module.path, node.lineno, f"{node.name} is a hook without a body"))
                    for line, name in _premature(node):
                        found.append(Offence(module.path, line, f"lambda uses {name}, made after it"))
        return found

    def mode_branches(self) -> list[Offence]:
        """Comparisons with a mode: what serves which mode is chosen in settings and in wiring, and nowhere else."""
        return [
            Offence(module.path, node.lineno, ast.unparse(node).partition("\n")[0])
            for module in self.modules
            if not module.name.startswith(MODE_CHOOSERS)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Compare | ast.Match) and any(map(_is_mode, ast.iter_child_nodes(node)))
        ]

    def many_callables(self) -> list[Offence]:
        """Classes whose constructor takes more callables than one keeps apart."""
        found = []
        for module in self.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ClassDef):
                    aliases = self.callable_aliases
                    names = [name for name, annotation in _constructor(node) if _names_callable(annotation, aliases)]
                    if len(names) > CONSTRUCTOR_CALLABLES:
                        found.append(Offence(module.path, node.lineno, f"{node.name} takes {', '.join(names)}"))
        return found


def _has_files(folder: Path) -> bool:
    """Whether a folder has more than the caches that a removed package leaves behind."""
    return any(path.is_file() and "__pycache__" not in path.parts for path in folder.rglob("*"))


def _in_core(name: str) -> bool:
    return name.split(".")[1:2] not in ([around] for around in AROUND_THE_CORE)


def _others(path: str, paths: Iterable[str]) -> str:
    return ", ".join(sorted(set(paths) - {path})) or "the same file"


def _is_mode(node: ast.AST) -> bool:
    return "mode" in (getattr(node, "attr", None), getattr(node, "id", None))


def _is_gerund(name: str) -> bool:
    words = WORDS.findall(name)
    last = words[-1].lower() if words else ""
    return len(last) > len("ping") and last.endswith("ing") and last not in NOUNS


def _has_banned_word(name: str) -> bool:
    return any(BANNED_NAMES.fullmatch(word.lower()) for word in WORDS.findall(name))


def _banned(path: str, line: int, text: str) -> list[Offence]:
    found = []
    for number, part in enumerate(text.splitlines()):
        found += [
            Offence(path, line + number, f"{match.group()!r} in: {part.strip()[:100]}")
            for match in BANNED.finditer(part)
        ]
    return found


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Strings that stand for themselves: docstrings, also those below an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _defined_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def _is_foreign(target: ast.expr) -> bool:
    """An attribute of anything but the object itself or its class."""
    return isinstance(target, ast.Attribute) and not (
        isinstance(target.value, ast.Name) and target.value.id in {"self", "cls"}
    )


class Attributes:
    """Which names of the package are methods, which hold data, and which hold something to call.

    Args:
        modules: the package.
        aliases: names of types that stand for a Callable.
    """

    def __init__(self, modules: Iterable[Module], aliases: set[str]) -> None:
        self._aliases = aliases
        self._functions: set[str] = set()
        self._data: set[str] = set()
        self._callables: set[str] = set()
        for module in modules:
            for node in ast.walk(module.tree):
                self._note(node)

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, Function):
            is_property = any("property" in ast.unparse(each) for each in node.decorator_list)
            (self._data if is_property else self._functions).add(node.name)
            called = {name for name, annotation in _annotated(node.args) if _names_callable(annotation, self._aliases)}
            for each in ast.walk(node):
                if isinstance(each, ast.Assign) and isinstance(each.value, ast.Name) and each.value.id in called:
                    self._callables |= {target.attr for target in each.targets if isinstance(target, ast.Attribute)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute | ast.Name):
            name = node.target.attr if isinstance(node.target, ast.Attribute) else node.target.id
            (self._callables if _names_callable(node.annotation, self._aliases) else self._data).add(name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            self._data.add(node.attr)

    def assignments(self, node: ast.AST, scope: set[str]) -> Iterator[tuple[ast.Assign | ast.AnnAssign, set[str]]]:
        """All assignments below a node, each with the functions that its place sees."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Assign | ast.AnnAssign):
                yield child, scope
            yield from self.assignments(child, self.scope(child, scope) if isinstance(child, Function) else scope)

    def is_behaviour(self, target: ast.expr, value: ast.expr | None, scope: set[str]) -> bool:
        """Is a function assigned? A name of both a method and of data is one if the target holds something to call."""
        if isinstance(value, ast.IfExp):
            return any(self.is_behaviour(target, each, scope) for each in (value.body, value.orelse))
        if isinstance(value, ast.Call):
            return ast.unparse(value.func).rpartition(".")[2] in {"partial", "partialmethod"}
        if isinstance(value, ast.Attribute):
            called = isinstance(target, ast.Attribute) and target.attr in self._callables
            return value.attr in self._functions and (called or value.attr not in self._data)
        return isinstance(value, ast.Lambda) or (isinstance(value, ast.Name) and value.id in scope)

    def scope(self, node: ast.Module | Function, around: Iterable[str] = ()) -> set[str]:
        """Names of functions as the body of a module or function sees them; what it binds otherwise hides them."""
        seen = set(around)
        if not isinstance(node, ast.Module):
            arguments = dict(_annotated(node.args))
            seen -= {each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            seen |= {name for name, annotation in arguments.items() if _names_callable(annotation, self._aliases)}
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and not isinstance(node, ast.Module):
                seen.discard(each.id)
            elif isinstance(each, ast.ImportFrom):
                seen |= {alias.asname or alias.name for alias in each.names if alias.name in self._functions}
        return seen | {each.name for each in node.body if isinstance(each, Function)}


def _annotated(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr]]:
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        if argument.annotation is not None:
            yield argument.arg, argument.annotation


def _only_not_implemented(node: Function) -> bool:
    body = [each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])


def _premature(function: Function) -> Iterator[tuple[int, str]]:
    """Lambdas among the arguments of a call, with what they use and only a later line of the function makes."""
    first: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = ast.unparse(node)
            first[name] = min(first.get(name, node.lineno), node.lineno)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    arguments = [each for call in calls for each in (*call.args, *(keyword.value for keyword in call.keywords))]
    for argument in arguments:
        if isinstance(argument, ast.Lambda):
            used = {ast.unparse(node) for node in ast.walk(argument.body) if isinstance(node, ast.Name | ast.Attribute)}
            for name in sorted(used):
                if first.get(name, 0) > (argument.end_lineno or argument.lineno):
                    yield argument.lineno, name


def _constructor(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Names and types that the constructor takes: of ``__init__``, else the fields of a class without one."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            yield from _annotated(each.args)
            return
    if node.decorator_list or node.bases:
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                yield each.target.id, each.annotation


def _names_callable(annotation: ast.expr, aliases: set[str]) -> bool:
    if isinstance(annotation, ast.BinOp):
        return _names_callable(annotation.left, aliases) or _names_callable(annotation.right, aliases)
    if isinstance(annotation, ast.Subscript):
        return _names_callable(annotation.value, aliases)
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value.partition("[")[0] in {"Callable", *aliases}
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return name == "Callable" or name in aliases


def _callable_aliases(tree: ast.Module) -> Iterator[str]:
    """Names of a module that stand for a Callable: ``Rows: TypeAlias = Callable[[], str]``."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Subscript | ast.BinOp):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and _names_callable(node.value, set()):
            yield target.id


# --- the table ----------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """One row of the table."""

    key: str
    words: str
    goal: int
    offences: Callable[[House], list[Offence] | None]
    weigh: Callable[[list[Offence], House], int] = lambda offences, _: len(offences)


class Count(NamedTuple):
    """A figure as it is today."""

    figure: Figure
    offences: list[Offence]
    value: int | None
    """None if there is nothing yet that it could be counted from."""
    limit: int


FIGURES = (
    # 37 with encryption.py, users import Keys, and flow.py: they import Flow, chain and group.
    Figure("entries", "entries in streamworker/", 37, lambda house: house.entries("")),
    # 24 with partitions: their routing, which brokers import, and their operator, which imports operators.
    Figure("broker_entries", "entries in streamworker/broker/", 24, lambda house: house.entries("broker")),
    Figure("files", "Python files", 150, House.files),
    Figure("lines", "lines of Python", 26_500, House.files, lambda _, house: sum(each.lines for each in house.modules)),
    Figure("path", "files on the way of a job (docs/architecture.md)", 20, House.path_of_a_job),
    Figure("single_importer", "core modules with a single importer", 9, House.single_importers),
    Figure("small", f"modules below {FLOOR_LINES} lines with one importer", 0, House.small),
    Figure("foreign", "assignments of behaviour into another object's attribute", 0, House.foreign_behaviour),
    Figure("untraceable", "hooks with NotImplementedError, lambdas made before what they use", 0, House.untraceable),
    Figure("modes", "comparisons with a mode outside of settings and wiring", 0, House.mode_branches),
    Figure("callables", f"constructors with more than {CONSTRUCTOR_CALLABLES} callables", 0, House.many_callables),
    Figure("basenames", "modules named as another", 0, House.repeated_basenames),
    Figure("classes", "public classes named as another", 0, House.repeated_classes),
    Figure("gerunds", "modules and classes on -ing", 0, House.gerunds),
    Figure("words", "banned words in prose and names", 0, House.banned_words),
    Figure("see_only", 'docstrings that only say "See X"', 0, House.see_only),
    Figure("wide_rows", f"layers of more than {ROW_NAMES} names", 0, House.wide_rows),
)


def limits(root: Path) -> dict[str, int]:
    """What each figure may be today: its goal, or a value above it that tools/house.toml holds."""
    file = root / "tools" / "house.toml"
    held = tomllib.loads(file.read_text("utf-8")) if file.exists() else {}
    if unknown := held.keys() - {figure.key for figure in FIGURES}:
        raise SystemExit(f"{file}: no such figure: {', '.join(sorted(unknown))}")
    return {figure.key: max(figure.goal, held.get(figure.key, 0)) for figure in FIGURES}


def counts(house: House) -> list[Count]:
    """All figures, each counted once."""
    allowed = limits(house.root)
    found = []
    for figure in FIGURES:
        offences = figure.offences(house)
        value = None if offences is None else figure.weigh(offences, house)
        found.append(Count(figure, offences or [], value, allowed[figure.key]))
    return found


def lower(root: Path, found: list[Count]) -> None:
    """Write today's values as limits of the figures that are above their goals. No limit rises by that."""
    lines = ["# Limits of the figures that have not reached their goals. They only fall: python tools/house.py --lower"]
    for figure, _, value, limit in found:
        if (lowered := limit if value is None else min(limit, value)) > figure.goal:
            lines.append(f"{figure.key} = {lowered}")
    (root / "tools" / "house.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(found: list[Count]) -> Iterator[str]:
    """The figures, one a line."""
    yield f"{'':<76}{'today':>7}{'goal':>8}{'limit':>8}"
    for figure, _, value, limit in found:
        mark = ""
        if value is not None and value > figure.goal:
            mark = "  ABOVE ITS LIMIT" if value > limit else "  *" if value == limit else "  * lower the limit"
        yield f"{figure.words:<76}{'-' if value is None else value:>7}{figure.goal:>8}{limit:>8}{mark}"


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Print the figures; with ``--strict`` the exit code is 1 if one is above its limit."""
    parser = argparse.ArgumentParser(prog="house", description="The figures of the package as a whole.")
    parser.add_argument("paths", nargs="*", help="only the offences below these paths")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a figure is above its limit")
    parser.add_argument("--lower", action="store_true", help="write today's values into tools/house.toml")
    options = parser.parse_args(arguments)
    found = counts(House(root))
    if options.lower:
        lower(root, found)
    print("\n".join(table(found)))
    above = [count for count in found if (count.value or 0) > count.limit]
    for count in above if options.strict else found:
        _print_offences(count, tuple(options.paths))
    if options.strict and above:
        print(f"house: above the limit: {'; '.join(count.figure.words for count in above)}", file=sys.stderr)
        return 1
    return 0


def _print_offences(count: Count, paths: tuple[str, ...]) -> None:
    offences = [each for each in count.offences if not paths or each.path.startswith(paths)]
    if count.figure.goal < MOST_LISTED and offences:
        print(f"\n{count.figure.words}: {len(offences)}")
        print("\n".join(map(str, sorted(offences))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

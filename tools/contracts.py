"""Kinds of import-linter contracts that the house needs beside the built-in ones (configured in pyproject.toml).

Both pass over rooms that are not built yet, where the built-in kinds stop with an error: the plan may be ahead.
"""

from typing import Any

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


def _package(graph: ImportGraph, name: str) -> set[str]:
    """A module and everything below it; with ``.*`` at the end only what is below it. Nothing if it does not exist."""
    if name.endswith(".*"):
        return _package(graph, name[:-2]) - {name[:-2]}
    return {name, *graph.find_descendants(name)} if name in graph.modules else set()


def _packages(graph: ImportGraph, names: Any) -> set[str]:
    # Any: import-linter turns the class's field descriptors into plain lists of names, or None, without telling types.
    return {module for name in names or [] for module in _package(graph, name)}


class _Rule(Contract):
    """Finds imports that may not be and prints one line for each."""

    def _wrong_imports(self, graph: ImportGraph) -> list[tuple[str, str]]:
        raise NotImplementedError

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002 - import-linter's words
        wrong = self._wrong_imports(graph)
        lines = [
            f"{importer} -> {imported} (line {', '.join(str(detail['line_number']) for detail in details)})"
            for importer, imported in sorted(wrong)
            if (details := graph.get_import_details(importer=importer, imported=imported))
        ]
        return ContractCheck(kept=not lines, metadata={"lines": lines})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata["lines"]:
            output.print_error(line)


class ImportsOnly(_Rule):
    """Each of ``modules`` imports, of our own code, nothing but itself and ``may_import``."""

    type_name = "imports-only"

    modules = fields.ListField(subfield=fields.StringField())
    may_import = fields.ListField(subfield=fields.StringField(), required=False)

    def _wrong_imports(self, graph: ImportGraph) -> list[tuple[str, str]]:
        roots = tuple(f"{root}." for root in self.session_options["root_packages"])
        allowed = _packages(graph, self.may_import)
        wrong = []
        for module in self.modules:  # type: ignore[attr-defined]
            own = _package(graph, module)
            for importer in own:
                imported = graph.find_modules_directly_imported_by(importer)
                wrong += [(importer, name) for name in imported - own - allowed if f"{name}.".startswith(roots)]
        return wrong


class ImportedOnlyBy(_Rule):
    """Each of ``modules`` is imported by itself and by ``importers``, by nobody else."""

    type_name = "imported-only-by"

    modules = fields.ListField(subfield=fields.StringField())
    importers = fields.ListField(subfield=fields.StringField())

    def _wrong_imports(self, graph: ImportGraph) -> list[tuple[str, str]]:
        allowed = _packages(graph, self.importers)
        wrong = []
        for module in self.modules:  # type: ignore[attr-defined]
            own = _package(graph, module)
            for imported in own:
                importers = graph.find_modules_that_directly_import(imported)
                wrong += [(name, imported) for name in importers - own - allowed]
        return wrong

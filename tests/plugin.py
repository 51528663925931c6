"""Which tests run, in which order, and one line about those that did not: a plugin of pytest, named in pyproject.toml.

``pytest`` leaves out what a marker of `LEFT_OUT` carries. ``--all`` runs what is marked ``all`` too, as is by itself what tries
a promise once more (`AGAIN`). A test runs whatever its markers when it is asked for: by its node id, by ``-m`` with the name of
its marker, by ``--last-failed``, or by a ``-k`` that fits no other test. ``--order-seed N`` runs everything in an order of
chance, the same for the same N.
"""

from __future__ import annotations

import gc
import os
import random
import re
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = {"all": "--all", "slow": "-m slow", "crash": "./dev crash"}
"""Markers of tests that run only when they are asked for, and how to ask."""

AGAIN = ("ground", "mode", "dispatcher", "loop")
"""Parameters whose values try the same promise in another mode or on another loop: the first is tried every day.

Both modes of what calls a broker itself (`broker_factory`) are, unless it is ``mode_free``: their scripts differ.
"""

_left_out = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("streamworker's own tests")
    group.addoption("--all", action="store_true", dest="run_all", help="run what is marked `all` too, as CI does")
    group.addoption(
        "--order-seed",
        type=int,
        metavar="N",
        help="run modules, and the tests of each, in an order of chance made from N",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_left_out] = Counter()
    config.pluginmanager.register(_Again(), "streamworker-again")
    if config.pluginmanager.has_plugin("xdist"):
        config.pluginmanager.register(_Distributed(), "streamworker-distributed")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    gc.disable()  # while only that is made which stays


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()  # modules and tests: no collection has to look through them, in no process that is forked either


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """``-n auto``: what a core has left while a test waits for servers and processes, another one uses."""
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS"):
        return None  # xdist reads it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(3 * cores + 1, 12)


def pytest_report_header(config: pytest.Config) -> str | None:
    seed = config.option.order_seed
    return None if seed is None else f"order: by chance, again with --order-seed {seed}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Last: -k, -m and --last-failed have taken out what they leave out.
    _choose(config, items)
    if config.option.order_seed is not None:
        _shuffle(items, config.option.order_seed)


class _Again:
    """Marks ``all`` what tries a promise once more, before anything is chosen by its markers."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seen = set()
        for item in items:
            parameters = getattr(item, "callspec", None) and item.callspec.params
            if not parameters or parameters.keys().isdisjoint(AGAIN):
                continue
            if "broker_factory" in item.fixturenames and not item.get_closest_marker("mode_free"):
                continue
            others = [(name, repr(value)) for name, value in parameters.items() if name not in AGAIN]
            promise = item.nodeid.partition("[")[0], *sorted(others)
            if promise in seen:
                item.add_marker("all")
            seen.add(promise)


def _choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = set(re.findall(r"\w+", config.option.markexpr))
    asked |= {"all"} if config.option.run_all else set()
    named = _Named(config)
    run, out = [], []
    counts = Counter[str]()
    for item in items:
        markers = [name for name in LEFT_OUT if item.get_closest_marker(name)]
        # --all says nothing about a test that is slow besides; -m with the name of any of its markers does.
        missing = [name for name in markers if name not in asked]
        explicit = any(name in asked and (name != "all" or config.option.markexpr) for name in markers)
        if not missing or explicit or named(item):
            run.append(item)
        else:
            out.append(item)
            counts[missing[-1]] += 1
    if out and not run and config.option.keyword:
        return
    items[:] = run
    if out:
        config.hook.pytest_deselected(items=out)
        config.stash[_left_out] += counts


class _Named:
    """Whether a test was asked for by its node id, or failed last when those are to be repeated."""

    def __init__(self, config: pytest.Config) -> None:
        self._ids: list[tuple[Path, str]] = []
        for argument in config.args:
            path, colons, name = argument.partition("::")
            if colons:
                self._ids.append(((config.invocation_params.dir / path).resolve(), name))
        again = config.option.lf or config.option.failedfirst if hasattr(config.option, "lf") else False
        self._failed = config.cache.get("cache/lastfailed", {}) if again and config.cache is not None else {}

    def __call__(self, item: pytest.Item) -> bool:
        name = item.nodeid.partition("::")[2]
        return item.nodeid in self._failed or any(
            item.path == path and (name == asked or name.startswith((f"{asked}[", f"{asked}::")))
            for path, asked in self._ids
        )


def _shuffle(items: list[pytest.Item], seed: int) -> None:
    chance = random.Random(seed)
    modules: dict[Path, list[pytest.Item]] = {}
    for item in sorted(items, key=lambda item: item.nodeid):
        modules.setdefault(item.path, []).append(item)
    order = list(modules)
    chance.shuffle(order)
    for path in order:
        chance.shuffle(modules[path])
    items[:] = [item for path in order for item in modules[path]]


class _Distributed:
    """With pytest-xdist the processes choose, and the one that reports has to hear of it."""

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["left_out"] = dict(session.config.stash[_left_out])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Every process chose the same.
        node.config.stash[_left_out] |= Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    words = [f"{count} skipped ({reason})" for reason, count in skipped.most_common()]
    words += [f"{count} marked {name} ({LEFT_OUT[name]})" for name, count in config.stash[_left_out].most_common()]
    if words:
        terminalreporter.write_line(f"not run: {', '.join(words)}")
    if config.option.order_seed is not None:
        terminalreporter.write_line(f"order: again with --order-seed {config.option.order_seed}")


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())

"""Alert rules and the Grafana dashboard name metrics, labels and pages that exist; Prometheus itself tries the alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from streamworker.worker.metrics import FAMILIES

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/streamworker.rules.yaml"
BOARD = ROOT / "deploy/grafana/streamworker.json"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")

# What Prometheus itself adds.
TARGET = {"job", "instance"}


def samples() -> dict[str, set[str]]:
    """Every name a query may use, with its labels."""
    found: dict[str, set[str]] = {}
    for family in FAMILIES:
        if family.kind == "histogram":
            found[f"{family.name}_bucket"] = {*family.labels, "le"}
            found[f"{family.name}_sum"] = found[f"{family.name}_count"] = {*family.labels}
        else:
            found[family.name] = {*family.labels}
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[tuple[str, str]]:
    panels = json.loads(BOARD.read_text())["panels"]
    shown = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]
    return [(rule["alert"], rule["expr"]) for rule in rules()] + shown


@pytest.mark.parametrize(("where", "query"), queries())
def test_queries_use_what_is_exported(where, query):
    known = samples()
    names = re.findall(r"\b(?:streamworker|process)_\w+", query)
    assert names, where
    allowed = set(TARGET)
    for name in names:
        assert name in known, f"{where}: {name}"
        allowed |= known[name]
    for selector in re.findall(r"\{([^}]*)\}", query):
        for label in re.findall(r"(\w+)\s*[=!]", selector):
            assert label in allowed, f"{where}: {label}"
    for grouping in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query):
        for label in filter(None, (word.strip() for word in grouping.split(","))):
            assert label in allowed, f"{where}: {label}"


def test_everything_exported_is_shown():
    used = " ".join(query for _, query in queries())
    assert [family.name for family in FAMILIES if family.name not in used] == []


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_leads_to_a_page_that_says_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (ROOT / page).read_text()
    anchors = [
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    ]
    assert not anchor or anchor in anchors


def test_the_board_is_one_that_grafana_takes():
    board = json.loads(BOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel.get("targets", []))
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "job", "queue"}


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_the_rules_and_each_fires_when_it_should():
    promtool("check", "rules", RULES)
    promtool("test", "rules", ROOT / "tests/deploy/prometheus.test.yaml")


def test_every_alert_is_tried():
    tried = (ROOT / "tests/deploy/prometheus.test.yaml").read_text()
    for rule in rules():
        assert f'alertname="{rule["alert"]}"' in tried


@needs_promtool
def test_prometheus_can_read_the_queries_of_the_board(tmp_path):
    filled = [
        query.replace("$__rate_interval", "1m").replace("$job", ".*").replace("$queue", ".*") for _, query in queries()
    ]
    made = {
        "groups": [{"name": "board", "rules": [{"record": f"q:{n}", "expr": query} for n, query in enumerate(filled)]}]
    }
    (tmp_path / "board.yaml").write_text(yaml.safe_dump(made))
    promtool("check", "rules", tmp_path / "board.yaml")

"""``./dev containers`` where there is no engine: said in one line, and skipped only if that was asked for and is the reason."""

import pytest

from tests.containers import engine
from tests.containers.__main__ import main


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No engine answers, and whoever may start one is a script of the test."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("CONTAINERS_STATE", str(tmp_path))
    monkeypatch.setattr(engine, "TURN", tmp_path / "turn")
    monkeypatch.setattr(engine, "PREPARE", tmp_path / "prepare")
    monkeypatch.setattr(engine.os, "geteuid", lambda: 0)
    return tmp_path


def prepare(folder, script):
    (folder / "prepare").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "prepare").chmod(0o755)


def test_nobody_can_start_one(capsys):
    assert main(["--or-skip"]) == 0
    assert capsys.readouterr().out == (
        "containers: not run: no Docker engine with compose answers here: install one (docs.docker.com/engine/install), or start it\n"
    )
    assert main([]) == 1


def test_it_cannot_be_started(capsys, nowhere):
    prepare(nowhere, "echo much; echo 'operation not permitted' >&2; exit 1")
    assert main(["--or-skip"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("containers: not run: no Docker engine can be started here")
    assert last.endswith("ended with 1: operation not permitted")


def test_an_engine_without_base_images_is_no_reason_to_skip(capsys, nowhere, monkeypatch):
    monkeypatch.setattr(engine, "succeeds", lambda *words: "image" not in words)
    prepare(nowhere, "echo 'the mirror is away'; exit 1")
    assert main(["--or-skip"]) == 1
    assert "the mirror is away" in capsys.readouterr().err


def test_an_engine_that_others_have_started_is_left_alone(nowhere):
    (nowhere / "dockerd.pid").write_text("1")
    prepare(nowhere, "exit 0")
    with engine.Engine() as mine:
        assert mine._ours is None

"""Somebody who has nothing but README and tutorial: a fresh clone, an empty home, and the commands as they stand in the files.

`./dev newcomer`. What is not on any index yet is found where pip and uv are told to look besides (PIP_FIND_LINKS, UV_FIND_LINKS):
the wheel is built from that clone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, Block, blocks_of
from tests.examples.test_tutorial import follow, mail_server
from tools.walk import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
# `./dev test` as it stands is the whole suite, which CI runs anyway: here it has to set up everything and run the first tests.
A_FEW = os.environ.get("NEWCOMER_TESTS", "tests/unit/test_policy.py tests/unit/test_testing.py")


class Newcomer:
    """A home with nothing in it, and a clone."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.clone = home / "streamworker"
        kept = environment(home)
        # A Python, and what every machine has; nothing of this checkout.
        path = [str(Path(sys.base_prefix) / "bin"), "/usr/local/bin", "/usr/bin", "/bin"]
        self.env = {**kept, "PATH": os.pathsep.join(path), "PYTEST_ADDOPTS": A_FEW, "GIT_CONFIG_NOSYSTEM": "1"}
        self.run(f"git -c safe.directory='*' clone -q {ROOT} streamworker", home)

    def run(self, script: str, where: Path, **more: str) -> str:
        done = subprocess.run(
            ["bash", "-c", "set -e\n" + script], cwd=where, env={**self.env, **more}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, timeout=2400,
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout[-6000:]}"
        return done.stdout

    def block(self, page: str, begins: str) -> Block:
        """The block of a page that begins so."""
        text = (self.clone / page).read_text()
        (found,) = [block for block in blocks_of(page, text) if block.body.startswith(begins)]
        return found


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def published(newcomer: Newcomer) -> dict[str, str]:
    """Where pip and uv find what is to be published."""
    newcomer.run("./dev build", newcomer.clone)
    links = f"{newcomer.clone / 'dist'} {newcomer.env.get('PIP_FIND_LINKS', '')}".strip()
    return {"PIP_FIND_LINKS": links, "UV_FIND_LINKS": str(newcomer.clone / "dist")}


def test_the_two_commands(newcomer: Newcomer):
    script = newcomer.block("README.md", "./dev demo").body
    assert [line.split("#")[0].split() for line in script.splitlines()] == [["./dev", "demo"], ["./dev", "test"]]
    said = newcomer.run(script, newcomer.clone)
    assert "Nothing is lost: 10,000 of 10,000 jobs are accounted for." in said
    assert " passed" in said


def test_without_a_checkout(newcomer: Newcomer, published: dict[str, str]):
    uv = str(Path(sys.executable).parent)  # uv has to be installed by somebody; here it came with the development lock
    script = newcomer.block("README.md", "uvx").body
    said = newcomer.run(script, newcomer.home, **published, PATH=f"{newcomer.env['PATH']}{os.pathsep}{uv}")
    assert "Nothing is lost: 10,000 of 10,000 jobs are accounted for." in said


def test_the_tutorial(newcomer: Newcomer, published: dict[str, str]):
    newcomer.run(newcomer.block("docs/tutorial.md", "mkdir hello").body, newcomer.home, **published)
    hello = newcomer.home / "hello"
    env = {**newcomer.env, "PATH": f"{hello / '.venv/bin'}{os.pathsep}{newcomer.env['PATH']}"}
    env.pop("PYTEST_ADDOPTS")
    with mail_server() as (port, mails):
        assert follow(hello, {**env, "COLUMNS": "200", "SMTP_PORT": str(port)}) >= 8
    assert mails.count("ann@example.org") == 1

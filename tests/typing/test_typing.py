"""mypy --strict and basedpyright over the golden files: clean where it should be, complaining where it must."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = [str(path) for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_")]


def check(*command: str) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(180)
def test_mypy():
    # A cache of its own: with other options than those of pyproject.toml, the two would throw away each other's.
    cache = f"--cache-dir={ROOT}/.mypy_cache/golden"
    check(sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--follow-imports=silent", cache, *GOLDEN)


# Without their tests.
EXAMPLES = [
    str(path / path.name if (path / path.name).is_dir() else path)
    for path in (ROOT / "examples").iterdir()
    if path.is_dir()
]


@pytest.mark.timeout(180)
def test_basedpyright(tmp_path):
    pyright(tmp_path, [*GOLDEN, str(ROOT / "examples/shop/shop")], "strict")


@pytest.mark.timeout(180)
def test_basedpyright_on_all_examples(tmp_path):
    """In the mode that editors begin with."""
    pyright(tmp_path, EXAMPLES, "standard")


def pyright(directory, paths, mode):
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    assert program, "basedpyright is not installed beside this Python"
    rules = {
        "include": paths,
        "extraPaths": [str(ROOT), str(ROOT / "examples/shop"), str(ROOT / "examples/mailer")],
        "pythonVersion": "3.11",
        "typeCheckingMode": mode,
        # Those are mypy's; in the golden files each checker has to find every mistake itself.
        "enableTypeIgnoreComments": mode != "strict",
        "reportUnnecessaryTypeIgnoreComment": "error" if mode == "strict" else "none",
    }
    (directory / "pyrightconfig.json").write_text(json.dumps(rules))
    check(
        program, "--pythonpath", sys.executable, "--level", "error", "--project", str(directory / "pyrightconfig.json")
    )

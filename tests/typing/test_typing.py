"""mypy --strict and basedpyright over the golden files: clean where it should be, complaining where it must."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mypy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = [str(path) for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_")]


@pytest.mark.timeout(180)
def test_mypy():
    mypy.run(GOLDEN)


# Without their tests.
EXAMPLES = [
    str(path / path.name if (path / path.name).is_dir() else path)
    for path in (ROOT / "examples").iterdir()
    if path.is_dir()
]


@pytest.mark.all
@pytest.mark.timeout(180)
def test_basedpyright(tmp_path):
    """Both in one go, most of which is for what they import: the examples in the mode that editors begin with."""
    program = shutil.which("basedpyright", path=str(Path(sys.executable).parent))
    assert program, "basedpyright is not installed beside this Python"
    strict = [*GOLDEN, str(ROOT / "examples/shop/shop")]
    rules = {
        "include": [*GOLDEN, *EXAMPLES],
        "extraPaths": [str(ROOT), str(ROOT / "examples/shop"), str(ROOT / "examples/mailer")],
        "pythonVersion": "3.11",
        "typeCheckingMode": "standard",
        "strict": strict,
        # Those are mypy's; in the golden files each checker has to find every mistake itself.
        "enableTypeIgnoreComments": False,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps(rules))
    done = subprocess.run(
        [program, "--pythonpath", sys.executable, "--level", "error", "--project", str(project)],
        cwd=ROOT, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

"""deploy/systemd: units systemd understands, and in agreement with the program."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from streamworker.errors import ConfigurationError, UsageError
from streamworker.settings import Settings
from streamworker.worker import HAND_BACK, UNWIND

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))


def service(name):
    parser = configparser.RawConfigParser(strict=False, interpolation=None)  # type: ignore[call-arg]
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(SYSTEMD / name)
    return parser["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_takes_it(unit, tmp_path):
    # The program is not installed here; everything else is as it is.
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=50)
    mine = [line for line in (done.stdout + done.stderr).splitlines() if unit.stem.rstrip("@") in line]
    assert mine == []
    assert done.returncode == 0
    copy.write_text(copy.read_text().replace("KillMode=mixed", "KillMode=gentle").replace("Type=oneshot", "Type=once"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=50)
    assert "Failed to parse" in done.stdout + done.stderr


def test_systemd_waits_longer_than_a_drain_takes():
    assert float(service("streamworker@.service")["TimeoutStopSec"]) > Settings().grace + HAND_BACK + UNWIND


def test_what_does_not_get_better_is_not_tried_again():
    codes = service("streamworker@.service")["RestartPreventExitStatus"].split()
    assert codes == [str(UsageError.exit_code), str(ConfigurationError.exit_code)]


def test_postgresql_is_asked_for_by_its_own_file_alone():
    """systemd starts no unit that names a credential which is not there: workers without a ledger have none."""
    unit, ledger = SYSTEMD / "streamworker@.service", SYSTEMD / "streamworker@.service.d" / "postgresql.conf"
    settings = "\n".join(line for line in unit.read_text().splitlines() if not line.startswith("#"))
    assert "database" not in settings
    assert "postgres" not in settings
    assert "LoadCredential=database-url:/etc/streamworker/database-url" in ledger.read_text()
    assert "Environment=DATABASE_URL_FILE=%d/database-url" in ledger.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd")
def test_systemd_takes_the_unit_with_its_addition(tmp_path):
    copy = tmp_path / "streamworker@.service"
    text = (SYSTEMD / copy.name).read_text()
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    shutil.copytree(SYSTEMD / f"{copy.name}.d", tmp_path / f"{copy.name}.d")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=50)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "postgresql.conf" in line] == []
    assert done.returncode == 0


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_urls_are_credentials_not_environment(unit):
    text = unit.read_text()
    for name, key in re.findall(r"(\w+_URL_FILE)=%d/(\S+)", text):
        assert key == name.removesuffix("_FILE").lower().replace("_", "-")
        assert f"LoadCredential={key}:/etc/streamworker/{key}" in text
    assert "DynamicUser=yes" in text

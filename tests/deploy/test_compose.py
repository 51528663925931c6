"""compose.yaml, .env.example and the Dockerfile agree with the program and with each other. `./dev containers` runs them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from streamworker import settings
from streamworker.settings import Settings
from streamworker.settings.rules import to_text
from streamworker.worker import HAND_BACK, UNWIND
from tests.deploy.tools import jsonschema_complaints

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "compose.yaml").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# Where the containers decide: the two URLs are made of passwords and names, health has a port of its own inside, and
# nothing embedded runs there.
DECIDED = {"REDIS_URL", "DATABASE_URL", "STREAMWORKER_REDIS_URL", "STREAMWORKER_DATABASE_URL", "STREAMWORKER_HTTP", "STREAMWORKER_STATE_DIR"}  # fmt: skip

LINE = re.compile(r"^(#?)([A-Z_]+)=(.*)$", re.MULTILINE)
USED = re.compile(r"\$\{([A-Z_]+)(?::([-?])([^}]*))?\}")


def example():
    """Name to (whether it is commented out, value)."""
    lines = LINE.findall(EXAMPLE)
    assert len(lines) == len({name for _, name, _ in lines})
    return {name: (bool(comment), value) for comment, name, value in lines}


def test_every_setting_is_explained_and_passes_through():
    passed = yaml.safe_load(COMPOSE)["x-streamworker"]["environment"]
    known = set(settings._KNOWN) - DECIDED - set(settings._READ_ELSEWHERE)
    assert known <= set(example())
    assert known <= set(passed)
    ours = {name for name in {*example(), *passed} if name.startswith("STREAMWORKER_")} - {"STREAMWORKER_IMAGE"}
    assert ours <= set(settings._KNOWN)


@pytest.mark.parametrize(
    "name", sorted(set(settings._RULES) - {"redis_url", "database_url", "http", "state_dir", "app"})
)
def test_the_defaults_that_are_shown_are_the_programs(name):
    commented, value = example()[f"STREAMWORKER_{name.upper()}"]
    assert commented
    assert value == to_text(getattr(Settings(), name))


def test_every_variable_of_compose_is_explained_with_its_default():
    used = {name: (kind, default) for name, kind, default in USED.findall(COMPOSE)}
    for name, (kind, default) in used.items():
        commented, value = example()[name]
        assert commented == (kind != "?"), name
        if kind == "-":
            assert value == default, name
    passed = {name for name, value in yaml.safe_load(COMPOSE)["x-streamworker"]["environment"].items() if value is None}
    assert set(example()) == set(used) | passed


def test_every_variable_has_words_before_it():
    for block in re.split(r"\n\n+", EXAMPLE):
        lines = block.strip().splitlines()
        assert lines[0].startswith("# "), block


def test_no_password_has_a_default():
    assert {name for name, (commented, value) in example().items() if not commented and value == ""} == {
        "REDIS_PASSWORD",
        "POSTGRES_PASSWORD",
        "STREAMWORKER_DASHBOARD_PASSWORD",
    }


def test_the_engine_waits_longer_than_a_drain_takes():
    waits = float(example()["WORKER_STOP_GRACE_PERIOD"][1].removesuffix("s"))
    assert waits > Settings().grace + HAND_BACK + UNWIND


def test_redis_never_drops_jobs():
    command = yaml.safe_load(COMPOSE)["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"


def test_all_our_containers_are_locked_down_alike():
    for name, service in yaml.safe_load(COMPOSE)["services"].items():
        if name not in ("redis", "postgres"):
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]
            fleet = name != "mailbox"
            assert service["image"] == (
                "${STREAMWORKER_IMAGE:-streamworker:example}" if fleet else "streamworker:example"
            )


def test_servers_have_what_their_entrypoints_need_and_no_more():
    """They begin as root, since new volumes are root's; what runs then is their own user, without capabilities."""
    prepare = {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}
    for name, more in (("redis", {"SETPCAP"}), ("postgres", set())):
        service = yaml.safe_load(COMPOSE)["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert set(service["cap_add"]) == prepare | more
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert "ports" not in service  # only the containers of the fleet reach them


TAGS = {"PYTHON_IMAGE": "python:3.13-slim", "REDIS_IMAGE": "redis:8", "POSTGRES_IMAGE": "postgres:17"}


def base_images(dockerfile: str, compose: str) -> dict[str, str]:
    """The base images by variable: the tag that each one has where the variable is not set."""
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) >= {"${PYTHON_IMAGE}"}
    assert "PYTHON_IMAGE" not in re.sub(r"^(ARG|FROM) .*$|^#.*$", "", dockerfile, flags=re.MULTILINE)
    services = yaml.safe_load(compose)["services"].values()
    words = [*(service["image"] for service in services)]
    words += [service["build"]["args"]["PYTHON_IMAGE"] for service in services if "build" in service]
    named = [re.fullmatch(r"\$\{(\w+_IMAGE):-(.*)\}", word) for word in words]
    found = {match[1]: match[2] for match in named if match} | dict(
        re.findall(r"^ARG (PYTHON_IMAGE)=(\S+)", dockerfile, re.MULTILINE)
    )
    return {variable: tag for variable, tag in found.items() if variable != "STREAMWORKER_IMAGE"}


def test_base_images_are_the_three_and_each_has_a_digest_to_pin_it():
    assert base_images(DOCKERFILE, COMPOSE) == TAGS
    pins = dict(re.findall(r"^(\w+)=(\S+)$", (ROOT / "deploy/base-images.env").read_text(), re.MULTILINE))
    assert set(pins) == set(TAGS)
    for variable, tag in TAGS.items():
        assert re.fullmatch(re.escape(tag) + r"@sha256:[0-9a-f]{64}", pins[variable])


def test_what_the_dockerfile_copies_is_let_through_and_nothing_else():
    copied = {
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / word).exists() for word in copied)


def test_the_python_of_the_image_is_one_we_support():
    version = re.search(r"python:(3\.\d+)-slim", TAGS["PYTHON_IMAGE"])[1]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert f"Programming Language :: Python :: {version}" in classifiers


def test_compose_is_valid_by_the_specification():
    assert jsonschema_complaints(["--builtin-schema", "vendor.compose-spec"], ROOT / "compose.yaml") == ""


def test_the_shop_is_built_of_the_same_images_and_lets_its_own_files_through():
    shop = ROOT / "examples/shop"
    dockerfile, compose = (shop / "Dockerfile").read_text(), yaml.safe_load((shop / "compose.yaml").read_text())
    assert base_images(dockerfile, (shop / "compose.yaml").read_text()) == TAGS
    copied = {word for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]}
    # The repository's own .dockerignore leaves the example out.
    ignore = (shop / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[1] == "*" and {line[1:] for line in ignore if line.startswith("!")} == copied
    assert "healthcheck" in compose["services"]["api"]  # for `up --wait`
    assert jsonschema_complaints(["--builtin-schema", "vendor.compose-spec"], shop / "compose.yaml") == ""

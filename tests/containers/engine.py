"""The container engine: found or started, and asked by its own command line."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
BASES: Final = ("python:3.13-slim", "redis:8", "postgres:17")
PREPARE: Final = ROOT.parent / "shared" / "containers" / "prepare"
"""Beside the checkout, where no image registry is reachable: starts an engine and makes the base images."""
TURN: Final = Path(tempfile.gettempdir()) / f"streamworker-containers-{os.getuid()}.turn"


class Unusable(Exception):
    """There is no engine, and why."""


class Failed(Exception):
    """A command of the engine failed."""


def run(*words: str, env: Mapping[str, str] | None = None, stdin: str | None = None, timeout: float = 600) -> str:
    """Run a command in the checkout; returns what it wrote to standard output."""
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **(env or {})}, input=stdin, capture_output=True, text=True, timeout=timeout
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise Failed(f"{' '.join(words)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def succeeds(*words: str) -> bool:
    """Whether a command ends well."""
    try:
        return subprocess.run(words, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Engine:
    """The engine of this machine: used as it is where one answers, else started by `PREPARE` and stopped again.

    Runs of several checkouts take turns: they build images of the same names, and whoever started the engine ends it.

    Args:
        keep: leave an engine that was started here running.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._turn = TURN.open("w")
        self._ours: int | None = None

    def __enter__(self) -> Engine:
        """See that an engine answers and has, or can get, the base images.

        Raises:
            Unusable: none can be had here, and why.
            Failed: there is one, and the base images could not be made.
        """
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            self._get_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours is not None and not self._keep:
            stop(self._ours)
        self._turn.close()

    def _get_ready(self) -> None:
        if answers():
            if all(succeeds("docker", "image", "inspect", base) for base in BASES):
                return
        elif not (PREPARE.exists() and os.geteuid() == 0):
            raise Unusable(
                "no Docker engine with compose answers here: install one (docs.docker.com/engine/install), or start it"
            )
        if not PREPARE.exists():
            return  # the engine gets the images where everybody does
        before = noted_engine()
        print("containers: preparing an engine and base images, two minutes the first time", flush=True)
        # Not through a pipe: the engine inherits what its starter writes to, and would hold it open for ever.
        with tempfile.TemporaryFile("w+") as said:
            code = subprocess.run([PREPARE], stdin=subprocess.DEVNULL, stdout=said, stderr=said).returncode
            said.seek(0)
            lines = said.read().split("\n")
        if (engine := noted_engine()) != before:
            self._ours = engine
        if code:
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            sentence = f"{PREPARE} ended with {code}: {last}"
            raise Failed(sentence) if answers() else Unusable(f"no Docker engine can be started here, {sentence}")


def answers() -> bool:
    """Whether an engine with compose is there."""
    return succeeds("docker", "info") and succeeds("docker", "compose", "version")


def noted_engine() -> int | None:
    """The process that `PREPARE` made, if it lives: its note may be an old one, of a process that is something else now."""
    file = Path(os.environ.get("CONTAINERS_STATE", "/var/cache/streamworker-containers")) / "dockerd.pid"
    noted = int(file.read_text()) if file.exists() else 0
    return noted if b"dockerd" in cmdline(noted) else None


def stop(engine: int) -> None:
    """End an engine in good order; its images stay on disk for the next time."""
    with suppress(ProcessLookupError):
        os.kill(engine, signal.SIGTERM)
        until(lambda: not cmdline(engine), 60, "the engine ends")


def cmdline(process: int) -> bytes:
    """What a process is; empty once it ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


class Compose:
    """One project of compose.yaml.

    Args:
        name: the project's; everything it makes carries it.
        settings: what an .env file would hold.
        directory: where that file is written.
    """

    def __init__(self, name: str, settings: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.settings = dict(settings)
        self._file = directory / "check.env"
        self._file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        self.env: dict[str, str] = {}
        """What a shell would export on top: it goes before the file."""

    def __call__(self, *words: str, timeout: float = 300) -> str:
        """``docker compose`` with these words."""
        command = ("docker", "compose", "--project-name", self.name, "--env-file", str(self._file), *words)
        return run(*command, env=self.env, timeout=timeout)

    def scale(self, count: int, *more: str) -> None:
        """Have so many workers."""
        self("up", "--detach", "--no-build", *more, "--scale", f"worker={count}", "worker")

    def containers(self, service: str = "worker") -> dict[str, Container]:
        """The running ones of a service, by short id, which is their host name."""
        ids = self("ps", "--quiet", "--status", "running", service).split()
        return {found.id: found for found in inspect(*ids)}

    def streamworker(self, *words: str) -> str:
        """A command in a container of its own, as people give it."""
        return self("run", "--rm", "--no-TTY", "--no-deps", "worker", *words)

    def inside(self, *words: str) -> str:
        """A command in a worker's container, which is faster."""
        return self("exec", "--no-TTY", "worker", "streamworker", *words)

    def redis(self, *words: str) -> Any:
        """A command of Redis."""
        return json.loads(run("docker", "exec", f"{self.name}-redis-1", "redis-cli", "--json", *words))

    def sql(self, statement: str, *, database: str = "streamworker") -> list[list[str]]:
        """A statement of PostgreSQL; the rows as text."""
        psql = ("psql", "-X", "-q", "-A", "-t", "-U", "streamworker", "-h", "127.0.0.1", "-d", database)
        password = self.settings["POSTGRES_PASSWORD"]
        execute = ("docker", "exec", "--env", f"PGPASSWORD={password}", f"{self.name}-postgres-1")
        out = run(*execute, *psql, "-c", statement)
        return [line.split("|") for line in out.splitlines()]


class Container(NamedTuple):
    """What `docker inspect` tells, as far as it matters here."""

    id: str
    full_id: str
    name: str
    image: str
    started: str
    finished: str
    exit_code: int
    user: str
    read_only: bool


def inspect(*containers: str) -> list[Container]:
    """Some containers, by id or name."""
    return [_container(told) for told in json.loads(run("docker", "inspect", *containers))] if containers else []


def _container(told: dict[str, Any]) -> Container:
    state, config = told["State"], told["Config"]
    return Container(
        told["Id"][:12],
        told["Id"],
        told["Name"].lstrip("/"),
        told["Image"],
        state["StartedAt"],
        state["FinishedAt"],
        state["ExitCode"],
        config["User"],
        told["HostConfig"]["ReadonlyRootfs"],
    )


def slow(container: str) -> bool:
    """Whether its last health checks were not answered at all: on a busy machine a Python may take 5 s to start and ask."""
    try:
        (told,) = json.loads(run("docker", "inspect", container))
    except Failed:
        return False
    asked = told["State"].get("Health", {}).get("Log") or []
    return any("exceeded timeout" in each["Output"] for each in asked[-3:])


class Deaths:
    """Every end of a container of one project and its exit code, as the engine tells them: `compose` removes the traces."""

    def __init__(self, project: str) -> None:
        self.codes: dict[str, int] = {}
        """Short id of a worker to its exit code; of several ends, the last."""
        self.unhealthy: set[str] = set()
        self._process = subprocess.Popen(
            [
                "docker", "events", "--format", "{{json .}}", "--filter", "type=container",
                "--filter", f"label=com.docker.compose.project={project}", "--filter", "event=die",
                "--filter", "event=health_status",
            ],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            attributes = event["Actor"]["Attributes"]
            if attributes.get("com.docker.compose.service") != "worker":
                continue
            if attributes.get("com.docker.compose.oneoff") == "True":
                continue
            if event["Action"] == "die":
                self.codes[event["Actor"]["ID"][:12]] = int(attributes["exitCode"])
            elif event["Action"].endswith("unhealthy") and not slow(event["Actor"]["ID"]):
                self.unhealthy.add(attributes["name"])

    def close(self) -> None:
        """Listen no more."""
        self._process.terminate()
        self._process.wait()
        self._reader.join(5)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until it holds and return what it returned.

    Raises:
        Failed: it did not come true, with its last answer.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} s, the last answer was {answer!r}")
        time.sleep(0.2)
    return answer

"""What is done to the fleet while it works, and what has to be so afterwards. Each scene leaves the fleet running."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from tests.containers.engine import ROOT, Deaths, Failed, inspect, run, until
from tests.containers.stage import QUEUE, Findings, Stage, of

IMAGE: Final = "streamworker:example"
PLAIN: Final = "streamworker:check"
NEXT: Final = "streamworker:check-next"
ROLES: Final = ("worker", "relay", "bridge", "dashboard", "migrate", "check", "config")
TOOLS: Final = ("gcc", "cc", "g++", "ld", "as", "make")
AT_LEAST: Final = 2000
"""Jobs that wait when a scene begins."""
SLOW: Final = 20.0
"""Seconds of a job that no grace is long enough for, and its handler's timeout (30) is."""
PATIENCE: Final = 180
"""Seconds until something that takes a few counts as never: machines may be busy."""

NEXT_RELEASE: Final = '''

class SendFarewell(Payload, kind="farewell.send", queue="mail"):
    """What only this release knows."""

    to: str
    seconds: float = 0.0


@app.handler
async def send_farewell(payload: SendFarewell, ctx: Context[Mail]) -> None:
    """Send the other mail."""
    await send_welcome(SendWelcome(to=payload.to), ctx)
'''


class Show:
    """The scenes, in order.

    Args:
        stage: the project.
        deaths: how its workers ended.
        findings: where findings go.
    """

    def __init__(self, stage: Stage, deaths: Deaths, findings: Findings) -> None:
        self._stage, self._compose, self._deaths, self._findings = stage, stage.compose, deaths, findings
        self.ids: list[str] = []
        """Every job that was enqueued."""
        self._held_at_kill: set[str] = set()
        self._victim = ""

    # -- before anything runs

    def image(self) -> None:
        """The image is what a cautious operator wants."""
        run("docker", "build", "--quiet", "--tag", PLAIN, ".")
        run("docker", "build", "--quiet", "--tag", IMAGE, "--target", "example", ".")
        self._findings.holds("the image builds from the hashed lock")
        for tag in (PLAIN, IMAGE):
            (told,) = json.loads(run("docker", "image", "inspect", tag))
            config = told["Config"]
            self._findings.holds(
                f"{tag}: not root, no shell in the entry point, health by the worker itself",
                config["User"] == "10001:10001"
                and config["Entrypoint"] == ["streamworker"]
                and config["Healthcheck"]["Test"][:3] == ["CMD", "python", "-m"],
                config,
            )
        locked = ("docker", "run", "--rm", "--read-only", "--cap-drop", "ALL", "--network", "none")
        look = (
            "for tool in " + " ".join(TOOLS) + "; do command -v $tool; done; id -u; touch /x /app/x /opt/x 2>&1 | wc -l"
        )
        out = run(*locked, "--entrypoint", "sh", IMAGE, "-c", look).split()
        self._findings.holds("no compiler in it, and nothing can be written", out == ["10001", "3"], out)
        each = "; ".join(f"streamworker {role} --help" for role in ROLES)
        run(*locked, "--entrypoint", "sh", PLAIN, "-e", "-c", each)
        self._findings.holds(f"one image answers to every role: {', '.join(ROLES)}")
        try:
            run(*locked, IMAGE, "worker")
        except Failed as error:
            self._findings.holds(
                "without REDIS_URL it ends with 78 and a sentence", "ended with 78" in str(error), error
            )
        with tempfile.TemporaryDirectory() as directory:
            run("docker", "build", "--quiet", "--target", "sbom", "--output", directory, ".")
            components = json.loads((Path(directory) / "sbom.cdx.json").read_text())["components"]
        names = {each["name"] for each in components}
        self._findings.holds(
            f"the sbom target lists {len(components)} packages, Python's and Debian's",
            {"redis", "streamworker", "libc6"} <= names and not {"pip", "hatchling"} & names,
            names,
        )

    def up(self, count: int) -> None:
        """Everything starts in order, and every replica is a consumer of its own."""
        self._compose("up", "--detach", "--no-build", "--wait", "--scale", f"worker={count}")
        workers = self._compose.containers()
        (migrate,) = inspect(f"{self._compose.name}-migrate-1")
        self._findings.holds(
            f"up: {count} workers, Redis, PostgreSQL and the mail catcher are healthy", len(workers) == count
        )
        self._findings.holds(
            "the schema was there before any worker started",
            migrate.exit_code == 0 and all(migrate.finished <= each.started for each in workers.values()),
            migrate,
        )
        password = self._compose.settings["STREAMWORKER_DASHBOARD_PASSWORD"]
        answers = [
            self._stage.dashboard(),
            self._stage.dashboard(password="wrong"),
            self._stage.dashboard(password=password),
        ]
        self._findings.holds(
            "the dashboard answers, to those who know the password", answers == [401, 401, 200], answers
        )
        beats = self._stage.heartbeats()
        self._findings.holds(
            f"{count} replicas are {count} consumers, each named after its container",
            len(beats) == count and of(beats, workers) == set(beats),
            beats,
        )
        self._findings.holds(
            "none runs as root, all with a read-only file system",
            all(each.user == "10001:10001" and each.read_only for each in workers.values()),
        )

    def enqueue(self, count: int) -> None:
        """Work for all that follows."""
        self.ids += self._stage.enqueue("welcome.send", count, 1.0, fresh=True)
        self._findings.holds(f"{count} jobs of one second are enqueued", len(set(self.ids)) == count)

    # -- while they run

    def _load(self) -> None:
        """Whatever this machine's speed: what a scene shows is shown under load."""
        if self._stage.backlog() < AT_LEAST:
            self.ids += self._stage.enqueue("welcome.send", AT_LEAST, 1.0)

    def more(self, count: int) -> None:
        """Scaling up: the new ones work at once."""
        self._load()
        self._compose.scale(count, "--no-recreate")
        until(self._all_work(count), PATIENCE, f"{count} workers at work")
        self._findings.holds(f"scaled to {count}: all of them work", self._still_running())

    def fewer(self, count: int) -> None:
        """Scaling down: what runs finishes or is handed back, nothing stays behind."""
        self._load()
        before = self._compose.containers()
        slow = self._stage.enqueue("welcome.send", 60, SLOW, "--priority", "high")
        self.ids += slow
        until(lambda: len(self._holders(slow)) > count, PATIENCE, "slow jobs run on more workers than will be left")
        self._compose.scale(count, "--no-recreate")
        left = self._compose.containers()
        stopped = set(before) - set(left)
        self._findings.holds(f"scaled to {count} while jobs run", len(left) == count and self._still_running(), left)
        self._ended_well(stopped)
        names = self._stage.consumers()
        self._findings.holds(
            "their consumers are gone", not of(names, stopped) and len(of(names, left)) == count, names
        )
        handed = self._stage.handed_back()
        self._findings.holds(
            f"{len(handed)} jobs that outlast the grace were handed back, by those that stopped and nobody else",
            set(handed) & set(slow) and of(handed.values(), stopped) == set(handed.values()),
            handed,
        )

    def kill(self, count: int) -> None:
        """SIGKILL for one: its jobs run elsewhere, and somebody clears its name away."""
        self._load()
        container = next(iter(self._compose.containers().values()))
        # Its worker by name: compose starts the container again, which has the same host name and is another consumer.
        (victim,) = of(self._stage.heartbeats(), [container.id])
        until(lambda: self._held_by(victim), PATIENCE, "it has jobs")
        run("docker", "kill", "--signal", "KILL", container.full_id)
        self._held_at_kill = self._held_by(victim)
        until(lambda: container.id in self._deaths.codes, PATIENCE, "the engine tells its exit code")
        held = len(self._held_at_kill)
        self._findings.holds("one is killed, with jobs", held and self._deaths.codes[container.id] == 137, held)
        self._compose.scale(count, "--no-recreate")
        until(lambda: not self._held_by(victim), PATIENCE, "the dead worker's jobs run elsewhere")
        self._findings.holds(f"others run its {held} jobs after its lease", self._still_running())
        self._victim = victim

    def roll(self, count: int) -> None:
        """A changed image comes in beside the old one; jobs only it knows wait for it."""
        with tempfile.TemporaryDirectory() as directory:
            welcome = (ROOT / "examples" / "welcome" / "welcome.py").read_text()
            (Path(directory) / "welcome.py").write_text(welcome + NEXT_RELEASE)
            (Path(directory) / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY --chmod=0644 welcome.py /app/welcome.py\n")
            run("docker", "build", "--quiet", "--tag", NEXT, directory)
        self._load()
        old = self._compose.containers()
        self._compose.env["STREAMWORKER_IMAGE"] = NEXT  # from here on, as a shell would export it: producers come first
        new_kind = self._stage.enqueue("farewell.send", 10, 0.0, "--priority", "high", fresh=True)
        self.ids += new_kind
        until(self._stage.delayed, PATIENCE, "the unknown kind waits")
        self._findings.holds("jobs of a kind that no worker knows yet wait, and are not dead", self._stage.dead() == 0)
        self._compose("run", "--rm", "--no-TTY", "migrate")
        self._compose.scale(len(old) + count, "--no-recreate")
        new = {name: each for name, each in self._compose.containers().items() if name not in old}
        until(
            lambda: of(self._stage.heartbeats(), new) and len(of(self._stage.heartbeats(), new)) == count,
            PATIENCE,
            "new ones",
        )
        images = {each.image for each in new.values()}
        self._findings.holds(
            f"rolling: {count} workers of the changed image beside {len(old)} old ones",
            len(new) == count and not images & {each.image for each in old.values()} and self._still_running(),
        )
        run("docker", "stop", *(each.full_id for each in old.values()))
        run("docker", "rm", *(each.full_id for each in old.values()))
        self._ended_well(set(old))
        until(lambda: set(new_kind) <= set(self._stage.mails()), PATIENCE, "the new kind is done")
        self._findings.holds("the new workers did the jobs of the new kind")
        self._compose.scale(count, "--no-recreate")
        self._findings.holds(
            f"compose sees {count} workers of the changed image", set(self._compose.containers()) == set(new)
        )

    def finish(self) -> None:
        """Every job is done, and once."""
        until(lambda: self._stage.backlog() + self._stage.delayed() == 0, 3 * PATIENCE, "all jobs are settled")
        mails = self._stage.mails()
        missing = set(self.ids) - set(mails)
        self._findings.holds(f"all {len(self.ids)} jobs are done", not missing and self._stage.dead() == 0, missing)
        twice = {job for job, count in mails.items() if count > 1}
        explained = self._held_at_kill | self._stage.cut_off()
        self._findings.holds(
            f"{len(twice)} ran twice, all of them held by the worker that was killed or cut off at the end of a grace",
            twice <= explained,
            twice - explained,
        )
        until(lambda: self._victim not in self._stage.consumers(), 2 * PATIENCE, "the killed one's consumer is pruned")
        self._findings.holds("the consumer of the one that was killed is pruned")
        names, running = self._stage.consumers(), self._compose.containers()
        self._findings.holds("only running containers are consumers", of(names, running) == names, names)
        self._findings.holds("no worker was ever unhealthy", not self._deaths.unhealthy, self._deaths.unhealthy)

    def switch(self, count: int, jobs: int) -> None:
        """STREAMWORKER_MODE moves the whole fleet, and what lies in lists is bridged back."""
        before = set(self._compose.containers())
        self._compose.env["STREAMWORKER_MODE"] = "list"
        self._compose.scale(count)
        self._ended_well(before)
        self.ids += self._stage.enqueue("welcome.send", jobs, 0.2)
        until(lambda: set(self.ids) <= set(self._stage.mails()), PATIENCE, "jobs of list mode are done")
        modes = {each["mode"] for each in self._stage.heartbeats().values()}
        self._findings.holds(f"STREAMWORKER_MODE=list: {jobs} jobs went through lists", modes == {"list"}, modes)

    def bridge(self, count: int, jobs: int) -> None:
        """Back to streams, with jobs left in lists."""
        lists = set(self._compose.containers())
        self.ids += self._stage.enqueue("welcome.send", jobs, 2.0)
        self._compose.env["STREAMWORKER_MODE"] = "stream"
        self._compose.scale(count)
        self._ended_well(lists)
        waiting = self._compose.redis("LLEN", f"queue:{QUEUE}")
        self._compose.streamworker("bridge", "--drain")
        until(lambda: set(self.ids) <= set(self._stage.mails()), PATIENCE, "the bridged jobs are done")
        self._findings.holds(f"back to streams: {waiting} jobs that lay in lists were bridged and done", waiting)

    def nobody(self, jobs: int) -> None:
        """No worker at all, and a relay: what gets due comes where KEDA looks."""
        workers = set(self._compose.containers())
        self._compose("up", "--detach", "--no-build", "relay")
        self._compose.scale(0)
        self._ended_well(workers)
        self.ids += self._stage.enqueue("welcome.send", jobs, 0.0, "--delay", "3", fresh=True)
        until(lambda: self._stage.backlog() == jobs, PATIENCE, "delayed jobs get ready without workers")
        self._findings.holds(f"scaled to none: the relay makes {jobs} delayed jobs ready, so that a scaler wakes")
        self._compose.scale(1)
        until(lambda: set(self.ids) <= set(self._stage.mails()), PATIENCE, "they are done")
        self._findings.holds("one worker comes, and they are done")

    def ledger(self) -> None:
        """What PostgreSQL knows."""
        rows = self._compose.sql("select id, status from streamworker.jobs")
        recorded = {row[0] for row in rows if row[1] == "completed"}
        missing = set(self.ids) - recorded
        self._findings.holds(
            f"the ledger has all {len(self.ids)} jobs as completed", not missing, (len(missing), rows[:3])
        )

    def down(self) -> None:
        """The end: everybody drains."""
        workers = set(self._compose.containers())
        self._compose("--profile", "*", "down", "--volumes", "--remove-orphans")
        self._ended_well(workers)
        left = run(
            "docker", "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={self._compose.name}"
        )
        self._findings.holds("down: nothing is left", not left, left)

    # -- looking

    def _all_work(self, count: int) -> Callable[[], bool]:
        def look() -> bool:
            beats = self._stage.heartbeats()
            return len(beats) == count and all(int(each["done"]) > 0 for each in beats.values())

        return look

    def _still_running(self) -> bool:
        """What was shown was shown under load."""
        return self._stage.backlog() > 0

    def _holders(self, ids: Collection[str]) -> set[str]:
        """The workers that hold some of these jobs."""
        return {worker for job, worker in self._stage.pending().items() if job in ids}

    def _held_by(self, worker: str) -> set[str]:
        return {job for job, holder in self._stage.pending().items() if holder == worker}

    def _ended_well(self, hosts: set[str]) -> None:
        until(lambda: hosts <= set(self._deaths.codes), PATIENCE, "the engine tells their exit codes")
        codes = {host: self._deaths.codes[host] for host in hosts}
        self._findings.holds(
            f"{len(hosts)} containers that were told to stop ended with 0", not any(codes.values()), codes
        )

"""Sentinels with their master and replica, and a cluster, as processes of their own. Only what was started here is ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from redis.crc import key_slot

from tests.conftest import eventually_blocking, free_port, server_program

SERVICE = "mymaster"
SLOTS = 16384
PACE = ("info-period", 1000, "publish-period", 200)
"""ms between what Sentinels do every ten and every two seconds: they learn of each other and convert masters sooner."""


class Node:
    """One server process; what it is stands in its options."""

    def __init__(self, directory: Path, *options: Any, program: tuple[str, ...] = (), bus: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port, self.bus = free_port(), bus
        self._log = directory / "server.log"
        self._command = [
            str(server_program()),
            *program,
            "--port",
            self.port,
            "--bind",
            "127.0.0.1",
            "--dir",
            directory,
        ]
        self._command += ["--logfile", self._log, *options, *(("--cluster-port", bus) if bus else ())]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [str(word) for word in self._command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually_blocking(self._answers, 10)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        with suppress(redis.RedisError), self.client() as client:
            return bool(client.info("server")["process_id"] == self._process.pid)
        return False

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(port=self.port, protocol=2, socket_timeout=5, **options)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Sentineled:
    """A master, a replica and three Sentinels; with the face of `tests.conftest.Server`, which is the master's.

    Args:
        directory: of their files.
        patience: ms of silence after which a master counts as down; short where tests wait for failovers.
    """

    def __init__(self, directory: Path, patience: int = 500) -> None:
        server = ("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0")
        self.nodes = [Node(directory / "one", *server)]
        self.sentinels: list[Node] = []
        try:
            self.nodes.append(Node(directory / "two", *server, "--replicaof", "127.0.0.1", self.nodes[0].port))
            for number in range(3):
                home = directory / f"sentinel{number}"
                home.mkdir()
                (home / "sentinel.conf").write_text(
                    f"sentinel monitor {SERVICE} 127.0.0.1 {self.nodes[0].port} 2\n"
                    f"sentinel down-after-milliseconds {SERVICE} {patience}\n"
                    f"sentinel failover-timeout {SERVICE} 3000\n"
                )
                self.sentinels.append(Node(home, program=(str(home / "sentinel.conf"), "--sentinel")))
                with suppress(redis.ResponseError), self.sentinels[-1].client() as client:  # Redis 7 and later
                    client.execute_command("SENTINEL", "DEBUG", *PACE)
            eventually_blocking(self._agree, 20)
        except BaseException:
            self.kill()
            raise

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{each.port}' for each in self.sentinels)}/{SERVICE}/0"

    def state(self) -> dict[str, Any]:
        with self.sentinels[0].client() as client:
            flat = client.execute_command("SENTINEL", "MASTER", SERVICE)
        items = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
        return {_text(name): _text(value) for name, value in items.items()}

    def _agree(self) -> bool:
        """Everybody knows everybody, so that a majority can be had."""
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                flat = client.execute_command("SENTINEL", "MASTER", SERVICE)
            items = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
            state = {_text(name): _text(value) for name, value in items.items()}
            if (state["num-other-sentinels"], state["num-slaves"]) != ("2", "1"):
                return False
        with self.nodes[1].client() as client:
            return bool(client.info("replication")["master_link_status"] == "up")

    @asynccontextmanager
    async def users_client(self, **options: Any) -> AsyncIterator[Any]:
        """A client as users make them."""
        manager = redis.asyncio.Sentinel([("127.0.0.1", each.port) for each in self.sentinels])
        async with manager, manager.master_for(SERVICE, **options) as client:
            yield client

    @property
    def master(self) -> Node:
        port = int(self.state()["port"])
        return next(node for node in self.nodes if node.port == port)

    def client(self) -> redis.Redis:
        return self.master.client()

    def demote(self) -> bool:
        """Let the replica become the master; False while the Sentinel has no fresh word of it, and does nothing."""
        with self.sentinels[0].client() as sentinel:
            try:
                sentinel.execute_command("SENTINEL", "FAILOVER", SERVICE)
            except redis.ResponseError as error:
                if not str(error).startswith("NOGOODSLAVE"):
                    raise
                return False
        return True

    def kill(self) -> None:
        for node in [*self.sentinels, *self.nodes]:
            node.kill()


class Clustered:
    """Masters that share the slots evenly, and replicas of the first ones.

    Args:
        directory: of their files.
        masters: how many.
        replicas: of how many of them.
        patience: ms of silence after which a node counts as down; short where tests wait for failovers.
    """

    def __init__(self, directory: Path, masters: int = 3, replicas: int = 0, patience: int = 1500) -> None:
        options = ("--save", "", "--appendonly", "no", "--cluster-enabled", "yes", "--cluster-node-timeout", patience)
        options += ("--repl-diskless-sync-delay", "0")
        self.nodes: list[Node] = []
        self.masters = masters
        try:
            for number in range(masters + replicas):
                self.nodes.append(Node(directory / str(number), *options, bus=free_port()))
            self._meet()
        except BaseException:
            self.kill()
            raise

    def _meet(self) -> None:
        share = SLOTS // self.masters
        clients = [node.client() for node in self.nodes]
        for number, client in enumerate(clients[: self.masters]):
            last = SLOTS - 1 if number == self.masters - 1 else (number + 1) * share - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * share, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)

        def well() -> bool:
            said = [client.cluster("INFO") for client in clients]
            known = str(len(self.nodes))
            return all((each["cluster_state"], each["cluster_known_nodes"]) == ("ok", known) for each in said)

        eventually_blocking(well, 20)
        for number, client in enumerate(clients[self.masters :]):
            client.execute_command("CLUSTER", "REPLICATE", self.identity(self.nodes[number]))
            eventually_blocking(lambda client=client: client.info("replication")["master_link_status"] == "up", 20)
        for client in clients:
            client.close()

    def identity(self, node: Node) -> str:
        with node.client() as client:
            return _text(client.execute_command("CLUSTER", "MYID"))

    @property
    def url(self) -> str:
        # One that is not there, so that every test walks past it.
        return f"redis+cluster://127.0.0.1:1,127.0.0.1:{self.nodes[0].port}"

    def owner(self, key: str, via: Node | None = None) -> Node:
        """Who serves a key, by what one node knows."""
        slot = key_slot(key.encode())
        with (via or self._alive[0]).client() as client:
            for first, last, (_, port, *_rest), *_others in client.execute_command("CLUSTER", "SLOTS"):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == port)
        raise AssertionError(f"nobody serves slot {slot}")

    @property
    def _alive(self) -> list[Node]:
        return [node for node in self.nodes if node.alive]

    def client(self) -> redis.Redis:
        return Anywhere(self._alive)

    def users_client(self, **options: Any) -> Any:
        """``async with`` a client as users make them."""
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=self.nodes[0].port, **options)

    def owner_client(self, key: str) -> redis.Redis:
        return self.owner(key).client()

    def migrate(self, key: str, source: Node, target: Node) -> None:
        """Move a key's slot with everything in it, as cluster tools do."""
        with self.halfway(key, source, target):
            pass

    @contextmanager
    def halfway(self, key: str, source: Node, target: Node) -> Iterator[None]:
        """In the block, all keys of the slot have moved and the slot itself has not."""
        slot = key_slot(key.encode())
        with source.client() as old, target.client() as new:
            new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.identity(source))
            old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.identity(target))
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
                old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            yield
            while keys := old.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1):
                old.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            for node in (target, source, *(each for each in self._alive if each not in (source, target))):
                with suppress(redis.ResponseError), node.client() as client:  # replicas learn it from their masters
                    client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.identity(target))
        eventually_blocking(lambda: all(self.owner(key, via=node) is target for node in self._alive), 20)

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()


class Anywhere(redis.Redis):
    """A plain client for tests: follows MOVED, and asks all masters where one server would be asked for everything."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = {node.port: node.client() for node in nodes}
        self._masters = [client for client in self._nodes.values() if client.info("replication")["role"] == "master"]
        # Pipelines go where {q} lies: all tests that use one use that queue.
        here = next(c for c in self._masters if _serves(c, "{q}"))
        super().__init__(connection_pool=here.connection_pool)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] in ("FLUSHALL", "CONFIG SET"):
            answers = [client.execute_command(*args, **options) for client in self._masters]
            return answers[0]
        if args[0] in ("KEYS", "CLIENT LIST"):
            return [each for client in self._masters for each in client.execute_command(*args, **options)]
        if args[0] == "SCAN":  # a cursor belongs to one node, so this would tell of one node's keys
            raise NotImplementedError("SCAN asks one node of a cluster; tests ask all with keys()")
        if args[0] == "CLIENT KILL" and len(args) == 2:  # by its address, out of the list above: one of them knows it
            host = next(client for client in self._masters if _knows(client, args[1]))
            return host.execute_command(*args, **options)
        try:
            return super().execute_command(*args, **options)
        except redis.exceptions.MovedError as moved:
            return self._nodes[moved.port].execute_command(*args, **options)

    def close(self) -> None:
        for client in self._nodes.values():
            client.close()
        super().close()


def _serves(client: redis.Redis, key: str) -> bool:
    try:
        client.exists(key)
    except redis.ResponseError:
        return False
    return True


def _knows(client: redis.Redis, address: str) -> bool:
    return any(each["addr"] == address for each in client.client_list())


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


Making = Callable[[Path], Sentineled | Clustered]
# Nothing fails there that a test did not break: a busy machine is no reason for a failover.
MAKERS: dict[str, Making] = {
    "sentinel": lambda directory: Sentineled(directory, patience=60_000),
    "cluster": lambda directory: Clustered(directory, patience=60_000),
}

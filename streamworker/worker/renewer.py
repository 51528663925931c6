"""A small process beside a worker that renews its claims while C code there keeps the interpreter lock.

Run by path in a bare interpreter (`python -I -S renewer.py`): nothing of this package or of redis-py is loaded, which
would cost 40 MB a worker; `json` and `socket`, half of what it takes to start, are loaded once its worker is silent.
What it needs comes through its standard input, one line at a time: JSON that says where Redis is and which commands
renew (`broker.standby`), or an empty line, the worker's sign of life. It ends with its worker.

It renews only while all of this holds: the worker was silent for half a lease, its process exists and is not stopped,
and it was silent for no longer than its jobs may run. The commands renew what the worker still holds and nothing else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` would take a third of what this process takes to start
    from typing import Any

TIMEOUT = 2.0
"""Seconds one step of a connection or a command may take."""
RETRY = 0.5
"""Seconds until the next try after a failure."""
REDIRECTIONS = 3
"""Most times in a row that nodes of a cluster may send a command elsewhere."""


class ServerRefused(Exception):
    """The server answered with an error."""


class Connection:
    """One connection to a server, logged in; replies are read as the protocol's second version has them."""

    def __init__(self, told: dict[str, Any], host: str = "", port: int = 0) -> None:
        import socket  # noqa: PLC0415 - no worker waits for it at its start

        self._buffer = b""
        if told.get("path"):
            self._socket: Any = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(TIMEOUT)
            self._socket.connect(told["path"])
        else:
            self._socket = socket.create_connection((host, port), TIMEOUT)
        if told.get("tls"):
            self._socket = _tls(told["tls"]).wrap_socket(self._socket, server_hostname=host)
        if told.get("auth"):
            self.call("AUTH", *told["auth"])
        if told.get("db"):
            self.call("SELECT", told["db"])

    def call(self, *command: Any) -> Any:
        """Send a command and return its reply."""
        words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
        packed = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
        self._socket.sendall(b"*%d\r\n%b" % (len(words), packed))
        return self._reply()

    def _reply(self) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise ServerRefused(rest.decode(errors="replace"))
        if kind == b"$":
            return None if rest == b"-1" else self._bytes(int(rest) + 2)[:-2]
        if kind == b"*":
            return None if rest == b"-1" else [self._reply() for _ in range(int(rest))]
        return int(rest) if kind == b":" else rest

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._more()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _bytes(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._more()
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _more(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise OSError("the server closed the connection")
        self._buffer += data

    def close(self) -> None:
        self._socket.close()


def _tls(told: dict[str, Any]) -> Any:
    import ssl  # noqa: PLC0415 - 6 MB that most processes need not have

    context = ssl.create_default_context()
    context.check_hostname = told["check_hostname"]
    context.verify_mode = ssl.VerifyMode(told["cert_reqs"])
    if told["certfile"] or told["keyfile"]:
        context.load_cert_chain(told["certfile"], told["keyfile"], told["password"])
    if told["ca_certs"] or told["ca_path"] or told["ca_data"]:
        context.load_verify_locations(told["ca_certs"], told["ca_path"], told["ca_data"])
    if told["min_version"]:
        context.minimum_version = ssl.TLSVersion(told["min_version"])
    if told["ciphers"]:
        context.set_ciphers(told["ciphers"])
    return context


def _home(server: dict[str, Any]) -> tuple[str, int]:
    """Where the server is: as told, or as the first Sentinel that knows says."""
    asked = server.get("sentinels")
    if not asked:
        return str(server.get("host", "")), int(server.get("port", 0))
    for host, port in asked["hosts"]:
        try:
            connection = Connection(asked, host, port)
            try:
                found = connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", asked["service"])
            finally:
                connection.close()
        except (OSError, ServerRefused):
            continue
        if found:
            return found[0].decode(), int(found[1])
    raise OSError("no Sentinel knows the master")


def renew(server: dict[str, Any], scripts: list[str]) -> None:
    """Send one server its commands; those that a node of a cluster refuses go where it says.

    Raises:
        OSError: it does not answer, or answers with an error.
    """
    connections: dict[tuple[str, int], Connection] = {}
    home = _home(server)

    def call(*command: Any) -> Any:
        at = home
        for _ in range(REDIRECTIONS):
            if at not in connections:
                connections[at] = Connection(server, *at)
            try:
                return connections[at].call(*command)
            except ServerRefused as error:
                words = str(error).split()
                if len(words) < 3 or words[0] != "MOVED":
                    raise OSError(str(error)) from None
                host, _, port = words[2].rpartition(":")
                at = (host or at[0], int(port))
        return None

    try:
        for told in server["commands"]:
            if not isinstance(told[0], int):
                call(*told)
                continue
            number, keys, args, *ask = told
            more = call(*ask[0]) if ask else []
            if more or not ask:
                call("EVAL", scripts[number], len(keys) + len(more), *keys, *more, *args)
    finally:
        for connection in connections.values():
            connection.close()


def stopped(pid: int) -> bool:
    """Whether a process is stopped, dead, or not to be found; a debugger's hold is a stop."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib is 2 MB more
            state = file.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        if os.path.isdir("/proc/self"):  # noqa: PTH112
            return True
        import subprocess  # noqa: PLC0415 - macOS and the BSDs have no /proc

        command = ["ps", "-o", "state=", "-p", str(pid)]
        try:
            asked = subprocess.run(command, capture_output=True, timeout=5, check=False)  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            return True
        state = asked.stdout.decode().strip()[:1] or "X"
    return state in "TtZX"


class Renewer:
    """What the process knows of its worker.

    Args:
        worker: the worker's process id.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._told: dict[str, Any] = {}
        self._lease = 3.0
        self._unread = b""
        self._heard = time.monotonic()
        self._next = 0.0
        self._rest = b""

    def run(self) -> None:
        """Until the worker is gone."""
        while os.getppid() == self._worker:
            # What the worker said is read after half of the shortest lease there is.
            pause = 0.1 if self._unread else max(0.05, min(1.0, self._lease / 6))
            if select.select([0], [], [], pause)[0]:
                if not self._hear(os.read(0, 65536)):
                    return
                continue
            if self._unread:
                import json  # noqa: PLC0415 - as `socket`

                self._told, self._unread = json.loads(self._unread), b""
                self._lease = float(self._told["lease"])
            now = time.monotonic()
            silent = now - self._heard
            if not self._told or not self._lease / 2 <= silent <= self._told["longest"] or now < self._next:
                continue
            if not stopped(self._worker):
                self._next = now + (self._lease / 3 if self._renew() else RETRY)

    def _hear(self, data: bytes) -> bool:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._heard, self._next = time.monotonic(), 0.0
            if line:
                self._unread = line
        return bool(data)

    def _renew(self) -> bool:
        done = True
        for server in self._told["servers"]:
            try:
                renew(server, self._told["scripts"])
            except (OSError, ValueError):  # the other servers' claims are worth as much
                done = False
        return done


def main() -> None:
    """Renew for the process that started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # it ends with its worker, which may have jobs to finish
    Renewer(int(sys.argv[1])).run()


if __name__ == "__main__":
    main()

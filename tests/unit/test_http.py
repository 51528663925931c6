"""The HTTP server of probes: what people, proxies and strangers may send it."""

import asyncio
import contextlib
import http.client
import socket
import threading

import pytest

from streamworker.errors import ConfigurationError
from streamworker.settings import Address
from streamworker.telemetry import http as served
from streamworker.telemetry.http import Answer, HttpThread
from streamworker.telemetry.probe import ask
from tests.conftest import eventually_blocking


async def fine(_):
    return Answer(200, b'{"ok":true}\n')


async def ill(_):
    return Answer(503, b'{"ok":false}\n')


async def broken(_):
    raise ValueError("secret")


async def text(_):
    return Answer(200, b"a_total 1\n", "text/plain; version=0.0.4")


@pytest.fixture
def port():
    thread = HttpThread(Address("127.0.0.1", 0), {"/fine": fine, "/ill": ill, "/broken": broken, "/metrics": text})
    thread.open()
    yield thread.port
    thread.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", thread.port), 1)


def get(port, path, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path)
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


@pytest.mark.parametrize(
    ("path", "status", "body"),
    [
        ("/fine", 200, b'{"ok":true}\n'),
        ("/fine?verbose=1", 200, b'{"ok":true}\n'),
        ("/ill", 503, b'{"ok":false}\n'),
        ("/broken", 500, b'{"ok":false,"why":"an error of ours, see the log"}\n'),
        ("/else", 404, b'{"ok":false,"why":"there is only /broken, /fine, /ill, /metrics"}\n'),
    ],
)
def test_one_line_of_json(port, path, status, body):
    assert get(port, path)[:2] == (status, body)


def test_a_route_names_its_type_and_head_has_no_body(port):
    assert get(port, "/metrics")[2]["Content-Type"] == "text/plain; version=0.0.4"
    status, body, headers = get(port, "/fine", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "12")


def test_nothing_can_be_changed_here(port):
    status, _, headers = get(port, "/fine", "POST")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("sent", [b"hello\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /" + b"a" * 20_000])
def test_what_is_no_request_is_refused(port, sent):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(sent)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_who_says_nothing_is_cut_off_and_keeps_nobody_waiting(port, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.2)
    with socket.create_connection(("127.0.0.1", port), 5) as silent:
        assert get(port, "/fine")[0] == 200
        assert silent.recv(1) == b""


@pytest.mark.parametrize("sent", [b"", b"GET /fi", b"GET /fine HTTP/1.1\r\nX: "])
def test_silent_and_half_sent_requests_keep_no_probe_from_its_answer(port, sent):
    """Ten times as many as are allowed at once, made anew as soon as they are cut off."""
    idle = []
    for _ in range(10 * served.CONNECTIONS):
        idle.append(socket.create_connection(("127.0.0.1", port), 5))
        idle[-1].sendall(sent)
        if len(idle) % 50 == 0:
            assert get(port, "/fine")[:2] == (200, b'{"ok":true}\n')
    # The oldest gave way, the youngest are still waited for.
    assert gone(idle[0])
    idle[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        idle[-1].recv(1)
    for each in idle:
        each.close()


def gone(connection):
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1) == b""
    return True


def test_an_address_with_many_connections_gives_way_before_others(port, monkeypatch):
    monkeypatch.setattr(served, "CONNECTIONS", 5)
    other = socket.create_connection(("127.0.0.1", port), 5, source_address=("127.0.0.2", 0))
    other.sendall(b"GET /fine HT")
    flood = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(30)]
    eventually_blocking(lambda: gone(flood[0]))
    other.sendall(b"TP/1.1\r\n\r\n")
    assert other.recv(100).startswith(b"HTTP/1.1 200 ")
    for each in (other, *flood):
        each.close()


def test_requests_that_are_not_read_give_way_when_nothing_else_can(port, monkeypatch):
    monkeypatch.setattr(served, "CONNECTIONS", 3)
    begun = threading.Semaphore(0)
    release = threading.Event()

    async def slow(_):
        begun.release()
        await asyncio.to_thread(release.wait, 20)
        return Answer(200, b"slow")

    thread = HttpThread(Address("127.0.0.1", 0), {"/slow": slow, "/fine": fine})
    thread.open()
    asking = [socket.create_connection(("127.0.0.1", thread.port), 5) for _ in range(3)]
    for each in asking:
        each.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
    for _ in asking:
        assert begun.acquire(timeout=5)
    assert get(thread.port, "/fine")[0] == 200
    assert gone(asking[0])
    release.set()
    assert asking[2].recv(100).startswith(b"HTTP/1.1 200 ")
    thread.close()
    for each in asking:
        each.close()


def test_an_address_in_use_is_a_sentence_that_names_the_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(*taken.getsockname())
        with pytest.raises(ConfigurationError, match=f"STREAMWORKER_HTTP={address} cannot be listened on .*in use"):
            HttpThread(address, {}).open()


def test_a_host_that_is_not_ours_is_the_same_sentence():
    with pytest.raises(ConfigurationError, match=r"cannot be listened on"):
        HttpThread(Address("no-such-host.invalid", 1), {}).open()


def test_tasks_run_as_long_as_it_serves():
    began, ended = threading.Event(), threading.Event()

    async def task():
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    thread = HttpThread(Address("127.0.0.1", 0), {}, [task])
    thread.open()
    assert began.wait(5)
    thread.close()
    assert ended.is_set()
    thread.close()


def test_the_probe_tells_well_from_ill(port):
    env = {"STREAMWORKER_HTTP": f"0.0.0.0:{port}"}
    assert ask(["/fine"], env) == (True, '{"ok":true}')
    assert ask(["/ill"], env) == (False, '{"ok":false}')
    assert ask(["/fine", f"127.0.0.1:{port}"], {}) == (True, '{"ok":true}')
    assert ask([], env)[0] is False  # there is no /healthz here


@pytest.mark.parametrize("value", ["", "off", "8080", ":8080", "host:port"])
def test_the_probe_wants_to_know_whom_to_ask(value):
    assert ask([], {"STREAMWORKER_HTTP": value}) == (
        False,
        "no worker to ask: set STREAMWORKER_HTTP=host:port, as for the worker",
    )


def test_nobody_there_is_ill():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert ask([], {"STREAMWORKER_HTTP": f"127.0.0.1:{port}"})[0] is False

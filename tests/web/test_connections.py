"""Connections that ask nothing do not pile up at the dashboard's port."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from streamworker.web import server as web_server
from tests.conftest import eventually_blocking


async def site(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(web_server, "REQUEST", 0.5)
    monkeypatch.setattr(web_server, "CONNECTIONS", 20)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        site, http=web_server.PatientProtocol, lifespan="off", log_config=None, timeout_keep_alive=30
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = server.force_exit = True
    thread.join(10)
    listener.close()


def gone(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [[b""], [b"GET / HT"], [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /"]])
def test_who_does_not_ask_is_cut_off(port, sent):
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        for part in sent:
            connection.sendall(part)
            if part.endswith(b"\r\n\r\n"):
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        eventually_blocking(lambda: gone(connection))


def test_a_kept_connection_may_ask_again_later(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    for _ in range(2):
        client.request("GET", "/")
        assert client.getresponse().read() == b"ok"
        threading.Event().wait(0.7)  # longer than a request may take to come
    client.close()


def test_the_oldest_that_asks_nothing_gives_way(port, monkeypatch):
    monkeypatch.setattr(web_server, "REQUEST", 60)
    idle = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(100)]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    client.request("GET", "/")
    assert client.getresponse().read() == b"ok"
    eventually_blocking(lambda: gone(idle[0]))
    for each in idle:
        each.close()
    client.close()

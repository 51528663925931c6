"""DATABASE_URL as libpq's users write it: understood, or named; never handed to a server that refuses it."""

from __future__ import annotations

import socket

import pytest

from streamworker.errors import ConfigurationError
from streamworker.postgres import dsn
from streamworker.postgres.pool import NamedPool, Pressure, open_database
from tests.postgres.pgbouncer import PgBouncer


@pytest.mark.parametrize(
    ("query", "kept", "timeout"),
    [
        ("", "", None),
        ("?sslmode=disable", "?sslmode=disable", None),
        ("?connect_timeout=7", "", 7.0),
        ("?connect_timeout=1", "", 2.0),
        ("?connect_timeout=0&host=/run/pg", "?host=%2Frun%2Fpg", None),
        ("?channel_binding=prefer&gssencmode=disable&sslsni=1&sslcompression=0&client_encoding=utf8", "", None),
        ("?fallback_application_name=shop&application_name=x", "?application_name=x", None),
        ("?statement_timeout=5000", "?statement_timeout=5000", None),
    ],
)
def test_what_is_understood_does_not_reach_the_server(query, kept, timeout):
    parsed = dsn.parse(f"postgresql:///x{query}")
    assert (parsed.url, parsed.timeout) == (f"postgresql:///x{kept}", timeout)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("channel_binding=require", "channel_binding=require, which the driver .* write disable or prefer"),
        ("hostaddr=10.0.0.1", "hostaddr=10.0.0.1, which the driver"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("connect_timeout=soon", "connect_timeout=soon: write a whole number"),
        ("keepalives_idle=x", "whole number"),
    ],
)
async def test_what_cannot_be_done_is_named_before_anything_is_connected(query, words):
    with pytest.raises(ConfigurationError, match=words):
        await open_database(f"postgresql://127.0.0.1:1/x?{query}")
    with pytest.raises(ConfigurationError, match=words):
        NamedPool(f"postgresql://127.0.0.1:1/x?{query}", what="ctx.database", size=1, pressure=Pressure())


async def test_connections_work_with_them_and_keepalives_are_set(database_url):
    url = (
        f"{database_url}{'&' if '?' in database_url else '?'}connect_timeout=5&channel_binding=prefer&keepalives=1"
        "&keepalives_idle=7&keepalives_interval=3&keepalives_count=2&tcp_user_timeout=9000&sslsni=1"
    )
    database = await open_database(url)
    async with database.session() as connection:
        assert await connection.fetchval("select 1") == 1
    database.close()
    parsed = dsn.parse(url)
    expected = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1, (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 7,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 3, (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 2,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 9000,
    }  # fmt: skip
    assert {option[:2]: option[2] for option in parsed.socket_options} == expected


async def test_over_tcp_the_sockets_have_them(database_url, postgres):
    bouncer = PgBouncer(postgres)
    name = database_url.split("@/")[1].split("?")[0]
    try:
        connection = await dsn.connect(f"{bouncer.url(name)}&keepalives_idle=7&tcp_user_timeout=9000", timeout=5)
        line = connection._transport.get_extra_info("socket")
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7
        assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000
        await connection.close()
        with pytest.raises(ConfigurationError, match="unsupported startup parameter: lock_timeout"):
            await open_database(f"{bouncer.url(name)}&lock_timeout=5")
    finally:
        bouncer.close()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("pgbouncer=true", 'unrecognized configuration parameter "pgbouncer"'),
        ("statement_timeout=soon", 'invalid value for parameter "statement_timeout"'),
        ("sslmode=maybe", "sslmode"),
        ("sslmode=verify-full&sslrootcert=/no/such/file", "/no/such/file"),
    ],
)
async def test_what_asyncpg_or_the_server_refuses_is_a_configuration_error(database_url, option, words):
    url = database_url.partition("?")[0] if option.startswith("sslmode") else database_url
    if option.startswith("sslmode"):
        url = "postgresql://postgres@127.0.0.1:1/x"
    with pytest.raises(ConfigurationError, match=words) as caught:
        await open_database(f"{url}{'&' if '?' in url else '?'}{option}")
    assert caught.value.exit_code == 78

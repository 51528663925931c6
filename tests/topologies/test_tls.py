"""TLS: no wheel's server has it, so a proxy ends it in front of the real one. Certificates come from ``openssl``."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from streamworker import App, QueueWorker, Settings
from streamworker.errors import ConfigurationError, Unreachable
from tests.cli.conftest import Program
from tests.conftest import eventually
from tests.contract.ground import StreamGround
from tests.contract.helpers import job, names
from tests.contract.test_standby import renew
from tests.topologies.conftest import Count
from tests.topologies.servers import Clustered

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl: apt-get install openssl")


EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")  # made in a hundredth of the time of RSA


def openssl(*words: str, cwd: Path) -> None:
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem``, ``other.pem`` (another CA), and with their keys ``server.pem`` for 127.0.0.1 and ``client.pem``."""
    home = tmp_path_factory.mktemp("certificates")
    for ca in ("ca", "other"):
        openssl(
            "req", "-x509", *EC, "-nodes", "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-days", "2",
            "-subj", f"/CN={ca}", "-addext", "keyUsage=critical,keyCertSign,cRLSign", cwd=home,
        )  # fmt: skip
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        openssl(
            "req", *EC, "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}", cwd=home,
        )  # fmt: skip
        (home / "extensions").write_text(
            f"extendedKeyUsage={usage}\nsubjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
        )
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "extensions", "-out", f"{name}.pem", cwd=home,
        )  # fmt: skip
    return home


@asynccontextmanager
async def proxy(certificates: Path, target: int, *, client: bool = False) -> AsyncIterator[int]:
    """A port that speaks TLS and passes what it hears on to ``target``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "ca.pem")
    open_: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
        open_.update((writer, inner_writer))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in open_:
            with suppress(AttributeError):  # Python before 3.11.3 cannot abort a TLS transport that is gone already
                writer.transport.abort()
        await asyncio.sleep(0.05)  # lets the transports say goodbye before the loop closes


async def test_everything_over_tls_with_a_custom_ca(certificates, server, redis_url, broker_of):
    async with proxy(certificates, server.port) as port:
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificates / 'ca.pem'}"
        async with broker_of(url) as broker:
            await broker.publish([job("x"), job("later", delay=0.0)])
            claims = await broker.claim(10, 0, ())
            assert names(claims) == ["x", "later"]
            assert await broker.renew(claims) == []
            rung = asyncio.Event()
            listening = asyncio.create_task(broker.listen(lambda _: rung.set()))
            delay = 60.0
            while not rung.is_set():
                delay -= 1.0  # the bell tells of jobs that become the first to be due
                await broker.publish([job(delay=delay)])
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(rung.wait(), 0.1)
            listening.cancel()
            await asyncio.wait([listening])


async def test_a_worker_with_a_client_certificate(certificates, server, redis_url):
    seen = []
    async with proxy(certificates, server.port, client=True) as port:
        files = f"ssl_ca_certs={certificates}/ca.pem&ssl_certfile={certificates}/client.pem"
        url = f"rediss://127.0.0.1:{port}/0?{files}&ssl_keyfile={certificates}/client.key"
        app = App(settings=Settings(redis_url=url))

        @app.handler
        async def count(payload: Count) -> None:
            seen.append(payload.name)

        async with app:
            await app.enqueue(Count(name="x"))
        await QueueWorker(app, redis=None, database=None, services=None).run(burst=True)
    assert seen == ["x"]


async def test_the_renewing_process_speaks_tls_and_logs_in(certificates, server, broker_of, redis_url, raw):
    raw.execute_command("ACL", "SETUSER", "renewer", "on", ">SECRET", "~*", "&*", "+@all")
    async with proxy(certificates, server.port, client=True) as port:
        files = f"ssl_ca_certs={certificates}/ca.pem&ssl_certfile={certificates}/client.pem"
        url = f"rediss://renewer:SECRET@127.0.0.1:{port}/0?{files}&ssl_keyfile={certificates}/client.key"
        async with broker_of(url) as broker:
            await broker.publish([job("x")])
            (claim,) = await broker.claim(1, 0, ())
            ground = StreamGround(raw)
            ground.ripen(claim, 10_000)
            await asyncio.to_thread(renew, broker)
            assert ground.idle(claim) < 5000
    raw.execute_command("ACL", "DELUSER", "renewer")


async def test_a_missing_client_certificate_is_said_in_one_sentence(certificates, server, broker_of):
    async with proxy(certificates, server.port, client=True) as port:
        with pytest.raises((ConfigurationError, Unreachable), match="client certificate|does not answer"):
            async with broker_of(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificates}/ca.pem"):
                pass


@pytest.mark.parametrize("query", ["ssl_ca_certs={}/other.pem", ""])
async def test_a_wrong_ca_ends_with_one_sentence_and_78(certificates, server, redis_url, tmp_path, query):
    async with proxy(certificates, server.port) as port:
        program = Program(tmp_path, f"rediss://127.0.0.1:{port}/0?{query.format(certificates)}")
        done = await asyncio.to_thread(program, "queues", forked=True)
        assert done.returncode == 78
        assert "is not trusted" in done.sentence
        assert "ssl_ca_certs" in done.sentence
        checked = await asyncio.to_thread(program, "check", forked=True)
        assert checked.returncode == 1
        assert "is not trusted" in checked.stdout
        assert "Traceback" not in checked.stdout + checked.stderr


async def test_a_host_the_certificate_does_not_name(certificates, server, broker_of, redis_url):
    async with proxy(certificates, server.port) as port:
        url = f"rediss://localhost:{port}/0?ssl_ca_certs={certificates}/ca.pem"
        with pytest.raises(ConfigurationError, match="is not trusted"):
            async with broker_of(url):
                pass
        async with broker_of(f"{url}&ssl_check_hostname=false") as broker:
            await broker.publish([job("x")])


async def test_tls_to_a_server_without_it(server, redis_url, broker_of, monkeypatch):
    monkeypatch.setattr("streamworker.broker.redis.client.COMMAND_TIMEOUT", 0.5)
    with pytest.raises(Unreachable, match="does not answer"):
        async with broker_of(f"rediss://127.0.0.1:{server.port}/0"):
            pass


@pytest.mark.slow
async def test_a_cluster_over_tls(certificates, tmp_path, broker_of):
    servers = Clustered(tmp_path)
    try:
        async with AsyncExitStack() as stack:
            ports = [await stack.enter_async_context(proxy(certificates, node.port)) for node in servers.nodes]
            for node, port in zip(servers.nodes, ports, strict=True):
                with node.client() as client:  # what the nodes say of themselves leads to the proxies
                    client.config_set("cluster-announce-port", port)
            await eventually(lambda: announced(servers) == set(ports))
            url = f"rediss+cluster://127.0.0.1:{ports[0]}?ssl_ca_certs={certificates}/ca.pem"
            async with broker_of(url, "a", "q", "b", "c") as broker:
                await broker.publish([job(queue, queue) for queue in "aqbc"])
                claims = await broker.claim(10, 0, ())
                assert names(claims) == ["a", "q", "b", "c"]
                assert await broker.renew(claims) == []
                assert await broker.claim(10, 0.05, claims) == []
    finally:
        servers.kill()


def announced(servers: Clustered) -> set[int]:
    """The ports that every node knows of all; none while they disagree."""
    said = []
    for node in servers.nodes:
        with node.client() as client:
            said.append({port for _, _, (_, port, *_rest), *_others in client.execute_command("CLUSTER", "SLOTS")})
    return said[0] if said.count(said[0]) == len(said) else set()


async def test_sentinels_and_their_master_over_tls(certificates, server, redis_url, broker_of):
    """A real Sentinel speaks no TLS to its master here, so that the one that is asked only knows the answer."""
    async with proxy(certificates, server.port) as port:

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    words = int((await reader.readuntil(b"\r\n"))[1:])
                    command = [
                        await reader.readexactly(int((await reader.readuntil(b"\r\n"))[1:]) + 2) for _ in range(words)
                    ]
                    found = command[0].strip() == b"SENTINEL"
                    writer.write(
                        f"*2\r\n$9\r\n127.0.0.1\r\n${len(str(port))}\r\n{port}\r\n".encode() if found else b"+OK\r\n"
                    )
            writer.close()

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
        sentinel = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        at = sentinel.sockets[0].getsockname()[1]
        url = f"rediss+sentinel://127.0.0.1:{at}/mymaster?ssl_ca_certs={certificates}/ca.pem"
        async with broker_of(url) as broker:
            await broker.publish([job("x")])
            claims = await broker.claim(10, 0, ())
            assert names(claims) == ["x"]
            assert await broker.renew(claims) == []
        sentinel.close()
        await asyncio.sleep(0.05)  # lets the transports say goodbye before the loop closes


@asynccontextmanager
async def listener(target: int) -> AsyncIterator[tuple[int, bytearray]]:
    """A port that passes everything on to ``target``, and what went by: the network as a neighbour sees it."""
    heard = bytearray()
    open_: set[asyncio.StreamWriter] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                heard.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target)
        open_.update((writer, inner_writer))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heard
    finally:
        server.close()
        for writer in open_:
            writer.transport.abort()


async def test_who_listens_reads_everything_without_tls_and_nothing_with_it(certificates, server, redis_url):
    async def enqueued(url: str) -> None:
        async with App(settings=Settings(redis_url=url)) as app:
            await app.enqueue(Count(name="payload-of-ada"))

    async with listener(server.port) as (port, heard):
        await enqueued(f"redis://default:S3cr3t@127.0.0.1:{port}/0")
        assert b"payload-of-ada" in heard and b"S3cr3t" in heard
    async with proxy(certificates, server.port) as secured, listener(secured) as (port, heard):
        await enqueued(f"rediss://default:S3cr3t@127.0.0.1:{port}/0?ssl_ca_certs={certificates}/ca.pem")
        assert len(heard) > 1000
        assert b"payload-of-ada" not in heard and b"S3cr3t" not in heard

"""Servers for the tests. Redis and PostgreSQL come from streamworker's pytest plugin."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ca.pem`` and ``other.pem``, two authorities, and ``server.pem`` with its key, signed by the first."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes the certificates")
    home = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=home, check=True, capture_output=True)

    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    openssl(
        *("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    )
    (home / "extensions").write_text(
        "extendedKeyUsage=serverAuth\nsubjectAltName=IP:127.0.0.1,DNS:hooks.example.com\nauthorityKeyIdentifier=keyid\n"
        "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
    )
    openssl(
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"),
        *("-extfile", "extensions", "-out", "server.pem"),
    )
    return home


@pytest.fixture(scope="session")
def server_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    return context


@pytest.fixture
def corpus() -> list[Path]:
    """The standard library's own messages, where Python came with its tests."""
    try:
        import test.test_email as tests
    except ImportError:
        pytest.skip("this Python came without its tests")
    files = sorted(Path(tests.__file__).with_name("data").glob("msg_*.txt"))
    if not files:
        pytest.skip("this Python came without its test data")
    return files

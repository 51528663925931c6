"""Forms of REDIS_URL, taken apart."""

import pytest
import redis
import redis.asyncio as aioredis

from streamworker.broker.redis import url as urls
from streamworker.broker.redis.client import RedisAddress
from streamworker.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "kind", "scheme", "hosts", "options", "shown"),
    [
        ("redis://h", "server", "redis", (("h", 6379),), {}, "redis://h:6379/0"),
        ("redis://", "server", "redis", (("localhost", 6379),), {}, "redis://localhost:6379/0"),
        ("rediss://u:p%2F@h:1/2", "server", "rediss", (("h", 1),), {"username": "u", "password": "p/", "db": 2}, "rediss://h:1/2"),
        ("redis://:p@[::1]:1", "server", "redis", (("::1", 1),), {"password": "p"}, "redis://[::1]:1/0"),
        ("unix:///run/r.sock?db=3", "server", "unix", (), {"path": "/run/r.sock", "db": 3}, "unix:///run/r.sock"),
        (
            "redis+sentinel://u:p@a:1,b/m/4", "sentinel", "redis", (("a", 1), ("b", 26379)),
            {"username": "u", "password": "p", "db": 4}, "redis+sentinel://a:1,b:26379/m/4",
        ),
        ("rediss+sentinel://a/m", "sentinel", "rediss", (("a", 26379),), {}, "rediss+sentinel://a:26379/m/0"),
        ("redis+cluster://a,[::1]:2", "cluster", "redis", (("a", 6379), ("::1", 2)), {}, "redis+cluster://a:6379,[::1]:2"),
        ("rediss+cluster://:p@a/0", "cluster", "rediss", (("a", 6379),), {"password": "p"}, "rediss+cluster://a:6379"),
    ],
)  # fmt: skip
def test_every_form(url, kind, scheme, hosts, options, shown):
    form = urls.parse(url)
    assert (form.kind, form.scheme, form.hosts, form.options) == (kind, scheme, hosts, options)
    assert str(form) == str(RedisAddress(url)) == shown


def test_sentinels_have_a_login_of_their_own():
    form = urls.parse("rediss+sentinel://u:p@a/m?sentinel_username=su&sentinel_password=s%26p&ssl_cert_reqs=optional")
    assert form.options == {"username": "u", "password": "p", "ssl_cert_reqs": "optional"}
    assert form.sentinel_options == {"username": "su", "password": "s&p", "ssl_cert_reqs": "optional"}
    assert urls.parse("redis+sentinel://u:p@a/m").sentinel_options == {}


def test_tls_in_the_query(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.touch()
    form = urls.parse(f"rediss://h?ssl_ca_certs={ca}&ssl_check_hostname=false&socket_timeout=3")
    assert form.options == {"ssl_ca_certs": str(ca), "ssl_check_hostname": False}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+sentinel://a", "name of their master"),
        ("redis+sentinel://a/m/x", "name of their master"),
        ("redis+sentinel://a/m/0/0", "name of their master"),
        ("redis+sentinel://a/m?sentinel_pasword=S3cret", "no option sentinel_pasword"),
        ("redis+sentinel://a,,b/m", "separated by commas"),
        ("redis+sentinel:///m", "separated by commas"),
        ("redis+cluster://a/1", "no databases but 0"),
        ("redis+cluster://a?db=1", "no databases but 0"),
        ("rediss://h?ssl_ca_cert=/x", "no option ssl_ca_cert; TLS knows"),
        ("rediss+cluster://h?ssl_ca_certs=/no/such/file", "ssl_ca_certs=/no/such/file, which cannot be read"),
        ("rediss://h?ssl_ca_path=/no/such/directory", "cannot be read"),
        ("http://h", "must specify one of"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs is one of none, optional, required"),
        ("redis://h?ssl_cert_reqs=none", "ssl_cert_reqs is about TLS, and the URL has none: write rediss://"),
        ("redis+sentinel://h/m?ssl_ca_certs=/x", "write rediss://"),
        ("redis://h?socket_timeout=soon", "socket_timeout"),
    ],
)
def test_what_cannot_be_understood_is_said_in_one_sentence(url, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        urls.parse(url)
    assert str(caught.value).startswith("REDIS_URL")
    assert "S3cret" not in str(caught.value)


def alike(client, url):
    ours, theirs = urls.parse(url), urls.of(client)
    logins = [
        {name: form.options.get(name) or None for name in ("username", "password", "db")} for form in (ours, theirs)
    ]
    assert logins[0] == logins[1]
    assert (ours.kind, ours.scheme, ours.hosts, ours.service) == (
        theirs.kind,
        theirs.scheme,
        theirs.hosts,
        theirs.service,
    )
    assert ours.sentinel_options == theirs.sentinel_options


async def test_users_own_clients():
    plain = aioredis.Redis(host="h", port=1, db=2, username="u", password="p", ssl=True)
    alike(plain, "rediss://u:p@h:1/2")
    assert urls.of(plain).options["ssl_check_hostname"] is True
    unix = aioredis.Redis(unix_socket_path="/run/r.sock")
    assert str(urls.of(unix)) == "unix:///run/r.sock"
    manager = aioredis.Sentinel([("a", 1), ("b", 2)], sentinel_kwargs={"password": "s"})
    alike(manager.master_for("m", password="p", db=1), "redis+sentinel://:p@a:1,b:2/m/1?sentinel_password=s")
    alike(aioredis.RedisCluster(host="h", port=3, password="p"), "redis+cluster://:p@h:3")
    alike(aioredis.RedisCluster(host="h", port=3, ssl=True), "rediss+cluster://h:3")


@pytest.mark.parametrize("client", [object(), redis.Redis()])
def test_what_is_no_client_of_redis_asyncio(client):
    with pytest.raises(ConfigurationError, match="redis= takes"):
        urls.of(client)


@pytest.mark.parametrize("word", ["CERT_NONE", "cert_none", "none", "None"])
def test_celerys_words_for_certificates(word):
    assert urls.parse(f"rediss://h?ssl_cert_reqs={word}").options["ssl_cert_reqs"] == "none"
    RedisAddress(f"rediss+cluster://h?ssl_cert_reqs={word}")


@pytest.mark.parametrize(
    "option", ["ssl_ca_certs=/etc/hostname", "ssl_ciphers=none-such", "ssl_certfile=/etc/hostname"]
)
def test_tls_that_cannot_work_is_said_before_anything_is_connected(option):
    with pytest.raises(
        ConfigurationError, match=f"TLS options in REDIS_URL cannot be used .*{option.partition('=')[0]}"
    ):
        RedisAddress(f"rediss://h?{option}")


def test_options_of_the_clients_of_handlers():
    url = "redis://h?socket_timeout=3&max_connections=7&timeout=1.5&decode_responses=true&health_check_interval=9"
    form = urls.parse(url)
    assert form.options == {}
    assert form.client == {
        "socket_timeout": 3.0, "max_connections": 7, "timeout": 1.5, "decode_responses": True, "health_check_interval": 9,
    }  # fmt: skip
    assert urls.parse("redis+cluster://h?socket_timeout=3").client == {"socket_timeout": 3.0}
    assert urls.parse("redis+sentinel://h/m?socket_timeout=3").client == {"socket_timeout": 3.0}

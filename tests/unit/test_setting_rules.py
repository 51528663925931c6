"""What each variable refuses."""

import pytest

from streamworker.errors import ConfigurationError
from streamworker.settings import Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONCURRENCY", "0"),
        ("CONCURRENCY", "10001"),
        ("CONCURRENCY", "1_0"),
        ("CONCURRENCY", " 1"),
        ("CONCURRENCY", "1.0"),
        ("CONCURRENCY", "\u0661"),
        ("CONCURRENCY", "9" * 10_000),
        ("LEASE", "0.19"),
        ("LEASE", "86401"),
        ("LEASE", "nan"),
        ("LEASE", "inf"),
        ("LEASE", "15s"),
        ("LEASE", "1e1"),
        ("GRACE", "-1"),
        ("MAX_DELIVERIES", "0"),
        ("MAX_JOB_BYTES", "0"),
        ("KEY_TTL", "0"),
        ("UNKNOWN_KIND_TTL", "-0.1"),
        ("MODE", "streams"),
        ("RELAY", "yes"),
        ("LEDGER", "true"),
        ("LOG_LEVEL", "loud"),
        ("GROUP", "STREAMS"),
        ("GROUP", "Streams"),
        ("GROUP", "a b"),
        ("GROUP", "a\n"),
        ("GROUP", "a" * 101),
        ("WORKER_ID", "a b"),
        ("WORKER_ID", "-a"),
        ("WORKER_ID", "a\n"),
        ("WORKER_ID", "a:b"),
        ("WORKER_ID", "a" * 65),
        ("NAMESPACE", "{a}"),
        ("NAMESPACE", "a\n"),
        ("NAMESPACE", "ü"),
        ("APP", "shop"),
        ("APP", "shop:"),
        ("APP", "shop/jobs:app"),
        ("APP", "shop:app()"),
        ("QUEUES", "a,,b"),
        ("QUEUES", "a,"),
        ("QUEUES", "a=0"),
        ("QUEUES", "a="),
        ("QUEUES", "a=10001"),
        ("QUEUES", "a=x"),
        ("QUEUES", "a,a=3"),
        ("QUEUES", "a:high"),
        ("QUEUES", "a:low=3"),
        ("QUEUES", "a b"),
        ("QUEUES", "a" * 101),
        ("HTTP", "8080"),
        ("HTTP", ":8080"),
        ("HTTP", "h:65536"),
        ("HTTP", "h:"),
        ("HTTP", "::1:80"),
        ("HTTP", "h:80\n"),
        ("STATE_DIR", "~no-such-user-here/x"),
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://localhost"),
        ("REDIS_URL", "postgresql://localhost"),
        ("REDIS_URL", "redis:/localhost"),
        ("REDIS_URL", "redis://h:x"),
        ("REDIS_URL", "redis://h:65536"),
        ("REDIS_URL", "redis://h:65536/0"),
        ("REDIS_URL", "redis://:p/w@h"),
        ("REDIS_URL", "redis://user:p@ss/w:rd@host/0"),
        ("REDIS_URL", "redis://:1?x@host/0"),
        ("REDIS_URL", "redis://:1#x@host/0"),
        ("REDIS_URL", "redis+sentinel://:p@ss/w@host/main"),
        ("REDIS_URL", "redis://h/abc"),
        ("REDIS_URL", "redis://h/1/2"),
        ("REDIS_URL", "redis://h/-1"),
        ("REDIS_URL", "rediss://h/0#1"),
        ("REDIS_URL", "redis://:\udcff@h"),
        ("REDIS_URL", "redis://h h"),
        ("REDIS_URL", "redis://h\n"),
        ("REDIS_URL", "unix://run/redis.sock"),
        ("REDIS_URL", "unix://"),
        ("REDIS_URL", "Embedded"),
        ("DATABASE_URL", "mysql://h/x"),
        ("DATABASE_URL", "postgresql://user:p@ss/w:rd@host/x"),
        ("DATABASE_URL", "embedded"),
        ("DATABASE_URL", "postgresql+://h/x"),
        ("DATABASE_URL", "postgresql://h:x/x"),
        ("DATABASE_DIRECT_URL", "redis://h"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_is_allowed(name, value):
    with pytest.raises(ConfigurationError) as caught:
        Settings.load({f"STREAMWORKER_{name}": value})
    message = str(caught.value)
    assert message.startswith(f"STREAMWORKER_{name} is ")
    assert "; it must be " in message
    assert len(message) < 500
    assert "\n" not in message
    with pytest.raises(ConfigurationError):
        Settings(**{name.lower(): value})


@pytest.mark.parametrize(
    "url",
    [
        "redis://h", "redis://h/", "redis://h/0", "redis://h:1/15/", "redis://h?db=3", "rediss://h/0?ssl_cert_reqs=none",
        "unix:///run/a.sock", "unix:///run/a%40b.sock?db=3", "redis+sentinel://h/main/0", "redis+cluster://h:1,h:2",
        "redis://u:p@ss@h/0",
    ],
)  # fmt: skip
def test_urls_that_are_understood(url):
    assert Settings.load({"REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster", "unix", "postgresql"])
@pytest.mark.parametrize("rest", ["user:PA@SS/WO:RD@host/0", ":PA@SS?WORD@host:1/0", ":PA@S/S@WO#RD@host"])
def test_a_password_that_was_not_encoded_is_never_shown(scheme, rest):
    name = "DATABASE_URL" if scheme == "postgresql" else "REDIS_URL"
    with pytest.raises(ConfigurationError) as caught:
        Settings.load({name: f"{scheme}://{rest}"})
    message = str(caught.value)
    assert "percent-encode" in message
    for piece in ("PA", "SS", "WO", "RD", "S/S"):
        assert piece not in message.split("; it must be", maxsplit=1)[0]

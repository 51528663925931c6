"""Passwords never reach text that people read."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.masking import mask_url, redact

PASSWORDS = st.text(min_size=1).map(lambda text: f"S3{text}cr3t")


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:pw@localhost:6379/0", "redis://:***@localhost:6379/0"),
        ("redis://app:pw@localhost", "redis://app:***@localhost"),
        ("redis://token@localhost", "redis://***@localhost"),
        ("postgresql://app@db/shop", "postgresql://app@db/shop"),
        (
            "postgresql+asyncpg://app:pw@db:5432/shop?ssl=require",
            "postgresql+asyncpg://app:***@db:5432/shop?ssl=require",
        ),
        ("postgresql://a:pw@h1:5432,h2:5432/x", "postgresql://a:***@h1:5432,h2:5432/x"),
        ("postgresql:///shop?host=/run/pg&password=pw", "postgresql:///shop?host=/run/pg&password=***"),
        ("redis://h/0?p%61ssword=pw&db=1", "redis://h/0?p%61ssword=***"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("unix://:pw@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("redis+sentinel://:pw@h1:26379,h2:26379/main", "redis+sentinel://:***@h1:26379,h2:26379/main"),
        ("redis://:pw", "redis://***"),
        ("redis://app:pw", "redis://***"),
        ("redis://:p/w#x?y@h", "redis://:***@h"),
        ("redis://:p@ss@h", "redis://:***@h"),
        ("hunter2", "***"),
        ("app:pw@h:6379", "***"),
        ("host=db password=pw", "***"),
        ("embedded", "embedded"),
        ("", ""),
    ],
)
def test_mask_url(url, masked):
    assert mask_url(url) == masked
    assert mask_url(masked) == masked, "masking twice changes nothing"


@given(PASSWORDS)
@example("S3@cr3t")
@example("S3://cr3t")
@example("S3?password=x&cr3t")
def test_no_password_before_the_host_gets_through(password):
    masked = mask_url(f"redis://app:{password}@db.example:6379/0")
    assert masked in {"redis://app:***@db.example:6379/0", "redis://***"}


@given(PASSWORDS)
@example("S3@cr3t")
@example("S3&db=cr3t")
@example("S3#cr3t")
def test_no_password_in_the_query_gets_through(password):
    masked = mask_url(f"postgresql://db.example/shop?sslmode=require&password={password}&a=1")
    assert masked in {"postgresql://db.example/shop?sslmode=require&password=***", "postgresql://***"}


@given(st.text(alphabet=st.characters(exclude_characters="@:/?#[]&=,", exclude_categories=["Z", "C"]), min_size=1))
def test_a_plain_password_hides_nothing_else(password):
    assert mask_url(f"postgres://app:{password}@db/shop") == "postgres://app:***@db/shop"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("nothing to hide: a=1, b@c", "nothing to hide: a=1, b@c"),
        ("cannot reach redis://:pw@h:6379/0, giving up", "cannot reach redis://:***@h:6379/0, giving up"),
        ("'postgres://a:pw@h/x' and redis://b:pw@h", "'postgres://a:***@h/x' and redis://b:***@h"),
        ("host=db password=pw user=x", "host=db password=*** user=x"),
        ("host=db PASSWORD = 'p w' user=x", "host=db PASSWORD = *** user=x"),
        ("see (http://localhost:8080/docs).", "see (http://localhost:8080/docs)."),
        ("see http://localhost:8080.", "see http://localhost:8080."),
    ],
)
def test_redact(text, redacted):
    assert redact(text) == redacted
    assert redact(redacted) == redacted


@given(st.text(), st.text(alphabet=st.characters(exclude_categories=["Z", "C"]), min_size=1), st.text())
def test_redact_finds_the_url_in_any_text(before, password, after):
    assert f"S3{password}cr3t" not in redact(f"{before} redis://:S3{password}cr3t@h/0 {after}")


def test_redact_is_linear_in_a_long_line():
    # Quadratic search would take minutes here and run into the test's timeout.
    text = "a" * 1_000_000
    assert redact(f"{text} x=1 ://") == f"{text} x=1 ://"

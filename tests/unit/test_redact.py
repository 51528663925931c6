"""Passwords never reach text that people read."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.redact import (
    MAX_CHARS,
    clean_block,
    clean_json,
    cut,
    cut_lines,
    describe,
    fit,
    mask_url,
    name_of,
    printable,
    redact,
    text_of,
)

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
        ("{'user': 'a', 'password': 'p, w'}", "{'user': 'a', 'password': ***}"),
        ('{"api_key": "a\\"b c", "n": 1}', '{"api_key": ***, "n": 1}'),
        ("connect(host='h', passwd='p w', port=1)", "connect(host='h', passwd=***, port=1)"),
        ("Authorization: Bearer abcdefghijklmnop.qrst", "Authorization: Bearer ***"),
        ("wrong password: check it", "wrong password: check it"),
        ("the bearer of bad news", "the bearer of bad news"),
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


CONTROLS = [
    *range(0x20),
    *range(0x7F, 0xA0),
    0x61C,
    0x200E,
    0x200F,
    0x2028,
    0x2029,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]


def test_whatever_a_terminal_obeys_is_spelled_out():
    for code in CONTROLS:
        character = chr(code)
        assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"
        assert clean_block(f"a{character}b") == (
            f"a{character}b" if character in "\t\n" else f"a{ascii(character)[1:-1]}b"
        )
        line = clean_json(json.dumps(f"a{character}b", ensure_ascii=False))
        assert line.isprintable(), hex(code)
        assert json.loads(line) == f"a{character}b"
    assert printable("für José 日本") == clean_json("für José 日本") == "für José 日本"


@given(st.text())
def test_nothing_of_a_text_moves_a_cursor_or_turns_its_direction(text):
    cleaned = printable(text)
    assert not [each for each in cleaned if unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs")]
    assert not {unicodedata.bidirectional(each) for each in cleaned} & {
        "RLE",
        "LRE",
        "RLO",
        "LRO",
        "PDF",
        "RLI",
        "LRI",
        "FSI",
        "PDI",
    }
    assert printable(cleaned) == cleaned
    assert len(cleaned.splitlines()) <= 1
    assert clean_json(json.dumps(text, ensure_ascii=False).encode(errors="replace").decode()).splitlines() != []


def test_texts_are_bounded():
    assert cut("x" * 10, 10) == "x" * 10
    assert cut("x" * 2010, 10) == "xxxxxxxxxx… (2,000 characters more)"
    assert len(fit("x" * 20_000_000)) == MAX_CHARS
    block = cut_lines("first\n" + "x" * 20_000_000 + "\nlast", 16_000)
    assert len(block) < 17_000
    assert block.startswith("first\n") and block.endswith("\nlast")
    many = cut_lines("\n".join(f"line {n}" for n in range(100_000)), 16_000)
    assert len(many) < 17_000
    assert many.startswith("line 0\n") and many.endswith("\nline 99999") and "left out" in many


@pytest.mark.parametrize("length", range(0, 60, 3))
def test_half_a_url_does_not_show_half_a_password(length):
    text = "x" * (2 * MAX_CHARS - length - 1) + " postgresql://shop:S3cr3tS3cr3tS3cr3tS3cr3t@db/shop" + " y" * MAX_CHARS
    assert "S3" not in fit(text)


class Metaclass(type):
    @property
    def __name__(cls):
        raise SystemExit(3)


class Nameless(metaclass=Metaclass):
    pass


class Text(str):
    __slots__ = ()

    def isprintable(self):
        raise SystemExit(3)

    def __len__(self):
        raise SystemExit(3)


@pytest.mark.parametrize(
    "raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), RecursionError(), ValueError("x")]
)
def test_no_object_gets_an_exception_through(raised):
    class Hostile(Exception):
        def __str__(self):
            raise raised

        __repr__ = __str__

    assert describe(Hostile()) == "Hostile: (its message cannot be shown)"
    assert text_of(Hostile()) == "<unprintable Hostile>"


def test_objects_whose_names_and_texts_are_odd():
    assert name_of(Nameless()) == "object"
    assert type(text_of(type("Odd", (), {"__str__": lambda self: Text("x")})())) is str

"""Logs: one line per event, for people or machines, without passwords and payloads."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from streamworker.settings import Settings
from streamworker.telemetry import logs, processors


def text(style, level="info"):
    stream = io.StringIO()
    logs.configure(level, style, stream)
    return stream


def events(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_per_line():
    stream = text("json")
    logs.get_logger("streamworker.worker", worker="w-1").info(
        "claimed", count=2, ratio=0.5, alive=True, who=None, path=("a", 1)
    )
    (event,) = events(stream)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "claimed", "level": "info", "logger": "streamworker.worker", "worker": "w-1",
        "count": 2, "ratio": 0.5, "alive": True, "who": None, "path": ["a", 1],
    }  # fmt: skip


def test_console_is_readable():
    stream = text("console")
    logs.get_logger("streamworker.worker").warning("claimed", count=2)
    assert stream.getvalue().endswith("count=2\n")
    assert "[warning  ] claimed " in stream.getvalue()
    assert "\x1b" not in stream.getvalue(), "no colours where no terminal is"


@pytest.mark.parametrize(("variable", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False), (None, False)])
def test_colours_follow_the_usual_variables(monkeypatch, variable, coloured):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    stream = text("console")
    logs.get_logger().info("hello")
    assert ("\x1b[" in stream.getvalue()) is coloured


@pytest.mark.parametrize("style", ["json", "console"])
def test_levels(style):
    stream = text(style, "warning")
    for log in (logs.get_logger(), structlog.get_logger("user"), logging.getLogger("user")):
        log.info("no")
        log.warning("yes")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert all("yes" in line for line in lines)


def test_the_standard_library_takes_the_same_way():
    stream = text("json")
    logging.getLogger("asyncpg").error("lost %s to %s", "redis://:S3cr3t@h/0", {"payload": 1})
    (event,) = events(stream)
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "lost redis://:***@h/0 to {'payload': 1}", "level": "error", "logger": "asyncpg"}


def test_configuring_again_replaces_and_reaches_old_loggers():
    log = logs.get_logger()
    first = text("json")
    log.info("one")
    second = text("json")
    log.info("two")
    logging.getLogger("x").warning("three")
    assert [event["event"] for event in events(first)] == ["one"]
    assert [event["event"] for event in events(second)] == ["two", "three"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_secrets_and_payloads_never_arrive(style):
    stream = text(style)
    settings = Settings(redis_url="redis://:S3cr3t@h")
    log = logs.get_logger().bind(where="postgres://u:S3cr3t@h/x")
    log.info(
        "lost redis://u:S3cr3t@h/0",
        payload={"card": "S3cr3t"},
        body=b"S3cr3t",
        password="S3cr3t",
        settings=settings,
        error=ValueError("redis://:S3cr3t@h"),
        nested=[{"Password": "S3cr3t", "deep": ({"url": "redis://:S3cr3t@h"},)}],
        dsn="host=h password=S3cr3t",
    )
    with structlog.contextvars.bound_contextvars(url="redis://:S3cr3t@h"):
        log.info("again")
    assert "S3cr3t" not in stream.getvalue()
    assert stream.getvalue().count("[not logged]") == 4
    assert stream.getvalue().count("***") == 8


@given(st.text(alphabet=st.characters(exclude_categories=["Z", "C"]), min_size=1).map(lambda text: f"S3{text}cr3t"))
def test_no_generated_password_arrives(password):
    event = processors.clean(
        None, "info", {"event": f"lost redis://:{password}@h/0 now", "a": [f"postgres://u:{password}@h"]}
    )
    assert password not in str(event)
    assert event["event"].startswith("lost redis://")
    assert event["event"].endswith(" now")


def _fail():
    secret_local = "S3" + "cr3t"  # noqa: F841 - must not be printed with the frame
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise ValueError("lost redis://:pw@h/0") from error


@pytest.mark.parametrize("name", ["ours", "standard"])
def test_an_exception_is_structured_in_json(name):
    stream = text("json")
    log = logs.get_logger() if name == "ours" else logging.getLogger("x")
    try:
        _fail()
    except ValueError:
        log.exception("boom")
    (event,) = events(stream)
    assert [(error["exc_type"], error["exc_value"]) for error in event["exception"]] == [
        ("ValueError", "lost redis://:***@h/0"),
        ("KeyError", "'inner'"),
    ]
    assert event["exception"][0]["frames"][-1]["name"] == "_fail"
    assert "S3cr3t" not in stream.getvalue()
    assert event["level"] == "error"


def test_groups_in_groups_are_structured_to_the_last_frame():
    stream = text("json")
    try:
        try:
            _fail()
        except ValueError as error:
            raise ExceptionGroup("outer", [ExceptionGroup("inner", [error])]) from None
    except ExceptionGroup:
        logs.get_logger().exception("boom")
    (event,) = events(stream)
    inner = event["exception"][0]["exceptions"][0][0]["exceptions"][0][0]
    assert inner["frames"][-1]["name"] == "_fail"


@pytest.mark.parametrize("name", ["ours", "standard"])
def test_an_exception_is_in_full_on_the_console(name):
    stream = text("console")
    log = logs.get_logger() if name == "ours" else logging.getLogger("x")
    try:
        _fail()
    except ValueError:
        log.exception("boom")
    lines = stream.getvalue().splitlines()
    assert "boom" in lines[0]
    assert lines[-1] == "ValueError: lost redis://:***@h/0"
    assert "KeyError: 'inner'" in lines
    assert sum(line.startswith("Traceback") for line in lines) == 2


def test_a_job_cannot_repaint_the_terminal_or_fake_a_line():
    stream = text("console")
    logs.get_logger().info("kind \x1b[2J\r\nfake", job_id="\u202ea\x07")
    logs.get_logger().info("mail für José", name="Zoë")
    first, second = stream.getvalue().splitlines()
    assert r"kind \x1b[2J\r\nfake" in first
    assert r"job_id=\u202ea\x07" in first
    assert "mail für José" in second


class _Unprintable:
    def __str__(self):
        raise RuntimeError("no")


def test_values_that_json_does_not_know():
    stream = text("json")
    loop = []
    loop.append(loop)
    logs.get_logger().info("x", big=2**80, half="\ud800", bad=_Unprintable(), loop=loop, at=Settings, keys={1: 2})
    (event,) = events(stream)
    assert event["big"] == 2**80
    assert event["half"] == "\ud800"
    assert event["bad"] == "<unprintable _Unprintable>"
    assert event["level"] == "info"
    assert event["keys"] == {"1": 2}


class _Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_broken_stream_fails_nobody():
    logs.configure("info", "json", _Broken())
    logs.get_logger().info("x")
    logging.getLogger("x").warning("x")
    closed = text("json")
    closed.close()
    logs.get_logger().info("x")


def test_a_stream_of_ascii_still_gets_the_line():
    raw = io.BytesIO()
    logs.configure("info", "console", io.TextIOWrapper(raw, encoding="ascii"))
    logs.get_logger().info("für")
    assert rb"f\xfcr" in raw.getvalue()


def test_a_forked_child_can_log_whatever_the_parents_threads_were_doing(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        logs.configure("info", "json", stream)
        held, done = threading.Event(), threading.Event()

        def writes():
            with logs._pipeline.sink._lock:
                held.set()
                done.wait()

        writer = threading.Thread(target=writes)
        writer.start()
        held.wait()
        pid = os.fork()
        if not pid:
            signal.alarm(10)  # ends it where it waits for a thread that it does not have
            logs.get_logger("x").info("from the child")
            os._exit(0)
        done.set()
        writer.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "from the child" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(("level", "style"), [("loud", "json"), ("info", "yaml")])
def test_unknown_words_are_refused(level, style):
    with pytest.raises(ValueError, match="configure"):
        logs.configure(level, style)


def test_unconfigured_we_are_a_library_of_the_standard_kind(caplog):
    log = logs.get_logger("streamworker.app", worker="w")
    with caplog.at_level("INFO", logger="streamworker"):
        log.debug("no")
        log.info("lost redis://:S3cr3t@h", name="clashes with LogRecord", payload=1, rate="100%s")
    (record,) = caplog.records
    assert record.name == "streamworker"
    assert record.getMessage() == (
        "lost redis://:***@h worker='w' name='clashes with LogRecord' payload='[not logged]' rate='100%s'"
    )


def test_unconfigured_a_program_with_structlog_gets_our_events():
    with structlog.testing.capture_logs() as captured:
        structlog.configure(processors=structlog.get_config()["processors"])
        logs.get_logger("streamworker.app").info("x", a=1)
    assert captured == [{"event": "x", "a": 1, "logger": "streamworker.app", "log_level": "info"}]


def test_a_dropped_event_prepares_nothing():
    text("json", "info")
    seen = []
    logs._pipeline.processors.insert(0, lambda _l, _m, event: seen.append(event) or event)
    log = logs.get_logger().bind(a=1)
    log.debug("x")
    assert seen == []
    log.info("x")
    assert len(seen) == 1


def test_importing_configures_nothing_and_stdout_stays_clean():
    program = (
        "import logging, structlog; from streamworker.telemetry import logs;"
        "assert not structlog.is_configured() and not logging.getLogger().handlers;"
        "logs.get_logger().warning('early'); logs.configure('info', 'json'); logs.get_logger().info('late')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line.startswith("{") for line in done.stderr.splitlines()] == [False, True]


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_control_of_foreign_text_is_written(style):
    stream = text(style)
    codes = [
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
    odd = "".join(map(chr, codes))
    try:
        raise ValueError(odd)
    except ValueError:
        logs.get_logger().exception("a" + odd, job_id=odd, nested={"x": [odd], odd: 1})
    logging.getLogger("x").warning("b %s", odd)
    written = stream.getvalue()
    assert not [hex(ord(each)) for each in written if each not in "\t\n" and ord(each) in codes]
    if style == "json":
        first, second = written.split("\n")[:2]
        assert json.loads(first)["job_id"] == odd
        assert json.loads(second)["event"] == "b " + odd
        assert len(written.splitlines()) == 2


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("name", ["ours", "standard"])
def test_a_message_of_20_mb_is_a_short_line(style, name):
    stream = text(style)
    log = logs.get_logger() if name == "ours" else logging.getLogger("x")
    try:
        raise ValueError("x" * 20_000_000)
    except ValueError:
        log.exception("boom")
    logs.get_logger().info("y", a="y" * 20_000_000, b=["z"] * 1_000_000, c={str(n): n for n in range(100_000)})
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) < 20_000
    assert len(stream.getvalue()) < 60_000
    if style == "json":
        assert json.loads(lines[0])["exception"][0]["exc_type"] == "ValueError"
        assert json.loads(lines[1])["a"].endswith("(19,996,000 characters more)")


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), RecursionError(), ValueError("x")])
def test_objects_that_raise_are_written_all_the_same(style, raised):
    class Hostile(Exception):
        def __str__(self):
            raise raised

        __repr__ = __str__

    class Key:
        __hash__ = object.__hash__

        def __str__(self):
            raise raised

    stream = text(style)
    root = logging.getLogger()
    root.handlers[:] = [each for each in root.handlers if isinstance(each, logs._SinkHandler)]  # pytest's would raise
    try:
        try:
            raise Hostile
        except Hostile as inner:
            raise ExceptionGroup("g", [Hostile(), ValueError("v")]) from inner
    except ExceptionGroup:
        logs.get_logger().exception("boom", thing=Hostile(), keys={Key(): Hostile()}, many=[Hostile()])
        logging.getLogger("x").exception("bang %s", "a")
    logging.getLogger("x").error("%s", Hostile())
    logs.get_logger().info("after")
    written = stream.getvalue()
    for word in ("boom", "bang", "record_unprintable", "after", "<unprintable Hostile>", "Hostile"):
        assert word in written
    assert "test_objects_that_raise" in written, "the traceback is there"


def test_lines_of_several_processes_are_not_torn(tmp_path):
    """A slow reader keeps the pipe full; lines above PIPE_BUF used to be cut into one another."""
    program = (
        "import sys; from streamworker.telemetry import logs; logs.configure('info', 'json'); log = logs.get_logger();"
        "[log.info('x', who=sys.argv[1], n=n, text=sys.argv[1] * 3900, more=sys.argv[1] * 3900) for n in range(150)]"
    )
    read, write = os.pipe()
    with (
        subprocess.Popen([sys.executable, "-c", program, "a"], stderr=write) as one,
        subprocess.Popen([sys.executable, "-c", program, "b"], stderr=write) as two,
    ):
        os.close(write)
        with open(read, "rb", buffering=0) as pipe:  # noqa: PTH123
            parts = []
            while part := pipe.read(3000):
                parts.append(part)
        assert one.wait() == two.wait() == 0
    lines = [json.loads(line) for line in b"".join(parts).splitlines()]
    assert sorted((line["who"], line["n"]) for line in lines) == sorted((who, n) for who in "ab" for n in range(150))


def test_a_frozen_process_does_not_silence_the_others(monkeypatch):
    """One that was stopped while it wrote holds the pipe's lock: after a while the others write without it."""
    monkeypatch.setattr(logs, "_TURN", 0.2)
    program = "import fcntl, sys, time; fcntl.lockf(2, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program], stderr=write, stdout=subprocess.PIPE) as frozen:
        try:
            assert frozen.stdout.readline() == b"held\n"
            with open(write, "w") as stream, open(read) as pipe:  # noqa: PTH123
                logs.configure("info", "json", stream)
                logs.get_logger().info("first")
                logs.get_logger().info("second")
                assert [json.loads(pipe.readline())["event"] for _ in range(2)] == ["first", "second"]
        finally:
            frozen.kill()


@pytest.mark.parametrize("by", ["ours", "standard library"])
def test_what_was_prepared_is_configured_by_the_first_event(by, monkeypatch):
    stream, others = io.StringIO(), []
    monkeypatch.setattr(sys, "stderr", stream)

    class Other(logging.Handler):
        def emit(self, record):
            others.append(record.getMessage())

    logs.prepare("warning", "json")
    logging.getLogger().addHandler(other := Other())
    try:
        assert not structlog.is_configured()
        logs.get_logger("streamworker.x") if by == "ours" else None
        assert not structlog.is_configured(), "holding a logger is no event"
        for number in range(2):
            logging.getLogger("user").info("too quiet")
            if by == "ours":
                logs.get_logger("streamworker.x").warning("happened", number=number)
            else:
                logging.getLogger("user").warning("happened")
    finally:
        logging.getLogger().removeHandler(other)
    assert [event["event"] for event in events(stream)] == ["happened", "happened"]
    assert others == ([] if by == "ours" else ["happened", "happened"])
    assert structlog.is_configured()


def test_code_of_users_finds_logs_configured():
    logs.prepare("info", "json")
    logs.configure_prepared()
    assert structlog.is_configured()
    with pytest.raises(ValueError, match="no such level"):
        logs.prepare("loud", "json")

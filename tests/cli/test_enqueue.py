"""``enqueue``: checked against the handler's type where there is an app, any JSON object where there is none."""

import json
import shlex
import subprocess
from datetime import datetime

import pytest


def documents(raw, stream="stream:{notes}"):
    return [json.loads(fields[b"job"]) for _, fields in raw.xrange(stream)]


def test_with_an_app(sw, raw):
    done = sw.ok("enqueue", "note.write", '{"text": "x", "unknown": 1}', "--app", "jobs:app")
    (job,) = documents(raw)
    assert done.stdout == job["id"] + "\n"
    assert (job["kind"], job["queue_name"], job["payload"]) == ("note.write", "notes", {"text": "x", "times": 1})
    old = sw.ok("enqueue", "note.old", '{"text": "y"}', "--queue", "elsewhere", "--json", STREAMWORKER_APP="jobs:app")
    (job,) = documents(raw, "stream:{elsewhere}")
    assert old.rows == [{"id": job["id"], "new": True}]
    assert job["kind"] == "note.write"

    wrong = sw("enqueue", "note.write", '{"text": 5}', "--app", "jobs:app")
    assert wrong.returncode == 1
    assert "Note.text: Expected `str`, got `int`" in wrong.sentence
    unknown = sw("enqueue", "note.wrote", "{}", "--app", "jobs:app")
    assert unknown.returncode == 2
    assert "did you mean 'note.write'?" in unknown.sentence
    assert sw("enqueue", "note.write", "{}", "--app", "jobs:nothing").returncode == 78
    assert len(documents(raw)) == 1


def test_without_an_app(sw, raw):
    sw.ok("enqueue", "any.kind", '{"n": 12345678901234567890123}', "--queue", "q", "--priority", "high")
    ((_, fields),) = raw.xrange("stream:{q}:high")
    assert b'"payload":{"n":12345678901234567890123}' in fields[b"job"]  # not a digit of it is touched
    sw.ok("enqueue", "any.kind", "-", "--queue", "q", "--priority", "200", stdin='{"from": "stdin"}\n')
    assert [job["payload"] for job in documents(raw, "stream:{q}:low")] == [{"from": "stdin"}]
    sw.ok("enqueue", "any.kind", "--queue", "q", "--count", "2500", "--json")
    assert len({job["id"] for job in documents(raw, "stream:{q}")}) == 2500


def test_key_and_delay(sw, raw):
    first = sw.ok("enqueue", "k", "--queue", "q", "--key", "once", "--json").rows
    second = sw.ok("enqueue", "k", "--queue", "q", "--key", "once", "--json").rows
    assert first == [{"id": second[0]["id"], "new": True}]
    assert second[0]["new"] is False
    assert "(enqueued before)" in sw.ok("enqueue", "k", "--queue", "q", "--key", "once").stdout
    sw.ok("enqueue", "k", "--queue", "q", "--delay", "0.5")
    assert (raw.xlen("stream:{q}"), raw.zcard("stream:{q}:due")) == (1, 1)


def test_a_key_that_is_held(sw, raw):
    words = ("enqueue", "k", "--queue", "q", "--key", "once", "--json")
    (first,) = sw.ok(*words, "--unique", "done", "--delay", "60").rows
    (second,) = sw.ok(*words, "--replace", "--delay", "5").rows
    assert second == {"id": first["id"], "new": False, "replaced": first["id"]}
    (third,) = sw.ok(*words, "--debounce", "5", "--debounce-max", "9").rows
    assert third["replaced"] == first["id"] and raw.zcard("stream:{q}:due") == 1
    assert sw("enqueue", "k", "--queue", "q", "--replace").returncode == 2
    assert sw(*words, "--debounce", "5", "--delay", "5").returncode == 2
    assert sw(*words, "--debounce-max", "5").returncode == 2


def test_expiry(sw, raw):
    sw.ok("enqueue", "k", "--queue", "q", "--delay", "5", "--expires-in", "600")
    (body,) = raw.hvals("stream:{q}:bodies")
    seconds, _ = raw.time()
    assert 590 < datetime.fromisoformat(json.loads(body)["expires_at"]).timestamp() - seconds <= 601
    refused = sw("enqueue", "k", "--queue", "q", "--delay", "5", "--expires-in", "5")
    assert refused.returncode == 2 and "no run would ever start" in refused.sentence


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["k"], 2),
        (["k", "{}", "--queue", "q:high"], 2),
        (["k", "{}", "--queue", "q", "--priority", "urgent"], 2),
        (["k", "{}", "--queue", "q", "--delay", "-1"], 2),
        (["k", "{}", "--queue", "q", "--delay", "inf"], 2),
        (["k", "{}", "--queue", "q", "--delay", "nan"], 2),
        (["k", "{}", "--queue", "q", "--delay", "1e12"], 2),
        (["k", "{}", "--queue", "q", "--priority", "9" * 5000], 2),
        (["k", "{}", "--queue", "q", "--key", "\udcff"], 2),
        (["k\udcff", "{}", "--queue", "q"], 2),
        (["k", "{}", "--queue", "q", "--count", "0"], 2),
        (["k", "{}", "--queue", "q", "--key", "x", "--count", "2"], 2),
        (["k", "{}", "--queue", "q", "--key", ""], 2),
        (["a kind", "{}", "--queue", "q"], 2),
        (["k", "[1]", "--queue", "q"], 1),
        (["k", "{", "--queue", "q"], 1),
        (["k", '{"a": 1} trailing', "--queue", "q"], 1),
        (["k", json.dumps({"big": "x" * 30_000}), "--queue", "q"], 1),
    ],
)
def test_refused(sw, raw, words, code):
    done = sw("enqueue", *words, STREAMWORKER_MAX_JOB_BYTES="20000")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.sentence
    assert "(unexpected" not in done.stderr
    assert raw.keys("*") == []


def test_standard_input(sw, raw):
    """Bytes that are no text would be a dead letter; a closed one is an empty one."""
    command = shlex.join(sw.command("enqueue", "k", "-", "--queue", "q"))
    for words in (f'printf \'{{"a": "\\377"}}\' | {command}', f"{command} <&-"):
        done = subprocess.run(words, shell=True, cwd=sw.directory, env=sw.env, capture_output=True, text=True)
        assert done.returncode == 1
        assert "the payload must be a JSON object" in done.stderr
    assert raw.keys("*") == []


def test_payloads_with_code_of_their_own(sw, raw):
    module = (sw.directory / "jobs.py").read_text()
    hook = "    def __post_init__(self):\n        {}[self.text]\n"
    (sw.directory / "jobs.py").write_text(module.replace("    times: int = 1\n", f"    times: int = 1\n{hook}"))
    done = sw("enqueue", "note.write", '{"text": "x"}', "--app", "jobs:app")
    assert done.returncode == 1
    assert "the payload is no Note: " in done.sentence


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        ('{"text": 5}', "the payload is no Note: Note.text: Expected `str`, got `int`"),
        ('{"text": "x", "times": 1e999}', "Note.times: Number out of range"),
        ('{"text": "x", "times": NaN}', "JSON is malformed"),
    ],
)
def test_what_does_not_fit_is_named_with_class_and_field(sw, raw, payload, says):
    done = sw("enqueue", "note.write", payload, "--app", "jobs:app")
    assert done.returncode == 1
    assert says in done.sentence
    assert raw.keys("*") == []


def test_types_for_type_checkers_alone_end_with_78_and_a_sentence(sw):
    (sw.directory / "shop.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nfrom streamworker import App, Payload\n"
        "if TYPE_CHECKING:\n    from decimal import Decimal\nclass Pay(Payload, kind='pay', queue='q'):\n    amount: Decimal\n"
        "app = App()\n@app.handler\nasync def pay(p: Pay): ...\n"
    )
    for words in (["worker", "shop:app", "--burst"], ["enqueue", "pay", "{}", "--app", "shop:app"]):
        done = sw(*words)
        assert done.returncode == 78
        assert f"{sw.directory / 'shop.py'}:7: the type 'Decimal' of Pay.amount cannot be resolved" in done.stderr
        assert "payload.py" not in done.stderr


def test_nobody_reads_the_ids(sw, raw):
    command = sw.piped("enqueue", "k", "--queue", "q", "--count", "5000")
    assert command.stdout.readline()
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait(30) == 0
    assert raw.xlen("stream:{q}") == 5000

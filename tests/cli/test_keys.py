"""``streamworker keys``, and what other commands show of sealed jobs."""

from __future__ import annotations

import base64
import json

from streamworker import Keys
from streamworker.encryption import new_key

ONE, TWO = new_key(), new_key()

JOBS = """
import os
from streamworker import App, Keys, Payload

class Letter(Payload, kind="letter", queue="q"):
    text: str

known = {{"one": {one!r}, "two": {two!r}}}
app = App(encryption=Keys(current=os.environ["CURRENT"], keys={{name: known[name] for name in os.environ["KNOWN"].split()}}))

@app.handler(max_attempts=1)
def letter(payload: Letter) -> None:
    raise ValueError(payload.text)
"""


def test_a_new_key_is_32_bytes(bare):
    made = bare.ok("keys", "new").stdout.strip()
    assert len(base64.urlsafe_b64decode(made)) == 32
    assert Keys(current="a", keys={"a": made}).ids == {"a"}


def test_payloads_are_shown_where_the_key_is_and_check_finds_what_still_uses_one(sw, raw):
    (sw.directory / "letters.py").write_text(JOBS.format(one=ONE, two=TWO))
    sw.env |= {"STREAMWORKER_APP": "letters:app", "CURRENT": "one", "KNOWN": "one two"}
    sw.ok("enqueue", "letter", '{"text": "SECRET dead"}')
    sw.ok("worker", "--burst")
    sw.env["CURRENT"] = "two"
    sw.ok("enqueue", "letter", '{"text": "SECRET later"}', "--delay", "3600")
    sw.ok("enqueue", "letter", '{"text": "SECRET ready"}')

    shown = sw.ok("dead", "--json", "--payload").stdout
    assert shown.count("SECRET dead") == 2  # payload and error
    hidden = sw.ok("dead", "--json").rows[0]
    assert hidden["error"].startswith("ValueError: at letters.py:")
    assert hidden["error"].endswith("[sealed one]")
    assert "SECRET later" in sw.ok("delayed", "--json", "--payload").stdout
    uses = sw.ok("keys", "check", "--json").rows
    assert {(row["key"], row["place"]): row["count"] for row in uses} == {
        ("one", "redis stream:{q}:dead"): 2, ("two", "redis stream:{q}:bodies"): 1, ("two", "redis stream:{q}"): 1,
    }  # fmt: skip
    assert all(row["known"] for row in uses)

    sw.env["KNOWN"] = "two"
    assert "SECRET" not in sw.ok("dead", "--json", "--payload").stdout
    lacking = sw("keys", "check")
    assert lacking.returncode == 1
    assert "the app lacks one" in lacking.stderr
    sw.ok("dead", "drop", "--all", "--yes")
    sw.env["KNOWN"] = "one two"
    assert "nothing is sealed with the key one: it can go" in sw.ok("keys", "check").stderr

    del sw.env["STREAMWORKER_APP"]
    document = sw.ok("delayed", "--json", "--payload").rows[0]["document"]
    assert list(document["payload"]) == ["streamworker_sealed"]
    assert "SECRET" not in json.dumps(document)
    assert "STREAMWORKER_APP" in sw("keys", "check").stderr


def test_erase_says_what_there_is_and_deletes_with_yes(sw, raw, ground):
    for text in ("ann", "bob"):
        ground.push(
            json.dumps({"id": text, "kind": "letter", "payload": {"person": {"name": text, "id": 17}}}), queue="q"
        )
    found = sw.ok("jobs", "erase", "--where", "person.name=ann", "--json").rows[0]
    assert (found["jobs"], found["redis"], found["dry_run"]) == ([["q", "ann"]], {"ready": 1}, True)
    shown = sw("jobs", "erase", "--where", "person.name=ann")
    assert (shown.returncode, "nothing was deleted: --yes deletes it" in shown.stderr) == (0, True)
    assert raw.xlen("stream:{q}") == 2
    assert sw.ok("jobs", "erase", "--where", "person.name=ann", "--where", "person.id=17", "--yes").stdout.startswith(
        "jobs"
    )
    assert raw.xlen("stream:{q}") == 1
    assert sw("jobs", "erase").returncode == sw("jobs", "erase", "--where", "ann", "--yes").returncode == 2

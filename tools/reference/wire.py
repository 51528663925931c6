"""The document of a job, from the type that writes it."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from streamworker import codec
from streamworker.codec import MARK_FIELD, STATE_FIELD, Document
from tools.reference.tables import code, table

_WHAT: Final = {
    "id": f"Any text up to {codec.MAX_ID_BYTES} bytes. Same id, same job. Without one the job gets one when it is first taken.",
    "key": "The deduplication key it was enqueued with, so that an operator who ends it frees the key. Written by `enqueue` alone.",
    "unique": "`done` or `started`: until when `key` is held. Written by `enqueue` alone.",
    "queue_name": "The queue; the key's unless given.",
    "kind": "Picks the handler. A queue with exactly one handler needs none.",
    "priority": "Up to 50 is high, up to 150 normal, above that low; or one of the words. 100 unless given. Once a job is stored "
    "in the key of a level, that level holds.",
    "payload": "What the handler gets, decoded as its `Payload`.",
    "created_at": "When the producer made it, RFC 3339.",
    "run_at": "Not before this moment, RFC 3339; without a zone it is UTC.",
    "expires_at": "From this moment on it never starts, RFC 3339; without a zone it is UTC.",
    "attempt_count": "Failed attempts so far.",
    "max_attempts": "Failed attempts after which the job is dead; the handler's unless given.",
    "hop": "How often the job was put on a stream again: retry, release, replay, dispatch.",
    "order_key": "Of the jobs of a queue with one order key at most one runs at a time, in order. Up to 200 bytes.",
    "fair_key": "The tenant, which gets its share of the starts. Up to 200 bytes.",
    "headers": "What travels with the job besides its payload, such as `traceparent`.",
}


def page() -> str:
    """The page."""
    # The payload has a default in the code, by position, which no producer may rely on.
    fields = [
        (field.encode_name, field.type, *([] if field.name == "payload" else [field.default]))
        for field in msgspec.structs.fields(Document)
    ]
    wire = msgspec.defstruct("Document", fields, kw_only=True)
    document = json.loads(msgspec.json.encode(msgspec.json.schema(wire)))
    schema: dict[str, Any] = next(iter(document["$defs"].values()))
    required = set(schema["required"])
    rows = [
        [code(name), _type(schema["properties"][name]), "yes" if name in required else "", _WHAT[name]]
        for name in (field.encode_name for field in msgspec.structs.fields(Document))
    ]
    shown = {key: value for key, value in schema.items() if key not in ("title", "description")}
    return f"""# The wire

Made from `streamworker.codec.Document`. A job is one JSON object: the field `job` of a stream's entry, or an element of a list.
Any language may write it, and only `payload` is required:

```json
{{"payload": {{"invoice_id": 7}}}}
```

{table(["field", "type", "required", "what"], rows)}
Every field but `payload` may also be null. Fields that streamworker does not know stay in the document, byte for byte, however
often the job is retried. A document above `STREAMWORKER_MAX_JOB_BYTES`, or one that is no such object, goes to the dead letters
with its bytes kept. Two fields are written by workers alone: `{STATE_FIELD}`, the state of a job that they released
(`deliveries`, `turn`, `unknown_since`), and `{MARK_FIELD}`, the same of a list's element. Both end with a `seal`. State that is
not sealed with the queue's secret is ignored. Header names that begin with `streamworker-` are reserved.

## JSON Schema

```json
{json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **shown}, indent=2)}
```
"""


def _type(schema: dict[str, Any]) -> str:
    kinds = schema.get("anyOf", [schema])
    names = []
    for each in kinds:
        if "enum" in each:
            names += [json.dumps(word) for word in each["enum"]]
        elif each.get("type") not in (None, "null"):
            names.append(each.get("format", each["type"]))
    return ", ".join(names) or "object"

"""The mail catcher of compose.yaml: takes every mail on port 1025, delivers none, and shows on port 8025 what came.

``/`` is a summary and ``/ids`` every Message-ID with how often it came, both as JSON. All of it is in memory.
"""

import json
from collections import Counter, deque
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller

seen: Counter[str] = Counter()
latest: deque[dict[str, str]] = deque(maxlen=20)


class Catcher:
    """Keeps what an SMTP client sends."""

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: ARG002, N802 - aiosmtpd's
        """Count one mail."""
        message = message_from_bytes(envelope.content, policy=policy.default)
        seen[str(message["Message-ID"])] += 1
        latest.append({"to": ", ".join(envelope.rcpt_tos), "subject": str(message["Subject"])})
        return "250 caught"


class Page(BaseHTTPRequestHandler):
    """Shows what came."""

    def do_GET(self) -> None:
        """Answer with JSON."""
        summary = {"mails": sum(seen.values()), "different": len(seen), "latest": list(latest)}
        body = json.dumps(dict(seen) if self.path == "/ids" else summary, indent=1).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's names
        """Say nothing: health checks ask all the time."""


if __name__ == "__main__":
    Controller(Catcher(), hostname="0.0.0.0", port=1025).start()  # noqa: S104 - a container's own network
    ThreadingHTTPServer(("0.0.0.0", 8025), Page).serve_forever()  # noqa: S104

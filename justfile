# Every recipe of the project. `./dev NAME` makes .venv if need be and then runs `just NAME`.

set positional-arguments := true

# Whoever calls `just` directly gets the same tools as ./dev, and nothing that happens to lie on the PATH.
export PATH := justfile_directory() / ".venv/bin:" + env("PATH", "/usr/bin:/bin")
export VIRTUAL_ENV := justfile_directory() / ".venv"
# Some machines forbid byte code; every one of the thousand processes that the tests start would compile all it imports.
export PYTHONDONTWRITEBYTECODE := ""

_default:
    @just --justfile {{ quote(justfile()) }} --list

# The show: embedded servers, three workers, one is killed, nothing is lost
demo *args:
    @streamworker demo "$@"

# A worker in the foreground: ./dev worker module:attr
worker *args:
    @streamworker worker "$@"

# Every promise once, against embedded servers; --all runs all of it, and arguments go to pytest (./dev test -k name)
test *args:
    pytest -n auto --dist worksteal "$@"

# The unit tests, the brokers' contract and Django's tasks on every other Python we claim and this machine has, on Redis 6.2 and 8.2
pythons *args:
    @./dev pythons "$@"

# Django's own tests of its tasks with our backend, on the Python that `./dev pythons` made; downloads Django's source
django-tests python="build/python-3.12/bin/python":
    @{{python}} -W ignore -m tests.postgres.django.djangos_own

# Is the suite steady: all of it, 20 times, in orders of chance (--runs 5 --load), and a table of what failed
steady *args:
    @python -m tools.steady "$@"

# The brokers' contract against Redis 6.2 and Redis 8.2 on this Python; `pythons` does so on the others (compat redis-6.2)
compat *args:
    @python tools/compat.py "$@"

# The brokers' contract behind Sentinel and on a cluster, and what breaks there: failovers, slots that move
topologies *args:
    pytest -q -n auto --dist worksteal -m slow tests/topologies "$@"
    STREAMWORKER_TEST_TOPOLOGY=sentinel pytest -q -n auto --dist worksteal -m "not mode_free" tests/contract "$@"
    STREAMWORKER_TEST_TOPOLOGY=cluster pytest -q -n auto --dist worksteal -m "not mode_free" tests/contract "$@"

# The crash suite: workers and servers are killed, frozen and cut off while jobs run
crash *args:
    @python -m tests.crash.short "$@"

# Faults without end on a running fleet (--minutes 10 --seed 7), and a table of what they cost
soak *args:
    @python -m tests.crash.soak "$@"

# Takes one safety at a time out of a copy of the sources, and shows that the crash suite fails without it
mutants *args:
    @python -m tests.crash.mutants "$@"

# Jobs of PostgreSQL transactions while everything is killed, flushed, frozen or hostile: one row a job (--jobs 20000 --seed 7)
turmoil *args:
    @python -m tests.postgres.turmoil "$@"

# A fleet changes from lists to streams and back while producers push (--minutes 5 --kill-every 1)
flip *args:
    @python -m tests.bridge.flip "$@"

# compose.yaml on a real engine: scaled, killed, upgraded and drained while 5,000 jobs run
containers *args:
    @python -m tests.containers "$@"

# How fast, beside a bare loop in the same run (./dev bench throughput --rounds 3), or a commit (./dev bench guard HEAD~5)
bench *args:
    @python -m benchmarks "$@"

# Other job queues on the same workload, each in an environment of its own (./dev bench-peers blitzq arq --rounds 3)
bench-peers *args:
    @python -m benchmarks.peers "$@"

# A thousand idle workers and two hundred busy ones against one Redis (--idle 0 500 1000 --busy 200 --seconds 30)
bench-fleet *args:
    @python -m benchmarks.fleet "$@"

# What a job of a queue over 1, 2 and 4 servers costs each server, worker and producer (--nodes 1 2 --workers 2 --rounds 3)
bench-nodes *args:
    @python -m benchmarks.nodes "$@"

# Autoscaling by the scaling signal and by queue length, simulated on five recorded loads (steady burst --json FILE)
bench-scaling *args:
    @python -m benchmarks.scaling "$@"

# A worker that leaks a megabyte a job under --max-rss: lost, run twice, throughput and start latency while it is replaced (throughput, latency; --jobs 10000 --minutes 2 --max-rss 200)
bench-leak *args:
    @python -m benchmarks.leak "$@"

# Measured figures (benchmarks/results/*.json) into the pages and pictures that show them
figures:
    @python -m tools.figures

# ruff: rules and formatting
lint:
    ruff check
    ruff format --check

# The site, strictly, into build/site/VERSION (--into FOLDER; docs-serve shows it while you write)
docs *args:
    @python -m tools.site "$@"

# The site at http://127.0.0.1:8000, anew after every change
docs-serve *args:
    @NO_MKDOCS_2_WARNING=1 mkdocs serve "$@"

# Every code block of README and docs, run or checked; and pages that are a story, followed
docs-test *args:
    pytest -q -n auto --dist worksteal --all tests/docs "$@"

# README and tutorial alone, in a fresh clone with an empty home, the commands copied out of the files (five minutes)
newcomer *args:
    pytest -q -m slow tests/docs/test_newcomer.py "$@"

# What commands really print, into the pages that show it (console blocks)
capture *args:
    python -m tools.capture "$@"

# The pictures: of concepts, and of the demo from a real run
picture:
    python -m tools.pictures
    python -m tools.terminal docs/images/demo.svg streamworker demo

# Links between pages, and their anchors; ./dev links --external asks the addresses too
links *args:
    python -m tools.links "$@"

# Spelling of prose, comments and docstrings
spell:
    codespell

# mypy --strict, and pyright over what users write
types:
    mypy
    basedpyright

# Imports point down (import-linter)
layers:
    lint-imports --no-cache

# Lines a file, lines a function, positional parameters; and the figures of the package as a whole
ceilings:
    python tools/ceilings.py streamworker
    python tools/house.py --strict

# Those figures, their goals, and every offence by file and line (./dev house streamworker/cli)
house *args:
    @python tools/house.py "$@"

# No registry host names in tracked files
hosts:
    python tools/hosts.py

# Build the wheel, install it with its [demo] extra into a clean environment, and call it there
wheel-test:
    tools/wheel-test

# Everything that CI runs; stops at the first failing check and names it
check:
    bash .ci/run

[private]
_checks:
    @python -m tools.check

# Let ruff repair and format
fmt:
    ruff check --fix
    ruff format

# Both locks anew; `./dev lock --upgrade` takes the newest versions
lock *args:
    uv pip compile {{ lock_options }} --extra demo --extra web --group house pyproject.toml -o requirements.lock "$@"
    uv pip compile {{ lock_options }} --extra demo --extra web --group house --group dev --group docs -c requirements.lock pyproject.toml -o requirements-dev.lock "$@"

# No host name may get in: the locks install from whatever index pip is configured for.
lock_options := "--quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --python-version 3.11"

# Base images of Dockerfile and compose.yaml pinned by the digests that the registry shows now
pin-images:
    @python -m tools.pin_images

# What the next release says (changes/ and CHANGELOG.md); --release 0.2.0 writes it
changelog *args:
    @python -m tools.changelog "$@"

# What is published, into dist/: built twice, checked in clean environments
release:
    @python -m tools.release

# Source distribution and wheel into dist/
build:
    hatchling build

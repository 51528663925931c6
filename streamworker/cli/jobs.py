"""``streamworker jobs``: the ledger."""

from __future__ import annotations

from cyclopts import App

jobs = App(name="jobs", help="Durable jobs in the ledger.")
jobs.command("streamworker.cli.reconcile:reconcile", name="reconcile")

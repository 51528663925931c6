"""The task of `tests.postgres.turmoil`, whose writes commit with its end (the option ``atomic``)."""

from __future__ import annotations

from django.db import connection
from django.tasks import task

from streamworker import Backoff
from streamworker.integrations.django import run_options


@task(queue_name="writes")
@run_options(max_attempts=100, backoff=Backoff(base=0.2, cap=2), timeout=20)
def write(number):
    with connection.cursor() as cursor:
        cursor.execute("insert into effect (n) values (%s)", [number])

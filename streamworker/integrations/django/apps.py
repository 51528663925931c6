"""The app of Django: ``INSTALLED_APPS = [..., "streamworker.integrations.django"]``."""

from __future__ import annotations

from django.apps import AppConfig


class StreamworkerConfig(AppConfig):
    """Its migrations are the ledger's; it has no models."""

    name = "streamworker.integrations.django"
    label = "streamworker"
    verbose_name = "streamworker"

"""Names of keys are pinned: other people's producers and dashboards rely on them."""

import pytest

from streamworker.broker.keys import ListKeys, QueueKeys, queue_of_list


def test_streams_share_a_slot_and_a_namespace():
    keys = QueueKeys("billing", "ns:")
    assert keys.streams == ["ns:stream:{billing}:high", "ns:stream:{billing}", "ns:stream:{billing}:low"]
    assert [keys.ready(level) for level in ("high", "normal", "low")] == keys.streams


def test_lists_are_those_of_legacy_producers_and_all_else_is_where_stream_mode_has_it():
    keys, streams = ListKeys("billing", "ns:"), QueueKeys("billing", "ns:")
    assert keys.lists == ["queue:billing:high", "queue:billing", "queue:billing:low"]
    assert [keys.ready(level) for level in ("high", "normal", "low")] == keys.lists
    assert keys.claimed("w-1") == "ns:queue:billing:claimed:w-1"
    assert keys.leases == "ns:stream:{billing}:leases"
    for name in ("streams", "due", "bodies", "dead", "meta"):
        assert getattr(keys, name) == getattr(streams, name)
    assert keys.key("k") == streams.key("k")


@pytest.mark.parametrize(
    ("key", "queue"),
    [
        ("queue:billing", "billing"),
        ("queue:billing:high", "billing"),
        ("queue:billing:low", "billing"),
        ("queue:a:b", "a:b"),
        ("queue:a.b-c_d:E", "a.b-c_d:E"),
        ("queue:high", "high"),
        ("queue:" + "q" * 100, "q" * 100),
        ("queue:" + "q" * 100 + ":low", "q" * 100),
        ("queue:billing:claimed:worker-host-1-abc", "billing"),
        ("ns:queue:billing:claimed:worker-host-1-abc", "billing"),
        ("other:queue:billing:claimed:worker-host-1-abc", None),
        ("queue:claimed:x", None),
        ("queue:billing:high:low", None),
        ("queue:" + "q" * 101, None),
        ("queue:", None),
        ("queue:with space", None),
        ("queue:{tagged}", None),
        ("queue:billing\n", None),
        ("ns:queue:billing", None),
        ("stream:{billing}", None),
    ],
)
def test_lists_are_known_by_their_names(key, queue):
    assert queue_of_list(key, "ns:") == queue

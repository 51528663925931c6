"""Names of keys are pinned: other people's producers and dashboards rely on them."""

from streamworker.broker.keys import ListKeys, QueueKeys


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

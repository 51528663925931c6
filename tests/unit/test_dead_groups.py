"""Which errors are alike, and what it costs to find out."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from streamworker.job import DeadError
from streamworker.views.groups import MOST, DeadGroups, group_of, normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ValueError: no invoice 4711", "ValueError: no invoice 12"),
        ("KeyError: 'ann'", "KeyError: 'bob'"),
        ('x.Y: user "a b" is gone', 'x.Y: user "c" is gone'),
        ("Gone: 0198f0c2-7d8e-7abc-8def-000000000001", "Gone: 0198f0c2-7d8e-7abc-8def-000000000002"),
        ("HTTPError: GET https://a.example/x/1?y=2 gave 502", "HTTPError: GET https://b.example/zz gave 502"),
        ("SMTPError: ann@a.example refused", "SMTPError: bob.b@c.example refused"),
        ("TypeError: <f object at 0x7f14d2b0f9d0>", "TypeError: <f object at 0x7f14d2b0aaaa>"),
        ("OSError: connect 10.0.0.1:5432 after 3.5 s", "OSError: connect 10.1.2.3:5432 after 10.25 s"),
        ("ValueError: digest deadbeef1234", "ValueError: digest 00ff00ff11aa"),
    ],
)
def test_alike(one, other):
    assert normalised(one, "") == normalised(other, "")
    trace = "Traceback (most recent call last):\n  File 'x', line 1\n    raise\n"
    assert normalised(trace + one, "") == normalised(other, "")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ValueError: no invoice 1", "KeyError: no invoice 1"),
        ("ValueError: no invoice 1", "ValueError: no customer 1"),
        ("timed out", "discarded"),
    ],
)
def test_not_alike(one, other):
    assert normalised(one, "") != normalised(other, "")


def test_a_message_of_several_lines_keeps_its_type():
    assert normalised("Traceback …\n  File\nshop.Bad: first\nsecond 5", "") == "shop.Bad: first"
    assert normalised("", "worker died 5 times") == "worker died <n> times"
    assert len(normalised("E: " + "x" * 10_000, "")) == 200


def test_kind_and_queue_are_told_apart():
    assert len({group_of(q, k, "E: x", "") for q in "ab" for k in "cd"}) == 4


class Reader:
    """Dead letters, and how many were read."""

    def __init__(self, count: int) -> None:
        self.letters = [DeadError(f"{1_700_000_000_000 + n}-0", "k", "raised", f"E{n % 3}: {n}") for n in range(count)]
        self.read = self.compared = 0

    async def errors(self, queue: str, after: str = "", *, ids: bool = False) -> list[DeadError]:
        begin = next((n + 1 for n, each in enumerate(self.letters) if each.handle == after), 0) if after else 0
        page = self.letters[begin : begin + 1000]
        self.compared += len(page) if ids else 0
        self.read += 0 if ids else len(page)
        return page

    async def muted(self, queue: str) -> dict[str, str]:
        return {}


@pytest.mark.anyio
async def test_the_next_look_reads_only_what_is_new():
    reader = Reader(5000)
    groups = DeadGroups(reader)
    assert await groups.update("q", 5000)
    assert (reader.read, sorted(group.count for group in groups.of())) == (5000, [1666, 1667, 1667])
    reader.letters.append(DeadError("1800000000000-0", "k", "raised", "New: 1"))
    assert await groups.update("q", 5001)
    assert reader.read == 5001
    newest = groups.of()[0]
    assert (newest.error, newest.count, newest.is_new(1_800_000_100.0)) == ("New: <n>", 1, True)
    del reader.letters[:3000]
    assert await groups.update("q", 2001)
    assert reader.read == 5001  # the errors of those that stay are known
    assert sum(group.count for group in groups.of()) == 2001


@pytest.mark.anyio
async def test_errors_without_end_are_not_groups_without_end():
    reader = Reader(0)
    reader.letters = [
        DeadError(f"{1_700_000_000_000 + n}-0", f"kind{n}", "", f"E{'x' * (n % 50)}") for n in range(3000)
    ]
    groups = DeadGroups(reader)
    await groups.update("q", 3000)
    assert len(groups.of()) == MOST + 1
    assert sum(group.count for group in groups.of()) == 3000


async def test_updates_at_the_same_time_count_a_letter_once():
    """The dashboard's monitor and its pages share one index."""
    letters = [DeadError(f"{n}-0", "k", "boom") for n in range(1, 4)]

    class Reader:
        async def errors(self, queue, after="", *, ids=False):
            await anyio.lowlevel.checkpoint()
            return [each for each in letters if after == "" or int(each.handle[:-2]) > int(after[:-2])]

        async def muted(self, queue):
            return {}

    groups = DeadGroups(Reader())
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(groups.update, "q", len(letters))
    assert [group.count for group in groups.of()] == [3]

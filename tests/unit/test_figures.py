"""What tools/house.py counts, and what it lets pass."""

from pathlib import Path

import pytest

from tools import house


@pytest.fixture
def package(tmp_path: Path):
    """Writes files of a package and reads it."""

    def write(**files: str) -> house.House:
        for name, source in {"__init__": "", **files}.items():
            path = (
                tmp_path
                / "streamworker"
                / f"{name.replace('__init__', '@').replace('__', '/').replace('@', '__init__')}.py"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        (tmp_path / "pyproject.toml").touch()
        return house.House(tmp_path)

    return write


def texts(offences: list[house.Offence]) -> list[str]:
    return [str(offence).removeprefix("streamworker/") for offence in offences]


def test_entries_are_files_and_folders_of_one_level(package, tmp_path):
    made = package(app="", broker____init__="", broker__stream="")
    (tmp_path / "streamworker" / "py.typed").touch()
    (tmp_path / "streamworker" / "__pycache__").mkdir()
    (tmp_path / "streamworker" / "removed" / "__pycache__").mkdir(parents=True)
    (tmp_path / "streamworker" / "removed" / "__pycache__" / "old.pyc").touch()
    assert [each.path for each in made.entries("")] == [
        f"streamworker/{name}" for name in ("__init__.py", "app.py", "broker")
    ]
    assert len(made.entries("broker")) == 2
    assert made.entries("absent") == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a": "", "b": "import streamworker.a\n"}, ["a.py:1: only streamworker.b imports it"]),
        ({"a": "", "b": "from streamworker import a\n"}, ["a.py:1: only streamworker.b imports it"]),
        ({"a": "x = 1\n", "b": "from streamworker.a import x\n"}, ["a.py:1: only streamworker.b imports it"]),
        ({"a": "", "b": "import streamworker.a\n", "c": "import streamworker.a\n"}, []),
        ({"a": "", "b": "import streamworker.a\n", "cli__c": "import streamworker.a\n"}, []),
        ({"a": "", "cli__b": "import streamworker.a\n"}, []),
        ({"cli__a": "", "b": "import streamworker.cli.a\n"}, []),
        ({"errors": "", "b": "import streamworker.errors\n"}, []),
        ({"a": "if __name__ == '__main__':\n    main()\n", "b": "import streamworker.a\n"}, []),
        ({"a": ""}, []),
    ],
)
def test_core_modules_with_one_importer(package, files, found):
    assert texts(package(**files).single_importers()) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("kind = A if settings.mode == 'list' else B", ["a.py:1: settings.mode == 'list'"]),
        ("def f(mode):\n    return mode in ('list', 'x')", ["a.py:2: mode in ('list', 'x')"]),
        ("match settings.mode:\n    case 'list':\n        x = 1", ["a.py:1: match settings.mode:"]),
        ("kind = settings.by_mode(A, B)", []),
    ],
)
def test_only_settings_and_wiring_choose_by_mode(package, code, found):
    assert texts(package(a=code, wiring=code, settings____init__=code).mode_branches()) == found


def test_small_modules_with_one_importer(package):
    user = "import streamworker.a, streamworker.b, streamworker.c\n"
    made = package(a="x = 1\n" * 59, b="x = 1\n" * 60, c="", d="import streamworker.c\n", user=user)
    assert texts(made.small()) == ["a.py:1: 59 lines, and only streamworker.user imports it"]


def test_the_way_of_a_job_is_what_the_page_lists(package, tmp_path):
    made = package()
    assert made.path_of_a_job() is None
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "architecture.md").write_text(
        "1. Claim: `streamworker/a.py`\n2. `streamworker/b/c.py` decodes\n3. again `streamworker/a.py`\nno `streamworker/d.py`\n"
    )
    assert [each.path for each in made.path_of_a_job()] == ["streamworker/a.py", "streamworker/b/c.py"]


def test_rows_of_the_layers_contract(package, tmp_path):
    made = package()
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.importlinter.contracts]]\nlayers = ["a : b : c : d : e : f", "(a) : b : c : d : e : f : g"]\n'
    )
    assert [each.text for each in made.wide_rows()] == ["layer of 7 names: (a) : b : c : d : e : f : g"]


def test_modules_named_as_another(package):
    made = package(a="", x__a="", y__b="", cli__a="", x____init__="", y____init__="")
    assert texts(made.repeated_basenames()) == [
        "a.py:1: named as streamworker/x/a.py",
        "x/a.py:1: named as streamworker/a.py",
    ]


def test_public_classes_named_as_another(package):
    made = package(
        a="class A: ...\nclass _B: ...\ndef f():\n    class C: ...\n", b="class A: ...\nclass _B: ...\nclass C: ...\n"
    )
    assert texts(made.repeated_classes()) == [
        "a.py:1: class A is also in streamworker/b.py",
        "b.py:1: class A is also in streamworker/a.py",
    ]


def test_gerunds(package):
    made = package(
        gathering="class Serving: ...\nclass ServingBroker: ...\n", settings="class Ping: ...\nclass JobString: ...\n"
    )
    assert texts(made.gerunds()) == ["gathering.py:1: gathering is a gerund", "gathering.py:1: Serving is a gerund"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Nobody is told."""\n', ["a.py:1: 'Nobody' in: Nobody is told.", "a.py:1: 'is told' in: Nobody is told."]),
        ('"""Fine.\n\nA bell."""\n', ["a.py:3: 'bell' in: A bell."]),
        ("x = 1  # it lies there\n", ["a.py:1: 'lies' in: # it lies there"]),
        ("class A:\n    x: int\n    '''The rooms.'''\n", ["a.py:3: 'rooms' in: The rooms."]),
        ("def hear(): ...\nearly = replies = 'nobody lies in a message'\n", []),
        ("class Ears: ...\n", ["a.py:1: name Ears"]),
        ("def open_door(room): ...\n", ["a.py:1: name open_door", "a.py:1: name room"]),
        ("x.house = house = 1\n", ["a.py:1: name house"]),
        ("print(x.house)\n", []),
    ],
)
def test_banned_words(package, source, found):
    assert texts(package(a=source).banned_words()) == found


def test_banned_words_in_lua_comments(package, tmp_path):
    (tmp_path / "streamworker").mkdir()
    (tmp_path / "streamworker" / "x.lua").write_text("local room = 1\n-- whoever waits\nreturn room -- deaf\n")
    assert texts(package().banned_words()) == ["x.lua:2: 'whoever' in: whoever waits", "x.lua:3: 'deaf' in: deaf"]


def test_docstrings_that_only_send_elsewhere(package):
    source = 'def a():\n    """See `Broker.open`."""\ndef b():\n    """See whether the lease is held still, and by whom."""\n'
    assert texts(package(a=source).see_only()) == ["a.py:2: See `Broker.open`."]


FOREIGN = [
    "def wire(settler, decided):\n    settler.judge = lambda: 1\n",
    "def judge(): ...\ndef wire(settler):\n    settler.judge = judge\n",
    "def wire(settler):\n    def judge(): ...\n    settler.judge = judge\n",
    "from collections.abc import Callable\ndef wire(settler, judge: Callable[[], int]):\n    settler.judge = judge\n",
    "class A:\n    def judged(self): ...\n    def wire(self):\n        self.settler.judge = self.judged\n",
    "from functools import partial\ndef wire(settler):\n    settler.judge = partial(print, 1)\n",
    "def judge(): ...\ndef wire(settler, on):\n    settler.judge = judge if on else None\n",
]
OWN = [
    "class A:\n    def __init__(self, judge):\n        self.judge = judge\n        self.key = lambda: 1\n",
    "def wire(settler, judge):\n    settler.judge = judge\n",
    "def task(): ...\ndef wire(run):\n    task = 1\n    run.task = task\n",
    "class A:\n    def ended(self): ...\n\nclass B:\n    ended: float\n\ndef f(record, run):\n    record.ended = run.ended\n",
    "class A:\n    @property\n    def late(self): ...\n\ndef f(record, run):\n    record.lateness = run.late\n",
    "def f(run, clock):\n    run.ended = clock()\n",
]


@pytest.mark.parametrize("source", FOREIGN)
def test_behaviour_assigned_from_outside(package, source):
    assert len(package(a=source).foreign_behaviour()) == 1


@pytest.mark.parametrize("source", OWN)
def test_data_and_own_attributes_are_no_foreign_behaviour(package, source):
    assert package(a=source).foreign_behaviour() == []


def test_a_method_named_as_data_counts_where_the_target_is_called(package):
    source = (
        "from collections.abc import Callable\nclass Settler:\n    settled: Callable[[], None]\n"
        "class Watch:\n    def settled(self): ...\ndef wire(settler: Settler, watch: Watch):\n    settler.settled = watch.settled\n"
        "    settler.settled = None\n"
    )
    assert texts(package(a=source).foreign_behaviour()) == ["a.py:7: settler.settled = watch.settled"]


def test_hooks_without_a_body_and_lambdas_made_too_early(package):
    hook = 'class A:\n    async def hook(self):\n        """What it does."""\n        raise NotImplementedError\n'
    early = "class B:\n    def __init__(self, make):\n        self.a = make(lambda: self.b.go())\n        self.b = make(lambda: self.a.go())\n"
    made = package(a=hook, b=early)
    assert texts(made.untraceable()) == [
        "a.py:2: hook is a hook without a body",
        "b.py:3: lambda uses self.b, made after it",
    ]


def test_callables_of_a_constructor(package):
    head = "from collections.abc import Callable\nDo = Callable[[], None]\n"
    three = (
        "class A:\n    def __init__(self, a: Do, b: Callable[[], int] | None, c: 'Callable[[], int]', d: int): ...\n"
    )
    four = "class B:\n    def __init__(self, a: Do, b: Do, *, c: Do | None = None, d: Callable[[], int]): ...\n"
    fields = "@dataclass\nclass C:\n    a: Do\n    b: Do\n    c: Do\n    d: Do\n"
    found = texts(package(a=head + three + four + fields).many_callables())
    assert found == ["a.py:5: B takes a, b, c, d", "a.py:8: C takes a, b, c, d"]


def test_strict_holds_the_goal_or_the_limit_above_it(package, tmp_path, capsys):
    package(a='"""A room."""\n')
    (tmp_path / "tools").mkdir()
    limits = tmp_path / "tools" / "house.toml"
    assert house.main(["--strict"], tmp_path) == 1
    printed = capsys.readouterr()
    assert "streamworker/a.py:1: 'room' in: A room." in printed.out
    assert printed.err == "house: above the limit: banned words in prose and names\n"

    limits.write_text("words = 1\n")
    assert house.main(["--strict"], tmp_path) == 0
    assert "'room'" not in capsys.readouterr().out
    assert house.main([], tmp_path) == 0
    assert "'room'" in capsys.readouterr().out
    assert house.main(["streamworker/b"], tmp_path) == 0
    assert "'room'" not in capsys.readouterr().out


def test_limits_only_fall(package, tmp_path):
    (tmp_path / "tools").mkdir()
    limits = tmp_path / "tools" / "house.toml"
    limits.write_text("words = 2\n")
    package(a='"""A room."""\n')
    house.main(["--lower"], tmp_path)
    assert limits.read_text().splitlines()[1:] == ["words = 1"]
    package(a='"""A room with a door."""\n')
    house.main(["--lower"], tmp_path)
    assert limits.read_text().splitlines()[1:] == ["words = 1"]
    package(a='"""Fine."""\n')
    house.main(["--lower"], tmp_path)
    assert limits.read_text().splitlines()[1:] == []


def test_a_limit_of_no_figure(package, tmp_path):
    package()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "house.toml").write_text("wrods = 2\n")
    with pytest.raises(SystemExit, match="no such figure: wrods"):
        house.main([], tmp_path)

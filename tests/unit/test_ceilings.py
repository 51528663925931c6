"""What tools/ceilings.py lets pass and what it names."""

from pathlib import Path

import pytest

from tools import ceilings


@pytest.fixture
def check(tmp_path: Path):
    def run(source: str) -> list[str]:
        path = tmp_path / "room.py"
        path.write_text(source)
        return [offence.removeprefix(f"{path}:") for offence in ceilings.offences(path)]

    return run


def function(lines: int, comment: str = "", indent: str = "") -> str:
    body = "".join(f"{indent}    x{number} = {number}\n" for number in range(lines - 1))
    return f"{indent}def work():{comment}\n{body}"


def test_at_the_ceilings_nothing_is_said(check):
    parameters = "def work(a, b, /, c, d, e, f, *rest, g=1, h=2, **more):\n    pass\n"
    assert check(parameters + function(50) + "# filler\n" * (600 - 52)) == []


def test_a_long_file(check):
    assert check("x = 1\n" * 601) == ["1: 601 lines, more than 600"]


@pytest.mark.parametrize(
    "top",
    [
        "# ceiling: one table that reads as one\n",
        '# ceiling: one table that reads as one\n"""Docs."""\n',
        '"""Docs.\n\nMore.\n"""\n# ceiling: one table that reads as one\n',
    ],
)
def test_a_long_file_with_a_reason(check, top):
    assert check(top + "x = 1\n" * 601) == []


def test_no_reason_excuses_a_thousand_lines(check):
    top = "# ceiling: one table that reads as one\n"
    assert check(top + "x = 1\n" * 999) == []
    assert check(top + "x = 1\n" * 1000) == ["1: 1001 lines, more than 1000, which no reason excuses"]


def test_a_reason_below_the_first_statement_does_not_count(check):
    assert check("x = 1\n# ceiling: one table that reads as one\n" + "x = 1\n" * 600) == ["1: 602 lines, more than 600"]


def test_a_long_function(check):
    assert check(function(51)) == ["1: work: 51 lines, more than 50"]
    assert check("async " + function(51)) == ["1: work: 51 lines, more than 50"]
    assert check("class A:\n" + function(51, indent="    ")) == ["2: work: 51 lines, more than 50"]


def test_the_reason_of_the_file_excuses_no_function(check):
    assert check("# ceiling: one table that reads as one\n" + function(51) + "# filler\n" * 600) == [
        "2: work: 51 lines, more than 50"
    ]


def test_a_long_function_with_a_reason(check):
    assert check(function(51, comment="  # ceiling: a table of cases, one line each")) == []
    assert check("def work(\n    a,  # ceiling: a table of cases, one line each\n):\n" + "    x = 1\n" * 60) == []


@pytest.mark.parametrize("reason", ["# ceiling:", "# ceiling: long", "# ceiling"])
def test_an_empty_reason_is_none(check, reason):
    assert check(function(51, comment=f"  {reason}")) == ["1: work: 51 lines, more than 50"]


def test_a_reason_in_the_body_does_not_count(check):
    assert check(function(51) + "    # ceiling: a table of cases, one line each\n") == [
        "1: work: 51 lines, more than 50"
    ]


def test_too_many_positional_parameters(check):
    assert check("def work(a, b, /, c, d, e, f, g): pass\n") == ["1: work: 7 positional parameters, more than 6"]


@pytest.mark.parametrize(("first", "decorator"), [("self", ""), ("cls", "    @classmethod\n")])
def test_self_and_cls_are_not_counted(check, first, decorator):
    assert check(f"class A:\n{decorator}    def work({first}, a, b, c, d, e, f): pass\n") == []
    assert len(check(f"class A:\n{decorator}    def work({first}, a, b, c, d, e, f, g): pass\n")) == 1


def test_self_of_a_plain_function_is_counted(check):
    assert len(check("def work(self, a, b, c, d, e, f): pass\n")) == 1


def test_a_reason_that_outlived_its_cause(check):
    assert check("def work():  # ceiling: a table of cases, one line each\n    pass\n") == [
        "1: work: below every ceiling; remove its '# ceiling:' reason"
    ]


def test_main_names_the_offenders_and_exits_1(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "long.py").write_text("x = 1\n" * 601)
    (tmp_path / "short.py").write_text("x = 1\n")

    assert ceilings.main([str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'inner' / 'long.py'}:1: 601 lines, more than 600\n"
    assert "write '# ceiling: <reason>'" in printed.err

    assert ceilings.main([str(tmp_path / "short.py")]) == 0


def test_our_own_house_is_below_its_ceilings():
    root = Path(ceilings.__file__).parent.parent
    assert ceilings.main([str(root / "tools")]) == 0

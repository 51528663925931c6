"""Templates: what fills them, and what they cannot do."""

import pytest

from mailer.templates import MAX_OUTPUT, TemplateError, parse, render


def test_holes_and_sections():
    source = (
        "Dear {{ customer.name }},{{#orders}} {{item}}{{/orders}}{{^orders}} nothing{{/orders}}{{#vip}} VIP{{/vip}}"
    )
    variables = {"customer": {"name": "Zoë"}, "orders": ["a", "b"], "vip": True}
    assert render(source, variables) == "Dear Zoë, a b VIP"
    assert render(source, {**variables, "orders": [], "vip": False}) == "Dear Zoë, nothing"


def test_a_section_looks_inside_first_and_outside_second():
    source = "{{#lines}}{{name}} x {{count}} for {{who}};{{/lines}}{{#who_else}}{{name}}{{/who_else}}"
    lines = [{"name": "pen", "count": 2}, {"name": "ink", "count": 1}]
    assert (
        render(source, {"lines": lines, "who": "me", "who_else": {"name": "you"}})
        == "pen x 2 for me;ink x 1 for me;you"
    )


def test_html_is_escaped_in_html_and_nowhere_else():
    assert render("{{x}}", {"x": '<b>&"'}, html=True) == "&lt;b&gt;&amp;&quot;"
    assert render("{{x}}", {"x": '<b>&"'}) == '<b>&"'


@pytest.mark.parametrize(
    "source",
    [
        "{{missing}}",
        "{{customer}}",  # a dict is no text
        "{{name.__class__}}",
        "{{name.upper}}",
        "{{customer.items}}",
    ],
)
def test_what_has_no_value_is_an_error_and_attributes_do_not_exist(source: str):
    with pytest.raises(TemplateError, match="no value"):
        render(source, {"name": "x", "customer": {"name": "x"}})


@pytest.mark.parametrize(
    "source",
    [
        "{{#a}}",
        "{{/a}}",
        "{{#a}}{{#b}}{{/a}}{{/b}}",
        "{{ 1 + 1 }}",
        "{{ name | upper }}",
        "{{ name() }}",
        "{% for x in y %}{{ x }",
        "}}",
        "{{#a}}" * 50 + "{{/a}}" * 50,
        "x" * 300_000,
    ],
)
def test_what_is_no_template_is_refused(source: str):
    with pytest.raises(TemplateError):
        parse(source + "{{" if source.startswith("{%") else source)


def test_a_bomb_stops_early():
    rows = [{"rows": ["x"] * 1000}] * 1000
    with pytest.raises(TemplateError, match="steps"):
        render("{{#rows}}{{#rows}}{{#rows}}{{item}}{{/rows}}{{/rows}}{{/rows}}", {"rows": [{"rows": rows}] * 1000})
    with pytest.raises(TemplateError, match="characters"):
        render("{{#rows}}{{text}}{{/rows}}", {"rows": [1] * 100, "text": "x" * (MAX_OUTPUT // 50)})


def test_values_are_not_templates():
    assert render("{{x}}", {"x": "{{y}}", "y": "secret"}) == "{{y}}"

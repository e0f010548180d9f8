"""Escaping, columns, units: the small parts that every view rests on."""

from __future__ import annotations

import json
import unicodedata

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.cli.escape import printable
from meshbpf.cli.failure import asked_format
from meshbpf.cli.output import Format, machine
from meshbpf.cli.table import Cell, facts, table
from meshbpf.cli.units import duration, size


@given(st.text())
def test_printable_leaves_no_control_or_format_character(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text(alphabet=st.characters(whitelist_categories=("L", "N", "P"))))
def test_printable_leaves_readable_text_alone(text: str) -> None:
    assert printable(text) == text


@settings(max_examples=40)
@given(st.recursive(st.text(), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_and_yaml_are_ascii_and_mean_what_went_in(value: object) -> None:
    content = {"value": value}
    as_json, as_yaml = machine(Format.JSON, content), machine(Format.YAML, content)
    for text in (as_json, as_yaml):
        assert all(char == "\n" or " " <= char <= "~" for char in text)
    assert json.loads(as_json) == content
    assert yaml.safe_load(as_yaml) == content


def test_a_table_aligns_numbers_right_and_wide_characters_by_their_width() -> None:
    assert table(("NAME", "N"), (("a", 5), ("漢字", 12), ("", None))) == (
        "NAME   N\n"  #
        "a      5\n"
        "漢字  12\n"
        "-      -"
    )


def test_a_newline_in_a_cell_cannot_forge_a_row() -> None:
    assert table(("NAME",), (("a\nready",),)) == "NAME\na\\x0aready"
    assert facts([("name", Cell("a\nready"))]) == "name:  a\\x0aready"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.4, "<1s"),
        (59.9, "59s"),
        (60, "1m"),
        (3 * 60 + 12, "3m12s"),
        (3600 + 5, "1h"),
        (86400 * 12 + 3600 * 3 + 59, "12d3h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024 - 1, "10.0 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (150 * 1024**3, "150 GiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_sizes_have_three_digits(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("line", "form"),
    [
        ("status", Format.TABLE),
        ("status -o json", Format.JSON),
        ("status -ojson", Format.JSON),
        ("--output=yaml status", Format.YAML),
        ("-o json status -o yaml", Format.YAML),
        ("status -o xml", Format.TABLE),
        ("status -o", Format.TABLE),
        ("", Format.TABLE),
    ],
)
def test_errors_take_the_form_of_the_last_o_even_when_the_line_is_wrong(
    line: str, form: Format
) -> None:
    assert asked_format(line.split()) is form

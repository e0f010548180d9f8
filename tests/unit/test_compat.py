"""docs/compat.md is held to its word: every test that it names exists, every row has an answer."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compat.md"
ROW = re.compile(r"^\| ([A-Z]+\d+) \| (.+) \| (.+) \|$")
MARK = re.compile(r"mark\.(compat|slow|netns|xds|gamma)\b")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[tuple[str, str, str]]:
    found = []
    for line in TABLE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| id "):
            match = ROW.match(line)
            assert match is not None, f"not a row: {line}"
            found.append((match[1], match[2], match[3]))
    return found


@cache
def names_in(path: str) -> frozenset[str]:
    """The names of the test functions of a file; none if it is not there."""
    file = ROOT / path
    if not file.exists():
        return frozenset()
    tree = ast.parse(file.read_text())
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    )


@cache
def is_marked(path: str, name: str) -> bool:
    """Whether the file, or the test, carries the marker `compat`, or that of a stage of its own."""
    tree = ast.parse((ROOT / path).read_text())
    for node in tree.body:
        text = ast.unparse(node)
        if text.startswith("pytestmark = ") and MARK.search(text):
            return True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return any(MARK.search(ast.unparse(each)) for each in node.decorator_list)
    return False


def test_no_two_rows_have_one_id() -> None:
    ids = [row[0] for row in rows()]
    assert len(ids) == len(set(ids))
    assert len(ids) > 40


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_row_names_a_test_that_exists_or_says_why_we_differ(row: tuple[str, str, str]) -> None:
    _id, _fact, answer = row
    named = TEST.findall(answer)
    missing = [f"{path}::{name}" for path, name in named if name not in names_in(path)]
    assert not missing
    if answer.startswith("*Differs*: "):
        assert len(answer) > 40, "say what is done instead"
    else:
        assert named
        assert all(is_marked(path, name) for path, name in named), "mark it `compat`"

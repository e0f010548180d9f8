"""docs/threat-model.md is held to its word: each answer has a test, and the test exists."""

from __future__ import annotations

import re

import pytest

from tests.unit.test_compat import ROOT, TEST, names_in

THREAT = re.compile(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def threats() -> list[tuple[str, str, str]]:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    return [row for row in THREAT.findall(text) if not row[0].startswith(("it ", "---"))]


def test_there_are_threats_of_every_kind() -> None:
    assert len(threats()) > 25


@pytest.mark.parametrize("threat", threats(), ids=lambda threat: threat[0][:40])
def test_a_threat_has_an_answer_and_a_test_that_exists(threat: tuple[str, str, str]) -> None:
    _, answer, tests = threat
    named = TEST.findall(tests)
    assert answer
    assert named
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []

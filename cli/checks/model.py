"""The result of `meshbpf check`: categories of findings, and how they look.

The marks are linkerd's: a check mark holds, two exclamation marks work with a
loss, a cross does not work. Every finding that does not hold says what follows
from it, and what to do where there is something to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import click

from meshbpf.agent.api import Result
from meshbpf.cli.escape import printable
from meshbpf.cli.table import Style
from meshbpf.cli.units import count

Outcome = Literal["ok", "warning", "failed"]

_MARKS = {
    "ok": ("√", Style.GOOD),
    "warning": ("‼", Style.WARN),
    "failed": ("\N{MULTIPLICATION SIGN}", Style.BAD),
}


class Finding(Result, frozen=True):
    """One fact that was looked at."""

    name: str
    """What was looked at; the same however it comes out."""
    outcome: Outcome
    found: str = ""
    consequence: str = ""
    """What follows from it, unless all is well."""
    hint: str = ""
    """What to do about it."""


class Category(Result, frozen=True):
    """Findings of one area, in the order in which they were looked at."""

    name: str
    findings: tuple[Finding, ...]


class Totals(Result, frozen=True):
    """How many findings came out how."""

    ok: int
    warning: int
    failed: int


class CheckResult(Result, frozen=True):
    """All that `check` found."""

    totals: Totals
    categories: tuple[Category, ...]


def result_of(categories: tuple[Category, ...]) -> CheckResult:
    """Categories with their totals."""
    outcomes = [finding.outcome for category in categories for finding in category.findings]
    totals = Totals(
        ok=outcomes.count("ok"),
        warning=outcomes.count("warning"),
        failed=outcomes.count("failed"),
    )
    return CheckResult(totals=totals, categories=categories)


def view(result: CheckResult) -> str:
    """A block a category, a line a finding, consequence and hint below it; the verdict last."""
    blocks = ["\n".join(_block(category)) for category in result.categories]
    totals = result.totals
    colour = "red" if totals.failed else "yellow" if totals.warning else "green"
    verdict = f"{totals.ok} ok, {count(totals.warning, 'warning')}, {totals.failed} failed"
    return "\n\n".join([*blocks, click.style(verdict, fg=colour)])


def _block(category: Category) -> Iterator[str]:
    yield category.name
    yield "-" * len(category.name)
    for finding in category.findings:
        mark, style = _MARKS[finding.outcome]
        beside = f": {finding.found}" if finding.found else ""
        yield f"{click.style(mark, fg=style.value)} {printable(finding.name + beside)}"
        if finding.consequence:
            yield f"    {printable(finding.consequence)}"
        if finding.hint:
            yield f"    hint: {printable(finding.hint)}"

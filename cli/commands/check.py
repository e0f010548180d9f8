"""`meshbpf check`: what this machine can do, and what it lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from meshbpf.agent.api import StatusResult
from meshbpf.agent.core.errors import Exit
from meshbpf.cli.checks.host import settings
from meshbpf.cli.checks.model import Category, Finding, result_of, view
from meshbpf.cli.checks.neighbours import attached_pods, neighbours
from meshbpf.cli.checks.running import running_agent
from meshbpf.cli.options import Session, common_options, pass_session, require_root
from meshbpf.cli.output import emit

if TYPE_CHECKING:
    from meshbpf.agent.datapath.features import Feature

# What the connect hook rests on, beside TC: without any of them `auto` means TC alone.
_FOR_CONNECT = ("connect hook", "cgroup v2")


@click.command("check", short_help="Say what this machine can do, and what it lacks.")
@click.option("--strict", is_flag=True, help="Warnings count as problems too.")
@common_options
@pass_session
def command(session: Session, strict: bool) -> Exit:
    """Say what this machine can do for meshbpf, what it lacks, and what follows.

    Looks at the kernel by trying what the agent needs (nothing is changed), at settings
    of the host, at what else works on its packets, and at the agent if one answers. Exit
    status: 0 no problem found, 79 at least one, 77 not root.
    """
    require_root("check")
    # Only here: probing needs the data path, which no other client command touches.
    from meshbpf.agent.datapath.features import cgroup_reason, probe
    from meshbpf.agent.datapath.interplay import look

    features = probe()
    agent, status = running_agent(session)
    result = result_of(
        (
            kernel("kernel", (item for item in features if item.least_kernel is not None)),
            kernel("system", (item for item in features if item.least_kernel is None)),
            Category(name="capture", findings=(capture(features, status, cgroup_reason()),)),
            settings(),
            neighbours(look(attached_pods(session))),
            agent,
        )
    )
    emit(session.output, "Check", result, lambda: view(result))
    problems = result.totals.failed + (result.totals.warning if strict else 0)
    return Exit.FINDINGS if problems else Exit.OK


def kernel(name: str, features: Iterable[Feature]) -> Category:
    """One finding a feature: a required one that is missing fails, another warns."""
    return Category(name=name, findings=tuple(_finding(feature) for feature in features))


def _finding(feature: Feature) -> Finding:
    if feature.supported:
        return Finding(name=feature.name, outcome="ok")
    # The detail is an error's text: what happened, and often `hint: ...` on a line below.
    why, _, hint = feature.detail.partition("\n")
    since = ""
    if feature.least_kernel is not None:
        since = f" (Linux {feature.least_kernel[0]}.{feature.least_kernel[1]} has it)"
    return Finding(
        name=feature.name,
        outcome="failed" if feature.required else "warning",
        found=f"no{since}: {why}",
        consequence=feature.consequence,
        hint=hint.strip().removeprefix("hint: "),
    )


_NOT_IN_KERNEL = "connections inside the node take HBONE, and plaintext the agent"


def capture(features: Iterable[Feature], status: StatusResult | None, cgroups: str = "") -> Finding:
    """How connections are captured: by the agent that runs, or as one would with `auto`."""
    if status is not None:
        now = status.capture
        # Asking for TC alone is a choice; getting it for `auto` is a loss.
        lost = now.requested == "auto" and now.in_force == "tc"
        return Finding(
            name="in force",
            outcome="warning" if lost else "ok",
            found=f"{now.in_force}, asked for {now.requested}"
            + (f": {now.reason}" if now.reason and now.requested == "auto" and not lost else ""),
            consequence=f"{now.reason}; {_NOT_IN_KERNEL}" if lost else "",
        )
    missing = [item for item in features if item.name in _FOR_CONNECT and not item.supported]
    if not missing:
        why = f": {cgroups}" if cgroups else ""
        return Finding(name="--capture=auto", outcome="ok", found=f"would be connect+tc{why}")
    return Finding(
        name="--capture=auto",
        outcome="warning",
        found="would be tc",
        consequence="; ".join(
            (
                *(f"no {item.name}: {_first_line(item.detail)}" for item in missing),
                _NOT_IN_KERNEL,
            )
        ),
    )


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

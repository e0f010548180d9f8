"""`meshbpf status`: is the agent ready, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import click

from meshbpf.agent.api import StateSourceInfo, StatusRequest, StatusResult
from meshbpf.agent.core.errors import Exit
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import Cell, CellLike, Style, facts, good_if, line
from meshbpf.cli.units import count, duration, moment


@click.command("status", short_help="Show whether the agent is ready, and why not.")
@common_options
@pass_session
def command(session: Session) -> Exit:
    """Show whether the agent is ready, and why not.

    Exit status: 0 ready, 1 running but not ready, 69 no agent answers.
    """
    status = ask(session, StatusRequest())
    emit(session.output, "Status", status, lambda: view(status))
    return Exit.OK if status.ready else Exit.FAILED


def view(status: StatusResult) -> str:
    """One screen: the verdict first, what it rests on below, counters last."""
    blocks = [facts(_facts(status))]
    if status.warnings:
        blocks.append("\n".join(["warnings:", *(line(f"  {text}") for text in status.warnings)]))
    if status.statistics:
        blocks.append("counters (zeros left out):\n" + facts(_counters(status.statistics)))
    return "\n\n".join(blocks)


def _counters(parts: Mapping[str, Mapping[str, int | float]]) -> Iterator[tuple[str, CellLike]]:
    for part, values in sorted(parts.items()):
        counted = " ".join(f"{name}={_number(value)}" for name, value in values.items() if value)
        yield f"  {part}", counted


def _facts(status: StatusResult) -> Iterator[tuple[str, CellLike]]:
    yield "agent", good_if(status.ready, "ready" if status.ready else "not ready")
    if status.pending:
        yield "waiting for", Cell(", ".join(status.pending), Style.WARN)
    yield "node", status.node
    yield "version", f"{status.version}, agent id {status.agent_id}"
    yield "running", f"pid {status.pid}, for {duration(status.uptime_s)}"
    yield "trust domain", status.trust_domain
    yield "network", status.network
    yield "capture", _capture(status)
    if status.proxy is not None:
        gone = Cell(f"{status.proxy.kind}, not connected to {status.proxy.socket}", Style.BAD)
        here = f"{status.proxy.kind}, pid {status.proxy.pid}, by {status.proxy.socket}"
        yield "proxy", here if status.proxy.pid else gone
    pods = status.pods
    yield (
        "pods",
        Cell(
            f"{pods.attached} attached, {pods.failed} failed"
            + (f", {pods.waiting} waiting" if pods.waiting else ""),
            Style.BAD if pods.failed else Style.PLAIN,
        ),
    )
    yield "connections", str(status.connections)
    if status.draining_until is not None:
        yield "draining", Cell(f"until {moment(status.draining_until)}", Style.WARN)
    for old in status.predecessors:
        ends = f", until {moment(old.ends_at)}" if old.ends_at is not None else ""
        yield "predecessor", f"pid {old.pid} drains {count(old.connections, 'connection')}{ends}"
    yield from _state(status.state)
    if status.capture.in_force == "istio":
        return  # no hook asks whether we live
    beat = status.heartbeat
    yield "lease", f"{beat.lease_s:g} s{'' if status.state.healthy else ', not extended'}"
    yield (
        "heartbeat",
        good_if(
            beat.beating,
            f"{'beating' if beat.beating else 'missing'}, limit {beat.limit_s:g} s, "
            f"event loop {beat.loop_lag_s * 1000:.0f} ms behind",
        ),
    )


def _capture(status: StatusResult) -> str:
    capture = status.capture
    if not capture.in_force:
        return f"none yet, asked for {capture.requested}"
    if capture.in_force == "istio":
        return f"none of ours: pods are captured by the node agent that {capture.reason} leads to"
    text = f"{capture.in_force}, asked for {capture.requested}"
    if capture.reason:
        text = f"{text}: {capture.reason}"
    # Nothing attests a caller then.
    return f"{text}; no connection is left to the kernel" if capture.in_force == "tc" else text


def _state(state: StateSourceInfo) -> Iterator[tuple[str, CellLike]]:
    yield "state", f"{state.kind} {state.origin}"
    if state.loaded_at is None:
        yield "state version", Cell("none read yet", Style.WARN)
    else:
        yield (
            "state version",
            f"{state.version} of {moment(state.loaded_at)}: "
            f"{count(state.workloads, 'workload')}, {count(state.services, 'service')}, "
            f"{count(state.policies, 'policy', 'policies')}",
        )
    if state.error is not None:
        yield "state error", Cell(state.error.what, Style.BAD)
        if state.error.hint:
            yield "state hint", state.error.hint


def _number(value: int | float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)

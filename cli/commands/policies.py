"""`meshbpf policies`: the authorization policies of the mesh state."""

from __future__ import annotations

import click

from meshbpf.agent.api import PoliciesRequest, PoliciesResult, PolicyInfo
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, only_namespace_option, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import table

_SCOPES = {"GLOBAL": "mesh", "NAMESPACE": "namespace", "WORKLOAD_SELECTOR": "selected workloads"}


@click.command("policies", short_help="List the authorization policies of the mesh state.")
@only_namespace_option
@common_options
@pass_session
def command(session: Session, namespace: str | None) -> None:
    """List the authorization policies of the mesh state; -o yaml shows their rules."""
    result = ask(session, PoliciesRequest())
    if namespace is not None:
        result = PoliciesResult(
            policies=tuple(one for one in result.policies if one.namespace == namespace)
        )
    emit(session.output, "Policies", result, lambda: view(result))


def view(result: PoliciesResult) -> str:
    """One policy a line. MODE says whether it is enforced, and what if it cannot be."""
    return table(
        ("NAMESPACE", "NAME", "ACTION", "APPLIES TO", "RULES", "MODE"),
        (
            (
                policy.namespace,
                policy.name,
                policy.action,
                _scope(policy),
                policy.rules,
                _mode(policy),
            )
            for policy in result.policies
        ),
    )


def _scope(policy: PolicyInfo) -> str:
    scope = _SCOPES[policy.scope]
    return f"{scope} ({policy.workloads})" if policy.scope == "WORKLOAD_SELECTOR" else scope


def _mode(policy: PolicyInfo) -> str:
    mode = "dry run" if policy.dry_run else "enforced"
    return f"{mode}, fails closed: {policy.inexpressible}" if policy.inexpressible else mode

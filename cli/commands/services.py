"""`meshbpf services`: the services of the mesh state."""

from __future__ import annotations

import click

from meshbpf.agent.api import ServicePortInfo, ServicesRequest, ServicesResult
from meshbpf.cli.client import ask
from meshbpf.cli.options import Session, common_options, only_namespace_option, pass_session
from meshbpf.cli.output import emit
from meshbpf.cli.table import table


@click.command("services", short_help="List the services of the mesh state.")
@only_namespace_option
@common_options
@pass_session
def command(session: Session, namespace: str | None) -> None:
    """List the services of the mesh state and how many endpoints each has."""
    result = ask(session, ServicesRequest())
    if namespace is not None:
        result = ServicesResult(
            services=tuple(s for s in result.services if s.namespace == namespace)
        )
    emit(session.output, "Services", result, lambda: view(result))


def view(result: ServicesResult) -> str:
    """One service a line; ports as `80->8080`, `80` for 80->80, `80->*` by each endpoint's word."""
    return table(
        ("NAMESPACE", "NAME", "HOSTNAME", "VIPS", "PORTS", "ENDPOINTS"),
        (
            (
                service.namespace,
                service.name,
                service.hostname,
                ",".join(service.vips),
                ",".join(_port(port) for port in service.ports),
                len(service.endpoints),
            )
            for service in result.services
        ),
    )


def _port(port: ServicePortInfo) -> str:
    if port.target == port.port:
        return str(port.port)
    return f"{port.port}->{port.target or '*'}"

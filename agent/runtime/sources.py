"""From settings to the parts that speak to a control plane."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meshbpf.agent import config_mesh
from meshbpf.agent.config import Settings, control_plane_address, kube_signer, spire_socket
from meshbpf.agent.runtime import kube_config
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.control_plane import ControlPlane
from meshbpf.agent.runtime.embedded_issuer import EmbeddedIssuer
from meshbpf.agent.runtime.issuing import AnyIssuer
from meshbpf.agent.runtime.istiod_issuer import IstiodIssuer
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kubernetes_csr import KubernetesCsrIssuer
from meshbpf.agent.runtime.spire_issuer import SpireIssuer
from meshbpf.agent.runtime.xds_source import XdsSource
from meshbpf.agent.waypoint_config import WaypointSettings
from meshbpf.agent.wire import xds

CaSettings = Settings | WaypointSettings

# ztunnel's: what stands behind them is the name of a header, and the value its value.
_XDS_HEADER, _CA_HEADER = "XDS_HEADER_", "CA_HEADER_"


def xds_source(settings: Settings, environ: Mapping[str, str]) -> XdsSource:
    """The source of --xds. Raises MeshbpfError for an environment that makes no sense."""
    plane = _plane(
        settings, settings.xds, settings.xds_root, settings.xds_name, _headers(environ, _XDS_HEADER)
    )
    return XdsSource(
        plane, xds.node(config_mesh.metadata(environ), settings.node, settings.cluster_id)
    )


def issuer(
    settings: CaSettings, environ: Mapping[str, str], *, impersonates: bool
) -> tuple[AnyIssuer, str]:
    """Who signs, and the trust domain that it signs for, where it says so.

    `impersonates`: istiod is asked on behalf of others, as by a node agent.
    Raises MeshbpfError when the embedded CA cannot be loaded.
    """
    if settings.ca_dir is not None:
        embedded = EmbeddedIssuer(settings.ca_dir)
        return embedded, embedded.trust_domain
    if signer := kube_signer(settings.ca):
        api = KubeApi(kube_config.load(settings.kubeconfig, environ))
        return KubernetesCsrIssuer(api, signer, Path(settings.ca_root), utc_now), ""
    if (socket := spire_socket(settings.ca)) is not None:
        # Of its bundles SPIRE does not say which is its own: we say.
        return SpireIssuer(socket, settings.trust_domain, utc_now), ""
    plane = _plane(
        settings, settings.ca, settings.ca_root, settings.ca_name, _headers(environ, _CA_HEADER)
    )
    return IstiodIssuer(plane, utc_now, impersonates=impersonates), ""


def _plane(
    settings: CaSettings, url: str, root: str, name: str, headers: tuple[tuple[str, str], ...]
) -> ControlPlane:
    address = control_plane_address(url)
    assert address is not None  # noqa: S101 (Settings refuses others)
    host, port = address
    return ControlPlane(host, port, root, name, settings.token_file, settings.cluster_id, headers)


def _headers(environ: Mapping[str, str], prefix: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key.removeprefix(prefix).lower(), value)
        for key, value in sorted(environ.items())
        if key.startswith(prefix)
    )

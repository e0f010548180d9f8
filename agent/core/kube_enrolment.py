"""Whether a pod belongs to the ambient mesh, by the labels that Istio reads.

`istio.io/dataplane-mode: ambient` on the pod, or on its namespace unless the
pod says `none`. A pod on the host network has no namespace of its own to
steer, and one with a sidecar has its proxy already: both are left alone, and
if they ask to be enrolled that is worth telling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshbpf.agent.core.kube_names import (
    AMBIENT,
    DATAPLANE_MODE,
    REDIRECTION,
    REDIRECTION_ENABLED,
    SIDECAR_STATUS,
    TUNNEL,
)
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import TunnelProtocol


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The answer for one pod."""

    enrolled: bool
    left_alone: str = ""
    """Why a pod whose labels ask for it is not enrolled; empty for all others."""


NOT_ENROLLED = Enrolment(False)
ENROLLED = Enrolment(True)
HOST_NETWORK = Enrolment(False, "it is on the host's network, which is not one pod's to steer")
HAS_SIDECAR = Enrolment(False, "it has a sidecar, which carries its traffic already")


def enrolment(pod: KubeObject, namespace_labels: Mapping[str, str]) -> Enrolment:
    """What becomes of `pod`, whose namespace has these labels."""
    mode = pod.labels.get(DATAPLANE_MODE, namespace_labels.get(DATAPLANE_MODE))
    if mode != AMBIENT:
        return NOT_ENROLLED
    if pod.spec.get("hostNetwork"):
        return HOST_NETWORK
    if SIDECAR_STATUS in pod.annotations:
        return HAS_SIDECAR
    return ENROLLED


def tunnel(about: KubeObject, *, enrolled: bool) -> tuple[TunnelProtocol, bool]:
    """How a workload takes connections, and whether it does so by itself.

    `enrolled`: it takes HBONE though nobody has annotated it.
    """
    if "http" in about.labels.get(TUNNEL, "").split(","):
        return TunnelProtocol.HBONE, True
    redirected = about.annotations.get(REDIRECTION) == REDIRECTION_ENABLED
    return TunnelProtocol.HBONE if redirected or enrolled else TunnelProtocol.NONE, False

"""The verb `explain`: the mesh's answer, with what the kernel says of this node's pods.

What a hook would do is read from the maps that the hook reads, not from what
was meant to be in them: when the two differ, that is what one wants to know.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from meshbpf.agent import api
from meshbpf.agent.config import Settings
from meshbpf.agent.core.address import IPAddress, SocketAddress
from meshbpf.agent.core.carry import between_pods, draw_of
from meshbpf.agent.core.explain import Outcome, Step, explain, target_of, workload_of
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.datapath.steering import Steering
from meshbpf.agent.l7.explain import explain_request
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.mesh_view import MeshView
from meshbpf.agent.runtime.pod import Pod


class Explaining:
    """Answers for one agent; made with it."""

    def __init__(
        self,
        control: ControlServer,
        settings: Settings,
        mesh: MeshView,
        pods: Callable[[], Iterable[Pod]],
        steering: Callable[[], Steering | None],
        objects: Callable[[], ObjectSet | None],
    ) -> None:
        self._objects = objects
        self._settings = settings
        self._mesh = mesh
        self._pods = pods
        self._steering = steering
        self._rng = random.Random()  # noqa: S311 - it picks endpoints, no secrets
        control.handle(api.ExplainRequest, self.explain)

    async def explain(self, request: api.ExplainRequest) -> api.ExplainResult:
        """Answer. Raises MeshbpfError for a source or destination that nobody knows."""
        mesh = self._mesh()
        source = workload_of(mesh, request.source, self._settings.network)
        found = target_of(mesh, source, request.destination, self._settings.cluster_domain)
        target = found.address
        pod = next((one for one in self._pods() if _is(one, source)), None)
        steps = [_source(source, pod), found.step]
        direct = self._left_alone(pod, target)
        if direct is not None:
            steps.append(Step("capture", "left alone", direct))
            outcome = Outcome.PLAINTEXT
        else:
            if pod is not None:
                steps.append(_captured(pod, target))
            outcome, more = explain(mesh, source, target, self._rng)
            steps += more
            carried = self._carried(pod, source, target) if outcome is Outcome.HBONE else None
            if carried is not None:
                outcome, step = carried
                steps.append(step)
            objects = self._objects()
            if objects is not None:
                head = _head(request, target)
                domain = self._settings.cluster_domain
                steps += explain_request(objects, mesh, source, target, head, self._rng, domain)
        return api.ExplainResult(
            source=source.uid,
            destination=str(target),
            outcome=outcome.value,
            steps=tuple(api.ExplainStep(stage=s.stage, what=s.what, why=s.why) for s in steps),
        )

    def _carried(
        self, pod: Pod | None, source: Workload, target: SocketAddress
    ) -> tuple[Outcome, Step] | None:
        """What the kernel carries of such connections, once the agent has had the first one."""
        if pod is None or pod.local is None or not pod.local.carried or pod.proxied:
            return None
        mesh = self._mesh()
        near: dict[IPAddress, LocalPod] = {}
        for each in self._pods():
            if each.local is not None and each.local.carried and not each.proxied:
                near.update(dict.fromkeys(each.local.addresses, each.local))

        def allowed(endpoint: SocketAddress) -> bool:
            server = near[endpoint.ip]
            workload = server.workload(mesh)
            own = [ip for ip in source.addresses if ip.version == endpoint.ip.version]
            return (
                server is not pod.local
                and workload is not None
                and any(
                    between_pods(mesh, source, ip, workload, server.addresses, endpoint).allowed
                    for ip in own
                )
            )

        if target.ip in near:
            if not allowed(target):
                return None
            why = "both pods are on this node, and policy has nothing to ask"
            return Outcome.KERNEL, Step("kernel", f"carries it to {target}", why)
        draw = draw_of(mesh, source, target, near)
        weight = sum(each.weight for each in draw.near if allowed(each.target)) if draw else 0
        if draw is None or not weight:
            return None
        share = f"{weight} of {draw.total} by weight" if weight < draw.total else "all of them"
        step = Step(
            "kernel", f"draws endpoints of this node itself: {share}", "and carries to them"
        )
        return Outcome.KERNEL if weight == draw.total else Outcome.HBONE, step

    def _left_alone(self, pod: Pod | None, target: SocketAddress) -> str | None:
        """Why the hooks of `pod` would not capture the connection; None when they would."""
        steering = self._steering()
        if pod is None or pod.kernel is None or steering is None:
            return None
        if target.ip in pod.kernel.addresses:
            return f"{target.ip} is the pod's own address"
        if target.port in pod.attachment.exempt_ports:
            return f"port {target.port} is exempt for this pod"
        exempt = steering.exempt_by(pod.kernel.index, target.ip)
        if exempt:
            return f"{target.ip} is exempt for this pod"
        if not steering.in_mesh(target.ip):
            return f"{target.ip} is not in the mesh, by the kernel's map"
        return None


def _head(request: api.ExplainRequest, target: SocketAddress) -> RequestHead:
    """The request that was asked about."""
    fields = Headers(
        (name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        for name, value in request.headers.items()
    )
    authority = fields.get("host") or str(target)
    fields.remove("host")
    return RequestHead(request.method.upper(), request.path, authority, fields)


def _is(pod: Pod, workload: Workload) -> bool:
    """Whether the workload is this pod: by name and by an address that it really has."""
    if pod.local is None or pod.key != f"{workload.namespace}/{workload.name}":
        return False
    return not pod.local.addresses.isdisjoint(workload.addresses)


def _captured(pod: Pod, target: SocketAddress) -> Step:
    if pod.captured_elsewhere:
        return Step("capture", "redirected to the agent", "by the rules of Istio's node agent")
    proxy = "ztunnel" if pod.proxied else "the agent"
    return Step("capture", f"handed to {proxy}", f"{target.ip} is in the mesh")


def _source(source: Workload, pod: Pod | None) -> Step:
    where = "attached here" if pod is not None else "not attached to this agent"
    return Step(
        "source", f"{source.namespace}/{source.name}, {where}", f"speaks as {source.identity}"
    )

"""Resources as istiod packs them."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

from meshbpf.agent.wire.pb import authorization_pb2, workload_pb2


def uid(name: str, namespace: str = "shop") -> str:
    return f"Kubernetes//Pod/{namespace}/{name}"


def workload(name: str, *ips: str, namespace: str = "shop", **fields: Any) -> bytes:
    """An HBONE pod, packed."""
    services = fields.pop("services", {})
    message = workload_pb2.Workload(
        uid=uid(name, namespace),
        name=name,
        namespace=namespace,
        addresses=[ip_address(ip).packed for ip in ips],
        **{
            "tunnel_protocol": workload_pb2.HBONE,
            "service_account": name.partition("-")[0],
            "node": "node1",
            **fields,
        },
    )
    for key, ports in services.items():
        for port, target in ports.items():
            message.services[key].ports.add(service_port=port, target_port=target)
    return workload_pb2.Address(workload=message).SerializeToString()


def service(hostname: str, *vips: str, namespace: str = "shop", **fields: Any) -> bytes:
    message = workload_pb2.Service(
        name=hostname.partition(".")[0],
        namespace=namespace,
        hostname=hostname,
        addresses=[workload_pb2.NetworkAddress(address=ip_address(vip).packed) for vip in vips],
        ports=[workload_pb2.Port(service_port=80, target_port=8080)],
        **fields,
    )
    return workload_pb2.Address(service=message).SerializeToString()


def policy(
    name: str, *principals: str, namespace: str = "shop", action: int = 0, **fields: Any
) -> bytes:
    """Lets in (or out, for DENY) who has one of these principals."""
    rules = []
    if principals:
        texts = [authorization_pb2.StringMatch(exact=one) for one in principals]
        match = authorization_pb2.Match(principals=texts)
        clause = authorization_pb2.Clause(matches=[match])
        rules.append(authorization_pb2.Rule(clauses=[clause]))
    return authorization_pb2.Authorization(
        name=name,
        namespace=namespace,
        scope=fields.pop("scope", authorization_pb2.NAMESPACE),
        action=action,  # type: ignore[arg-type]
        rules=rules,
        **fields,
    ).SerializeToString()

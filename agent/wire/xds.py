"""Delta xDS as messages: requests packed, pushes unpacked, and who this client says it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.xds import Push, Request, Resource
from meshbpf.agent.wire.pb import discovery_pb2 as pb

METHOD = "envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
# What stands for an unknown address in ztunnel's node id.
_NO_ADDRESS = "1.1.1.1"
_META, _META_JSON = "ISTIO_META_", "ISTIO_METAJSON_"


def node(environ: Mapping[str, str], name: str, cluster_id: str) -> pb.Node:
    """Who asks, as istiod knows its node proxies: `ztunnel~IP~POD.NS~NS.svc.cluster.local`.

    The agent's own pod comes from the variables that Istio's manifests set.
    Raises MeshbpfError for an ISTIO_METAJSON_ variable that is no JSON.
    """
    address = environ.get("INSTANCE_IP") or _NO_ADDRESS
    pod, namespace = environ.get("POD_NAME", ""), environ.get("POD_NAMESPACE", "")
    metadata: dict[str, Any] = {
        "NAME": pod,
        "NAMESPACE": namespace,
        "INSTANCE_IPS": address,
        "NODE_NAME": name,
        "CLUSTER_ID": cluster_id,
    }
    for key, value in sorted(environ.items()):
        if key.startswith(_META_JSON):
            try:
                metadata[key.removeprefix(_META_JSON)] = json.loads(value)
            except ValueError as error:
                raise MeshbpfError("bad-environment", f"{key} is not JSON: {error}") from None
        elif key.startswith(_META):
            metadata[key.removeprefix(_META)] = value
    packed = struct_pb2.Struct()
    packed.update(metadata)
    identity = f"ztunnel~{address}~{pod}.{namespace}~{namespace}.svc.cluster.local"
    return pb.Node(id=identity, metadata=packed)


def encode(request: Request, sender: pb.Node | None) -> bytes:
    """One request; `sender` goes with those that open a type."""
    message = pb.DeltaDiscoveryRequest(
        node=sender,
        type_url=request.type_url,
        initial_resource_versions=request.initial_versions,
        response_nonce=request.nonce,
    )
    if request.error:
        message.error_detail.message = request.error
    return message.SerializeToString()


def decode(data: bytes) -> Push:
    """One push. Raises MeshbpfError when it is none."""
    try:
        message = pb.DeltaDiscoveryResponse.FromString(data)
    except DecodeError as error:
        raise MeshbpfError("bad-push", f"not a DeltaDiscoveryResponse: {error}") from error
    resources = tuple(
        Resource(one.name, one.version, one.resource.value) for one in message.resources
    )
    return Push(message.type_url, message.nonce, resources, tuple(message.removed_resources))

"""The objects of one manifest: YAML or JSON, several documents, Lists among them.

Only what every object must have is checked here, with its line: apiVersion,
kind, a name, and labels that are text. What a kind's fields mean is for those
who read the kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.yaml_tree import read_documents
from meshbpf.agent.core.yaml_values import plain_value

CODE = "bad-manifest"
# What every kind's names keep to (the API's IsValidPathSegmentName); most are narrower.
_NAME = re.compile(r"(?!\.{1,2}$)[^/%\s]{1,253}")
DEFAULT_NAMESPACE = "default"
"""Where kubectl puts what names no namespace."""

CLUSTER_SCOPED = frozenset(
    {
        "APIService",
        "CSIDriver",
        "CertificateSigningRequest",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "GatewayClass",
        "IngressClass",
        "MutatingWebhookConfiguration",
        "Namespace",
        "Node",
        "PersistentVolume",
        "PriorityClass",
        "RuntimeClass",
        "StorageClass",
        "ValidatingWebhookConfiguration",
    }
)


def parse_manifest(text: str, origin: str) -> tuple[KubeObject, ...]:
    """The objects of a file's text; `origin` is its name for messages.

    ConfigError `mesh.yaml:12: metadata.name: ...` for the first thing that is
    wrong.
    """
    found: list[KubeObject] = []
    for document in read_documents(text, origin):
        top = Field(document, origin, code=CODE)
        if not top.is_null:  # what stands between two `---` may be a comment alone
            found.extend(_objects(top))
    return tuple(found)


def _objects(field: Field) -> Iterator[KubeObject]:
    fields = dict(field.members())
    version = field.need(fields, "apiVersion").text()
    kind = field.need(fields, "kind").text()
    if kind.endswith("List") and "items" in fields:
        for item in field.at("items").items():
            yield from _objects(item)
        return
    group, _, bare = version.rpartition("/")
    body: dict[str, Any] = plain_value(field)
    metadata = body.get("metadata")
    place = field.at("metadata")
    if not isinstance(metadata, Mapping):
        raise place.error("expected a mapping with the object's name")
    name = _name(place, metadata, "name")
    namespace = ""
    if kind not in CLUSTER_SCOPED:
        namespace = _name(place, metadata, "namespace", DEFAULT_NAMESPACE)
    for part in ("labels", "annotations"):
        _check_texts(field.at("metadata", part), metadata.get(part))
    key = ObjectKey(group, kind, namespace, name)
    yield KubeObject(key, bare, body, f"{field.origin}:{field.node.line}")


def _name(place: Field, metadata: Mapping[str, Any], key: str, default: str = "") -> str:
    found = metadata.get(key) or default
    if not found:
        raise place.error(f"{key} is missing")
    if not isinstance(found, str) or _NAME.fullmatch(found) is None:
        raise place.at(key).error(f"{found!r} is not a name that Kubernetes would take")
    return found


def _check_texts(place: Field, found: Any) -> None:
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise place.error("expected a mapping")
    for key, value in found.items():
        if not isinstance(value, str):
            raise place.at(key).error(f"{value!r} is not a text", "put quotes round it")

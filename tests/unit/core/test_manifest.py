"""What counts as a manifest, and what is said of one that is none."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.manifest import parse_manifest
from meshbpf.agent.core.objects import KubeObject, ObjectKey


def read(text: str) -> tuple[KubeObject, ...]:
    return parse_manifest(text, "mesh.yaml")


def test_several_documents_and_lists_are_so_many_objects_with_their_lines() -> None:
    found = read(
        "# only a comment\n"
        "---\n"
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"
        "---\n"
        "apiVersion: v1\nkind: List\nmetadata: {resourceVersion: ''}\nitems:\n"
        "- {apiVersion: v1, kind: Node, metadata: {name: node1}}\n"
        "- apiVersion: security.istio.io/v1\n"
        "  kind: PeerAuthentication\n"
        "  metadata: {name: strict, namespace: shop}\n"
        "---\n"
    )
    assert [(each.key, each.version, each.origin) for each in found] == [
        (ObjectKey("", "Namespace", "", "shop"), "v1", "mesh.yaml:3"),
        (ObjectKey("", "Node", "", "node1"), "v1", "mesh.yaml:11"),
        (
            ObjectKey("security.istio.io", "PeerAuthentication", "shop", "strict"),
            "v1",
            "mesh.yaml:12",
        ),
    ]


def test_a_namespaced_object_without_a_namespace_is_in_default() -> None:
    (found,) = read("{apiVersion: v1, kind: Pod, metadata: {name: web}}")
    assert found.namespace == "default"


def test_values_are_what_kubectl_makes_of_them() -> None:
    (found,) = read(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\n"
        "spec: {a: 1, b: 1.5, c: yes, d: 'yes', e: ~, f: 0644, g: 2020-01-01, h: -3, i: 1e3,\n"
        "  j: .5, k: !!str 7, l: [on, off], m: 1.2.3, n: e3}\n"
    )
    assert found.spec == {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": "yes",
        "e": None,
        "f": 0o644,
        "g": "2020-01-01",
        "h": -3,
        "i": 1000.0,
        "j": 0.5,
        "k": "7",
        "l": [True, False],
        "m": "1.2.3",
        "n": "e3",
    }


def test_an_alias_does_not_reach_into_the_next_document() -> None:
    with pytest.raises(ConfigError, match=r"mesh\.yaml:3: \*x names no value"):
        read("{apiVersion: v1, kind: Pod, metadata: &x {name: a}}\n---\n{metadata: *x}\n")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[]", "mesh.yaml:1: expected a mapping, found a list"),
        ("kind: Pod", "mesh.yaml:1: apiVersion is missing"),
        ("apiVersion: v1", "mesh.yaml:1: kind is missing"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: x",
            "mesh.yaml:3: metadata: expected a mapping with the object's name",
        ),
        ("apiVersion: v1\nkind: Pod\nmetadata:\n  labels: {}", "metadata: name is missing"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a/b",
            "mesh.yaml:4: metadata.name: 'a/b' is not a name that Kubernetes would take",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\n  labels:\n    version: 1",
            "mesh.yaml:6: metadata.labels.version: 1 is not a text",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {x: 1, x: 2}",
            "mesh.yaml:4: spec.x: given at line 4 already",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: !Foo {}",
            "mesh.yaml:4: spec: the tag '!Foo' means nothing in a manifest",
        ),
        ("a: b: c", "mesh.yaml:1: not YAML"),
    ],
)
def test_what_is_wrong_is_told_with_line_and_field(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert what in caught.value.what

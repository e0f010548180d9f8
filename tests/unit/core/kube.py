"""Objects in YAML, translated: what the tests of the translation share."""

from __future__ import annotations

from textwrap import dedent

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_mesh import Translation, translate
from meshbpf.agent.core.manifest import parse_manifest
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import Workload

BY_HAND = Cluster(by_hand=True)
LIVE = Cluster()

POD = """\
    apiVersion: v1
    kind: Pod
    metadata: {name: web-0, namespace: shop, labels: {app: web}}
    spec: {nodeName: node1, serviceAccountName: web, containers: []}
    status: {phase: Running, podIP: 198.18.1.1}
    """


def objects(*texts: str) -> ObjectSet:
    """Each text is one document or several; indentation does not matter."""
    whole = "\n---\n".join(dedent(text) for text in texts)
    return ObjectSet.of(parse_manifest(whole, "mesh.yaml"))


def translated(*texts: str, cluster: Cluster = BY_HAND) -> Translation:
    return translate(objects(*texts), cluster)


def workload(found: Translation, name: str = "web-0") -> Workload:
    return next(each for each in found.state.workloads if each.name == name)


def service(found: Translation, name: str = "web") -> Service:
    return next(each for each in found.state.services if each.name == name)


def told(found: Translation) -> list[str]:
    return [str(problem) for problem in found.problems]

"""Random objects of a small cluster, good and bad ones, for tests of their translation.

The names are few, so that selectors, labels and hostnames meet all the time.
"""

from __future__ import annotations

from random import Random
from typing import Any

from meshbpf.agent.core.objects import KubeObject, ObjectKey

SPACES = ("a", "b", "istio-system")
NAMES = ("s0", "s1", "wp")
GATEWAYS = "gateway.networking.k8s.io"
ISTIO = "networking.istio.io"
HOSTS = (
    "api.example",
    "b.example",
    "*.w.example",
    "s0.a.svc.cluster.local",
    "s1.b.svc.cluster.local",
)
AUTO_ALLOCATE = "networking.istio.io/enable-autoallocate-ip"
SECURITY = "security.istio.io"
KINDS = (
    ("", "Namespace"),
    ("", "Node"),
    *[("", "Pod")] * 4,
    *[("", "Service")] * 2,
    *[("discovery.k8s.io", "EndpointSlice")] * 2,
    (GATEWAYS, "Gateway"),
    (GATEWAYS, "GatewayClass"),
    *[(ISTIO, "ServiceEntry")] * 2,
    (ISTIO, "WorkloadEntry"),
    *[(SECURITY, "AuthorizationPolicy")] * 2,
    (SECURITY, "PeerAuthentication"),
    ("gateway.networking.k8s.io", "HTTPRoute"),
)
_APPS = ("x", "y")
_TIMES = (None, "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")


class Objects:
    """Draws changes."""

    def __init__(self, rng: Random, bad: float = 0.1) -> None:
        """`bad` is the share of fields, of some, that cannot be read."""
        self._rng = rng
        self._bad_share = bad

    def changes(self) -> dict[ObjectKey, KubeObject | None]:
        """One to four objects that are new, other or gone."""
        found: dict[ObjectKey, KubeObject | None] = {}
        for _ in range(self._rng.choice((1, 1, 1, 2, 4))):
            each = self.one()
            found[each.key] = None if self._rng.random() < 0.15 else each
        return found

    def one(self) -> KubeObject:
        """An object of a random kind."""
        group, kind = self._rng.choice(KINDS)
        namespace = self._rng.choice(SPACES)
        name = self._rng.choice(NAMES)
        if kind in ("Namespace", "Node", "GatewayClass"):
            name, namespace = self._rng.choice(SPACES if kind == "Namespace" else ("n0", "n1")), ""
        body: dict[str, Any] = getattr(self, f"_{kind.lower()}")()
        metadata = {"name": name, "namespace": namespace, **body.pop("metadata", {})}
        time = self._rng.choice(_TIMES)
        if time is not None:
            metadata["creationTimestamp"] = time
        key = ObjectKey(group, kind, namespace, name)
        return KubeObject(key, "v1", {"metadata": metadata, **body})

    # -- parts

    def _some(self, chance: float, value: dict[str, Any]) -> dict[str, Any]:
        return value if self._rng.random() < chance else {}

    def _bad(self, value: Any, instead: Any = 7) -> Any:
        """Now and then what cannot be read."""
        return instead if self._rng.random() < self._bad_share else value

    def _use(self, chance: float = 0.3) -> dict[str, str]:
        found = self._some(
            chance, {"istio.io/use-waypoint": self._rng.choice(("wp", "s0", "none"))}
        )
        other = {"istio.io/use-waypoint-namespace": self._rng.choice(SPACES)}
        return found | (self._some(0.3, other) if found else {})

    def _labels(self) -> dict[str, str]:
        found = {"app": self._rng.choice(_APPS)} | self._some(0.5, {"tier": "front"})
        found |= self._some(0.1, {"gateway.networking.k8s.io/gateway-name": "wp"})
        return found | self._use() | self._some(0.1, {"networking.istio.io/tunnel": "http"})

    def _selector(self) -> dict[str, str]:
        return self._rng.choice(({}, {"app": "x"}, {"app": "y"}, {"tier": "front", "app": "x"}))

    # -- kinds

    def _namespace(self) -> dict[str, Any]:
        labels = self._use() | self._some(0.3, {"istio.io/dataplane-mode": "ambient"})
        annotation = {"networking.istio.io/traffic-distribution": "PreferClose"}
        return {"metadata": {"labels": labels, "annotations": self._some(0.2, annotation)}}

    def _node(self) -> dict[str, Any]:
        region = {"topology.kubernetes.io/region": self._rng.choice(("eu", "us"))}
        return {"metadata": {"labels": self._some(0.7, region)}}

    def _pod(self) -> dict[str, Any]:
        number = self._rng.randrange(9)
        port = {
            "name": self._rng.choice(("http", "web")),
            "containerPort": self._bad(8080 + number),
            "protocol": "TCP",
        }
        spec = {
            "nodeName": self._rng.choice(("n0", "n1")),
            "serviceAccountName": self._bad(self._rng.choice(("default", "web")), "a b"),
            "containers": [{"ports": [port]}],
        } | self._some(0.1, {"hostNetwork": True})
        address = {"podIP": self._bad(f"198.18.0.{number}")}
        return {
            "metadata": {"labels": self._labels()},
            "spec": spec,
            "status": {"phase": self._rng.choice(("Running", "Running", "Failed"))}
            | self._some(0.8, address),
        }

    def _service(self) -> dict[str, Any]:
        target = self._rng.choice((8080, "http", "web"))
        spec = {
            "selector": self._selector(),
            "clusterIP": self._rng.choice(("198.19.0.1", "198.19.0.2", "None")),
            "ports": self._bad([{"name": "http", "port": 80, "targetPort": target}]),
        } | self._some(0.1, {"type": "ExternalName"})
        return {"metadata": {"labels": self._use()}, "spec": spec}

    def _endpointslice(self) -> dict[str, Any]:
        pod = {"targetRef": {"kind": "Pod", "name": self._bad(self._rng.choice(NAMES))}}
        machine = {"addresses": [self._bad("198.51.100.1")]}
        service = {"kubernetes.io/service-name": self._rng.choice(("s0", "s1"))}
        return {
            "metadata": {"labels": service},
            "ports": [{"name": "http", "port": 9000}],
            "endpoints": self._rng.choice(([pod], [pod, machine], [machine], [])),
        }

    def _gateway(self) -> dict[str, Any]:
        allowed = {"from": self._rng.choice(("All", "Same", "Selector"))}
        allowed |= {"selector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}}
        listener = {"protocol": "HBONE", "allowedRoutes": {"namespaces": allowed}}
        traffic = {"istio.io/waypoint-for": self._rng.choice(("service", "workload", "all"))}
        annotations = self._some(0.1, {"istio.io/for-service-account": "web"})
        annotations |= self._some(0.2, {"ambient.istio.io/waypoint-inbound-binding": "PROXY/1"})
        addresses = [{"type": "IPAddress", "value": "198.19.9.9"}]
        return {
            "metadata": {"labels": self._some(0.6, traffic), "annotations": annotations},
            "spec": {
                "gatewayClassName": self._rng.choice(("n0", "n1")),
                "listeners": [self._bad(listener)],
            },
            "status": self._some(0.7, {"addresses": addresses}),
        }

    def _gatewayclass(self) -> dict[str, Any]:
        binding = {"ambient.istio.io/waypoint-inbound-binding": self._rng.choice(("PROXY/2", "X"))}
        return {
            "metadata": {
                "labels": self._some(0.5, {"istio.io/waypoint-for": "all"}),
                "annotations": self._some(0.3, binding),
            }
        }

    def _serviceentry(self) -> dict[str, Any]:
        resolution = self._rng.choice(("STATIC", "STATIC", "DNS", "DNS_ROUND_ROBIN", "NONE"))
        if self._rng.random() < 0.1:
            resolution = "DYNAMIC_DNS"
        static, by_name = resolution == "STATIC", resolution in ("DNS", "DNS_ROUND_ROBIN")
        way: dict[str, Any] = {}
        if (static or resolution == "DNS") and self._rng.random() < 0.5:
            way["endpoints"] = [self._endpoint(n) for n in range(self._rng.randint(1, 2))]
        elif static and self._rng.random() < 0.7:
            way["workloadSelector"] = {"labels": self._selector()}
        elif by_name and self._rng.random() < 0.2:
            way["endpoints"] = [{"address": "x.example"}]
        names = [each for each in HOSTS if "*" not in each or "endpoints" in way or not by_name]
        hosts = self._rng.sample(names, self._rng.randint(1, 2))
        addresses = self._rng.choice(
            (["198.19.0.9"], ["198.19.0.9", "fd00:6d62::9"], ["198.20.0.7/16"] if static else [])
        )
        if resolution == "DYNAMIC_DNS":
            hosts, addresses = ["*.w.example"], []
        port = {"number": 80, "name": "http", "protocol": self._rng.choice(("HTTP", "TCP"))}
        other = {"number": 443, "name": "web", "protocol": "TLS", "targetPort": self._bad(8443)}
        spec = {"hosts": hosts, "ports": [port, other], "resolution": resolution} | way
        spec |= self._some(0.4, {"addresses": [self._bad(each) for each in addresses]})
        spec |= self._some(0.3, {"subjectAltNames": ["spiffe://cluster.local/ns/a/sa/api"]})
        spec |= self._some(0.2, {"exportTo": ["."]}) | self._some(
            0.2, {"location": "MESH_INTERNAL"}
        )
        labels = self._labels() | self._some(0.1, {AUTO_ALLOCATE: "false"})
        given = [{"value": f"240.240.0.{n}", "host": each} for n, each in enumerate(HOSTS, 1)]
        return {
            "metadata": {"labels": labels},
            "spec": spec,
            "status": self._some(0.6, {"addresses": given}),
        }

    def _endpoint(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {"address": f"198.51.100.{number + 1}"}
        found |= self._some(0.4, {"labels": self._labels()})
        found |= self._some(0.3, {"ports": {"http": 9090}})
        found |= self._some(0.2, {"locality": self._rng.choice(("eu", "eu/z", "eu/z/s"))})
        found |= self._some(0.2, {"weight": 5})
        return found | self._some(0.4, {"serviceAccount": self._bad("api", "a b")})

    def _workloadentry(self) -> dict[str, Any]:
        address = self._rng.choice(("198.51.100.9", "vm.example", "fd00:6d62::5"))
        spec: dict[str, Any] = {"address": self._bad(address)}
        spec |= self._some(0.5, {"labels": {"tier": "front", "app": self._rng.choice(_APPS)}})
        spec |= self._some(0.4, {"ports": self._rng.choice(({"http": 7070}, {"web": 7071}))})
        spec |= self._some(0.2, {"network": "n2"}) | self._some(0.2, {"weight": 3})
        spec |= self._some(0.2, {"locality": "eu/z/s/x"})
        spec |= self._some(0.6, {"serviceAccount": self._bad("web", "a b")})
        group = {"istio.io/autoRegistrationGroup": "group"}
        annotations = self._some(0.1, group)
        annotations |= self._some(0.1, {"ambient.istio.io/redirection": "enabled"})
        labels = self._labels() if self._rng.random() < 0.8 or "labels" not in spec else {}
        return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}

    def _authorizationpolicy(self) -> dict[str, Any]:
        ports = [self._bad(str(self._rng.randint(80, 82)))]
        rule = {"to": [{"operation": {"ports": ports}}]}
        selector = self._some(0.8, {"selector": {"matchLabels": self._selector()}})
        return {"spec": {"action": self._rng.choice(("ALLOW", "DENY")), "rules": [rule]} | selector}

    def _peerauthentication(self) -> dict[str, Any]:
        mode = self._rng.choice(("STRICT", "PERMISSIVE", "UNSET", "ODD"))
        selector = {"matchLabels": self._selector()}
        ports = {str(self._rng.choice((80, 81))): {"mode": self._rng.choice(("STRICT", "DISABLE"))}}
        spec = {"mtls": {"mode": mode}} | self._some(0.5, {"selector": selector})
        return {"spec": spec | self._some(0.4, {"portLevelMtls": ports})}

    def _httproute(self) -> dict[str, Any]:
        return {"spec": {}}

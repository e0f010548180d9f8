"""The mesh conformance tests of Gateway API, each under its own name.

The manifests are ours, for the same behaviour; every request is made by a pod
of its own network namespace, over HBONE to the waypoint and from it, and must
succeed three times in a row. Each test has a service of its own, so that all
manifests stand at the same time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.waypoint.bed import (
    CONSUMER,
    SERVICES,
    Answer,
    Inside,
    WaypointBed,
    a_service,
    read,
    route,
    to,
    vip,
)
from tests.waypoint.grpc import Grpc

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.gamma]

IN_A_ROW = 3
DRAWS = 800
TOLERANCE = 0.05


def path(value: str, kind: str = "PathPrefix") -> dict[str, Any]:
    return {"path": {"type": kind, "value": value}}


def edit(kind: str, **what: Any) -> dict[str, Any]:
    key = kind[0].lower() + kind[1:]
    fields = {
        name: [{"name": n, "value": v} for n, v in value.items()] if name != "remove" else value
        for name, value in what.items()
    }
    return {"type": kind, key: fields}


def redirects(**what: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "matches": [path(f"/{name.replace('_', '-')}")],
            "filters": [{"type": "RequestRedirect", "requestRedirect": value}],
        }
        for name, value in what.items()
    ]


SET = edit("ResponseHeaderModifier", set={"X-Header-Set": "set"})
EDITS = {
    "/set": {"set": {"X-Header-Set": "set-overwrites-values"}},
    "/add": {"add": {"X-Header-Add": "add-appends-values"}},
    "/remove": {"remove": ["X-Header-Remove"]},
    "/multiple": {
        "set": {"X-Header-Set-1": "header-set-1", "X-Header-Set-2": "header-set-2"},
        "add": {f"X-Header-Add-{n}": f"header-add-{n}" for n in (1, 2, 3)},
        "remove": ["X-Header-Remove-1", "X-Header-Remove-2"],
    },
    "/case-insensitivity": {
        "set": {"X-Header-Set": "header-set"},
        "add": {"X-Header-Add": "header-add"},
        "remove": ["X-Header-Remove"],
    },
}
PREFIX = {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/replacement-prefix"}
FULL = {"type": "ReplaceFullPath", "replaceFullPath": "/full-path-replacement"}
REWRITE_EDITS = edit(
    "RequestHeaderModifier",
    set={"X-Header-Set": "set-overwrites-values"},
    add={"X-Header-Add": "header-val-1", "X-Header-Add-Append": "header-val-2"},
    remove=["X-Header-Remove"],
)


def rewrite(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "URLRewrite", "urlRewrite": {"path": value}}


def queries(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in pairs]


def manifests() -> Iterator[dict[str, Any]]:
    """Services and routes of all tests. Numbers are of virtual addresses."""
    for number, name in enumerate(
        (
            "split", "simple", "matching", "weight", "header", "host", "query", "rpath", "rport",
            "rscheme", "rewrite", "backend", "named", "r303", "r307", "r308", "gweight", "gheader",
            "gsplit",
        ),
        20,
    ):  # fmt: skip
        yield a_service(name, number)
    for number, name in enumerate(("front", "ports2"), 60):
        yield a_service(name, number, version="echo-v2")
    for number, name in enumerate(("ports1", "consumed"), 70):
        yield a_service(name, number, version="echo-v1")
    one, two = path("/v1", "Exact"), path("/v2", "Exact")
    yield route(
        "split",
        to("echo-v1", port=80, matches=[one]),
        to("echo-v2", port=80, matches=[two]),
        parent="split",
        port=None,
    )
    yield route("simple", to("echo-v1"), parent="simple")
    version = [{"name": "version", "value": "one"}]
    yield route(
        "matching",
        to("echo-v1", matches=[path("/"), {"headers": version}]),
        to(
            "echo-v2",
            matches=[path("/v2"), {"headers": [{"name": "version", "value": "two"}]}],
        ),
        parent="matching",
    )
    yield route("weight", to("echo-v1=70", "echo-v2=30"), parent="weight")
    yield route(
        "header",
        *(
            to("echo-v1", matches=[path(at)], filters=[edit("RequestHeaderModifier", **what)])
            for at, what in EDITS.items()
        ),
        parent="header",
    )
    yield route(
        "backend",
        *(
            {
                "matches": [path(at)],
                "backendRefs": [
                    {
                        "name": "echo-v1",
                        "port": 8080,
                        "filters": [edit("RequestHeaderModifier", **what)],
                    }
                ],
            }
            for at, what in EDITS.items()
        ),
        parent="backend",
    )
    example = {"hostname": "example.org"}
    yield route(
        "host",
        *redirects(hostname_redirect=example, host_and_status=example | {"statusCode": 301}),
        parent="host",
    )
    yield route(
        "query",
        to("echo-v1", matches=[{"queryParams": queries(("animal", "whale"))}]),
        to("echo-v2", matches=[{"queryParams": queries(("animal", "dolphin"))}]),
        to("echo-v1", matches=[path("/path1") | {"queryParams": queries(("animal", "whale"))}]),
        to("echo-v2", matches=[{"headers": version, "queryParams": queries(("animal", "whale"))}]),
        to(
            "echo-v1",
            matches=[
                path("/path3") | {"queryParams": queries(("animal", "shark"))},
                path("/path4")
                | {
                    "headers": [{"name": "version", "value": "three"}],
                    "queryParams": queries(("animal", "kraken")),
                },
            ],
        ),
        to("echo-v1", matches=[path("/path5")]),
        to("echo-v2", matches=[{"queryParams": queries(("animal", "hydra"))}]),
        parent="query",
    )
    yield route(
        "rpath",
        *redirects(
            original_prefix={"path": PREFIX},
            full={"path": FULL},
            path_and_host={"path": PREFIX} | example,
            path_and_status={"path": PREFIX, "statusCode": 301},
            full_path_and_host={"path": FULL} | example,
            full_path_and_status={"path": FULL, "statusCode": 301},
        ),
        parent="rpath",
    )
    yield route(
        "rport",
        *redirects(
            port={"port": 8083},
            port_and_host={"port": 8083} | example,
            port_and_status={"port": 8083, "statusCode": 301},
            port_and_host_and_status={"port": 8083, "statusCode": 302} | example,
        ),
        parent="rport",
    )
    secure = {"scheme": "https"}
    yield route(
        "rscheme",
        *redirects(
            scheme=secure,
            scheme_and_host=secure | example,
            scheme_and_status=secure | {"statusCode": 301},
            scheme_and_host_and_status=secure | example | {"statusCode": 302},
        ),
        parent="rscheme",
    )
    for name, at, status in (
        ("r303", "redirect", 303),
        ("r307", "temporary", 307),
        ("r308", "permanent", 308),
    ):
        yield route(name, *redirects(**{at: {"statusCode": status}}), parent=name)
    yield from _rewrites()
    yield route(
        "named",
        to("echo-v1", name="named-rule", matches=[path("/named")]),
        to("echo-v2", matches=[path("/unnamed")]),
        parent="named",
    )
    yield route("front", to("echo-v2", port=80, filters=[SET]), parent="front", port=None)
    for name, backend, port in (("ports1", "echo-v1", 80), ("ports2", "echo-v2", None)):
        filters = [edit("ResponseHeaderModifier", set={"X-Header-Set": name})]
        yield route(name, to(backend, port=80, filters=filters), parent=name, port=port)
    yield route(
        "consumer",
        to("consumed", port=80, filters=[SET]),
        parent="consumed",
        port=None,
        namespace=CONSUMER,
    )
    yield route(
        "gweight",
        to("echo-v1=70", "echo-v2=30", "echo-v3=0", port=7070),
        parent="gweight",
        port=7070,
        kind="GRPCRoute",
    )
    yield route(
        "gheader",
        *(
            to(
                "echo-v1",
                port=7070,
                matches=[{"headers": [{"name": "x-test-case", "value": at[1:]}]}],
                filters=[edit("RequestHeaderModifier", **what)],
            )
            for at, what in EDITS.items()
        ),
        parent="gheader",
        port=7070,
        kind="GRPCRoute",
    )


def _rewrites() -> Iterator[dict[str, Any]]:
    prefix, full = "replacePrefixMatch", "replaceFullPath"
    yield route(
        "rewrite",
        *(
            to("echo-v1", port=80, matches=[path(at)], filters=filters)
            for at, filters in (
                ("/prefix/one", [rewrite({"type": "ReplacePrefixMatch", prefix: "/one"})]),
                ("/strip-prefix", [rewrite({"type": "ReplacePrefixMatch", prefix: "/"})]),
                ("/full/one", [rewrite({"type": "ReplaceFullPath", full: "/one"})]),
                (
                    "/full/rewrite-path-and-modify-headers",
                    [rewrite({"type": "ReplaceFullPath", full: "/test"}), REWRITE_EDITS],
                ),
                (
                    "/prefix/rewrite-path-and-modify-headers",
                    [rewrite({"type": "ReplacePrefixMatch", prefix: "/prefix"}), REWRITE_EDITS],
                ),
            )
        ),
        parent="rewrite",
    )


@pytest.fixture(scope="module")
def mesh(bed: WaypointBed) -> Iterator[WaypointBed]:
    with bed.objects(*manifests()):
        yield bed


class Client:
    """Keeps one connection to a service: routes hold for each request by itself."""

    def __init__(self, bed: WaypointBed, service: str, port: int = 80, pod: str = "n1a") -> None:
        self._conn = Inside(bed[pod], vip(service) if service in SERVICES else service, port)
        self.host = service if port == 80 else f"{service}:{port}"

    def get(self, target: str = "/", **headers: str) -> Answer:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self._conn.request("GET", target, headers={"Host": self.host} | fields)
        return read(self._conn)

    def close(self) -> None:
        self._conn.close()


@contextlib.contextmanager
def client(bed: WaypointBed, service: str, port: int = 80, pod: str = "n1a") -> Iterator[Client]:
    one = Client(bed, service, port, pod)
    try:
        yield one
    finally:
        one.close()


def shares(drawn: Counter[str]) -> dict[str, float]:
    return {name: count / drawn.total() for name, count in drawn.items()}


# --- MESH-HTTP core ----------------------------------------------------------------


def test_mesh_basic(mesh: WaypointBed) -> None:
    for _ in range(IN_A_ROW):
        assert mesh.get("echo").status == 200


def test_mesh_traffic_split(mesh: WaypointBed) -> None:
    with client(mesh, "split") as one:
        for _ in range(IN_A_ROW):
            assert one.get("/v1").name == "echo-v1"
            assert one.get("/v2").name == "echo-v2"


def test_mesh_httproute_simple_same_namespace(mesh: WaypointBed) -> None:
    with client(mesh, "simple") as one:
        assert {one.get().name for _ in range(5 * IN_A_ROW)} == {"echo-v1"}


@pytest.mark.parametrize(
    ("target", "version", "backend"),
    [
        ("/", "", "echo-v1"),
        ("/example", "", "echo-v1"),
        ("/", "one", "echo-v1"),
        ("/v2", "", "echo-v2"),
        ("/v2/example", "", "echo-v2"),
        ("/", "two", "echo-v2"),
        ("/v2/", "", "echo-v2"),
        ("/v2example", "", "echo-v1"),
        ("/foo/v2/example", "", "echo-v1"),
    ],
)
def test_mesh_httproute_matching(
    mesh: WaypointBed, target: str, version: str, backend: str
) -> None:
    with client(mesh, "matching") as one:
        for _ in range(IN_A_ROW):
            answer = one.get(target, **({"Version": version} if version else {}))
            assert (answer.status, answer.name) == (200, backend)


def test_mesh_httproute_weight(mesh: WaypointBed) -> None:
    with client(mesh, "weight") as one:
        drawn = shares(Counter(one.get().name for _ in range(DRAWS)))
    assert drawn == pytest.approx({"echo-v1": 0.7, "echo-v2": 0.3}, abs=TOLERANCE)


HEADER_CASES = [
    ("/set", {"Some_Other": "val"}, {"x-header-set": "set-overwrites-values", "some-other": "val"}),
    ("/set", {"X_Header_Set": "old"}, {"x-header-set": "set-overwrites-values"}),
    ("/add", {"Some_Other": "val"}, {"x-header-add": "add-appends-values", "some-other": "val"}),
    ("/add", {"X_Header_Add": "a"}, {"x-header-add": "a,add-appends-values"}),
    ("/remove", {"X_Header_Remove": "val"}, {"x-header-remove": None}),
    (
        "/multiple",
        {
            "X_Header_Set_2": "old",
            "X_Header_Add_2": "kept",
            "X_Header_Remove_2": "val",
            "Another": "val",
        },
        {
            "x-header-set-1": "header-set-1",
            "x-header-set-2": "header-set-2",
            "x-header-add-1": "header-add-1",
            "x-header-add-2": "kept,header-add-2",
            "x-header-add-3": "header-add-3",
            "x-header-remove-2": None,
            "another": "val",
        },
    ),
    (
        "/case-insensitivity",
        {"x_header_set": "old", "x_header_add": "kept", "x_header_remove": "val"},
        {"x-header-set": "header-set", "x-header-add": "kept,header-add", "x-header-remove": None},
    ),
]


def headers_arrive(said: dict[str, Any], expected: dict[str, str | None]) -> None:
    fields = said["headers"]
    for name, value in expected.items():
        assert (",".join(fields[name]) if name in fields else None) == value, name


@pytest.mark.parametrize(("target", "sent", "expected"), HEADER_CASES)
def test_mesh_httproute_request_header_modifier(
    mesh: WaypointBed, target: str, sent: dict[str, str], expected: dict[str, str | None]
) -> None:
    with client(mesh, "header") as one:
        for _ in range(IN_A_ROW):
            headers_arrive(one.get(target, **sent).said, expected)


def redirected(
    mesh: WaypointBed,
    service: str,
    target: str,
    status: int,
    scheme: str = "http",
    host: str = "",
    port: int | None = None,
    to_path: str = "",
) -> None:
    with client(mesh, service) as one:
        for _ in range(IN_A_ROW):
            answer = one.get(target)
            found = urlsplit(answer.headers["location"])
            assert answer.status == status
            assert (found.scheme, found.hostname, found.port, found.path) == (
                scheme,
                host or service,
                port,
                to_path or target,
            )


@pytest.mark.parametrize(
    ("target", "status"), [("/hostname-redirect", 302), ("/host-and-status", 301)]
)
def test_mesh_httproute_redirect_host_and_status(
    mesh: WaypointBed, target: str, status: int
) -> None:
    redirected(mesh, "host", target, status, host="example.org")


# --- MESH-HTTP extended ------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "version", "backend"),
    [
        ("/?animal=whale", "", "echo-v1"),
        ("/?animal=dolphin", "", "echo-v2"),
        ("/?animal=whale&otherparam=irrelevant", "", "echo-v1"),
        ("/?animal=dolphin&color=yellow", "", "echo-v2"),
        ("/?color=blue", "", None),
        ("/?animal=dog", "", None),
        ("/?animal=whaledolphin", "", None),
        ("/", "", None),
        ("/path1?animal=whale", "", "echo-v1"),
        ("/?animal=whale", "one", "echo-v2"),
        ("/path3?animal=shark", "", "echo-v1"),
        ("/path4?animal=kraken", "three", "echo-v1"),
        ("/?animal=shark", "", None),
        ("/path4?animal=kraken", "", None),
        ("/path5?animal=hydra", "", "echo-v1"),
    ],
)
def test_mesh_httproute_query_param_matching(
    mesh: WaypointBed, target: str, version: str, backend: str | None
) -> None:
    with client(mesh, "query") as one:
        for _ in range(IN_A_ROW):
            answer = one.get(target, **({"version": version} if version else {}))
            if backend is None:
                assert answer.status == 404
            else:
                assert answer.name == backend


@pytest.mark.parametrize(
    ("target", "status", "host", "to_path"),
    [
        ("/original-prefix/lemon", 302, "", "/replacement-prefix/lemon"),
        ("/full/path/original", 302, "", "/full-path-replacement"),
        ("/path-and-host", 302, "example.org", "/replacement-prefix"),
        ("/path-and-status", 301, "", "/replacement-prefix"),
        ("/full-path-and-host", 302, "example.org", "/full-path-replacement"),
        ("/full-path-and-status", 301, "", "/full-path-replacement"),
    ],
)
def test_mesh_httproute_redirect_path(
    mesh: WaypointBed, target: str, status: int, host: str, to_path: str
) -> None:
    redirected(mesh, "rpath", target, status, host=host, to_path=to_path)


@pytest.mark.parametrize(
    ("target", "status", "host"),
    [
        ("/port", 302, ""),
        ("/port-and-host", 302, "example.org"),
        ("/port-and-status", 301, ""),
        ("/port-and-host-and-status", 302, "example.org"),
    ],
)
def test_mesh_httproute_redirect_port(
    mesh: WaypointBed, target: str, status: int, host: str
) -> None:
    redirected(mesh, "rport", target, status, host=host, port=8083)


@pytest.mark.parametrize(
    ("target", "status", "host"),
    [
        ("/scheme", 302, ""),
        ("/scheme-and-host", 302, "example.org"),
        ("/scheme-and-status", 301, ""),
        ("/scheme-and-host-and-status", 302, "example.org"),
    ],
)
def test_mesh_httproute_scheme_redirect(
    mesh: WaypointBed, target: str, status: int, host: str
) -> None:
    redirected(mesh, "rscheme", target, status, scheme="https", host=host)


REWRITTEN = {
    "x-header-add": "header-val-1",
    "x-header-add-append": "append-val-1,header-val-2",
    "x-header-set": "set-overwrites-values",
    "x-header-remove": None,
}


@pytest.mark.parametrize(
    ("target", "arrives", "edited"),
    [
        ("/prefix/one/two", "/one/two", False),
        ("/strip-prefix/three", "/three", False),
        ("/strip-prefix", "/", False),
        ("/full/one/two", "/one", False),
        ("/full/rewrite-path-and-modify-headers/test", "/test", True),
        ("/prefix/rewrite-path-and-modify-headers/one", "/prefix/one", True),
    ],
)
def test_mesh_httproute_rewrite_path(
    mesh: WaypointBed, target: str, arrives: str, edited: bool
) -> None:
    sent = {
        "X_Header_Remove": "remove-val",
        "X_Header_Add_Append": "append-val-1",
        "X_Header_Set": "set-val",
    }
    with client(mesh, "rewrite") as one:
        for _ in range(IN_A_ROW):
            said = one.get(target, **sent).said
            assert (said["name"], said["path"]) == ("echo-v1", arrives)
            if edited:
                headers_arrive(said, REWRITTEN)


@pytest.mark.parametrize(("target", "sent", "expected"), HEADER_CASES)
def test_mesh_httproute_backend_request_header_modifier(
    mesh: WaypointBed, target: str, sent: dict[str, str], expected: dict[str, str | None]
) -> None:
    with client(mesh, "backend") as one:
        for _ in range(IN_A_ROW):
            headers_arrive(one.get(target, **sent).said, expected)


@pytest.mark.parametrize(("target", "backend"), [("/named", "echo-v1"), ("/unnamed", "echo-v2")])
def test_mesh_httproute_named_rule(mesh: WaypointBed, target: str, backend: str) -> None:
    with client(mesh, "named") as one:
        for _ in range(IN_A_ROW):
            assert one.get(target).name == backend


def test_mesh_frontend(mesh: WaypointBed) -> None:
    with client(mesh, "front") as one, client(mesh, mesh["n2b"].ipv4, 8080) as pod:
        for _ in range(IN_A_ROW):
            answer = one.get()
            assert (answer.name, answer.headers.get("x-header-set")) == ("echo-v2", "set")
            direct = pod.get()
            assert (direct.name, direct.headers.get("x-header-set")) == ("echo-v2", None)


def test_mesh_frontend_hostname(mesh: WaypointBed) -> None:
    with client(mesh, "front") as front, client(mesh, "ports1", 8080) as other:
        for _ in range(IN_A_ROW):
            answer = front.get(Host="echo-v1")
            assert (answer.name, answer.headers.get("x-header-set")) == ("echo-v2", "set")
            answer = other.get(Host="front")
            assert (answer.name, answer.headers.get("x-header-set")) == ("echo-v1", None)


@pytest.mark.parametrize(
    ("service", "port", "expected", "backend"),
    [
        ("ports1", 80, "ports1", "echo-v1"),
        ("ports1", 8080, None, "echo-v1"),
        ("ports2", 80, "ports2", "echo-v2"),
        ("ports2", 8080, "ports2", "echo-v2"),
    ],
)
def test_mesh_ports(
    mesh: WaypointBed, service: str, port: int, expected: str | None, backend: str
) -> None:
    with client(mesh, service, port) as one:
        for _ in range(IN_A_ROW):
            answer = one.get()
            assert (answer.name, answer.headers.get("x-header-set")) == (backend, expected)


def test_mesh_consumer_route(mesh: WaypointBed) -> None:
    with client(mesh, "consumed", pod="n1b") as consumer, client(mesh, "consumed") as producer:
        for _ in range(IN_A_ROW):
            answer = consumer.get()
            assert (answer.name, answer.headers.get("x-header-set")) == ("echo-v1", "set")
            answer = producer.get()
            assert (answer.name, answer.headers.get("x-header-set")) == ("echo-v1", None)


def test_mesh_httproute_303_redirect(mesh: WaypointBed) -> None:
    redirected(mesh, "r303", "/redirect", 303)


def test_mesh_httproute_307_redirect(mesh: WaypointBed) -> None:
    redirected(mesh, "r307", "/temporary", 307)


def test_mesh_httproute_308_redirect(mesh: WaypointBed) -> None:
    redirected(mesh, "r308", "/permanent", 308)


# --- MESH-GRPC ---------------------------------------------------------------------


def test_mesh_grpc_basic(mesh: WaypointBed) -> None:
    with Grpc(mesh["n1a"], vip("gsplit"), 7070) as one:
        for _ in range(IN_A_ROW):
            called = one.call("/gateway_api_conformance.echo_basic.GrpcEcho/Echo")
            assert (called.http, called.grpc) == (200, 0)
            assert called.said["name"] in ("echo-v1", "echo-v2", "echo-v3")


def test_mesh_grpcroute_weight(mesh: WaypointBed) -> None:
    with Grpc(mesh["n1a"], vip("gweight"), 7070) as one:
        drawn = shares(Counter(one.call("/shop.Cart/Add").said["name"] for _ in range(DRAWS)))
    assert drawn == pytest.approx({"echo-v1": 0.7, "echo-v2": 0.3}, abs=TOLERANCE)


@pytest.mark.parametrize(("target", "sent", "expected"), HEADER_CASES)
def test_mesh_grpcroute_request_header_modifier(
    mesh: WaypointBed, target: str, sent: dict[str, str], expected: dict[str, str | None]
) -> None:
    fields = {name.replace("_", "-").lower(): value for name, value in sent.items()}
    with Grpc(mesh["n1a"], vip("gheader"), 7070) as one:
        for _ in range(IN_A_ROW):
            called = one.call("/shop.Cart/Add", {"x-test-case": target[1:]} | fields)
            assert called.grpc == 0
            headers_arrive(called.said, expected)

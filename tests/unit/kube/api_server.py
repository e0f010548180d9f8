"""An API server for tests: list and watch over TLS, and every way in which they go wrong.

Speaks what the API's conventions say of lists in pages, resourceVersions,
watches with bookmarks, 410, and the status subresource. Objects are put and
taken by the test; what a watch has not been sent yet it is sent from the
history, which the test can cut (`compact`).
"""

from __future__ import annotations

import datetime as dt
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from meshbpf.agent.runtime.kube_config import KubeConfig

LISTS = {
    "/api/v1/namespaces": "Namespace",
    "/api/v1/nodes": "Node",
    "/api/v1/pods": "Pod",
    "/api/v1/services": "Service",
    "/apis/discovery.k8s.io/v1/endpointslices": "EndpointSlice",
    "/api/v1/configmaps": "ConfigMap",
    "/apis/gateway.networking.k8s.io/v1/httproutes": "HTTPRoute",
    "/apis/gateway.networking.k8s.io/v1/grpcroutes": "GRPCRoute",
    "/apis/gateway.networking.k8s.io/v1/tcproutes": "TCPRoute",
    "/apis/gateway.networking.k8s.io/v1/tlsroutes": "TLSRoute",
    "/apis/gateway.networking.k8s.io/v1/referencegrants": "ReferenceGrant",
    "/apis/security.istio.io/v1/requestauthentications": "RequestAuthentication",
    "/apis/extensions.istio.io/v1alpha1/wasmplugins": "WasmPlugin",
    "/apis/extensions.istio.io/v1alpha1/trafficextensions": "TrafficExtension",
    "/apis/telemetry.istio.io/v1/telemetries": "Telemetry",
    "/apis/meshbpf.io/v1alpha1/ratelimits": "RateLimit",
    "/apis/gateway.networking.k8s.io/v1/gateways": "Gateway",
    "/apis/gateway.networking.k8s.io/v1/gatewayclasses": "GatewayClass",
    "/apis/networking.istio.io/v1/serviceentries": "ServiceEntry",
    "/apis/networking.istio.io/v1/workloadentries": "WorkloadEntry",
    "/apis/security.istio.io/v1/authorizationpolicies": "AuthorizationPolicy",
    "/apis/security.istio.io/v1/peerauthentications": "PeerAuthentication",
}

LEASES = "/apis/coordination.k8s.io/v1/namespaces/meshbpf-system/leases"
CSRS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"


@dataclass(slots=True)
class Request:
    """One request that came in."""

    method: str
    path: str
    query: dict[str, str]
    token: str


@dataclass(slots=True, eq=False)
class ApiServer:
    """What it holds, and how it misbehaves."""

    ca: bytes
    context: ssl.SSLContext
    port: int = 0
    objects: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    history: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    """(version, event, kind, object)."""
    version: int = 100
    oldest: int = 0
    """A watch from before it is answered 410."""
    missing: set[str] = field(default_factory=set)
    """Kinds that the cluster does not have."""
    tokens: set[str] | None = None
    """Those that are taken; None takes all."""
    requests: list[Request] = field(default_factory=list)
    patches: list[tuple[str, Any]] = field(default_factory=list)
    signs: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """The status that a CertificateSigningRequest of this spec gets."""
    manager: str = ""
    """Who may apply."""
    refuses: str = ""
    """The plural of a kind that may not be applied."""
    cut_list_after: int | None = None
    """Bytes of a list that are sent before the connection is cut."""
    _stirred: trio.Event = field(default_factory=trio.Event)
    _watches: set[trio.CancelScope] = field(default_factory=set)
    _raw: dict[str, list[bytes]] = field(default_factory=dict)

    # --- what the test does ---------------------------------------------------

    def config(self, **more: Any) -> KubeConfig:
        return KubeConfig(
            origin=f"https://127.0.0.1:{self.port}",
            host="127.0.0.1",
            port=self.port,
            path="",
            server_name="127.0.0.1",
            ca=self.ca,
            **more,
        )

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        kind, metadata = body["kind"], body["metadata"]
        key = (kind, metadata.get("namespace", ""), metadata["name"])
        self.version += 1
        known = key in self.objects
        body = body | {"metadata": metadata | {"resourceVersion": str(self.version)}}
        self.objects[key] = body
        self._tell("MODIFIED" if known else "ADDED", kind, body)
        return body

    def take(self, kind: str, namespace: str, name: str) -> None:
        body = self.objects.pop((kind, namespace, name))
        self.version += 1
        last = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        self._tell("DELETED", kind, last)

    def say(self, kind: str, event: dict[str, Any] | bytes) -> None:
        """An event that the server ought not to send, or the bytes of half a one."""
        data = event if isinstance(event, bytes) else json.dumps(event).encode() + b"\n"
        self._raw.setdefault(kind, []).append(data)
        self._stir()

    def bookmark(self, kind: str) -> None:
        self.version += 1
        body = {"kind": kind, "metadata": {"resourceVersion": str(self.version)}}
        self.say(kind, {"type": "BOOKMARK", "object": body})

    def compact(self) -> None:
        """Forget the history: who watches from before now is told 410."""
        self.oldest = self.version
        self.history.clear()

    @property
    def watched(self) -> bool:
        """Whether a watch is open: what was accepted a moment ago may not be yet."""
        return bool(self._watches)

    def end_watches(self) -> None:
        """Cut every watch in the middle of its stream."""
        for scope in self._watches:
            scope.cancel()

    def count(self, path: str, watch: bool) -> int:
        return sum(r.path == path and ("watch" in r.query) == watch for r in self.requests)

    def _tell(self, event: str, kind: str, body: dict[str, Any]) -> None:
        self.history.append((self.version, event, kind, body))
        self._stir()

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    # --- the server -----------------------------------------------------------

    async def serve(self, stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)
        link = h11.Connection(h11.SERVER)
        try:
            body = b""
            head: Any = None
            while not isinstance(event := link.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    link.receive_data(bytes(await tls.receive_some(65536)))
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return
            await self._answer(tls, link, head, body)
        except (trio.BrokenResourceError, ssl.SSLError, h11.RemoteProtocolError):
            return
        finally:
            await trio.aclose_forcefully(tls)

    async def _answer(
        self, tls: trio.SSLStream[trio.SocketStream], link: h11.Connection, head: Any, body: bytes
    ) -> None:
        parts = urlsplit(head.target.decode())
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        headers = {name.decode(): value.decode() for name, value in head.headers}
        token = headers.get("authorization", "").removeprefix("Bearer ")
        request = Request(head.method.decode(), parts.path, query, token)
        self.requests.append(request)
        if self.tokens is not None and token not in self.tokens:
            await self._send(tls, link, 401, {"message": "Unauthorized"})
        elif request.method == "PATCH":
            self.patches.append((parts.path, json.loads(body)))
            if headers["content-type"] == "application/apply-patch+yaml":
                assert query == {"fieldManager": self.manager, "force": "true"}
                if self.refuses and self.refuses in parts.path.split("/"):
                    await self._send(tls, link, 403, {"message": f"no {self.refuses} for you"})
                else:
                    await self._send(tls, link, 200, self._apply(json.loads(body)))
                return
            assert headers["content-type"] == "application/merge-patch+json"
            await self._send(tls, link, 200, self._patch(parts.path, json.loads(body)))
        elif request.method == "POST":
            await self._send(tls, link, 201, self._create(parts.path, json.loads(body)))
        elif request.method == "PUT":
            await self._send(tls, link, *self._replace(parts.path, json.loads(body)))
        elif request.method == "DELETE":
            self.take("CertificateSigningRequest", "", parts.path.rpartition("/")[2])
            await self._send(tls, link, 200, {"status": "Success"})
        elif (kind := LISTS.get(parts.path)) is None:
            found = self._one(parts.path)
            said = {"message": f"{parts.path} not found"}
            await self._send(tls, link, 404 if found is None else 200, found or said)
        elif kind in self.missing:
            await self._send(tls, link, 404, {"message": "the server could not find it"})
        elif "watch" in query:
            await self._watch(tls, link, kind, int(query["resourceVersion"]))
        else:
            await self._list(tls, link, kind, query)

    def _one(self, path: str) -> dict[str, Any] | None:
        if path.startswith(f"{CSRS}/"):
            return self.objects.get(("CertificateSigningRequest", "", path.rpartition("/")[2]))
        if path.startswith(f"{LEASES}/"):
            return self.objects.get(("Lease", "meshbpf-system", path.rpartition("/")[2]))
        _, _, _, _, namespace, plural, name = path.split("/")
        assert plural == "pods"
        return self.objects.get(("Pod", namespace, name))

    def _create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == LEASES:
            return self.put(body | {"metadata": body["metadata"] | {"namespace": "meshbpf-system"}})
        assert path == CSRS
        name = f"{body['metadata']['generateName']}{self.version}"
        made = self.put(body | {"metadata": body["metadata"] | {"name": name}})
        if self.signs is not None:
            self.put(made | {"status": self.signs(made["spec"])})
        return made

    def _replace(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        held = self._one(path)
        version = body["metadata"].get("resourceVersion")
        if held is None or held["metadata"]["resourceVersion"] != version:
            return 409, {"message": "the object has been modified"}
        return 200, self.put(body)

    def _apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """As far as one manager alone makes an object: what is so already changes nothing."""
        metadata = body["metadata"]
        key = (body["kind"], metadata.get("namespace", ""), metadata["name"])
        held = self.objects.get(key)
        if held is not None:
            same = held["metadata"] | metadata == held["metadata"]
            if same and all(held.get(name) == body[name] for name in body if name != "metadata"):
                return held
        return self.put((held or {}) | body)

    def _patch(self, path: str, change: dict[str, Any]) -> dict[str, Any]:
        body = self._one(path.removesuffix("/status"))
        assert body is not None
        annotations = dict(body["metadata"].get("annotations") or {})
        for key, value in change["metadata"]["annotations"].items():
            if value is None:
                annotations.pop(key, None)
            else:
                annotations[key] = value
        return self.put(body | {"metadata": body["metadata"] | {"annotations": annotations}})

    async def _list(
        self,
        tls: trio.SSLStream[trio.SocketStream],
        link: h11.Connection,
        kind: str,
        query: dict[str, str],
    ) -> None:
        items = [body for key, body in sorted(self.objects.items()) if key[0] == kind]
        start, limit = int(query.get("continue", "0")), int(query["limit"])
        metadata = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            metadata["continue"] = str(start + limit)
        answer = {
            "kind": f"{kind}List",
            "metadata": metadata,
            "items": items[start : start + limit],
        }
        await self._send(tls, link, 200, answer, cut=self.cut_list_after)

    async def _watch(
        self, tls: trio.SSLStream[trio.SocketStream], link: h11.Connection, kind: str, since: int
    ) -> None:
        if since < self.oldest:
            status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
            event = {"type": "ERROR", "object": status}
            head = h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")])
            await tls.send_all(link.send(head) or b"")
            await self._chunk(tls, link, json.dumps(event).encode() + b"\n")
            return
        head = h11.Response(status_code=200, headers=[("Transfer-Encoding", "chunked")])
        await tls.send_all(link.send(head) or b"")
        with trio.CancelScope() as scope:
            self._watches.add(scope)
            while True:
                stirred = self._stirred
                for version, event, of, body in list(self.history):
                    if of == kind and version > since:
                        since = version
                        line = json.dumps({"type": event, "object": body}).encode() + b"\n"
                        await self._chunk(tls, link, line)
                raw = self._raw.get(kind)
                while raw:
                    await self._chunk(tls, link, raw.pop(0))
                await stirred.wait()
        self._watches.discard(scope)

    @staticmethod
    async def _chunk(
        tls: trio.SSLStream[trio.SocketStream], link: h11.Connection, data: bytes
    ) -> None:
        await tls.send_all(link.send(h11.Data(data=data)) or b"")

    @staticmethod
    async def _send(
        tls: trio.SSLStream[trio.SocketStream],
        link: h11.Connection,
        status: int,
        answer: Any,
        cut: int | None = None,
    ) -> None:
        body = json.dumps(answer).encode()
        headers = [("Content-Length", str(len(body)))]
        data = link.send(h11.Response(status_code=status, headers=headers)) or b""
        data += link.send(h11.Data(data=body)) or b""
        await tls.send_all(data if cut is None else data[:cut])


def certificates(folder: Path) -> tuple[bytes, ssl.SSLContext]:
    """A CA of the test's own, and a server's context for 127.0.0.1 under it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test api server")])
    now = dt.datetime.now(dt.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = cert.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.pem").write_bytes(pem + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return pem, context


@asynccontextmanager
async def running(folder: Path, port: int = 0) -> AsyncIterator[ApiServer]:
    """One that listens; everything of it ends with the block."""
    server = ApiServer(*certificates(folder))
    async with serving(server, port):
        yield server


@asynccontextmanager
async def serving(server: ApiServer, port: int = 0) -> AsyncIterator[None]:
    """It listens for the time of the block, and hangs up on all at its end."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
        server.port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        yield
        nursery.cancel_scope.cancel()

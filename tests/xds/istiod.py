"""A control plane for tests: istiod's two gRPC services over TLS, as scripts see fit to misbehave.

It keeps resources by type and pushes what changed to every stream, as istiod
does; what a script wants said out of order it says itself. Its CA is the
project's own, so certificates that it signs are real.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.core import ca
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION
from meshbpf.agent.runtime.control_plane import ControlPlane
from meshbpf.agent.wire import istio_ca, xds
from meshbpf.agent.wire.pb import citadel_pb2, discovery_pb2
from tests.unit.runtime.grpc_server import Connection, ServerCall

NAME = "istiod.istio-system.svc"
TOKEN = "first-token"
VALIDITY = timedelta(hours=1)


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True, eq=False)
class Stream:
    """One delta stream, from the server's side."""

    call: ServerCall
    requests: list[discovery_pb2.DeltaDiscoveryRequest] = field(default_factory=list)
    nonces: int = 0
    _read: int = 0

    async def request(self) -> discovery_pb2.DeltaDiscoveryRequest:
        """The next one; the client's end of the stream raises EndOfChannel."""
        body = self.call.body
        while True:
            if len(body) >= self._read + 5:
                size = int.from_bytes(body[self._read + 1 : self._read + 5], "big")
                end = self._read + 5 + size
                if len(body) >= end:
                    data = bytes(body[self._read + 5 : end])
                    self._read = end
                    found = discovery_pb2.DeltaDiscoveryRequest.FromString(data)
                    self.requests.append(found)
                    return found
            if self.call.complete or self.call.reset_code is not None:
                raise trio.EndOfChannel
            await self.call.wait()

    async def push(
        self,
        type_url: str,
        resources: dict[str, bytes] | None = None,
        removed: tuple[str, ...] = (),
        *,
        version: str = "1",
    ) -> str:
        """Say it; gives the nonce."""
        self.nonces += 1
        message = discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url, nonce=f"n{self.nonces}", removed_resources=removed
        )
        for name, payload in (resources or {}).items():
            one = message.resources.add(name=name, version=version)
            one.resource.type_url = type_url
            one.resource.value = payload
        await self.call.send(message.SerializeToString())
        return message.nonce


@dataclass(slots=True, eq=False)
class Istiod:
    """The server's state, which tests change as they go."""

    directory: Path
    authority: ca.CertificateAuthority
    port: int = 0
    tokens: set[str] = field(default_factory=lambda: {TOKEN})
    accounts: dict[str, str] = field(default_factory=dict)
    """Tokens of workloads that ask for themselves: their identities."""
    resources: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {ADDRESS: {}, AUTHORIZATION: {}}
    )
    versions: dict[str, int] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)
    connections: list[Connection] = field(default_factory=list)
    script: Callable[[Stream], object] | None = None
    """Instead of what istiod would do; an async function of the stream."""
    roots_pem: bytes = b""
    validity: timedelta = VALIDITY
    asked: list[str] = field(default_factory=list)
    """Identities, in the order in which certificates were asked for."""
    signing_takes_s: float = 0.0
    now: Callable[[], datetime] = utc_now
    opened: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)
    _dirty: dict[Stream, set[tuple[str, str]]] = field(default_factory=dict)

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    @property
    def root_file(self) -> Path:
        return self.directory / "root.pem"

    def plane(self, **changes: object) -> ControlPlane:
        settings: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "root": str(self.root_file),
            "name": NAME,
            "token": self.token_file,
            "cluster_id": "Kubernetes",
        }
        return ControlPlane(**{**settings, **changes})  # type: ignore[arg-type]

    def put(self, type_url: str, name: str, payload: bytes) -> None:
        """Create or change a resource; streams hear of it."""
        self.resources[type_url][name] = payload
        self.versions[name] = self.versions.get(name, 0) + 1
        self._tell(type_url, name)

    def drop(self, type_url: str, name: str) -> None:
        """Delete a resource; streams hear of it."""
        self.resources[type_url].pop(name, None)
        self._tell(type_url, name)

    def _tell(self, type_url: str, name: str) -> None:
        for dirty in self._dirty.values():
            dirty.add((type_url, name))
        self.changed.set()
        self.changed = trio.Event()

    # -- what istiod does

    async def discovery(self, call: ServerCall) -> None:
        if not await self._admitted(call):
            return
        stream = Stream(call)
        self.streams.append(stream)
        self.opened.set()
        self.opened = trio.Event()
        await call.start()
        if self.script is not None:
            await self.script(stream)  # type: ignore[misc]
            return
        self._dirty[stream] = set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, stream)
                while True:
                    try:
                        request = await stream.request()
                    except trio.EndOfChannel:
                        nursery.cancel_scope.cancel()
                        return
                    if request.node.id and not request.response_nonce:
                        await self._first(stream, request)
        finally:
            del self._dirty[stream]

    async def _first(self, stream: Stream, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        held = dict(request.initial_resource_versions)
        all_of_it = self.resources[request.type_url]
        changed = {
            name: payload
            for name, payload in all_of_it.items()
            if held.get(name) != str(self.versions.get(name, 1))
        }
        gone = tuple(name for name in held if name not in all_of_it)
        await self._push(stream, request.type_url, changed, gone)

    async def _push(
        self, stream: Stream, type_url: str, changed: dict[str, bytes], gone: tuple[str, ...]
    ) -> None:
        stream.nonces += 1
        message = discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url, nonce=f"n{stream.nonces}", removed_resources=gone
        )
        for name, payload in changed.items():
            one = message.resources.add(name=name, version=str(self.versions.get(name, 1)))
            one.resource.type_url = type_url
            one.resource.value = payload
        await stream.call.send(message.SerializeToString())

    async def _follow(self, stream: Stream) -> None:
        while True:
            told = self.changed
            dirty, self._dirty[stream] = self._dirty[stream], set()
            for url in (ADDRESS, AUTHORIZATION):
                names = [name for of, name in dirty if of == url]
                if names:
                    known = self.resources[url]
                    changed = {name: known[name] for name in names if name in known}
                    gone = tuple(name for name in names if name not in known)
                    await self._push(stream, url, changed, gone)
            if not self._dirty[stream]:
                await told.wait()

    async def certificate(self, call: ServerCall) -> None:
        if not await self._admitted(call):
            return
        request = citadel_pb2.IstioCertificateRequest.FromString(await call.request())
        # Of a node agent the identity that it acts for, of others their token's own.
        token = call.headers["authorization"].removeprefix("Bearer ")
        identity = self.accounts.get(token) or request.metadata["ImpersonatedIdentity"]
        assert token not in self.accounts or not request.HasField("metadata")
        self.asked.append(identity)
        await trio.sleep(self.signing_takes_s)
        csr = x509.load_pem_x509_csr(request.csr.encode())
        assert csr.is_signature_valid
        san = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert san.critical
        wanted = san.value.get_values_for_type(x509.UniformResourceIdentifier)
        if wanted != [identity]:
            await _refuse(call, 7, "CSR is for another identity")
            return
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        now = self.now()
        validity = min(self.validity, timedelta(seconds=request.validity_duration))
        chain = self.authority.issue(
            SpiffeId.parse(identity), key, now - timedelta(minutes=1), now + validity
        )
        parts = [
            one.public_bytes(serialization.Encoding.PEM).decode()
            for one in x509.load_pem_x509_certificates(chain)
        ]
        parts.append((self.roots_pem or self.authority.roots_pem).decode())
        await call.answer(
            citadel_pb2.IstioCertificateResponse(cert_chain=parts).SerializeToString()
        )

    async def _admitted(self, call: ServerCall) -> bool:
        token = call.headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.tokens and call.headers.get("clusterid") == "Kubernetes":
            return True
        await _refuse(call, 16, "authentication failure")
        return False

    def hang_up(self) -> None:
        """Cut every connection, as a process that is killed does."""
        for connection in self.connections:
            connection.stream.transport_stream.socket.close()  # type: ignore[attr-defined]
        self.connections.clear()


def server_certificate(authority: ca.CertificateAuthority, directory: Path) -> ssl.SSLContext:
    """TLS for istiod's name, under the authority's root."""
    key = ca.new_key()
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=True)
    )
    signer = serialization.load_pem_private_key(authority.key_pem, None)
    certificate = builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    file = directory / "server.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    context.set_alpn_protocols(["h2"])
    return context


async def _refuse(call: ServerCall, status: int, message: str) -> None:
    """Without headers before: a response of trailers alone."""
    await call.end(
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", str(status)),
        ("grpc-message", message),
    )


@asynccontextmanager
async def serving(
    directory: Path, *, host: str = "127.0.0.1", port: int = 0, istiod: Istiod | None = None
) -> AsyncIterator[Istiod]:
    """Serve; with an earlier `istiod`, the same one again on its port."""
    if istiod is None:
        authority = ca.create("cluster.local", datetime.now(UTC))
        istiod = Istiod(directory, authority)
        istiod.token_file.write_text(TOKEN + "\n")
        istiod.root_file.write_bytes(authority.roots_pem)
    context = server_certificate(istiod.authority, directory)
    (listener,) = await trio.open_tcp_listeners(istiod.port or port, host=host)
    istiod.port = listener.socket.getsockname()[1]
    handlers = {xds.METHOD: istiod.discovery, istio_ca.METHOD: istiod.certificate}

    async def take(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, context, server_side=True, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(stream)
            return
        connection = Connection(stream, handlers, {})
        istiod.connections.append(connection)
        try:
            await connection.serve()
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, take, [listener])
        yield istiod
        nursery.cancel_scope.cancel()

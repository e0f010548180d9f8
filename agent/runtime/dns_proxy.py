"""The DNS proxy of one pod: answers for the names of the mesh, and passes the rest on.

A query arrives with the resolver that the pod asked as its destination, as a
captured connection arrives with its original one. So there is no resolver to
configure: what the mesh does not know goes to that very resolver, from inside
the pod's own network namespace, and its answer goes back as it came. The pod's
resolv.conf, its search list and its choice among several servers stay in force.

By UDP, answers are sent from a socket that is bound to the resolver's address:
a client's connected socket takes nothing from anybody else. Limits: so many
queries of a pod wait for a resolver at a time (further ones are dropped, which
the client repeats), and so many resolvers' reply sockets are kept.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import OrderedDict

import trio

from meshbpf.agent.core.address import IPAddress, SocketAddress, parse_ip
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.names import TTL_S, Host, RecordType, host, service_port
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.dns_metrics import DnsMetrics, Transport
from meshbpf.agent.runtime.dns_upstream import ask_by_tcp, ask_by_udp
from meshbpf.agent.runtime.gate import Gate
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.mesh_view import MeshView, local_workload
from meshbpf.agent.runtime.sockets import DialError
from meshbpf.agent.wire import dns

MAX_WAITING = 256
"""Queries of one pod that wait for a resolver; a descriptor each."""
MAX_REPLY_SOCKETS = 8
IDLE_S = 10.0
"""How long a client's TCP connection may say nothing."""
_BATCH = 64
_ANCILLARY_BYTES = socket.CMSG_SPACE(28)  # struct sockaddr_in6

log = Log("dns")


class DnsProxy:
    """Serves the sockets of one pod; see the module."""

    def __init__(
        self,
        pod: LocalPod,
        mesh: MeshView,
        metrics: DnsMetrics,
        nursery: trio.Nursery,
        *,
        domain: str,
        rng: random.Random,
        gate: Gate,
    ) -> None:
        self._gate = gate
        self._pod = pod
        self._mesh = mesh
        self._metrics = metrics
        self._nursery = nursery
        self._domain = domain
        self._rng = rng
        self._waiting = 0
        self._replies: OrderedDict[SocketAddress, socket.socket] = OrderedDict()

    async def serve_udp(self, sock: socket.socket) -> None:
        """Answer datagrams until cancelled."""
        sock.setblocking(False)
        try:
            while True:
                await self._gate.wait_readable(sock)
                for _ in range(_BATCH):
                    try:
                        query, ancillary, _flags, sender = sock.recvmsg(
                            dns.MAX_MESSAGE_BYTES, _ANCILLARY_BYTES
                        )
                    except BlockingIOError:
                        break
                    resolver = _original_destination(ancillary)
                    if resolver is None:
                        continue
                    client = SocketAddress.from_sockaddr(sender)
                    answer = self._at_once(query)
                    if answer is not None:
                        self._send(answer, resolver, client)
                    elif self._waiting >= MAX_WAITING:
                        self._metrics.dropped += 1
                    else:
                        self._waiting += 1  # here, since the task starts after the batch
                        self._nursery.start_soon(self._answer_udp, query, resolver, client)
        finally:
            while self._replies:
                self._replies.popitem()[1].close()

    async def serve_tcp(self, client: socket.socket) -> None:
        """Answer one captured connection's queries, and close it."""
        with client:
            resolver = self._pod.original(client)
            if resolver.ip.is_loopback:
                raise DialError("not-captured", "somebody dialed the DNS listener itself")
            buffer = bytearray()
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            while True:
                with trio.move_on_after(IDLE_S) as idle:
                    data = await stream.receive_some()
                if idle.cancelled_caught or not data:
                    return
                buffer += data
                for query in dns.split_stream(buffer):
                    answer = await self._answer(query, resolver, Transport.TCP)
                    with trio.fail_after(IDLE_S):
                        await stream.send_all(dns.framed(answer))

    # --- answers --------------------------------------------------------------

    def _at_once(self, query: bytes) -> bytes | None:
        """The answer by UDP that needs no waiting: most of those that the mesh has."""
        workload = self._pod.workload(self._mesh())
        question = dns.read_question(query)
        if workload is None or question is None:
            return None
        return self._from_mesh(question, workload, Transport.UDP)

    async def _answer_udp(
        self, query: bytes, resolver: SocketAddress, client: SocketAddress
    ) -> None:
        try:
            answer = await self._answer(query, resolver, Transport.UDP)
        except (MeshbpfError, OSError) as error:
            log.debug("no answer", error=error, resolver=resolver)
            return
        finally:
            self._waiting -= 1
        self._send(answer, resolver, client)

    async def _answer(self, query: bytes, resolver: SocketAddress, transport: Transport) -> bytes:
        """From the mesh or the resolver. Raises DialError for what no answer can be made of."""
        question = dns.read_question(query)
        try:
            workload = await local_workload(self._pod, self._mesh)
        except MeshbpfError:
            if question is None:
                raise
            self._metrics.asked(None, question.type, transport)
            return dns.answer(question, status=dns.Status.SERVER_FAILURE)
        if question is not None:
            answer = self._from_mesh(question, workload, transport)
            if answer is not None:
                return answer
        kind = 0 if question is None else question.type
        self._metrics.asked(workload, kind, transport)
        ask = ask_by_udp if transport is Transport.UDP else ask_by_tcp
        with self._metrics.forwarded(workload, kind, transport) as outcome:
            try:
                answer = await ask(self._pod.sockets, self._pod.resolver or resolver, query)
            except (DialError, OSError) as error:
                outcome.failed()
                self._told(workload, question, f"forwarding failed ({_why(error)})", 0)
                if question is None:
                    raise
                return dns.answer(question, status=dns.Status.SERVER_FAILURE)
        self._told(workload, question, "forwarded", 0)
        return answer

    def _from_mesh(
        self, question: dns.Question, workload: Workload, transport: Transport
    ) -> bytes | None:
        limit = question.udp_size if transport is Transport.UDP else dns.MAX_MESSAGE_BYTES
        if question.type == RecordType.SRV:
            target = service_port(self._mesh(), workload, question.name, domain=self._domain)
            if target is None:
                return None
            self._metrics.asked(workload, question.type, transport)
            self._told(workload, question, "success", 1)
            return dns.answer(question, [dns.Service(*target)], ttl_s=TTL_S, limit=limit)
        if question.type not in (RecordType.A, RecordType.AAAA):
            return None
        found = host(
            self._mesh(), workload, question.name, RecordType(question.type), domain=self._domain
        )
        if found is None:
            return None
        self._metrics.asked(workload, question.type, transport)
        return self._answer_of(found, question, workload, limit)

    def _answer_of(
        self, found: Host, question: dns.Question, workload: Workload, limit: int
    ) -> bytes:
        addresses: list[IPAddress] = list(found.addresses)
        self._rng.shuffle(addresses)
        told = "success" if addresses else "no records"
        self._told(workload, question, told, len(addresses))
        canonical = found.canonical if addresses else None
        return dns.answer(question, addresses, canonical=canonical, ttl_s=TTL_S, limit=limit)

    def _told(
        self, workload: Workload, question: dns.Question | None, result: str, count: int
    ) -> None:
        if not log.tells_debug():
            return
        fields: dict[str, object] = {
            "src.workload": workload.name,
            "src.namespace": workload.namespace,
        }
        if question is not None:
            fields |= {"query": _type_text(question.type), "domain": question.name}
        log.debug("", **fields, result=result, endpoints=count)

    # --- replies --------------------------------------------------------------

    def _send(self, answer: bytes, resolver: SocketAddress, client: SocketAddress) -> None:
        try:
            self._reply_socket(resolver).sendto(answer, (str(client.ip), client.port))
        except OSError as error:  # a full buffer too: the client asks again
            self._metrics.dropped += 1
            log.debug("answer not sent", error=error, client=client)

    def _reply_socket(self, resolver: SocketAddress) -> socket.socket:
        sock = self._replies.get(resolver)
        if sock is None:
            sock = self._replies[resolver] = self._pod.sockets.dns_reply(resolver)
            if len(self._replies) > MAX_REPLY_SOCKETS:
                self._replies.popitem(last=False)[1].close()
        else:
            self._replies.move_to_end(resolver)
        return sock


def _original_destination(ancillary: list[tuple[int, int, bytes]]) -> SocketAddress | None:
    """From IP_ORIGDSTADDR or IPV6_ORIGDSTADDR: a struct sockaddr_in or sockaddr_in6."""
    for level, _kind, data in ancillary:
        family, address = (
            (socket.AF_INET, data[4:8])
            if level == socket.IPPROTO_IP
            else (socket.AF_INET6, data[8:24])
        )
        (port,) = struct.unpack_from("!H", data, 2)
        return SocketAddress(parse_ip(socket.inet_ntop(family, address)), port)
    return None


def _why(error: DialError | OSError) -> str:
    return error.what if isinstance(error, DialError) else str(error.strerror)


def _type_text(kind: int) -> str:
    try:
        return RecordType(kind).name
    except ValueError:
        return f"TYPE{kind}"  # RFC 3597

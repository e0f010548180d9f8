"""An HTTP server that says what it was asked: the backend of the waypoint's tests.

    python -m tests.progs.web --name NAME [--port 8080] [--h2 7070] [--tcp 9090]

HTTP/1.1 on one port, HTTP/2 and gRPC (any unary method) on another, an opaque
port that says its name and echoes. The answer is JSON: name, method, path,
host, headers. A path may ask for more: `/status/503`, `/delay/0.5`,
`/bytes/100000`, `/reset` (after half a body), `/bad` (no HTTP), `/ws`.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from typing import Any

import h2.config
import h2.connection
import h2.events
import h11
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, Request

NAME = ""
_ASKS = re.compile(r"/(status|delay|bytes)/([0-9.]+)")
_seen: dict[str, int] = {}
_lock = threading.Lock()


def answer(method: str, target: str, host: str, headers: list[tuple[str, str]]) -> dict[str, Any]:
    with _lock:
        count = _seen[target] = _seen.get(target, 0) + 1
    fields: dict[str, list[str]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value)
    return {
        "name": NAME,
        "method": method,
        "path": target,
        "host": host,
        "headers": fields,
        "count": count,
    }


def listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    sock.listen(256)
    return sock


def serve(port: int, handle: Any) -> None:
    sock = listen(port)

    def accept() -> None:
        while True:
            conn, _ = sock.accept()
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=guarded, args=(handle, conn), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def guarded(handle: Any, conn: socket.socket) -> None:
    with conn:
        try:
            handle(conn)
        except (OSError, h11.ProtocolError) as error:
            print(json.dumps({"event": "broken", "error": str(error)}), flush=True)


# --- HTTP/1.1 -------------------------------------------------------------------


def http1(conn: socket.socket) -> None:
    http = h11.Connection(h11.SERVER)
    while True:
        head, body = None, b""
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                if http.they_are_waiting_for_100_continue:
                    go_on = h11.InformationalResponse(status_code=100, headers=[])
                    conn.sendall(http.send(go_on) or b"")
                http.receive_data(conn.recv(65536))
            elif isinstance(event, h11.Request):
                head = event
                if head.target == b"/ws":
                    websocket(conn, http.trailing_data[0], head)
                    return
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return
        assert head is not None
        if not one(conn, http, head, body) or http.our_state is not h11.DONE:
            return
        http.start_next_cycle()


def one(conn: socket.socket, http: h11.Connection, head: h11.Request, body: bytes) -> bool:
    target = head.target.decode()
    fields = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
    host = next((value for name, value in fields if name == "host"), "")
    said = answer(head.method.decode(), target, host, fields) | {"body": len(body)}
    status, payload = 200, json.dumps(said).encode()
    asked = _ASKS.match(target)
    if asked:
        match asked[1]:
            case "status":
                status = int(asked[2])
            case "delay":
                time.sleep(float(asked[2]))
            case "bytes":
                payload = b"x" * int(asked[2])
    if target == "/bad":
        conn.sendall(b"what is this\r\n\r\n")
        return False
    headers = [("content-length", str(len(payload))), ("x-served-by", NAME)]
    conn.sendall(http.send(h11.Response(status_code=status, headers=headers)) or b"")
    if target == "/reset":
        conn.sendall(payload[: len(payload) // 2])
        time.sleep(0.05)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False
    if head.method == b"HEAD":
        payload = b""
    conn.sendall(http.send(h11.Data(data=payload)) or b"")
    conn.sendall(http.send(h11.EndOfMessage()) or b"")
    return True


def websocket(conn: socket.socket, rest: bytes, head: h11.Request) -> None:
    """Echo messages, each behind the server's name."""
    ws = WSConnection(ConnectionType.SERVER)
    lines = [b"GET /ws HTTP/1.1"] + [b"%b: %b" % each for each in head.headers]
    ws.receive_data(b"\r\n".join(lines) + b"\r\n\r\n")
    data = rest
    while True:
        for event in ws.events():
            if isinstance(event, Request):
                conn.sendall(ws.send(AcceptConnection()))
            elif isinstance(event, Message):
                conn.sendall(ws.send(Message(data=f"{NAME}: {event.data!s}")))
            elif isinstance(event, CloseConnection):
                conn.sendall(ws.send(event.response()))
                return
        if not data:
            data = conn.recv(65536)
            if not data:
                return
        ws.receive_data(data)
        data = b""


# --- HTTP/2, gRPC ---------------------------------------------------------------


def http2(conn: socket.socket) -> None:
    machine = h2.connection.H2Connection(
        h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
    )
    machine.initiate_connection()
    conn.sendall(machine.data_to_send())
    heads: dict[int, dict[str, str]] = {}
    lists: dict[int, list[tuple[str, str]]] = {}
    sizes: Counter[int] = Counter()
    while data := conn.recv(65536):
        for event in machine.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                assert event.stream_id is not None
                pairs = [(str(n), str(v)) for n, v in event.headers or []]
                heads[event.stream_id] = dict(pairs)
                lists[event.stream_id] = [each for each in pairs if not each[0].startswith(":")]
            elif isinstance(event, h2.events.DataReceived):
                sizes[event.stream_id or 0] += len(event.data or b"")
                machine.acknowledge_received_data(
                    event.flow_controlled_length or 0, event.stream_id or 0
                )
            elif isinstance(event, h2.events.StreamEnded):
                stream = event.stream_id or 0
                reply2(machine, stream, heads, lists, sizes.pop(stream, 0))
        conn.sendall(machine.data_to_send())


def reply2(machine: Any, stream: int, heads: Any, lists: Any, size: int) -> None:
    head = heads.pop(stream)
    said = answer(head[":method"], head[":path"], head.get(":authority", ""), lists.pop(stream))
    payload = json.dumps(said | {"received_bytes": size}).encode()
    if head.get("content-type", "").startswith("application/grpc"):
        machine.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        machine.send_data(stream, b"\0" + struct.pack(">I", len(payload)) + payload)
        machine.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        return
    machine.send_headers(stream, [(":status", "200"), ("x-served-by", NAME)])
    machine.send_data(stream, payload, end_stream=True)


# --- opaque ---------------------------------------------------------------------


def opaque(conn: socket.socket) -> None:
    conn.sendall(f"{NAME}\n".encode())
    while data := conn.recv(65536):
        conn.sendall(data)


def main() -> None:
    global NAME
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--h2", type=int, default=7070)
    parser.add_argument("--tcp", type=int, default=9090)
    options = parser.parse_args()
    NAME = options.name
    serve(options.port, http1)
    serve(options.h2, http2)
    serve(options.tcp, opaque)
    print(json.dumps({"event": "ready", "name": NAME}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())

"""What stands outside the mesh and is asked by a waypoint: authorizer, key server, collector.

    python -m tests.progs.outside --jwks FILE [--http 8000] [--grpc 9000]

HTTP gives the file at `/jwks` (also by way of `/away`, a redirect). gRPC (by
grpcio, which is not ours) is Envoy's ext_authz service, which refuses a path
that ends in `/no`, and of opaque connections those of the namespace `consumer`;
and an OpenTelemetry collector, which says what it got.
"""

from __future__ import annotations

import argparse
import http.server
import json
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from meshbpf.agent.wire.pb import ext_authz_pb2, otlp_pb2


def say(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def check(request: ext_authz_pb2.CheckRequest, _: Any) -> ext_authz_pb2.CheckResponse:
    asked = request.attributes.request.http
    principal = request.attributes.source.principal
    say("check", path=asked.path, principal=principal)
    answer = ext_authz_pb2.CheckResponse()
    if not asked.path:
        if "/ns/consumer/" in principal:
            answer.status.code = grpc.StatusCode.PERMISSION_DENIED.value[0]
    elif asked.path.endswith("/no"):
        answer.status.code = grpc.StatusCode.PERMISSION_DENIED.value[0]
        answer.denied_response.status.code = 402
        answer.denied_response.body = "pay first"
    else:
        option = answer.ok_response.headers.add()
        option.header.key, option.header.value = "x-checked", asked.method
        option = answer.ok_response.response_headers_to_add.add()
        option.header.key, option.header.value = "x-by", "authorizer"
    return answer


def export(request: otlp_pb2.ExportTraceServiceRequest, _: Any) -> Any:
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                tags = {each.key: each.value.string_value for each in span.attributes}
                ids = {"trace": span.trace_id.hex(), "parent": span.parent_span_id.hex()}
                say("span", name=span.name, tags=tags, **ids)
    return otlp_pb2.ExportTraceServiceResponse()


def serve_grpc(port: int) -> grpc.Server:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    for service, method, handle, kind in (
        ("envoy.service.auth.v3.Authorization", "Check", check, ext_authz_pb2.CheckRequest),
        (
            "opentelemetry.proto.collector.trace.v1.TraceService",
            "Export",
            export,
            otlp_pb2.ExportTraceServiceRequest,
        ),
    ):
        handler = grpc.unary_unary_rpc_method_handler(
            handle,
            request_deserializer=kind.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        made = grpc.method_handlers_generic_handler(service, {method: handler})
        server.add_generic_rpc_handlers((made,))
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    return server


class Keys(http.server.BaseHTTPRequestHandler):
    file: Path

    def do_GET(self) -> None:
        say("get", path=self.path)
        if self.path == "/away":
            self.send_response(302)
            self.send_header("location", "/jwks")
            self.end_headers()
            return
        body = self.file.read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jwks", type=Path, required=True)
    parser.add_argument("--http", type=int, default=8000)
    parser.add_argument("--grpc", type=int, default=9000)
    options = parser.parse_args()
    Keys.file = options.jwks
    server = http.server.ThreadingHTTPServer(("0.0.0.0", options.http), Keys)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rpc = serve_grpc(options.grpc)
    say("ready")
    rpc.wait_for_termination()


if __name__ == "__main__":
    main()

"""The functions that a guest may call, by the names it imports them under.

Each takes unsigned integers and answers a Status. What this proxy does not
have (gRPC calls of plugins, shared queues, foreign functions) answers
UNIMPLEMENTED, which the SDKs turn into an error of the plugin's own code.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.wasm.abi import (
    LEVELS,
    BufferType,
    MetricType,
    Status,
    decode_pairs,
    encode_pairs,
)
from meshbpf.agent.l7.wasm.fastcall import GuestMemoryError, HostFunction
from meshbpf.agent.l7.wasm.properties import encode, property_of
from meshbpf.agent.l7.wasm.shared import PluginMetrics, SharedData
from meshbpf.agent.l7.wasm.streams import Context, Dispatched, FieldMap, field_map

MAX_DISPATCHED = 16
"""Calls that one context may have under way."""
_MAX_PROPERTIES = 64
_MAX_REPLY_BYTES = 1024 * 1024


class Guest(Protocol):
    """What host functions need of the machine that calls them."""

    def read(self, address: int, size: int) -> bytes:
        """Guest memory."""

    def write(self, address: int, data: bytes) -> None:
        """Change guest memory."""

    def allocate(self, data: bytes) -> int:
        """A copy of `data` in memory that the guest frees."""


class Host:
    """The state that host functions work on: one for each virtual machine.

    `guest` is set by the machine before it runs anything.
    """

    guest: Guest

    def __init__(
        self,
        *,
        name: str,
        root_id: str,
        configuration: bytes,
        vm_configuration: bytes,
        shared: SharedData,
        metrics: PluginMetrics,
        now_ns: Callable[[], int],
        log: Callable[[str, str], None],
    ) -> None:
        self.root = Context(1)
        self.contexts: dict[int, Context] = {}
        self.effective: Context = self.root
        self.tick_period_s = 0.0
        self.done_called = False
        self._names = {"plugin_name": name, "plugin_root_id": root_id, "plugin_vm_id": ""}
        self._configuration = configuration
        self._vm_configuration = vm_configuration
        self._shared = shared
        self._metrics = metrics
        self._now_ns = now_ns
        self._log = log
        self._token = 0

    def functions(self) -> dict[str, HostFunction]:
        """By import name."""
        return {
            f"proxy_{name[4:]}": _guarded(getattr(self, name))
            for name in dir(self)
            if name.startswith("_fn_")
        }

    # --- answers in guest memory

    def _give(self, data: bytes, pointer_at: int, size_at: int) -> int:
        address = self.guest.allocate(data) if data else 0
        self.guest.write(pointer_at, struct.pack("<I", address))
        self.guest.write(size_at, struct.pack("<I", len(data)))
        return Status.OK

    def _text(self, address: int, size: int) -> str:
        return self.guest.read(address, size).decode("utf-8", "replace")

    # --- logging, time

    def _fn_log(self, level: int, address: int, size: int) -> int:
        if level >= len(LEVELS):
            return Status.BAD_ARGUMENT
        self._log(LEVELS[level], self._text(address, size))
        return Status.OK

    def _fn_get_log_level(self, at: int) -> int:
        self.guest.write(at, struct.pack("<I", 2))  # info
        return Status.OK

    def _fn_get_current_time_nanoseconds(self, at: int) -> int:
        self.guest.write(at, struct.pack("<Q", self._now_ns()))
        return Status.OK

    def _fn_set_tick_period_milliseconds(self, period_ms: int) -> int:
        self.tick_period_s = period_ms / 1000
        return Status.OK

    # --- header maps

    def _map(self, kind: int) -> FieldMap | None:
        return field_map(self.effective, kind)

    def _fn_get_header_map_size(self, kind: int, at: int) -> int:
        found = self._map(kind)
        if found is None:
            return Status.BAD_ARGUMENT
        self.guest.write(at, struct.pack("<I", len(encode_pairs(found.pairs()))))
        return Status.OK

    def _fn_get_header_map_pairs(self, kind: int, pointer_at: int, size_at: int) -> int:
        found = self._map(kind)
        if found is None:
            return Status.BAD_ARGUMENT
        return self._give(encode_pairs(found.pairs()), pointer_at, size_at)

    def _fn_set_header_map_pairs(self, kind: int, address: int, size: int) -> int:
        found = self._map(kind)
        pairs = decode_pairs(self.guest.read(address, size))
        if found is None or not found.replace_all(pairs):
            return Status.BAD_ARGUMENT
        return Status.OK

    def _fn_get_header_map_value(
        self, kind: int, key: int, key_size: int, pointer_at: int, size_at: int
    ) -> int:
        found = self._map(kind)
        if found is None:
            return Status.BAD_ARGUMENT
        value = found.value(self.guest.read(key, key_size))
        return Status.NOT_FOUND if value is None else self._give(value, pointer_at, size_at)

    def _fn_add_header_map_value(
        self, kind: int, key: int, key_size: int, value: int, value_size: int
    ) -> int:
        found = self._map(kind)
        if found is None or not found.add(
            self.guest.read(key, key_size), self.guest.read(value, value_size)
        ):
            return Status.BAD_ARGUMENT
        return Status.OK

    def _fn_replace_header_map_value(
        self, kind: int, key: int, key_size: int, value: int, value_size: int
    ) -> int:
        found = self._map(kind)
        if found is None or not found.replace(
            self.guest.read(key, key_size), self.guest.read(value, value_size)
        ):
            return Status.BAD_ARGUMENT
        return Status.OK

    def _fn_remove_header_map_value(self, kind: int, key: int, key_size: int) -> int:
        found = self._map(kind)
        if found is None:
            return Status.BAD_ARGUMENT
        found.remove(self.guest.read(key, key_size))
        return Status.OK

    # --- buffers

    def _buffer(self, kind: int) -> bytes | None:
        context = self.effective
        match kind:
            case BufferType.REQUEST_BODY if not context.in_response:
                return context.body
            case BufferType.RESPONSE_BODY if context.in_response:
                return context.body
            case BufferType.CALL_RESPONSE_BODY if context.answer is not None:
                return context.answer.body
            case BufferType.VM_CONFIGURATION:
                return self._vm_configuration
            case BufferType.PLUGIN_CONFIGURATION:
                return self._configuration
        return None

    def _fn_get_buffer_bytes(
        self, kind: int, start: int, size: int, pointer_at: int, size_at: int
    ) -> int:
        found = self._buffer(kind)
        if found is None:
            return Status.NOT_FOUND
        return self._give(found[start : start + size], pointer_at, size_at)

    def _fn_get_buffer_status(self, kind: int, size_at: int, flags_at: int) -> int:
        found = self._buffer(kind)
        if found is None:
            return Status.NOT_FOUND
        self.guest.write(size_at, struct.pack("<I", len(found)))
        self.guest.write(flags_at, struct.pack("<I", 0))
        return Status.OK

    def _fn_set_buffer_bytes(
        self, kind: int, start: int, size: int, address: int, length: int
    ) -> int:
        if kind not in (BufferType.REQUEST_BODY, BufferType.RESPONSE_BODY):
            return Status.BAD_ARGUMENT
        found = self._buffer(kind)
        if found is None:
            return Status.NOT_FOUND
        context = self.effective
        context.body = found[:start] + self.guest.read(address, length) + found[start + size :]
        context.body_changed = True
        return Status.OK

    # --- the stream

    def _fn_continue_stream(self, _kind: int) -> int:
        self.effective.resumed = True
        return Status.OK

    def _fn_continue_request(self) -> int:
        return self._fn_continue_stream(0)

    def _fn_continue_response(self) -> int:
        return self._fn_continue_stream(1)

    def _fn_close_stream(self, _kind: int) -> int:
        self.effective.reply = Reply(503, detail="wasm_close_stream")
        return Status.OK

    def _fn_send_local_response(
        self,
        status: int,
        detail: int,
        detail_size: int,
        body: int,
        body_size: int,
        headers: int,
        headers_size: int,
        _grpc_status: int,
    ) -> int:
        if not 200 <= status <= 599 or body_size > _MAX_REPLY_BYTES:
            return Status.BAD_ARGUMENT
        pairs = decode_pairs(self.guest.read(headers, headers_size)) if headers_size else []
        fields = FieldMap(Headers())
        if not all(name.startswith(b":") or fields.add(name, value) for name, value in pairs):
            return Status.BAD_ARGUMENT
        self.effective.reply = Reply(
            status,
            self.guest.read(body, body_size),
            tuple(fields.headers.items()),
            self._text(detail, detail_size) or "wasm_local_response",
        )
        return Status.OK

    def _fn_http_call(
        self,
        upstream: int,
        upstream_size: int,
        headers: int,
        headers_size: int,
        body: int,
        body_size: int,
        _trailers: int,
        _trailers_size: int,
        timeout_ms: int,
        token_at: int,
    ) -> int:
        context = self.effective
        if len(context.dispatched) >= MAX_DISPATCHED:
            return Status.INTERNAL_FAILURE
        pairs = decode_pairs(self.guest.read(headers, headers_size))
        pseudo = {name: value.decode("latin-1") for name, value in pairs if name[:1] == b":"}
        path, method = pseudo.get(b":path", ""), pseudo.get(b":method", "")
        authority = pseudo.get(b":authority", "")
        if not path.startswith("/") or not method or not authority:
            return Status.BAD_ARGUMENT
        fields = FieldMap(Headers())
        if not all(name[:1] == b":" or fields.add(name, value) for name, value in pairs):
            return Status.BAD_ARGUMENT
        self._token += 1
        head = RequestHead(method, path, authority, fields.headers)
        context.dispatched.append(
            Dispatched(
                self._token,
                self._text(upstream, upstream_size),
                head,
                self.guest.read(body, body_size),
                timeout_ms / 1000,
            )
        )
        self.guest.write(token_at, struct.pack("<I", self._token))
        return Status.OK

    def _fn_set_effective_context(self, number: int) -> int:
        found = self.root if number == self.root.id else self.contexts.get(number)
        if found is None:
            return Status.BAD_ARGUMENT
        self.effective = found
        return Status.OK

    def _fn_done(self) -> int:
        self.done_called = True
        return Status.OK

    # --- properties

    def _fn_get_property(self, path: int, path_size: int, pointer_at: int, size_at: int) -> int:
        raw = self.guest.read(path, path_size).rstrip(b"\0")
        found = self.effective.properties.get(raw)
        if found is None:
            steps = raw.decode("utf-8", "replace").split("\0")
            if len(steps) == 1 and steps[0] in self._names:
                found = encode(self._names[steps[0]])
            elif self.effective.exchange is not None:
                found = property_of(self.effective.exchange, steps)
        return Status.NOT_FOUND if found is None else self._give(found, pointer_at, size_at)

    def _fn_set_property(self, path: int, path_size: int, value: int, value_size: int) -> int:
        known = self.effective.properties
        raw = self.guest.read(path, path_size).rstrip(b"\0")
        if raw not in known and len(known) >= _MAX_PROPERTIES:
            return Status.INTERNAL_FAILURE
        known[raw] = self.guest.read(value, value_size)
        return Status.OK

    # --- shared data, metrics

    def _fn_get_shared_data(
        self, key: int, key_size: int, pointer_at: int, size_at: int, cas_at: int
    ) -> int:
        found = self._shared.get(self.guest.read(key, key_size))
        if found is None:
            return Status.NOT_FOUND
        self.guest.write(cas_at, struct.pack("<I", found[1]))
        return self._give(found[0], pointer_at, size_at)

    def _fn_set_shared_data(
        self, key: int, key_size: int, value: int, value_size: int, cas: int
    ) -> int:
        done = self._shared.set(
            self.guest.read(key, key_size), self.guest.read(value, value_size), cas
        )
        if done is None:
            return Status.INTERNAL_FAILURE
        return Status.OK if done else Status.CAS_MISMATCH

    def _fn_define_metric(self, kind: int, name: int, name_size: int, at: int) -> int:
        if kind not in tuple(MetricType):
            return Status.BAD_ARGUMENT
        number = self._metrics.define(MetricType(kind), self._text(name, name_size))
        if number is None:
            return Status.INTERNAL_FAILURE
        self.guest.write(at, struct.pack("<I", number))
        return Status.OK

    def _fn_increment_metric(self, number: int, offset: int) -> int:
        metric = self._metrics.at(number)
        offset = offset - (1 << 64) if offset >= 1 << 63 else offset
        if metric is None:
            return Status.NOT_FOUND
        if metric.kind is MetricType.HISTOGRAM or (
            metric.kind is MetricType.COUNTER and offset < 0
        ):
            return Status.BAD_ARGUMENT
        metric.value += offset
        return Status.OK

    def _fn_record_metric(self, number: int, value: int) -> int:
        metric = self._metrics.at(number)
        if metric is None:
            return Status.NOT_FOUND
        if metric.kind is MetricType.HISTOGRAM:
            metric.value += value
            metric.count += 1
        else:
            metric.value = value
        return Status.OK

    def _fn_get_metric(self, number: int, at: int) -> int:
        metric = self._metrics.at(number)
        if metric is None:
            return Status.NOT_FOUND
        self.guest.write(at, struct.pack("<Q", metric.value & 0xFFFF_FFFF_FFFF_FFFF))
        return Status.OK


def _guarded(function: Callable[..., int]) -> HostFunction:
    """A guest's bad pointer or bad map is the guest's to handle, not a fault of the machine."""

    def called(*values: int) -> int:
        try:
            return function(*values)
        except GuestMemoryError:
            return Status.INVALID_MEMORY_ACCESS
        except ValueError:
            return Status.SERIALIZATION_FAILURE

    return called

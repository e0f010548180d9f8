"""Proxy-wasm plugins written as WebAssembly text: no toolchain, and every call in sight."""

from __future__ import annotations

IMPORTS = """
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
  (import "env" "proxy_add_header_map_value"
    (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value"
    (func $replace (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_remove_header_map_value" (func $remove (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value"
    (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_pairs" (func $pairs (param i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" (func $bytes (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_buffer_bytes"
    (func $set_bytes (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_send_local_response"
    (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_http_call"
    (func $http_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
  (import "env" "proxy_get_property" (func $property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_shared_data" (func $share (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_shared_data" (func $shared (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_define_metric" (func $metric (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (import "env" "proxy_call_foreign_function"
    (func $foreign (param i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_tick_period_milliseconds" (func $tick (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
"""

# Memory up to 1024 is the tests' data, from 4096 on a bump allocator's.
PLUGIN = """
(module
  {imports}
  (memory (export "memory") 2)
  (global $top (mut i32) (i32.const 4096))
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (global.get $top)
    (global.set $top (i32.add (global.get $top) (local.get $size))))
  {data}
  {code}
)
"""


def plugin(code: str, **data: str) -> bytes:
    """A module with `code`; each of `data` is a text, `@name` and `@name_len` in the code."""
    import wasmtime

    places, at = [], 16
    for name, text in sorted(data.items(), key=lambda item: -len(item[0])):
        raw = text.encode()
        escaped = "".join(f"\\{byte:02x}" for byte in raw)
        places.append(f'(data (i32.const {at}) "{escaped}")')
        code = code.replace(f"@{name}_len", f"(i32.const {len(raw)})")
        code = code.replace(f"@{name}", f"(i32.const {at})")
        at += len(raw) + 8
    text = PLUGIN.format(imports=IMPORTS, data="\n  ".join(places), code=code)
    return bytes(wasmtime.wat2wasm(text))


ADD_HEADER = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 0) @key @key_len @value @value_len))
    (drop (call $remove (i32.const 0) @gone @gone_len))
    (drop (call $replace (i32.const 0) @path @path_len @target @target_len))
    (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 2) @key @key_len @value @value_len))
    (i32.const 0))
  """,
    key="X-Plugin",
    value="seen",
    gone="x-secret",
    path=":path",
    target="/rewritten",
)

DENY = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    ;; without the header: 403
    (if (i32.ne (call $get (i32.const 0) @key @key_len (i32.const 512) (i32.const 516))
                (i32.const 0))
      (then (drop (call $reply (i32.const 403) @why @why_len @body @body_len
                        @headers @headers_len (i32.const -1)))
            (return (i32.const 1))))
    (i32.const 0))
  """,
    key="x-token",
    why="no_token",
    body="go away",
    # One pair: count, two sizes, then both texts with zeros behind them.
    headers="\x01\0\0\0\x05\0\0\0\x03\0\0\0x-why\0not\0",
)

BODY = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_request_body") (param $ctx i32) (param $size i32) (param $end i32)
    (result i32)
    ;; the body's bytes become a header, and the body "HELLO"
    (drop (call $bytes (i32.const 0) (i32.const 0) (local.get $size)
                (i32.const 512) (i32.const 516)))
    (drop (call $add (i32.const 0) @key @key_len
                (i32.load (i32.const 512)) (i32.load (i32.const 516))))
    (drop (call $set_bytes (i32.const 0) (i32.const 0) (local.get $size) @body @body_len))
    (i32.const 0))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32) (i32.const 0))
  """,
    key="x-body",
    body="HELLO",
)

HTTP_CALL = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (if (call $http_call @to @to_len @headers @headers_len @body @body_len
              (i32.const 0) (i32.const 0) (i32.const 1500) (i32.const 512))
      (then unreachable))
    (i32.const 1))
  (func (export "proxy_on_http_call_response")
    (param $ctx i32) (param $token i32) (param $headers i32) (param $body i32) (param i32)
    ;; no answer: 500; else the answer's body goes into a header, and on
    (if (i32.eqz (local.get $headers))
      (then (drop (call $reply (i32.const 500) (i32.const 0) (i32.const 0) (i32.const 0)
                        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const -1))))
      (else
        (drop (call $bytes (i32.const 4) (i32.const 0) (local.get $body)
                    (i32.const 512) (i32.const 516)))
        (drop (call $add (i32.const 0) @key @key_len
                    (i32.load (i32.const 512)) (i32.load (i32.const 516))))
        (drop (call $continue (i32.const 0))))))
  """,
    to="outbound|8000||authz.shop.svc.cluster.local",
    key="x-answer",
    body="ping",
    headers="\x03\0\0\0"
    + "\x07\0\0\0\x04\0\0\0\x05\0\0\0\x02\0\0\0\x0a\0\0\0\x05\0\0\0"
    + ":method\0POST\0:path\0/p\0:authority\0authz\0",
)

TRAP = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    ;; only where the request asks for it
    (if (i32.eqz (call $get (i32.const 0) @key @key_len (i32.const 512) (i32.const 516)))
      (then unreachable))
    (i32.const 0))
  """,
    key="x-trap",
)

SPIN = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (loop $again (br $again))
    (i32.const 0))
  """
)

HUNGRY = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    ;; 128 MiB more, or a trap
    (if (i32.eq (memory.grow (i32.const 2048)) (i32.const -1)) (then unreachable))
    (i32.const 0))
  """
)

PAUSE_FOR_EVER = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
  """
)

REFUSE_CONFIGURATION = plugin(
    """
  (func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 0))
  """
)

CONFIGURED = plugin(
    """
  (func (export "proxy_on_configure") (param $root i32) (param $size i32) (result i32)
    ;; remembers its configuration where requests find it
    (drop (call $bytes (i32.const 7) (i32.const 0) (local.get $size)
                (i32.const 520) (i32.const 524)))
    (drop (call $log (i32.const 2) (i32.load (i32.const 520)) (i32.load (i32.const 524))))
    (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 0) @key @key_len
                (i32.load (i32.const 520)) (i32.load (i32.const 524))))
    (i32.const 0))
  """,
    key="x-config",
)

PROPERTY = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (if (i32.eqz (call $property @path @path_len (i32.const 512) (i32.const 516)))
      (then (drop (call $add (i32.const 0) @key @key_len
                        (i32.load (i32.const 512)) (i32.load (i32.const 516)))))
      (else (drop (call $add (i32.const 0) @key @key_len @none @none_len))))
    (i32.const 0))
  """,
    path="connection\0uri_san_peer_certificate",
    key="x-property",
    none="none",
)

SHARED = plugin(
    """
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
    (i32.eqz (call $metric (i32.const 0) @name @name_len (i32.const 528))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $increment (i32.load (i32.const 528)) (i64.const 2)))
    ;; the second request finds what the first one left
    (if (i32.eqz (call $shared @key @key_len (i32.const 512) (i32.const 516) (i32.const 532)))
      (then (drop (call $add (i32.const 0) @key @key_len
                        (i32.load (i32.const 512)) (i32.load (i32.const 516)))))
      (else (drop (call $share @key @key_len @value @value_len (i32.const 0)))))
    (i32.const 0))
  (func (export "proxy_on_log") (param i32)
    (drop (call $increment (i32.load (i32.const 528)) (i64.const 40))))
  """,
    key="x-shared",
    value="kept",
    name="seen_total",
)

UNKNOWN = plugin(
    """
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    ;; 12 is UNIMPLEMENTED; 6 is for memory that the guest does not have
    (if (i32.ne (call $foreign (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                      (i32.const 0) (i32.const 0)) (i32.const 12)) (then unreachable))
    (if (i32.ne (call $add (i32.const 0) (i32.const -8) (i32.const 64) (i32.const 0)
                      (i32.const 1)) (i32.const 6)) (then unreachable))
    ;; 2: a field that cannot stand in a message
    (if (i32.ne (call $add (i32.const 0) @key @key_len @value @value_len) (i32.const 2))
      (then unreachable))
    (i32.const 0))
  """,
    key="x-a",
    value="b\r\nx-smuggled: 1",
)

TICK = plugin(
    """
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (drop (call $tick (i32.const 500)))
    (i32.const 1))
  (func (export "proxy_on_tick") (param i32)
    (drop (call $http_call @to @to_len @headers @headers_len (i32.const 0) (i32.const 0)
                (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 512))))
  (func (export "proxy_on_http_call_response") (param i32 i32 i32) (param $body i32) (param i32)
    ;; the last answer is kept for requests
    (drop (call $bytes (i32.const 4) (i32.const 0) (local.get $body)
                (i32.const 520) (i32.const 524))))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 0) @key @key_len
                (i32.load (i32.const 520)) (i32.load (i32.const 524))))
    (i32.const 0))
  """,
    to="keys.example:80",
    key="x-kept",
    headers="\x03\0\0\0"
    + "\x07\0\0\0\x03\0\0\0\x05\0\0\0\x02\0\0\0\x0a\0\0\0\x04\0\0\0"
    + ":method\0GET\0:path\0/k\0:authority\0keys\0",
)

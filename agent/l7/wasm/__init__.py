"""Proxy-Wasm plugins: WasmPlugin and TrafficExtension on wasmtime."""

"""The compiler child: one C source in, bytecode out. The only file that imports bcc.

It runs as `python -I -m meshbpf.agent.datapath.compile`, once per source, and
ends: libbcc and LLVM, 140 MB of memory, never enter the agent's process.

stdin:  {"source": path, "cflags": [...], "programs": [function names]}
stdout: {"programs": {function name: base64 of its instructions}}
stderr: what clang says; exit status 1 when there is no bytecode

Facts about bcc 0.26 that this relies on:

* It makes each global function of the main file a program of its own; those
  of included files must be static inline.
* It rewrites its map syntax (`BPF_HASH`, `m.lookup()`) in the main file only,
  and creates those maps while it compiles. Our sources name maps by number
  instead (see `meshbpf.bpf`), so a source that declares one is refused.
* It takes kernel headers from $BCC_KERNEL_SOURCE, which `build` always sets:
  its own search would unpack an archive into a folder under /tmp whose name
  anyone can foresee.
* Its constructor `BPF` raises nothing narrower than Exception, and attaches
  functions by their names' prefixes; so the library is called directly.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any


def compile_source(text: bytes, cflags: list[str], programs: list[str]) -> dict[str, str]:
    """The instructions of each program, base64. SystemExit, with clang's words on stderr."""
    from bcc.libbcc import lib  # loads LLVM: only once stdout is safe

    flags = (ctypes.c_char_p * len(cflags))(*(flag.encode() for flag in cflags))
    module: Any = lib.bpf_module_create_c_from_string(text, 0, flags, len(flags), False, None)
    if not module:
        raise SystemExit(1)
    # Not declared by bcc's own binding, whose default would cut the pointer.
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.bpf_table_name.restype = ctypes.c_char_p
    if lib.bpf_num_tables(module):
        name = lib.bpf_table_name(module, 0).decode()
        raise SystemExit(f"error: map '{name}' is declared in the source: name maps by number")
    found = {}
    for program in programs:
        start = lib.bpf_function_start(module, program.encode())
        if not start:
            raise SystemExit(f"error: no global function '{program}' in the source")
        size = lib.bpf_function_size(module, program.encode())
        found[program] = base64.b64encode(ctypes.string_at(start, size)).decode()
    return found


def main() -> None:
    """Answer the one request."""
    # Whatever the libraries print must not end up inside our reply.
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    text = Path(request["source"]).read_bytes()
    json.dump({"programs": compile_source(text, request["cflags"], request["programs"])}, reply)
    reply.close()


if __name__ == "__main__":
    main()

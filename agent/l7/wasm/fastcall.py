"""wasmtime, called the short way: the one module that reaches into its bindings.

wasmtime-py's public API makes a Python object of each argument, result and
memory access: a request through a small filter costs it about ten times what
the same calls cost through the C API's `*_unchecked` functions with memory
read by address. Those are private to the package, so its version is pinned
(setup.cfg, extra `wasm`) and checked here; docs/waypoint-policy.md has the
measurement, and nothing outside this file knows of it.

What the short way relies on:
- A linear memory never moves: 4 GiB of address space are reserved for it and
  `memory_may_move` is off. So its base is read once; its size only grows.
- Arguments and results are 16-byte slots (`wasmtime_val_raw_t`), integers in
  the low bytes. Only i32 and i64 cross, which is all of the proxy-wasm ABI.
- A C callback must not raise: an exception of a host function is kept, the
  guest is trapped, and the exception comes out of the call that entered it.

Every entry from outside has a budget of fuel, wasmtime's count of executed
instructions, so that no guest keeps the event loop for longer than that.
Nothing here is safe for two threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import wasmtime
from wasmtime import _ffi

PINNED: Final = "50.0.1"
_SLOT_WORDS = 2  # of 8 bytes
_GIB = 1 << 30
_MASK32 = 0xFFFF_FFFF

HostFunction = Callable[..., int]
"""Takes the arguments as unsigned integers, gives the result (0 where there is none)."""

if version("wasmtime") != PINNED:
    raise ImportError(f"wasmtime {version('wasmtime')} is installed; this module knows {PINNED}")

# PYFUNCTYPE keeps the GIL: guests run for microseconds, and each host call
# would otherwise have to take it back.
_void = ctypes.c_void_p
_call_unchecked = ctypes.PYFUNCTYPE(_void, _void, _void, _void, ctypes.c_size_t, _void)(
    ("wasmtime_func_call_unchecked", _ffi.dll)
)
_set_fuel = ctypes.PYFUNCTYPE(_void, _void, ctypes.c_uint64)(
    ("wasmtime_context_set_fuel", _ffi.dll)
)
_memory_size = ctypes.PYFUNCTYPE(ctypes.c_size_t, _void, _void)(
    ("wasmtime_memory_data_size", _ffi.dll)
)
_memory_data = ctypes.PYFUNCTYPE(_void, _void, _void)(("wasmtime_memory_data", _ffi.dll))
_trap_new = ctypes.PYFUNCTYPE(_void, ctypes.c_char_p, ctypes.c_size_t)(
    ("wasmtime_trap_new", _ffi.dll)
)
# (env, caller, slots, number of slots) -> trap or null
_Callback = ctypes.CFUNCTYPE(_void, _void, _void, _void, ctypes.c_size_t)


class GuestFaultError(Exception):
    """The guest trapped, or a host function failed under it: the machine is of no further use."""

    def __init__(self, reason: str, *, out_of_fuel: bool = False) -> None:
        super().__init__(reason)
        self.out_of_fuel = out_of_fuel


class GuestMemoryError(Exception):
    """The guest named memory that it does not have."""


def make_engine() -> wasmtime.Engine:
    """The engine that all machines share."""
    config = wasmtime.Config()
    config.consume_fuel = True
    config.memory_reservation = 4 * _GIB
    config.memory_may_move = False
    config.wasm_threads = False
    return wasmtime.Engine(config)


def compile_module(engine: wasmtime.Engine, code: bytes) -> wasmtime.Module:
    """Compile; takes up to a second, so not on the event loop. ValueError when it is no module."""
    try:
        return wasmtime.Module(engine, code)
    except wasmtime.WasmtimeError as error:
        raise ValueError(f"is not a WebAssembly module: {_first_line(error)}") from None


class GuestFunction:
    """An exported function, with its slots made once."""

    __slots__ = ("_function", "_machine", "_pointer", "_returns", "_slots", "_words", "arity")

    def __init__(self, machine: Machine, function: wasmtime.Func) -> None:
        kind = function.type(machine.store)
        self.arity = len(kind.params)
        self._returns = bool(kind.results)
        self._machine = machine
        self._words = _SLOT_WORDS * max(self.arity, len(kind.results), 1)
        self._slots = (ctypes.c_uint64 * self._words)()
        self._function = function._func
        self._pointer = ctypes.addressof(self._function)

    def __call__(self, *values: int) -> int:
        """Call with the first `arity` of `values`; 0 where the function returns nothing."""
        slots = self._slots
        for index in range(self.arity):
            slots[_SLOT_WORDS * index] = values[index]
        self._machine.enter(self._pointer, slots, self._words // _SLOT_WORDS)
        return slots[0] & _MASK32 if self._returns else 0


class Machine:
    """One instance of a module, with its own memory."""

    def __init__(
        self,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        host: Mapping[str, HostFunction],
        unknown: Callable[[str, str], int],
        *,
        memory_limit_bytes: int,
    ) -> None:
        """Instantiate, running nothing but the module's own start function.

        `host` names host functions by their import names; for all others that
        the module imports `unknown(module, name)` says what they return.
        Raises GuestFaultError, or ValueError when it cannot be instantiated.
        """
        self.store = wasmtime.Store(engine)
        self.store.set_limits(memory_size=memory_limit_bytes)
        self._context = ctypes.cast(self.store._context(), _void).value
        self._trap = _void()
        self._trap_address = ctypes.addressof(self._trap)
        self._depth = 0
        self._failure: BaseException | None = None
        self._callbacks: list[Any] = []
        """C keeps only addresses: these must live as long as the store."""
        linker = wasmtime.Linker(engine)
        for wanted in module.imports:
            if isinstance(wanted.type, wasmtime.FuncType):
                function = host.get(wanted.name or "")
                if function is None:
                    function = _constant(unknown(wanted.module, wanted.name or ""))
                self._define(linker, wanted.module, wanted.name or "", wanted.type, function)
        self.refuel(_START_FUEL)
        try:
            self._instance = linker.instantiate(self.store, module)
        except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
            raise ValueError(f"cannot be instantiated: {_first_line(error)}") from None
        exports = self._instance.exports(self.store)
        memory = exports.get("memory")
        if not isinstance(memory, wasmtime.Memory):
            raise ValueError("exports no memory")
        self._memory = memory._memory
        self._memory_address = ctypes.addressof(self._memory)
        self._base: int = _memory_data(self._context, self._memory_address) or 0
        self._size: int = _memory_size(self._context, self._memory_address)
        self._exports = exports

    def export(self, name: str) -> GuestFunction | None:
        """An exported function; None without one."""
        found = self._exports.get(name)
        return GuestFunction(self, found) if isinstance(found, wasmtime.Func) else None

    def refuel(self, fuel: int) -> None:
        """What the guest may execute until the next refuelling."""
        _set_fuel(self._context, fuel)

    def enter(self, function: int, slots: ctypes.Array[ctypes.c_uint64], count: int) -> None:
        """Run a function; GuestFaultError when it traps, or what a host function raised."""
        error = _call_unchecked(
            self._context, function, ctypes.addressof(slots), count, self._trap_address
        )
        if error or self._trap.value:
            self._faulted(error)

    def read(self, address: int, size: int) -> bytes:
        """A copy of guest memory."""
        self._check(address, size)
        return ctypes.string_at(self._base + address, size)

    def write(self, address: int, data: bytes) -> None:
        """Change guest memory."""
        self._check(address, len(data))
        ctypes.memmove(self._base + address, data, len(data))

    def _check(self, address: int, size: int) -> None:
        if address + size > self._size:
            self._size = _memory_size(self._context, self._memory_address)
            if address + size > self._size:
                raise GuestMemoryError

    def _faulted(self, error: int | None) -> None:
        failure, self._failure = self._failure, None
        trap, self._trap.value = self._trap.value, None
        reason, out_of_fuel = "trapped", False
        if trap:
            made = wasmtime.Trap._from_ptr(ctypes.cast(trap, ctypes.POINTER(_ffi.wasm_trap_t)))
            reason, code = _first_line(made), made.trap_code
            out_of_fuel = code is wasmtime.TrapCode.OUT_OF_FUEL
        elif error:
            made_error = wasmtime.WasmtimeError._from_ptr(
                ctypes.cast(error, ctypes.POINTER(_ffi.wasmtime_error_t))
            )
            reason = _first_line(made_error)
        if failure is not None:
            reason = str(failure) or type(failure).__name__
        raise GuestFaultError(reason, out_of_fuel=out_of_fuel) from failure

    def _define(
        self,
        linker: wasmtime.Linker,
        module: str,
        name: str,
        kind: wasmtime.FuncType,
        function: HostFunction,
    ) -> None:
        masks = [_MASK32 if str(each) == "i32" else None for each in kind.params]
        words = _SLOT_WORDS * max(len(masks), len(kind.results), 1)
        callback = self._callback(function, masks, words, returns=bool(kind.results))
        self._callbacks.append(callback)
        raw_module, raw_name = module.encode(), name.encode()
        error = _ffi.wasmtime_linker_define_func_unchecked(
            linker.ptr(),
            ctypes.create_string_buffer(raw_module),
            len(raw_module),
            ctypes.create_string_buffer(raw_name),
            len(raw_name),
            kind.ptr(),
            ctypes.cast(callback, _ffi.wasmtime_func_unchecked_callback_t),
            None,
            _NO_FINALIZER,
        )
        if ctypes.cast(error, _void).value:
            raise ValueError(f"imports {module}.{name} in a way that cannot be linked")

    def _callback(
        self, function: HostFunction, masks: Sequence[int | None], words: int, *, returns: bool
    ) -> Any:
        slots_type = ctypes.c_uint64 * words
        narrow = all(mask is not None for mask in masks)
        arity = _SLOT_WORDS * len(masks)

        def called(_env: int, _caller: int, address: int, _count: int) -> int | None:
            try:
                slots = slots_type.from_address(address)
                # The upper half of an i32's slot is not defined.
                if narrow:
                    values = [value & _MASK32 for value in slots[0:arity:_SLOT_WORDS]]
                else:
                    values = [
                        value if mask is None else value & mask
                        for value, mask in zip(slots[0:arity:_SLOT_WORDS], masks, strict=True)
                    ]
                result = function(*values)
                if returns:
                    slots[0] = result
            except BaseException as error:  # noqa: BLE001 - C must not see it; it is raised again
                self._failure = error
                trap: int | None = _trap_new(b"host", 4)
                return trap
            return None

        return _Callback(called)


_START_FUEL = 1_000_000_000
_NO_FINALIZER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(0)


def _constant(value: int) -> HostFunction:
    return lambda *_: value


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The backtrace of a stripped module tells nobody anything; its cause comes last.
    causes = [line for line in lines if line.startswith(("wasm trap:", "Caused by:", "0:", "1:"))]
    return (causes or lines or ["unknown"])[-1]

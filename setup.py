"""The one part that is compiled: the relay's innermost loop, where a C compiler is.

Everything else stands in setup.cfg. Without gcc or Python's headers the build
goes on with a warning, and the agent carries its streams in Python.
"""

from setuptools import Extension, setup

NATIVE = "agent/runtime/relay"

setup(
    ext_modules=[
        Extension(
            "meshbpf.agent.runtime._relay",
            sources=[
                f"{NATIVE}/{name}.c"
                for name in ("attributes", "engine", "module", "sockets", "stream", "tunnel")
            ],
            depends=[f"{NATIVE}/relay.h"],
            # No debug information: it would carry the path of the build.
            extra_compile_args=[
                "-O2",
                "-g0",
                "-Wall",
                "-Wextra",
                "-Wno-missing-field-initializers",
            ],
            optional=True,
        )
    ]
)

"""All sources of filters. What order they stand in matters only within a phase."""

from __future__ import annotations

from meshbpf.agent.l7.authn.source import authentication
from meshbpf.agent.l7.authz.source import authorization
from meshbpf.agent.l7.mesh_config import path_normalization
from meshbpf.agent.l7.rate_limit import rate_limits
from meshbpf.agent.l7.sources import FilterSource
from meshbpf.agent.l7.telemetry.source import telemetry
from meshbpf.agent.l7.wasm.source import wasm_plugins

SOURCES: tuple[FilterSource, ...] = (
    path_normalization,
    authentication,
    authorization,
    rate_limits,
    wasm_plugins,
    telemetry,
)

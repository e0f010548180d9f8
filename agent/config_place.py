"""Where the configuration file is, and what every command needs to know of it.

Apart from `config_sources.py`, because each run of the command line pays for
what is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from meshbpf.agent.config import DEFAULT_STATE_DIR
from meshbpf.agent.core.errors import ConfigError

DEFAULT_FILE = Path("/etc/meshbpf/config.yaml")
FILE_VARIABLE = "MESHBPF_CONFIG"
MESH_FILE = Path("etc/istio/config/mesh")
"""Istio's mesh configuration, from the working directory: where Istio's images have it."""
STATE_DIR_VARIABLE = "MESHBPF_STATE_DIR"


def find_file(environ: Mapping[str, str], file: Path | None = None) -> Path | None:
    """The file to read: --config, MESHBPF_CONFIG, or the usual one if it is there."""
    if file is not None:
        return file
    named = environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def client_state_dir(environ: Mapping[str, str]) -> Path:
    """Where commands look for the agent when no --state-dir says so.

    As `run` finds it. A file that cannot be understood is the agent's trouble
    and not that of whoever asks one.
    """
    if text := environ.get(STATE_DIR_VARIABLE):
        return Path(text)
    path = find_file(environ)
    try:
        # Most files do not say, and YAML takes its time to be imported.
        if path is None or b"state-dir" not in path.read_bytes():
            return DEFAULT_STATE_DIR
        from meshbpf.agent.config_file import read_file

        found = read_file(path).get("state-dir")
    except (OSError, ConfigError):
        return DEFAULT_STATE_DIR
    return Path(found.value) if found is not None else DEFAULT_STATE_DIR

"""Taking an agent's pods out of the mesh for good, when meshbpf leaves the machine.

    python -m meshbpf.agent.runtime.removal STATE_DIR

What the package runs before it is removed, with the agent stopped. Every pod
is detached as `meshbpf detach` would, and forgotten: installed again, the
agent starts without pods. State that is not about pods stays.
"""

from __future__ import annotations

import sys
from pathlib import Path

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.uproot import uproot
from meshbpf.agent.runtime.state_dir import StateDir


def remove(path: Path) -> tuple[str, ...]:
    """Detach all pods of the agent whose state directory this is; their names.

    Raises MeshbpfError (state-dir-in-use while an agent runs).
    """
    if not path.is_dir():
        return ()
    state_dir = StateDir.open(path)
    try:
        lifted = uproot(state_dir.agent_id)
        state_dir.attachments.unlink(missing_ok=True)
    finally:
        state_dir.close()
    return lifted


def main() -> int:
    """Say what was detached, or why it could not be."""
    try:
        lifted = remove(Path(sys.argv[1]))
    except MeshbpfError as error:
        print(f"meshbpf: {error}", file=sys.stderr)  # noqa: T201
        return int(error.exit_status)
    for pod in lifted:
        print(f"meshbpf: pod {pod} detached")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

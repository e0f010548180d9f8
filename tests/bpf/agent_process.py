"""An agent that can be killed: `python -m tests.bpf.agent_process ID CACHE MODE DOWN LEASE_S`.

Attaches the pod, serves it as TinyAgent does, says `ready`, and stays.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from meshbpf.agent.datapath.steering import Capture, OnAgentDown, PodSteering, Steering
from tests.bpf import lab


def main() -> None:
    agent_id, cache_dir, mode, down, lease_s = sys.argv[1:]
    steering = Steering.open(
        agent_id=agent_id,
        cache_dir=Path(cache_dir),
        capture=Capture.AUTO if mode == "auto" else Capture.TC,
        use_tcx=False if mode == "clsact" else None,
    )
    steering.set_mesh([*lab.MESH, *lab.PEER_IN_MESH])
    with lab.opened(lab.POD) as netns:
        tiny = lab.TinyAgent(steering, netns, lease_s=float(lease_s))
        tiny.start()
        wanted = PodSteering("ns/pod", netns, on_agent_down=OnAgentDown(down))
        steering.attach(wanted, tiny.listeners)
        print("ready", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

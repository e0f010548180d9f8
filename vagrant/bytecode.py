"""The programs compiled on this machine, for nodes whose CPU is emulated.

    python -m vagrant.bytecode OUT.json

Six programs take an emulated node minutes to compile at its first start. The
programs read stable kernel interfaces only, so what this machine's BCC makes of
them is what the node's would: `guest/precompiled.py` puts it into the agent's
cache there. A node that has other sources compiles for itself.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from meshbpf.agent.datapath.build import Sources, build

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "vagrant" / "bytecode"


def main(output: Path) -> None:
    sources = Sources.shipped()
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    programs = build(sources, CACHE)
    code = {name: base64.b64encode(data).decode() for name, data in programs.items()}
    output.write_text(json.dumps({"schema": sources.schema(), "programs": code}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

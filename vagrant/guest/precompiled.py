"""Fill the agent's compile cache on an emulated node: see vagrant/bytecode.py.

precompiled.py CACHE BYTECODE.json
"""

import json
import sys
from pathlib import Path

from meshbpf.agent.datapath.build import Sources, toolchain_identity
from meshbpf.agent.datapath.cache import private_directory, write_entry
from meshbpf.agent.datapath.headers import find_headers


def main(cache: Path, given: Path) -> None:
    sources, made = Sources.shipped(), json.loads(given.read_text())
    if made["schema"] != sources.schema():
        print("provision: the package has other programs: they are compiled at the first start")
        return
    cache.parent.mkdir(mode=0o700, exist_ok=True)
    private_directory(cache)
    headers, toolchain = find_headers(cache), toolchain_identity()
    for source in sources.files():
        names = [program.name for program in sources.programs if program.source == source]
        reply = {"programs": {name: made["programs"][name] for name in names}}
        write_entry(
            cache, source, sources.key(source, headers, toolchain), json.dumps(reply).encode()
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

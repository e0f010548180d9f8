# SPDX-License-Identifier: Apache-2.0
"""Every C file under bpf/ says its licence in the first line.

The kernel hands its GPL-only helpers to programs under a compatible licence
alone, and users who redistribute the bytecode must be able to tell.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WANT = "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause"


def main() -> int:
    """Print each file without the line; 1 when there is one."""
    bad = [
        path
        for path in sorted((ROOT / "bpf").rglob("*.[ch]"))
        if WANT not in path.read_text().split("\n", 1)[0]
    ]
    for path in bad:
        print(f"{path.relative_to(ROOT)}: the first line must hold '{WANT}'")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

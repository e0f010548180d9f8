# SPDX-License-Identifier: Apache-2.0
"""Files have one idea: median near 150 lines, nine in ten under 400, none over 600.

Tests and generated code are outside the rule; everything else that we write
in Python or C is inside it.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("agent", "bpf", "cli", "tools")
HARD_CAP, NINE_IN_TEN, MEDIAN_CAP = 600, 400, 200


def main() -> int:
    """Print each offence; 1 when there is one."""
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".c", ".h"} and path.name != "__init__.py"
        if "_pb2" not in path.name
    ]
    lines = {path: len(path.read_text().splitlines()) for path in files}
    failed = False
    for path, count in sorted(lines.items(), key=lambda item: -item[1]):
        if count > HARD_CAP:
            print(f"{path.relative_to(ROOT)}: {count} lines, the cap is {HARD_CAP}: split it")
            failed = True
    sizes = sorted(lines.values())
    p90 = sizes[int(len(sizes) * 0.9)] if sizes else 0
    median = statistics.median(sizes) if sizes else 0
    if p90 > NINE_IN_TEN or median > MEDIAN_CAP:
        print(f"median {median} (cap {MEDIAN_CAP}), nine in ten under {p90} (cap {NINE_IN_TEN})")
        failed = True
    print(
        f"sizes: {len(sizes)} files, median {median:g}, p90 {p90}, longest {max(sizes, default=0)}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

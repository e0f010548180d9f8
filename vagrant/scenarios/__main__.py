"""Run scenarios and print a summary with times: `python -m vagrant.scenarios [NAME...]`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time

from vagrant.testbed import ScenarioError, Testbed

# What changes most comes last: the reboot makes the pods anew.
ALL = ("kernel", "demo", "restart", "kill", "partition", "clock", "disk", "reboot")


def main(names: list[str]) -> int:
    unknown = set(names) - set(ALL)
    if unknown:
        print(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
        return 2
    bed = Testbed.find()
    bed.wait_ready()
    summary: list[tuple[str, str, float]] = []
    for name in names or ALL:
        scenario = importlib.import_module(f"vagrant.scenarios.{name}")
        print(f"--- {name}: {(scenario.__doc__ or '').splitlines()[0]}", flush=True)
        began, result = time.monotonic(), "ok"
        try:
            scenario.run(bed)
        except (ScenarioError, subprocess.SubprocessError) as error:
            result = "FAILED"
            print(f"    {error}", flush=True)
        summary.append((name, result, time.monotonic() - began))
        print(f"    {result}, {summary[-1][2]:.0f} s", flush=True)
    print("\nscenario   seconds  result")
    for name, result, seconds in summary:
        print(f"{name:<10} {seconds:7.0f}  {result}")
    return int(any(result != "ok" for _, result, _ in summary))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the agents of a testbed say over HTTP and in their logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.progs.program import run_inside
from tests.testbed import Testbed

HTTP = """
import http.client, json, socket, sys
method, port, path, headers, host = sys.argv[1:6]
ask = http.client.HTTPConnection(host, int(port), timeout=20)
ask.request(method, path, headers=json.loads(headers))
got = ask.getresponse()
print(json.dumps([got.status, dict(got.getheaders()), got.read().decode("latin-1")]))
"""


class Web:
    """HTTP as seen from a node."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed

    def __call__(
        self,
        node: int,
        port: int,
        path: str,
        method: str = "GET",
        *,
        host: str = "127.0.0.1",
        user: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], str]:
        sent = dict(headers or {})
        argv = ["/usr/bin/python3", "-c", HTTP, method, str(port), path, json.dumps(sent), host]
        if user:
            argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *argv]
        done = run_inside(self.bed.node_netns(node), argv, limit_s=60.0)
        status, got, body = json.loads(done.stdout)
        return status, got, body

    def metrics(self, node: int) -> dict[str, dict[str, float]]:
        """Values by name, then by labels as written."""
        status, _headers, body = self(node, 15020, "/metrics")
        assert status == 200
        found: dict[str, dict[str, float]] = {}
        for line in body.splitlines():
            if not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name, brace, labels = series.partition("{")
                found.setdefault(name, {})[brace + labels] = float(value)
        return found

    def log_lines(self, node: int, scope: str = "access") -> list[dict[str, Any]]:
        """What the agent of the node has logged under a scope."""
        text = self.bed.agents[node].program.log.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["scope"] == scope]

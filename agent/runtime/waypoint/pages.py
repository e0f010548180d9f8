"""The metrics page of one waypoint process, on 15020."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

from meshbpf.agent.runtime.certs import CertificateStore
from meshbpf.agent.runtime.exposition import (
    END,
    OPENMETRICS,
    TEXT,
    Family,
    Kind,
    render,
    single,
    wants_openmetrics,
)
from meshbpf.agent.runtime.httpd import Request, Response
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.waypoint.extensions import Extensions
from meshbpf.agent.runtime.waypoint.proxy import Proxy
from meshbpf.agent.runtime.waypoint.serve import Inbound

PATHS = ("/metrics", "/stats/prometheus")


class Pages:
    """Answers GET on the metrics port."""

    def __init__(
        self,
        proxy: Proxy,
        inbound: Inbound,
        certificates: CertificateStore,
        source: MeshSource,
        extensions: Extensions,
    ) -> None:
        self._proxy = proxy
        self._inbound = inbound
        self._certificates = certificates
        self._source = source
        self._extensions = extensions

    async def handle(self, request: Request) -> Response:
        """One scrape."""
        if request.path not in PATHS:
            return Response(HTTPStatus.NOT_FOUND, f"try {PATHS[0]}\n")
        openmetrics = wants_openmetrics(request.headers.get("accept", ""))
        text = "".join(render(each, openmetrics=openmetrics) for each in self._families())
        if openmetrics:
            return Response(HTTPStatus.OK, text + END, OPENMETRICS)
        return Response(HTTPStatus.OK, text, TEXT)

    def _families(self) -> Iterator[Family]:
        """Everything that is counted."""
        yield from self._extensions.families()
        proxy, served = self._proxy, self._inbound.served
        totals, pools = proxy.statistics, proxy.pools.statistics()
        plan = proxy.state.plan
        counters = {
            "requests": ("Requests of all inner streams", totals.requests),
            "retries": ("Requests sent once more", totals.retries),
            "local_replies": ("Requests that the waypoint answered itself", totals.local_replies),
            "client_gone": ("Requests whose client left", totals.client_gone),
            "tunnels": ("Tunnels accepted", served.tunnels),
            "connects": ("CONNECTs admitted", served.admitted),
            "connects_refused": ("CONNECTs refused", served.refused),
            "upstream_dials": ("Connections made to endpoints", pools.dialed),
            "upstream_reuses": ("Requests on connections that stood", pools.reused),
            "upstream_evictions": ("Endpoints whose connections were dropped", pools.evicted),
        }
        for name, (told, count) in counters.items():
            yield single(f"meshbpf_waypoint_{name}", told, Kind.COUNTER, count)
        gauges = {
            "services": ("Services bound to this waypoint", len(plan.services)),
            "problems": ("Objects that are not in force as written", len(plan.problems)),
            "upstream_endpoints": ("Endpoints with connections", pools.endpoints),
            "upstream_idle": ("HTTP/1.1 connections that wait", pools.idle),
            "ejected": (
                "Endpoints left out for failing",
                proxy.balancer.ejected(proxy.clock()),
            ),
        }
        for name, (told, count) in gauges.items():
            yield single(f"meshbpf_waypoint_{name}", told, Kind.GAUGE, count)

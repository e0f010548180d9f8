"""Filters stand in Istio's order, and only those hooks run that do something."""

from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import CONTINUE, Chain, Filter, Outcome, Phase
from meshbpf.agent.l7.message import Headers, RequestHead


class OnRequest(Filter):
    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def on_request(self, exchange: Exchange) -> Outcome:
        return CONTINUE


class Both(OnRequest):
    def on_response(self, exchange: Exchange) -> Outcome:
        return CONTINUE


class OnResponse(Filter):
    phase = Phase.STATS

    def on_response(self, exchange: Exchange) -> Outcome:
        return CONTINUE


def test_custom_authorization_comes_before_jwt_and_wasm_stats_before_wasm() -> None:
    given = [OnRequest(phase) for phase in (Phase.WASM, Phase.JWT, Phase.WASM_STATS, Phase.CUSTOM)]
    phases = [each.phase for each in Chain.of(given).filters]
    assert phases == [Phase.CUSTOM, Phase.JWT, Phase.WASM_STATS, Phase.WASM]


def test_a_hook_that_is_not_overridden_is_not_called() -> None:
    chain = Chain.of([OnRequest(Phase.JWT), Filter()])
    assert len(chain.filters) == 2
    assert len(chain.request) == 1
    assert chain.response == chain.connect == chain.end == ()


def test_responses_pass_the_filters_backwards() -> None:
    chain = Chain.of([OnResponse(), Both(Phase.CUSTOM), OnRequest(Phase.JWT)])
    # CUSTOM's counts once one request hook has begun, STATS' only after both.
    assert [needs for needs, _ in chain.response] == [2, 1]


def test_a_repeated_field_reads_as_one_list() -> None:
    headers = Headers([(b"accept", b"a"), (b"x", b"1"), (b"accept", b"b")])
    assert headers.get("accept") == "a,b"
    assert headers.every("accept") == ["a", "b"]
    headers.set("accept", "c")
    assert headers.raw == [(b"x", b"1"), (b"accept", b"c")]
    assert "y" not in headers
    assert headers.get("y") is None


def test_host_is_the_authority_without_port_in_lower_case() -> None:
    for authority, host in (
        ("Echo:80", "echo"),
        ("echo", "echo"),
        ("[::1]:80", "[::1]"),
        ("[::1]", "[::1]"),
    ):
        assert RequestHead("GET", "/", authority).host == host

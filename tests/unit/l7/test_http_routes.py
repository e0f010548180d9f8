"""HTTPRoute: which rule takes a request, and what it does to it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.planner import Planner
from tests.unit.l7.routed import ask, exchange, plan, route

MATCHES = route(
    """
    - matches:
      - {path: {type: PathPrefix, value: /}}
      backendRefs: [{name: v1, port: 8080}]
    - matches:
      - {path: {type: PathPrefix, value: /v2}}
      - headers: [{name: Version, value: two}]
      backendRefs: [{name: v2, port: 8080}]
    - matches:
      - {path: {type: Exact, value: /exact}}
      - {path: {type: RegularExpression, value: "/re[0-9]+"}}
      - {queryParams: [{name: animal, value: whale}]}
      - {headers: [{name: x-id, type: RegularExpression, value: "[a-f]+"}]}
      - {method: DELETE}
      backendRefs: [{name: echo, port: 8080}]
    """
)


@pytest.mark.parametrize(
    ("target", "more", "backend"),
    [
        ("/", {}, "v1"),
        ("/example", {}, "v1"),
        ("/v2", {}, "v2"),
        ("/v2/", {}, "v2"),
        ("/v2/example", {}, "v2"),
        ("/v2?x=1", {}, "v2"),
        ("/v2example", {}, "v1"),
        ("/foo/v2/example", {}, "v1"),
        ("/", {"version": "two"}, "v2"),
        ("/", {"version": "TWO"}, "v1"),
        ("/exact", {}, "echo"),
        ("/exact/", {}, "v1"),
        ("/re12", {}, "v1"),  # a prefix, be it /, comes before an expression
        ("/?animal=whale", {}, "echo"),
        ("/?b=1&animal=whale", {}, "echo"),
        ("/?animal=whales", {}, "v1"),
        ("/?animal=dog&animal=whale", {}, "v1"),
        ("/", {"x_id": "abc"}, "echo"),
        ("/", {"x_id": "abcz"}, "v1"),
        ("/", {"method": "DELETE"}, "echo"),
        ("/", {"method": "DELETE", "version": "two"}, "echo"),  # method before headers
    ],
)
def test_each_kind_of_match_finds_its_rule(target: str, more: dict[str, str], backend: str) -> None:
    made = plan(MATCHES)
    assert made.problems == ()
    assert ask(made, exchange(target, **more)).backend == backend  # type: ignore[arg-type]


PRECEDENCE = """
- matches: [{path: {type: RegularExpression, value: "/a.*"}}]
  backendRefs: [{name: v1, port: 80}]
- matches: [{path: {type: PathPrefix, value: /a}}]
  backendRefs: [{name: v2, port: 80}]
- matches: [{path: {type: PathPrefix, value: /a/b}}]
  backendRefs: [{name: v1, port: 80}]
- matches: [{path: {type: Exact, value: /a/b}}]
  backendRefs: [{name: echo, port: 80}]
- matches: [{path: {type: PathPrefix, value: /a}, headers: [{name: h, value: x}]}]
  backendRefs: [{name: echo, port: 80}]
- matches: [{path: {type: PathPrefix, value: /a}, queryParams: [{name: q, value: x}]}]
  backendRefs: [{name: v1, port: 80}]
"""


@pytest.mark.parametrize(
    ("target", "headers", "backend"),
    [
        ("/a/b", {}, "echo"),  # exact
        ("/a/b/c", {}, "v1"),  # the longer prefix
        ("/a", {}, "v2"),
        ("/ab", {}, "v1"),  # the expression alone fits
        ("/a", {"h": "x"}, "echo"),
        ("/a?q=x", {}, "v1"),
        ("/a?q=x", {"h": "x"}, "echo"),  # headers before query parameters
        ("/a/b/c", {"h": "x"}, "v1"),  # the path before headers
    ],
)
def test_the_more_specific_match_comes_first(
    target: str, headers: dict[str, str], backend: str
) -> None:
    assert ask(plan(route(PRECEDENCE)), exchange(target, **headers)).backend == backend  # type: ignore[arg-type]


def test_between_equal_matches_the_older_route_wins_then_the_name() -> None:
    one = "- backendRefs: [{name: v1, port: 80}]"
    two = "- backendRefs: [{name: v2, port: 80}]"
    young = route(one, place="shop/a", created="2026-02-01T00:00:00Z")
    old = route(two, place="shop/b", created="2026-01-01T00:00:00Z")
    assert ask(plan(young, old), exchange()).backend == "v2"
    same = route(two, place="shop/b", created="2026-02-01T00:00:00Z")
    assert ask(plan(same, young), exchange()).backend == "v1"


def test_a_request_that_no_rule_takes_is_answered_404() -> None:
    rules = "- matches: [{path: {type: Exact, value: /a}}]\n  backendRefs: [{name: v1, port: 80}]"
    assert ask(plan(route(rules)), exchange("/b")).status == 404


def test_a_service_without_routes_is_sent_to_itself() -> None:
    assert (
        ask(plan(route("- backendRefs: [{name: v1, port: 80}]")), exchange(to="shop/v2")).backend
        == "v2"
    )


def test_weights_hold_over_many_requests() -> None:
    made = plan(
        route("- backendRefs: [{name: v1, port: 80, weight: 70}, {name: v2, port: 80, weight: 30}]")
    )
    rng = random.Random(3)
    drawn = Counter(ask(made, exchange(), rng).backend for _ in range(4000))
    assert drawn["v1"] / 4000 == pytest.approx(0.7, abs=0.03)


def test_all_weights_zero_are_answered_500() -> None:
    made = plan(route("- backendRefs: [{name: v1, port: 80, weight: 0}]"))
    assert ask(made, exchange()).status == 500


def test_a_backend_that_is_not_there_costs_its_share_and_is_told() -> None:
    made = plan(
        route("- backendRefs: [{name: v1, port: 80}, {name: gone, port: 80}, {name: v2, port: 81}]")
    )
    rng = random.Random(3)
    drawn = Counter(ask(made, exchange(), rng).status for _ in range(600))
    assert drawn[500] / 600 == pytest.approx(2 / 3, abs=0.06)
    assert [str(each) for each in made.problems] == [
        "test.yaml: HTTPRoute shop/r: spec.rules[0].backendRefs[1]: there is no Service shop/gone",
        "test.yaml: HTTPRoute shop/r: spec.rules[0].backendRefs[2]: Service shop/v2 has no port 81",
    ]
    assert {each.reason for each in made.problems} == {"BackendNotFound"}


GRANT = """
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: g, namespace: other}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]
  to: [{group: "", kind: Service, name: NAME}]
"""


@pytest.mark.parametrize(("name", "status"), [("far", 0), ("near", 500), ("''", 0)])
def test_another_namespaces_backend_needs_a_reference_grant(name: str, status: int) -> None:
    text = route("- backendRefs: [{name: far, namespace: other, port: 80}]")
    assert ask(plan(text), exchange()).status == 500
    assert ask(plan(text, GRANT.replace("NAME", name)), exchange()).status == status


def test_headers_are_set_added_and_removed_by_rule_and_by_backend() -> None:
    made = plan(
        route(
            """
            - filters:
              - type: RequestHeaderModifier
                requestHeaderModifier:
                  set: [{name: X-Set, value: new}]
                  add: [{name: X-Add, value: b}]
                  remove: [X-Gone]
              backendRefs:
              - name: v1
                port: 80
                filters:
                - type: RequestHeaderModifier
                  requestHeaderModifier: {add: [{name: x-backend, value: v1}]}
            """
        )
    )
    asked = exchange(x_set="old", x_add="a", x_gone="1", x_stays="1")
    headers = ask(made, asked).exchange.request.headers
    assert dict(headers.items()) == {
        "x-add": "b",  # the last of both fields
        "x-stays": "1",
        "x-set": "new",
        "x-backend": "v1",
    }
    assert headers.get("x-add") == "a,b"


@pytest.mark.parametrize(
    ("redirect", "target", "location", "status"),
    [
        ("{hostname: example.org}", "/r?q=1", "http://example.org/r?q=1", 302),
        ("{hostname: example.org, statusCode: 301}", "/r", "http://example.org/r", 301),
        ("{statusCode: 303}", "/r", "http://echo/r", 303),
        ("{scheme: https}", "/r", "https://echo/r", 302),
        ("{scheme: https, port: 443}", "/r", "https://echo/r", 302),
        ("{port: 8083}", "/r", "http://echo:8083/r", 302),
        ("{scheme: https, port: 8443}", "/r", "https://echo:8443/r", 302),
        (
            "{path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}",
            "/r/a?q=1",
            "http://echo/new/a?q=1",
            302,
        ),
        ("{path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}", "/r", "http://echo/", 302),
        ("{path: {type: ReplaceFullPath, replaceFullPath: /all}}", "/r/a", "http://echo/all", 302),
    ],
)
def test_redirects_change_what_they_name(
    redirect: str, target: str, location: str, status: int
) -> None:
    made = plan(
        route(
            f"""
            - matches: [{{path: {{type: PathPrefix, value: /r}}}}]
              filters: [{{type: RequestRedirect, requestRedirect: {redirect}}}]
            """
        )
    )
    assert made.problems == ()
    answer = ask(made, exchange(target))
    assert (answer.location, answer.status) == (location, status)


def test_a_redirect_keeps_the_port_that_was_dialed_unless_told() -> None:
    made = plan(route("- filters: [{type: RequestRedirect, requestRedirect: {statusCode: 301}}]"))
    assert ask(made, exchange("/a", port=8080)).location == "http://echo:8080/a"


@pytest.mark.parametrize(
    ("path", "target", "expected"),
    [
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /one}", "/p/two?q=1", "/one/two?q=1"),
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /}", "/p/three", "/three"),
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /}", "/p", "/"),
        ("{type: ReplacePrefixMatch, replacePrefixMatch: ''}", "/p/", "/"),
        ("{type: ReplacePrefixMatch, replacePrefixMatch: /x/}", "/p/y", "/x/y"),
        ("{type: ReplaceFullPath, replaceFullPath: /full}", "/p/a?q=1", "/full?q=1"),
    ],
)
def test_rewrites_change_the_path(path: str, target: str, expected: str) -> None:
    made = plan(
        route(
            f"""
            - matches: [{{path: {{type: PathPrefix, value: /p}}}}]
              filters: [{{type: URLRewrite, urlRewrite: {{hostname: new.example, path: {path}}}}}]
              backendRefs: [{{name: v1, port: 80}}]
            """
        )
    )
    head = ask(made, exchange(target)).exchange.request
    assert (head.path, head.authority) == (expected, "new.example")


def test_mirrors_take_their_percentage() -> None:
    made = plan(
        route(
            """
            - filters:
              - type: RequestMirror
                requestMirror: {backendRef: {name: v2, port: 80}, percent: 25}
              - type: RequestMirror
                requestMirror: {backendRef: {name: gone, port: 80}}
              backendRefs: [{name: v1, port: 80}]
            """
        )
    )
    rng = random.Random(5)
    mirrors = [len(ask(made, exchange(), rng).answer.mirrors) for _ in range(2000)]
    assert sum(mirrors) / 2000 == pytest.approx(0.25, abs=0.03)


CONSUMER = "{kind: Service, group: '', name: echo, namespace: shop}"


def test_a_consumers_route_holds_for_clients_of_its_namespace_alone() -> None:
    producer = route("- backendRefs: [{name: v1, port: 80}]")
    consumer = route(
        "- backendRefs: [{name: echo, namespace: shop, port: 80}]", place="cons/r", parent=CONSUMER
    )
    made = plan(producer, consumer)
    assert made.problems == ()
    assert ask(made, exchange(caller="cons")).backend == "echo"
    assert ask(made, exchange(caller="shop")).backend == "v1"
    assert ask(made, exchange(caller="third")).backend == "v1"


def test_a_parents_port_limits_the_route_to_it() -> None:
    parent = "{kind: Service, group: '', name: echo, port: 80}"
    made = plan(route("- backendRefs: [{name: v1, port: 80}]", parent=parent))
    assert ask(made, exchange(port=80)).backend == "v1"
    assert ask(made, exchange(port=8080)).backend == "echo"


@pytest.mark.parametrize(
    ("rules", "what"),
    [
        ("- {matches: [{path: {type: Prefix, value: /}}]}", "spec.rules[0].matches[0].path.type"),
        ("- {matches: [{path: {value: a}}]}", "spec.rules[0].matches[0].path.value"),
        ("- {match: []}", "spec.rules[0].match: unknown field; meant matches?"),
        (
            "- {matches: [{path: {type: RegularExpression, value: '('}}]}",
            "spec.rules[0].matches[0].path.value: '(' is no RE2 expression",
        ),
        ("- {timeouts: {request: 5}}", "spec.rules[0].timeouts.request"),
        (
            "- {timeouts: {request: 1s, backendRequest: 2s}}",
            "spec.rules[0].timeouts.backendRequest",
        ),
        ("- {filters: [{type: Nonsense}]}", "spec.rules[0].filters[0].type"),
        ("- {filters: [{type: URLRewrite}]}", "spec.rules[0].filters[0].urlRewrite: is missing"),
        (
            "- {filters: [{type: RequestHeaderModifier, requestHeaderModifier: "
            "{set: [{name: Content-Length, value: '5'}]}}]}",
            "set[0].name: content-length is not to be edited",
        ),
    ],
)
def test_a_wrong_route_is_told_by_field_and_the_last_good_one_stays(rules: str, what: str) -> None:
    planner = Planner("shop", "waypoint", sources=())
    good = route("- backendRefs: [{name: v1, port: 80}]")
    plan(good, planner=planner)
    made = plan(route(rules), planner=planner)
    assert len(made.problems) == 1
    assert what in str(made.problems[0])
    assert ask(made, exchange()).backend == "v1"
    assert ask(plan(route(rules)), exchange()).backend == "echo"


LIMIT = """
apiVersion: meshbpf.io/v1alpha1
kind: RateLimit
metadata: {name: two, namespace: shop}
spec: {requests: 2, per: Minute, by: Caller}
"""
LIMITED = """
- filters: [{type: ExtensionRef, extensionRef: {group: meshbpf.io, kind: RateLimit, name: two}}]
  backendRefs: [{name: v1, port: 80}]
"""


def test_a_filter_that_is_not_there_is_not_skipped() -> None:
    made = plan(route(LIMITED))
    assert "there is no RateLimit shop/two" in str(made.problems[0])
    routes = made.services[exchange().destination.service.key].ports[80].producer  # type: ignore[union-attr]
    assert routes.http is not None
    refuses = routes.http.entries[0].rule.filters.extensions[0].on_request(exchange())
    assert isinstance(refuses, Reply)
    assert refuses.status == 500

"""Many destinations under many policies: each object is read once, and stays while it is there."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.l7.authz.source import authorization
from meshbpf.agent.l7.filter import CONTINUE
from meshbpf.agent.l7.memo import Memo
from meshbpf.agent.l7.paths import NormalizePath, PathNormalization
from meshbpf.agent.l7.problem import ObjectError
from meshbpf.agent.l7.registry import SOURCES
from tests.unit.l7.samples import a_connection, a_scope, an_exchange, an_object


def policy(service: str, **spec: Any) -> KubeObject:
    body = {"targetRefs": [{"kind": "Service", "name": service}], **spec}
    return an_object("security.istio.io", "AuthorizationPolicy", f"for-{service}", body)


def test_an_object_is_read_once_and_anew_when_it_changes() -> None:
    seen: list[KubeObject] = []

    def parse(each: KubeObject) -> int:
        seen.append(each)
        if "bad" in each.name:
            raise ObjectError("spec", "bad")
        return len(seen)

    one, bad = an_object("g", "K", "one", {}), an_object("g", "K", "bad", {})
    memo, objects = Memo(), ObjectSet.of([one, bad])
    for _ in range(3):
        memo.turn(objects)
        assert memo.read(one, parse) == 1
        with pytest.raises(ObjectError) as caught:
            memo.read(bad, parse)
    assert seen == [one, bad]
    assert caught.value.field == "spec"
    changed = replace(one, origin="elsewhere")
    memo.turn(ObjectSet.of([changed]))
    assert memo.read(changed, parse) == 3
    assert len(memo._read) == 1  # what is gone is forgotten


def test_a_plan_of_two_hundred_services_takes_less_than_two_seconds() -> None:
    names = [f"s{index}" for index in range(200)]
    mesh = KubeObject(
        ObjectKey("", "ConfigMap", "istio-system", "istio"),
        "v1",
        {"data": {"mesh": "{accessLogFile: /dev/stdout}"}},
    )
    telemetry = an_object(
        "telemetry.istio.io",
        "Telemetry",
        "t",
        {"accessLogging": [{"filter": {"expression": "response.code >= 400"}}]},
    )
    rule = {"to": [{"operation": {"paths": ["/a", "/b/{*}"], "methods": ["GET"]}}]}
    objects = [policy(name, rules=[rule]) for name in names]
    scope = a_scope(mesh, telemetry, *objects)
    before = time.process_time()
    for name in names:
        service = Service(name, "shop", f"{name}.shop.svc.cluster.local")
        filters = [one for source in SOURCES for one in source(replace(scope, service=service))[0]]
        assert len(filters) == 3  # paths, its one policy, telemetry
    assert time.process_time() - before < 2.0


@pytest.mark.parametrize(
    ("aliases", "written", "allowed"),
    [
        ("[]", "cluster.local/ns/shop/sa/web", True),
        ("[]", "mesh.example/ns/shop/sa/web", True),
        ("[]", "old.example/ns/shop/sa/web", False),
        ("[old.example]", "old.example/ns/shop/sa/web", True),
        ("[]", "cluster.local/ns/shop/*", True),
        ("[]", "other/ns/shop/sa/web", False),
        ("[]", "cluster.local/ns/shop/sa/other", False),
    ],
)
def test_trust_domains_of_the_mesh_stand_for_each_other(
    aliases: str, written: str, allowed: bool
) -> None:
    key = ObjectKey("", "ConfigMap", "istio-system", "istio")
    mesh = KubeObject(key, "v1", {"data": {"mesh": f"trustDomainAliases: {aliases}"}})
    rule = {"from": [{"source": {"principals": [written]}}]}
    scope = replace(a_scope(mesh, policy("echo", rules=[rule])), trust_domain="mesh.example")
    (one,), _ = authorization(scope)
    identity = replace(a_connection().caller.identity, trust_domain="mesh.example")  # type: ignore[type-var]
    exchange = an_exchange(connection=a_connection(identity=identity))
    assert (one.on_request(exchange) is CONTINUE) is allowed


def test_the_default_trust_domain_does_not_stand_for_a_mesh_of_another_one() -> None:
    """A policy for the mesh's own domain says nothing of a stranger under cluster.local."""
    rule = {"from": [{"source": {"principals": ["mesh.example/ns/shop/sa/web"]}}]}
    scope = replace(a_scope(policy("echo", rules=[rule])), trust_domain="mesh.example")
    (one,), _ = authorization(scope)
    assert one.on_request(an_exchange()) is not CONTINUE


def test_the_mesh_configuration_says_how_far_paths_are_rewritten() -> None:
    key = ObjectKey("", "ConfigMap", "istio-system", "istio")
    text = "pathNormalization: {normalization: MERGE_SLASHES}"
    for given, level in (
        (text, "MERGE_SLASHES"),
        ("pathNormalization: {normalization: X}", "BASE"),
    ):
        mesh = KubeObject(key, "v1", {"data": {"mesh": given}})
        filters, problems = SOURCES[0](a_scope(mesh))
        assert isinstance(filters[0], NormalizePath)
        assert filters[0]._level is PathNormalization(level)
        assert bool(problems) is (given is not text)


def test_a_policy_that_goes_bad_stays_as_it_was_until_it_is_good_or_gone() -> None:
    good = policy("echo", action="DENY", rules=[{"to": [{"operation": {"paths": ["/a"]}}]}])
    bad = policy("echo", action="DENY", rules=[{"to": [{"operation": {"pathz": ["/a"]}}]}])
    scope = a_scope(good)

    def passes(path: str, *objects: KubeObject) -> tuple[bool, int]:
        changed = replace(scope, objects=ObjectSet.of(objects))
        filters, problems = authorization(changed)
        allowed = all(f.on_request(an_exchange(path=path)) is CONTINUE for f in filters)
        return allowed, len(problems)

    assert passes("/a", good) == (False, 0)
    assert passes("/a", bad) == (False, 1)
    assert passes("/b", bad) == (True, 1)
    assert passes("/a") == (True, 0)
    # Gone and back as a bad one, it never was good: closed.
    assert passes("/b", bad) == (False, 1)

"""A cluster over time: what becomes of an object that turns bad."""

from __future__ import annotations

from meshbpf.agent.core.kube_state import ClusterState
from meshbpf.agent.core.objects import ObjectKey
from tests.unit.core.kube import BY_HAND, POD, objects

DENY = """\
    apiVersion: security.istio.io/v1
    kind: AuthorizationPolicy
    metadata: {name: p, namespace: shop}
    spec: {action: DENY, rules: [{to: [{operation: {ports: ["80"]}}]}]}
    """
KEY = ObjectKey("security.istio.io", "AuthorizationPolicy", "shop", "p")


def test_an_object_that_turns_bad_keeps_its_last_good_form_and_the_rest_moves_on() -> None:
    state = ClusterState(BY_HAND)
    good = state.update(objects(POD, DENY))
    assert good.problems == ()
    broken = DENY.replace('"80"', "http")
    after = state.update(objects(POD, POD.replace("web-0", "web-1"), broken))
    assert after.translation.state.policies == good.translation.state.policies
    assert len(after.translation.state.workloads) == 2
    assert after.broken == {KEY}
    (problem,) = after.problems
    assert str(problem).endswith("'http' is not a port (its last good form stays in force)")
    # Again, and still: what was kept once is what is kept.
    assert state.update(objects(broken)).translation.state.policies == (
        good.translation.state.policies
    )


def test_a_bad_object_that_is_removed_is_gone() -> None:
    state = ClusterState(BY_HAND)
    state.update(objects(DENY))
    state.update(objects(DENY.replace('"80"', "http")))
    gone = state.update(objects(POD))
    assert (gone.translation.state.policies, gone.problems) == ((), ())


def test_a_policy_that_was_never_good_fails_closed() -> None:
    found = ClusterState(BY_HAND).update(objects(DENY.replace('"80"', "http")))
    (policy,) = found.translation.state.policies
    assert policy.inexpressible == ("spec.rules[0].to[0].operation.ports[0]: 'http' is not a port")

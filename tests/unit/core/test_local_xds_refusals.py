"""LOCAL_XDS: everything that is wrong is refused, with its line and its field."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.errors import ConfigError, Exit
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.store import Snapshot

BASE = """\
workloads:
- uid: u1
  name: a
  namespace: ns
  workloadIps: [10.0.0.1, 10.0.0.2]
  services:
    ns/web.local:
      80: 8080
- uid: u2
  name: b
  namespace: ns
  workloadIps:
  - 10.0.0.3
services:
- name: web
  namespace: ns
  hostname: web.local
  vips: [/10.9.0.1]
  ports: {80: 8080}
- name: api
  namespace: ns
  hostname: api.local
  vips:
  - /10.9.0.2
  ports: {80: 8080}
policies:
- name: p
  namespace: ns
  scope: Namespace
  action: Deny
  rules:
  - - - principals: [!Exact td/ns/a/sa/b]
        sourceIps: [10.0.0.0/8]
        destinationPorts: [80]
- name: q
  namespace: ns
  scope: WorkloadSelector
  action: Allow
  dryRun: false
  rules: []
"""

# (what is replaced, by what, line, field and message)
WRONG = [
    # keys
    ("uid: u1", "uuid: u1", "2: workloads[0].uuid: unknown key"),
    ("workloads:\n", "workload:\n", "1: workload: unknown key"),
    ("destinationPorts", "destinationPort", "34: policies[0].rules[0][0][0].destinationPort: unk"),
    ("ports: {80: 8080}\npolicies", "port: {}\npolicies", "25: services[1].port: unknown key"),
    ("name: b", "name: b\n  name: c", "11: workloads[1].name: given at line 10 already"),
    (
        "      80: 8080\n-",
        "      80: 8080\n      80: 1\n-",
        "9: workloads[0].services[ns/web.local]",
    ),
    ("ports: {80: 8080}\n- name: api", "ports: {80: 1, 80: 2}\n- name: api", "19: services[0].por"),
    ("  name: a\n  namespace: ns", "  name: a", "2: workloads[0]: namespace is missing"),
    ("  workloadIps:\n  - 10.0.0.3\n", "", "9: workloads[1]: workloadIps is missing"),
    ("  scope: Namespace\n", "", "27: policies[0]: scope is missing"),
    ("  rules: []\n", "", "35: policies[1]: rules is missing"),
    ("  hostname: web.local\n", "", "15: services[0]: hostname is missing"),
    ("- uid: u2\n  name: b\n", "- node: x\n", "9: workloads[1]: uid is missing, and there is no n"),
    # addresses
    ("10.0.0.1, 10.0.0.2", "10.0.0.1, 10.0.0.x", "5: workloads[0].workloadIps[1]: '10.0.0.x' is"),
    ("- 10.0.0.3", "- 10.0.0.3/32", "13: workloads[1].workloadIps[0]: '10.0.0.3/32' is not an IP"),
    ("- 10.0.0.3", "- fe80::1%eth0", "13: workloads[1].workloadIps[0]: 'fe80::1%eth0' has a scope"),
    ("- 10.0.0.3", "- 0.0.0.0", "13: workloads[1].workloadIps[0]: '0.0.0.0' is no host's own"),
    ("- 10.0.0.3", "- ff02::1", "13: workloads[1].workloadIps[0]: 'ff02::1' is no host's own"),
    ("- 10.0.0.3", "- [10.0.0.3]", "13: workloads[1].workloadIps[0]: expected a text, found a li"),
    ("- 10.0.0.3", "-", "13: workloads[1].workloadIps[0]: expected a text, found nothing"),
    ("[10.0.0.1, 10.0.0.2]", "10.0.0.1", "5: workloads[0].workloadIps: expected a list, found '1"),
    ("- /10.9.0.2", "- 10.9.0.2", "24: services[1].vips[0]: '10.9.0.2' is not NETWORK/IP"),
    ("- /10.9.0.2", "- /10.9.0.2/32", "24: services[1].vips[0]: '10.9.0.2/32' is not an IP addre"),
    ("10.0.0.0/8", "10.0.0.0/33", "33: policies[0].rules[0][0][0].sourceIps[0]: '10.0.0.0/33' is"),
    ("10.0.0.0/8", "10.0.0.0/255.0.0.0", "33: policies[0].rules[0][0][0].sourceIps[0]: '10.0.0.0"),
    ("10.0.0.0/8", "'::ffff:10.0.0.0/104'", "33: policies[0].rules[0][0][0].sourceIps[0]: '::ff"),
    ("10.0.0.0/8", "10.0.0/8", "33: policies[0].rules[0][0][0].sourceIps[0]: '10.0.0/8' is not a"),
    # ports and other numbers
    (
        "      80: 8080",
        "      80: 65536",
        "8: workloads[0].services[ns/web.local][80]: 65536 is no",
    ),
    (
        "      80: 8080",
        "      80: 0",
        "8: workloads[0].services[ns/web.local][80]: 0 is not betwee",
    ),
    (
        "      80: 8080",
        "      0: 8080",
        "8: workloads[0].services[ns/web.local][0]: 0 is not betwee",
    ),
    ("      80: 8080", "      80: -1", "8: workloads[0].services[ns/web.local][80]: '-1' is not a"),
    (
        "      80: 8080",
        "      80: 0x50",
        "8: workloads[0].services[ns/web.local][80]: '0x50' is no",
    ),
    (
        "      80: 8080",
        "      http: 8080",
        "8: workloads[0].services[ns/web.local][http]: 'http' is",
    ),
    (
        "      80: 8080",
        "      80: 8080.0",
        "8: workloads[0].services[ns/web.local][80]: '8080.0' is",
    ),
    ("Ports: [80]", "Ports: [0]", "34: policies[0].rules[0][0][0].destinationPorts[0]: 0 is not b"),
    ("name: b", "name: b\n  capacity: 4294967296", "11: workloads[1].capacity: 4294967296 is not"),
    # names of things
    ("scope: Namespace", "scope: Everywhere", "29: policies[0].scope: 'Everywhere' is none of Glo"),
    ("action: Deny", "action: DENY", "30: policies[0].action: 'DENY' is none of Allow, Deny"),
    ("name: b", "name: b\n  protocol: hbone", "11: workloads[1].protocol: 'hbone' is none of TCP,"),
    ("name: b", "name: b\n  status: Sick", "11: workloads[1].status: 'Sick' is none of"),
    ("name: b", "name: b\n  networkMode: Host", "11: workloads[1].networkMode: 'Host' is none of"),
    ("dryRun: false", "dryRun: 'false'", "39: policies[1].dryRun: expected true or false, found '"),
    ("dryRun: false", "dryRun: no", "39: policies[1].dryRun: expected true or false, found 'no'"),
    (
        "name: b",
        "name: b\n  nativeTunnel: 1",
        "11: workloads[1].nativeTunnel: expected true or fal",
    ),
    (
        "name: b",
        "name: b\n  serviceAccount: a/b",
        "11: workloads[1].serviceAccount: 'a/b' cannot b",
    ),
    ("name: b\n  namespace: ns", "name: b\n  namespace: n s", "11: workloads[1].namespace: 'n s'"),
    ("name: b", "name: b\n  trustDomain: a b", "11: workloads[1].trustDomain: 'a b' cannot be a"),
    ("ns/web.local:", "web.local:", "7: workloads[0].services[web.local]: 'web.local' is not NAME"),
    ("hostname: api.local", "hostname: ''", "22: services[1].hostname: must not be empty"),
    (
        "name: b",
        "name: b\n  networkGateway: {destination: ns/g, hboneMtlsPort: 15008}",
        "11: workloads[1].networkGateway.destination: nothing in this file is ns/g",
    ),
    (
        "name: b",
        "name: b\n  applicationTunnel: {protocol: HTTP, port: 1}",
        "11: workloads[1].applicationTunnel.protocol: 'HTTP' is none of NONE, PROXY",
    ),
    (
        "name: b",
        "name: b\n  applicationTunnel: {protocol: PROXY, port: 0}",
        "11: workloads[1].applicationTunnel.port: ",
    ),
    # policies
    ("!Exact td", "!Glob td", "32: policies[0].rules[0][0][0].principals[0]: expected one of !Ex"),
    ("!Exact td", "td", "32: policies[0].rules[0][0][0].principals[0]: expected one of !Exact"),
    ("!Exact td", "!Exact spiffe://td", "32: policies[0].rules[0][0][0].principals[0]: 'spiffe:/"),
    ("!Exact td/ns/a/sa/b", "!Presence [x]", "32: policies[0].rules[0][0][0].principals[0]: Pres"),
    ("!Exact td/ns/a/sa/b", "{Exact: a, Prefix: b}", "32: policies[0].rules[0][0][0].principals["),
    ("!Exact td/ns/a/sa/b", "{exact: a}", "32: policies[0].rules[0][0][0].principals[0].exact: un"),
    (
        "[80]\n- name: q",
        "[80]\n  - - []\n    - - []\n- name: q",
        "36: policies[0].rules[1][1][0]: expected a mapping, found a list",
    ),
    (
        "[80]\n- name: q",
        "[80]\n  - - destinationPorts: [1]\n- name: q",
        "35: policies[0].rules[1][0]: expected a list, found a mapping",
    ),
    (
        "!Exact td/ns/a/sa/b",
        "!Exact ",
        "32: policies[0].rules[0][0][0].principals[0]: expected a t",
    ),
    (
        "namespace: ns\n  scope: W",
        "namespace: ''\n  scope: W",
        "36: policies[1].namespace: must no",
    ),
    # twice the same
    ("uid: u2", "uid: u1", "9: workloads[1].uid: uid 'u1' is in the record at line 2 already"),
    ("- 10.0.0.3", "- 10.0.0.2", "13: workloads[1].workloadIps[0]: address 10.0.0.2 is in the re"),
    ("- 10.0.0.3", "- ::ffff:10.0.0.2", "13: workloads[1].workloadIps[0]: address 10.0.0.2 is in"),
    ("10.0.0.1, 10.0.0.2", "10.0.0.1, 10.0.0.1", "5: workloads[0].workloadIps[1]: address 10.0."),
    ("hostname: api", "hostname: web", "22: services[1].hostname: service ns/web.local is in the"),
    ("/10.9.0.2", "/10.9.0.1", "24: services[1].vips[0]: virtual address /10.9.0.1 is in the rec"),
    ("- name: q", "- name: p", "35: policies[1].name: policy ns/p is in the record at line 27"),
    # names that nothing bears
    ("ns/web.local:", "ns/wep.local:", "8: workloads[0].services[ns/wep.local]: no service in thi"),
    (
        "name: b",
        "name: b\n  authorizationPolicies: [ns/q, ns/gone]",
        "11: workloads[1].authorizationPolicies[1]: no policy in this file is ns/gone",
    ),
    (
        "name: b",
        "name: b\n  authorizationPolicies: [ns/p]",
        "11: workloads[1].authorizationPolicies[0]: policy ns/p has another scope than WorkloadSel",
    ),
    (
        "name: b",
        "name: b\n  waypoint: {destination: ns/gone, hboneMtlsPort: 15008}",
        "11: workloads[1].waypoint.destination: nothing in this file is ns/gone",
    ),
    (
        "name: b",
        "name: b\n  waypoint: {destination: /10.0.0.99, hboneMtlsPort: 15008}",
        "11: workloads[1].waypoint.destination: nothing in this file is /10.0.0.99",
    ),
    (
        "name: api",
        "name: api\n  weightedWaypoints: [{destination: {destination: ns/x}, weight: 1}]",
        "21: services[1].weightedWaypoints[0].destination.destination: nothing in this file is ns/",
    ),
    (
        "name: api",
        "name: api\n  endpoints: {u9: {workloadUid: u9, port: {}, status: Healthy}}",
        "21: services[1].endpoints.u9: no workload in this file has this uid",
    ),
    (
        "name: api",
        "name: api\n  endpoints: {u1: {workloadUid: u2}}",
        "21: services[1].endpoints[u1].workloadUid: 'u2' is not the key under which",
    ),
    # services
    (
        "name: api",
        "name: api\n  subjectAltNames: [api.example]",
        "21: services[1].subjectAltNames[0]: 'api.example' is not a workload identity",
    ),
    (
        "name: api",
        "name: api\n  cidrVips: [{network: '', cidr: 10.0.0.0/99}]",
        "21: services[1].cidrVips[0].cidr: '10.0.0.0/99' is not a CIDR",
    ),
    (
        "name: api",
        "name: api\n  loadBalancer: {routingPreferences: [Region, Region]}",
        "21: services[1].loadBalancer.routingPreferences[1]: this scope is in the list already",
    ),
    (
        "name: api",
        "name: api\n  loadBalancer: {routingPreferences: [Planet]}",
        "21: services[1].loadBalancer.routingPreferences[0]: 'Planet' is none of Region",
    ),
    ("name: api", "name: api\n  ipFamilies: IPv5", "21: services[1].ipFamilies: 'IPv5' is none of"),
    ("name: api", "name: api\n  visibility: Secret", "21: services[1].visibility: 'Secret' is non"),
    (
        "name: api",
        "name: api\n  waypoint: {destination: gone, hboneMtlsPort: 15008}",
        "21: services[1].waypoint.destination: 'gone' is not NETWORK/IP or NAMESPACE/HOSTNAME",
    ),
    (
        "name: api",
        "name: api\n  waypoint: {destination: /10.0.0.999, hboneMtlsPort: 15008}",
        "21: services[1].waypoint.destination: '10.0.0.999' is not an IP address",
    ),
    # YAML itself
    ("- uid: u2", " - uid: u2", "9: not YAML: "),
    ("name: b", "name: *nobody", "10: *nobody names no value"),
    ("name: b", "name: !!binary aGk=\n  node: !weird x", "11: workloads[1].node: expected a text"),
    ("name: b", "? [a, b]\n  : c", "10: a list or mapping cannot be a key here"),
    ("policies:\n", "---\npolicies:\n", "26: a second document begins here"),
]


@pytest.mark.parametrize(("old", "new", "want"), WRONG, ids=[want for _, _, want in WRONG])
def test_refused(old: str, new: str, want: str) -> None:
    parse_local_xds(BASE, "mesh.yaml")  # good before the one change
    text = BASE.replace(old, new, 1)
    assert text != BASE
    with pytest.raises(ConfigError) as caught:
        parse_local_xds(text, "mesh.yaml")
    assert caught.value.what.startswith(f"mesh.yaml:{want}"), caught.value.what
    assert caught.value.exit_status is Exit.CONFIG
    assert caught.value.code in {"bad-local-xds", "bad-yaml"}


def test_a_near_miss_of_a_key_is_pointed_out() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_local_xds(BASE.replace("destinationPorts", "destinationPort"), "mesh.yaml")
    assert caught.value.hint == "did you mean destinationPorts?"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "---\n...\n",
        "just text",
        "- a list",
        "workloads: text",
        "[" * 100_000,
        "{a: " * 10_000,
        "- " * 5_000,
        "a: &a [*a]",
        "\x00",
        "a\x07b",
        "a: \ud800",
        "%YAML 9.9\n---\n{}",
        "? ",
        "<<: {workloads: []}",
        "!!map {}\n--- {}",
    ],
)
def test_what_is_no_such_file_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_local_xds(text, "mesh.yaml")
    assert caught.value.what.startswith("mesh.yaml:")


def test_aliases_cannot_make_a_small_file_large() -> None:
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for previous, name in zip("abcdefghi", "bcdefghij", strict=True):
        text += f"{name}: &{name} [{','.join([f'*{previous}'] * 10)}]\n"
    with pytest.raises(ConfigError, match="more than"):
        parse_local_xds(text, "mesh.yaml")


WORDS = [
    "workloads", "services", "policies", "rules", "uid", "name", "namespace", "workloadIps",
    "ports", "vips", "hostname", "scope", "Global", "action", "Deny", "waypoint", "destination",
    "locality",
    "endpoints", "10.0.0.1", "/10.0.0.1", "ns/h", "80", "!Exact", "!Presence", "principals", "~",
    "&a", "*a", "<<", "{", "}", "[", "]", ":", ": ", "- ", ",", "\n", "\n  ", "'", '"', "|", ">",
    "?", "#", "---", "...", "%", "!", "0", "-1", "1e9", "true", "null", "\t", "\x85", "\ufeff",
]  # fmt: skip


def refusal(text: str) -> str | None:
    """Why `text` is refused; None when it is taken. Any other exception is a failure."""
    try:
        Snapshot.of(parse_local_xds(text, "mesh.yaml"))
    except ConfigError as error:
        return error.what
    return None


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=40).map("".join)
    | st.text(alphabet=string.printable)
)
@example("workloads: [{}]")
def test_any_text_is_a_mesh_or_a_config_error(text: str) -> None:
    what = refusal(text)
    assert what is None or (what.startswith("mesh.yaml:") and len(what) < 1000)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(BASE.splitlines()),
    st.sampled_from(WORDS) | st.text(max_size=5),
    st.integers(0, 30),
)
def test_a_good_file_with_one_line_spoilt_is_a_mesh_or_a_config_error(
    line: str, junk: str, position: int
) -> None:
    spoilt = line[:position] + junk + line[position:]
    what = refusal(BASE.replace(line, spoilt))
    assert what is None or what.startswith("mesh.yaml:")

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// What the agent says of a pod, and whether the agent is there to be asked.
#pragma once

#include "keys.h"

INLINE struct pod_config *config_of(u32 pod)
{
    return map_find(MAP_POD_CONFIG, &pod);
}

// Flags of a pod that is attached, 0 of any other.
INLINE u32 pod_flags(u32 pod)
{
    struct pod_config *config = config_of(pod);

    return config ? config->flags : 0;
}

INLINE int is_own_address(u32 pod, const struct address *address)
{
    struct pod_address key = {.pod = pod, .address = *address};

    return map_find(MAP_ADDRESSES, &key) != 0;
}

INLINE int is_exempt_port(u32 pod, u32 flags, u32 port)
{
    struct pod_port key = {.pod = pod, .port = port};

    return (flags & POD_EXEMPT_PORTS) && map_find(MAP_EXEMPT_PORTS, &key);
}

INLINE int is_exempt_address(u32 pod, u32 flags, const struct address *address)
{
    struct pod_prefix key = {.length = 32 + 128, .pod = pod, .address = *address};

    return (flags & POD_EXEMPT_CIDRS) && map_find(MAP_EXEMPT_CIDRS, &key);
}

INLINE int is_in_mesh(const struct address *address)
{
    struct pod_prefix key = {.length = 32 + 128, .pod = 0, .address = *address};

    return map_find(MAP_MESH, &key) != 0;
}

// A hung agent keeps its listeners, and so does one whose listeners sit in a
// service manager's store; only the beat tells. A killed one loses its
// listeners at once, long before the beat is too old.
INLINE int agent_beats(void)
{
    u32 zero = 0;
    struct heartbeat *heart = map_find(MAP_HEARTBEAT, &zero);

    // As a signed age: a beat written on another CPU just after our reading
    // of the clock is young, not ages old.
    return heart && (s64)(bpf_ktime_get_ns() - heart->beat_ns) < (s64)heart->limit_ns;
}

INLINE int lease_is_fresh(void)
{
    u32 zero = 0;
    struct heartbeat *heart = map_find(MAP_HEARTBEAT, &zero);

    return heart && bpf_ktime_get_ns() < heart->lease_until_ns;
}

// A probe's SYNs all refresh its entry; later the address and port may be
// anybody's.
#define PROBE_VALID_NS 10000000000ULL

INLINE int is_probe(const struct flow *flow)
{
    u64 *seen_ns = map_find(MAP_PROBES, flow);

    return seen_ns && (s64)(bpf_ktime_get_ns() - *seen_ns) < (s64)PROBE_VALID_NS;
}

// The caller releases what it gets. Sockhash forgets a listener when it closes.
INLINE struct bpf_sock *find_listener(u32 pod, u16 role, u16 family)
{
    struct listener_key key = {.pod = pod, .role = role, .family = family};

    return map_find(MAP_LISTENERS, &key);
}

// Who answers in a role: a stock proxy holds its listeners itself and needs no
// beat of ours; DNS is the agent's for every pod.
INLINE int is_answered(u32 flags, u16 role)
{
    if ((flags & POD_PROXIED) && role != ROLE_DNS && role != ROLE_DNS_UDP)
        return 1;
    return agent_beats();
}

INLINE int agent_accepts(u32 pod, u32 flags, u16 role, u16 family)
{
    struct bpf_sock *listener;

    if (!is_answered(flags, role))
        return 0;
    listener = find_listener(pod, role, family);
    if (!listener)
        return 0;
    bpf_sk_release(listener);
    return 1;
}

// Whether a DNS query to `resolver` goes to the agent. While none answers the
// pod asks its resolver itself, whatever its mode: names of the mesh are then
// unknown, but every other name works.
INLINE int asks_agent(u32 pod, u32 flags, u16 role, const struct address *resolver)
{
    if (!(flags & POD_DNS))
        return 0;
    if (agent_accepts(pod, flags, role, is_v4(resolver) ? AF_INET : AF_INET6))
        return 1;
    count(DECISION_DNS_DIRECT);
    return 0;
}

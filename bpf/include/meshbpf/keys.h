// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Keys and values of the maps. agent/datapath/codecs.py packs the same bytes;
// sizes are asserted here and compared with the catalogue when maps are made.
#pragma once

#include "base.h"

// An IPv6 address, or an IPv4 one mapped into ::ffff:0:0/96, in network order.
// One form for both families: a prefix, a rule and a flow are written once.
struct address {
    u32 word[4];
};

struct pod_address {
    u32 pod;
    struct address address;
};

struct pod_prefix {
    u32 length; // bits after this field that count: 32 for `pod`, then the prefix
    u32 pod;    // in `mesh` the group, today always 0
    struct address address;
};

struct pod_port {
    u32 pod;
    u32 port; // host order
};

struct pod_interface {
    u32 pod;
    u32 ifindex;
};

struct listener_key {
    u32 pod;
    u16 role;
    u16 family;
};

// As the packet has it, from its sender to its receiver; ports in network order.
struct flow {
    struct address source;
    struct address destination;
    u16 source_port;
    u16 destination_port;
};

struct pod_config {
    u32 flags; // POD_*
    u32 reserved;
};

// All three in CLOCK_MONOTONIC nanoseconds, the clock of bpf_ktime_get_ns().
struct heartbeat {
    u64 beat_ns;        // the agent lived then
    u64 lease_until_ns; // until then 'not in the mesh map' means outside the mesh
    u64 limit_ns;       // an older beat means a dead or hung agent
};

struct pod_counters {
    u64 from_pod_packets;
    u64 from_pod_bytes;
    u64 to_pod_packets;
    u64 to_pod_bytes;
    u64 spoofed_packets;
};

_Static_assert(sizeof(struct pod_address) == 20, "addresses");
_Static_assert(sizeof(struct pod_prefix) == 24, "mesh, exempt_cidrs");
_Static_assert(sizeof(struct pod_port) == 8, "exempt_ports");
_Static_assert(sizeof(struct pod_interface) == 8, "exempt_ifaces");
_Static_assert(sizeof(struct listener_key) == 8, "listeners");
_Static_assert(sizeof(struct flow) == 36, "probes");
_Static_assert(sizeof(struct pod_config) == 8, "pod_config");
_Static_assert(sizeof(struct heartbeat) == 24, "heartbeat");
_Static_assert(sizeof(struct pod_counters) == 40, "pod_counters");

#define V4_MAPPED_WORD bpf_htonl(0xffff)

INLINE void map_v4(struct address *to, u32 ip)
{
    to->word[0] = 0;
    to->word[1] = 0;
    to->word[2] = V4_MAPPED_WORD;
    to->word[3] = ip;
}

INLINE int is_v4(const struct address *a)
{
    return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == V4_MAPPED_WORD;
}

// 127.0.0.0/8 and ::1, and 0.0.0.0 and ::, which connect() takes for them.
INLINE int is_loopback(const struct address *a)
{
    if (a->word[0] | a->word[1])
        return 0;
    if (a->word[2] == V4_MAPPED_WORD)
        return a->word[3] == 0 || (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
    return a->word[2] == 0 && (a->word[3] == 0 || a->word[3] == bpf_htonl(1));
}

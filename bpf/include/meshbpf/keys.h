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
    u64 cookie; // of its netns: no other ever has it, while its index may go to another pod
    // What the kernel will most likely choose for an unbound socket; 0 where there is none.
    struct address source_v4;
    struct address source_v6;
};

// All that policy can read of a connection. The agent writes an element only
// where its own decision functions allow the connection.
struct verdict_key {
    u32 source;      // index of the attested pod; 0: an address, which proves nothing
    u32 destination; // index
    struct address source_address;
    struct address destination_address;
    u32 port; // host order
};

struct verdict_value {
    u64 source_epoch; // 0 where there is no source
    u64 destination_epoch;
    u32 slot; // of its counters
    u32 reserved;
};

// What one pod gets for one address and port of a service. The agent fills it where a
// connection needs no other decision than the endpoint: `below` adds up the weights of
// those endpoints that the kernel may carry to; a draw beyond the last is the agent's
// to pick among the others.
struct service_key {
    u32 pod;  // that dials
    u32 port; // host order
    struct address address;
};

struct service_choice {
    u32 below; // a draw less than this, and not less than the one before
    u32 port;  // host order
    u32 slot;  // of the counters of connections that are made by this service
    u32 reserved;
    struct address address;
};

struct service_choices {
    u64 epoch; // of the pod that dials, when they were written
    u32 total; // weight of all endpoints
    u32 count; // of the choices
    struct service_choice choices[MAX_CHOICES];
};

// What the application dialed, on a socket that was led to an endpoint.
struct dialed {
    struct address address;
    u32 port; // host order
    u32 slot;
};

// A connection that the kernel carries, from before its SYN to its end. Each
// byte flag has one writer, so that none needs an atomic.
struct flow_state {
    u64 source_cookie; // of the source pod's netns, 0 in plaintext
    u64 socket_cookie; // of the end that we watch: the client, in plaintext the server
    u64 opened_ns;
    u64 received_at_fin; // what our end had received when its FIN was acknowledged
    u32 source;          // pod index, 0 in plaintext
    u32 destination;
    u32 slot;
    u32 client_isn; // network order, as the next
    u32 server_isn;
    u8 syn_sent; // by the source pod's veth, under client_isn
    u8 syn_came; // to the destination pod's veth, under the same
    u8 answered; // by the destination pod's veth, under server_isn
    u8 carried;  // the destination's sk_lookup left it to the kernel
    u8 open;     // it was established
    u8 reserved[7];
};

// Of one pair of workloads, in the terms of Istio's metrics.
struct flow_slot {
    u64 opened;
    u64 closed;
    u64 failed;   // ended before they were established
    u64 sent;     // bytes from source to destination, of connections that are closed
    u64 received; // bytes from destination to source
};

struct flow_quota {
    u64 records; // that may be queued until the agent comes by again
    u64 records_dropped;
    u64 reports_lost; // the queue was full: the agent must look at everything
};

// A connection that has ended, for the access log.
struct flow_record {
    struct flow flow;
    u32 slot;
    u64 opened_ns;
    u64 closed_ns;
    u64 sent;
    u64 received;
    u32 failed;
    u32 reserved;
};

// A connection that was established without a verdict that holds now.
struct flow_report {
    struct flow flow;
    u32 reason; // REPORT_*
    u64 socket_cookie;
    u32 source;
    u32 destination;
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
_Static_assert(sizeof(struct pod_config) == 48, "pod_config");
_Static_assert(sizeof(struct verdict_key) == 44, "verdicts");
_Static_assert(sizeof(struct verdict_value) == 24, "verdicts");
_Static_assert(sizeof(struct service_key) == 24, "services");
_Static_assert(sizeof(struct service_choices) == 16 + 32 * MAX_CHOICES, "services");
_Static_assert(sizeof(struct dialed) == 24, "dialed");
_Static_assert(sizeof(struct flow_state) == 64, "flows");
_Static_assert(sizeof(struct flow_slot) == 40, "flow_slots");
_Static_assert(sizeof(struct flow_quota) == 24, "flow_quota");
_Static_assert(sizeof(struct flow_record) == 80, "flow_records");
_Static_assert(sizeof(struct flow_report) == 56, "flow_reports");
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

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: TC egress of the host's end of the pod's veth, one instance per pod.
// Runs for every packet towards the pod, outside the pod's reach.
// Does: counts; drops the SYNs and SYN-ACKs of handshakes that the kernel carries
// unless they are those that left by the other pod's veth; and notes the SYNs that a probing host
// process (the kubelet) sends, so that sk_lookup in the pod leaves such a connection alone. Only
// packets of this host's own sockets have a socket here: a forwarded packet
// cannot pass for a probe.
// Reads: headers, skb->sk, the socket's cgroup.
// Maps: probe_cgroups, flows; writes probes, pod_counters, flows, decisions.
// Returns: GO_ON or TC_ACT_SHOT.
// Budget: 4096 verified instructions.

#include <meshbpf/carry.h>
#include <meshbpf/packet.h>

// The kubelet may sit some levels below the cgroup that was named.
#define MAX_LEVELS 8

INLINE int is_probe_cgroup(u64 id)
{
    return id && map_find(MAP_PROBE_CGROUPS, &id);
}

INLINE int from_prober(struct __sk_buff *skb)
{
    int level;

    if (is_probe_cgroup(bpf_skb_cgroup_id(skb)))
        return 1;
#pragma unroll
    for (level = 1; level < MAX_LEVELS; level++) {
        if (is_probe_cgroup(bpf_skb_ancestor_cgroup_id(skb, level)))
            return 1;
    }
    return 0;
}

// Whether a SYN or SYN-ACK is part of a handshake that the kernel carries, and
// is not the one that left by the other pod's veth: somebody else answers or
// speaks for that pod.
INLINE int is_foreign(const struct packet *p, u32 pod)
{
    struct flow_state *state;
    struct flow request = {};

    if (is_opening(p)) {
        state = map_find(MAP_FLOWS, &p->flow);
        if (!state || !state->source || state->destination != pod)
            return 0;
        if (!state->syn_sent || state->client_isn != p->sequence)
            return 1;
        state->syn_came = 1;
    } else if (is_answer(p)) {
        turn(&request, &p->flow);
        state = map_find(MAP_FLOWS, &request);
        if (!state || state->source != pod)
            return 0;
        return !state->answered || state->server_isn != p->sequence;
    }
    return 0;
}

int host_egress(struct __sk_buff *skb)
{
    struct packet packet = {};
    u32 pod = this_pod();
    struct pod_counters *counters = map_find(MAP_POD_COUNTERS, &pod);
    u64 now_ns;

    if (counters) {
        counters->to_pod_packets += 1;
        counters->to_pod_bytes += skb->len;
    }
    if (!(usual_flags(skb, protocol_of(skb)) & (TCP_SYN | UNUSUAL)))
        return GO_ON;
    if (read_packet(skb, &packet) != TCP)
        return GO_ON;
    if (is_foreign(&packet, pod)) {
        count(DECISION_SPOOFED_HANDSHAKE);
        return TC_ACT_SHOT;
    }
    if (!skb->sk || !is_opening(&packet) || !from_prober(skb))
        return GO_ON;
    now_ns = bpf_ktime_get_ns();
    map_put(MAP_PROBES, &packet.flow, &now_ns);
    count(DECISION_PROBE_MARKED);
    return GO_ON;
}

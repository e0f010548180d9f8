// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: TC egress of the host's end of the pod's veth, one instance per pod.
// Runs for every packet towards the pod, outside the pod's reach.
// Does: counts; and notes the SYNs that a probing host process (the kubelet)
// sends, so that sk_lookup in the pod leaves such a connection alone. Only
// packets of this host's own sockets have a socket here: a forwarded packet
// cannot pass for a probe.
// Reads: headers, skb->sk, the socket's cgroup.
// Maps: probe_cgroups; writes probes, pod_counters, decisions.
// Returns: GO_ON, always.
// Budget: 4096 verified instructions.

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
    if (!skb->sk)
        return GO_ON;
    if (read_packet(skb, &packet) != TCP || !is_opening(&packet))
        return GO_ON;
    if (!from_prober(skb))
        return GO_ON;
    now_ns = bpf_ktime_get_ns();
    map_put(MAP_PROBES, &packet.flow, &now_ns);
    count(DECISION_PROBE_MARKED);
    return GO_ON;
}

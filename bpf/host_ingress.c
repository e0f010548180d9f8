// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: TC ingress of the host's end of the pod's veth, one instance per pod.
// Runs for every packet that the pod sent, outside the pod's reach.
// Does: counts, and drops IP packets whose source is not an address of the pod:
// the far side may then take a source address for a statement about the pod.
// ARP is left alone, and so is what IPv6 needs before and beside addresses: the
// unspecified source of duplicate address detection, link-local sources, and in
// IPv4 a DHCP client.
// Of a handshake that the kernel carries it notes under which sequence number it
// left by this veth.
// Reads: IP and TCP headers.
// Maps: addresses, pod_config; writes pod_counters, flows, decisions.
// Returns: GO_ON or TC_ACT_SHOT.
// Budget: 4096 verified instructions.

#include <meshbpf/carry.h>
#include <meshbpf/packet.h>

#define DHCP_SERVER_PORT 67

INLINE int is_dhcp_request(struct __sk_buff *skb, const struct iphdr *ip)
{
    u16 port = 0;

    if (ip->saddr != 0 || ip->protocol != IPPROTO_UDP)
        return 0;
    if (bpf_skb_load_bytes(skb, ETH_HLEN + ip->ihl * 4 + 2, &port, sizeof(port)))
        return 0;
    return port == bpf_htons(DHCP_SERVER_PORT);
}

INLINE int may_send_v4(struct __sk_buff *skb, u32 pod)
{
    struct iphdr ip;
    struct address source;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
        return 0;
    map_v4(&source, ip.saddr);
    return is_own_address(pod, &source) || is_dhcp_request(skb, &ip);
}

INLINE int may_send_v6(struct __sk_buff *skb, u32 pod)
{
    struct ipv6hdr ip;
    struct address source;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
        return 0;
    __builtin_memcpy(&source, &ip.saddr, 16);
    if ((source.word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
        return 1;
    if (!(source.word[0] | source.word[1] | source.word[2] | source.word[3]))
        return 1;
    return is_own_address(pod, &source);
}

INLINE void note_handshake(struct __sk_buff *skb, u32 pod)
{
    struct packet packet = {};
    struct flow_state *state;
    struct flow request = {};

    if (read_packet(skb, &packet) != TCP)
        return;
    if (is_opening(&packet)) {
        state = map_find(MAP_FLOWS, &packet.flow);
        if (!state || state->source != pod)
            return;
        state->client_isn = packet.sequence;
        state->syn_sent = 1;
    } else if (is_answer(&packet)) {
        turn(&request, &packet.flow);
        state = map_find(MAP_FLOWS, &request);
        if (!state || !state->source || state->destination != pod)
            return;
        state->server_isn = packet.sequence;
        state->answered = 1;
    }
}

// What nearly every packet is: under the pod's first address of its family, and
// no part of a handshake.
INLINE int is_usual(struct __sk_buff *skb, u32 protocol, u32 pod)
{
    u8 *data = (u8 *)(long)skb->data, *end = (u8 *)(long)skb->data_end;
    struct pod_config *config = config_of(pod);

    if (!config || (usual_flags(skb, protocol) & (TCP_SYN | UNUSUAL)))
        return 0;
    if (protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = (struct iphdr *)(data + ETH_HLEN);

        if (data + ETH_HLEN + sizeof(struct iphdr) > end)
            return 0;
        return ip->saddr && ip->saddr == config->source_v4.word[3];
    }
    if (protocol == bpf_htons(ETH_P_IPV6)) {
        u32 *source = (u32 *)(data + ETH_HLEN + 8);

        if (data + ETH_HLEN + sizeof(struct ipv6hdr) > end)
            return 0;
        return source[0] && source[0] == config->source_v6.word[0] &&
               source[1] == config->source_v6.word[1] && source[2] == config->source_v6.word[2] &&
               source[3] == config->source_v6.word[3];
    }
    return 0;
}

int host_ingress(struct __sk_buff *skb)
{
    u32 pod = this_pod();
    struct pod_counters *counters = map_find(MAP_POD_COUNTERS, &pod);
    u32 protocol = protocol_of(skb);
    int allowed = 1;

    if (counters) {
        counters->from_pod_packets += 1;
        counters->from_pod_bytes += skb->len;
    }
    if (is_usual(skb, protocol, pod))
        return GO_ON;
    if (protocol == bpf_htons(ETH_P_IP))
        allowed = may_send_v4(skb, pod);
    else if (protocol == bpf_htons(ETH_P_IPV6))
        allowed = may_send_v6(skb, pod);
    if (allowed) {
        if (usual_flags(skb, protocol) & (TCP_SYN | UNUSUAL))
            note_handshake(skb, pod);
        return GO_ON;
    }
    if (!(pod_flags(pod) & POD_ATTACHED))
        return GO_ON;
    if (counters)
        counters->spoofed_packets += 1;
    count(DECISION_SPOOFED_SOURCE);
    return TC_ACT_SHOT;
}

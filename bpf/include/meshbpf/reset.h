// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Turns an outgoing SYN into the RST that refuses it.
//
// Outbound, a dropped SYN is a timeout of minutes for the application. The
// packet is therefore rewritten in place, both ends swapped, and sent back up
// through the interface it was leaving by, so that connect() returns
// ECONNREFUSED at once. The frame keeps its length: the IP header says where
// the segment ends, the receiver trims what was options and data.
#pragma once

#include "packet.h"

#define RESET_TTL 64

INLINE u16 fold(u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

INLINE int swap_macs(struct __sk_buff *skb)
{
    u8 mac[2 * ETH_ALEN], swapped[2 * ETH_ALEN];

    if (bpf_skb_load_bytes(skb, 0, mac, sizeof(mac)))
        return -1;
    __builtin_memcpy(swapped, mac + ETH_ALEN, ETH_ALEN);
    __builtin_memcpy(swapped + ETH_ALEN, mac, ETH_ALEN);
    return bpf_skb_store_bytes(skb, 0, swapped, sizeof(swapped), 0);
}

INLINE int turn_v4(struct __sk_buff *skb, u32 *pseudo_sum)
{
    struct iphdr ip;
    u32 swap;
    u8 options[40] = {};
    u64 options_length;
    s64 sum;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
        return -1;
    swap = ip.saddr;
    ip.saddr = ip.daddr;
    ip.daddr = swap;
    ip.tot_len = bpf_htons(ip.ihl * 4 + sizeof(struct tcphdr));
    ip.ttl = RESET_TTL;
    ip.check = 0;
    sum = bpf_csum_diff(0, 0, &ip, sizeof(ip), 0);
    options_length = (u32)(ip.ihl - 5) * 4;
    // Kernels before 6.8 know a length to be positive from a comparison with a
    // bound alone, in 64 bits, and each such comparison must reach them: clang
    // knows better than to keep the first one, and would fold the two.
    asm volatile("" : "+r"(options_length));
    if (options_length >= 4) {
        asm volatile("" : "+r"(options_length));
        if (options_length > sizeof(options))
            return -1;
        if (bpf_skb_load_bytes(skb, ETH_HLEN + sizeof(ip), options, options_length))
            return -1;
        sum = bpf_csum_diff(0, 0, options, sizeof(options), sum);
    }
    ip.check = fold(sum);
    *pseudo_sum = bpf_csum_diff(0, 0, &ip.saddr, 8, 0);
    return bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), BPF_F_INVALIDATE_HASH);
}

INLINE int turn_v6(struct __sk_buff *skb, const struct packet *p, u32 *pseudo_sum)
{
    struct ipv6hdr ip;
    struct in6_addr swap;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
        return -1;
    swap = ip.saddr;
    ip.saddr = ip.daddr;
    ip.daddr = swap;
    ip.payload_len = bpf_htons(p->tcp_offset - ETH_HLEN - sizeof(ip) + sizeof(struct tcphdr));
    ip.hop_limit = RESET_TTL;
    *pseudo_sum = bpf_csum_diff(0, 0, &ip.saddr, 32, 0);
    return bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), BPF_F_INVALIDATE_HASH);
}

// Returns the TC action. What cannot be rewritten is dropped: it must not leave.
INLINE int refuse(struct __sk_buff *skb, const struct packet *p)
{
    struct tcphdr tcp = {};
    struct {
        u32 length;
        u32 protocol;
    } pseudo = {bpf_htonl(sizeof(tcp)), bpf_htonl(IPPROTO_TCP)};
    u32 sum = 0;

    if (swap_macs(skb))
        return TC_ACT_SHOT;
    if (p->is_v6 ? turn_v6(skb, p, &sum) : turn_v4(skb, &sum))
        return TC_ACT_SHOT;
    tcp.source = p->flow.destination_port;
    tcp.dest = p->flow.source_port;
    tcp.ack_seq = bpf_htonl(bpf_ntohl(p->sequence) + 1);
    ((u8 *)&tcp)[12] = sizeof(tcp) / 4 << 4;
    ((u8 *)&tcp)[13] = TCP_RST | TCP_ACK;
    sum = bpf_csum_diff(0, 0, &pseudo, sizeof(pseudo), sum);
    tcp.check = fold((u32)bpf_csum_diff(0, 0, &tcp, sizeof(tcp), sum));
    if (bpf_skb_store_bytes(skb, p->tcp_offset, &tcp, sizeof(tcp), BPF_F_INVALIDATE_HASH))
        return TC_ACT_SHOT;
    return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Finds the TCP header of an Ethernet frame at a TC hook. bpf_skb_load_bytes()
// reads frames whose headers are not linear too, as raw sockets and forwarding
// make them; direct access would need a pull for those.
#pragma once

#include "keys.h"

#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>
#include <uapi/linux/tcp.h>
#include <uapi/linux/udp.h>

// "Not mine": the next program of the interface runs, be it tcx or clsact. With
// TC_ACT_OK we would switch off those of a CNI that come after ours.
#define GO_ON TC_ACT_UNSPEC

#define IPV4_FRAGMENT bpf_htons(0x3fff) // more fragments, or an offset
#define IPV6_FRAGMENT bpf_htons(0xfff9)
#define MAX_EXTENSIONS 6 // more than RFC 8200 ever allows in one packet

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum kind {
    NOT_TCP, // and not IP
    UDP,     // whole, with addresses and ports filled
    TCP,     // all of struct packet is filled
    // A fragment, or more extension headers than anyone sends: there may be
    // TCP in it. Only the addresses of struct packet are filled.
    OPAQUE,
};

struct packet {
    struct flow flow;
    u32 tcp_offset; // of UDP's header, if it is UDP
    u32 end;        // of the IP packet, from the start of the frame
    u32 sequence;   // network order
    u8 flags;       // TCP_*
    u8 is_v6;
    u8 has_data; // of IPv4 and of IPv6 alike
};

// Of these two, TCP and UDP mean that there is such a header at tcp_offset, not read yet.
INLINE enum kind find_v4(struct __sk_buff *skb, struct packet *p)
{
    struct iphdr ip;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)) || ip.ihl < 5)
        return NOT_TCP;
    map_v4(&p->flow.source, ip.saddr);
    map_v4(&p->flow.destination, ip.daddr);
    p->is_v6 = 0;
    p->tcp_offset = ETH_HLEN + ip.ihl * 4;
    p->end = ETH_HLEN + bpf_ntohs(ip.tot_len);
    if (ip.protocol == IPPROTO_UDP && !(ip.frag_off & IPV4_FRAGMENT))
        return UDP;
    if (ip.protocol != IPPROTO_TCP)
        return NOT_TCP;
    return ip.frag_off & IPV4_FRAGMENT ? OPAQUE : TCP;
}

INLINE enum kind find_v6(struct __sk_buff *skb, struct packet *p)
{
    struct ipv6hdr ip;
    u32 offset = ETH_HLEN + sizeof(ip);
    u8 next;
    int i;

    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof(ip)))
        return NOT_TCP;
    __builtin_memcpy(&p->flow.source, &ip.saddr, 16);
    __builtin_memcpy(&p->flow.destination, &ip.daddr, 16);
    p->is_v6 = 1;
    p->end = ETH_HLEN + sizeof(ip) + bpf_ntohs(ip.payload_len);
    next = ip.nexthdr;
    p->tcp_offset = offset;
    if (next == IPPROTO_UDP)
        return UDP;
#pragma clang loop unroll(disable)
    for (i = 0; i < MAX_EXTENSIONS && next != IPPROTO_TCP; i++) {
        u8 extension[4];

        if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
            next != IPPROTO_FRAGMENT)
            return NOT_TCP;
        if (bpf_skb_load_bytes(skb, offset, extension, sizeof(extension)))
            return OPAQUE;
        if (next == IPPROTO_FRAGMENT && (*(u16 *)&extension[2] & IPV6_FRAGMENT))
            return OPAQUE;
        // Others have their length here, in units of 8 beyond the first.
        offset += next == IPPROTO_FRAGMENT ? 8 : (extension[1] + 1) * 8;
        next = extension[0];
    }
    p->tcp_offset = offset;
    return next == IPPROTO_TCP ? TCP : OPAQUE;
}

// Without this clang computes an offset into the context that it keeps for the
// next time; of a context the verifier refuses that.
INLINE u32 protocol_of(struct __sk_buff *skb)
{
    u32 protocol;

    asm volatile("%0 = *(u32 *)(%1 + %2)"
                 : "=r"(protocol)
                 : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, protocol)));
    return protocol;
}

INLINE enum kind read_packet(struct __sk_buff *skb, struct packet *p)
{
    u32 protocol = protocol_of(skb);
    enum kind kind = NOT_TCP;
    struct tcphdr tcp;

    if (protocol == bpf_htons(ETH_P_IP))
        kind = find_v4(skb, p);
    else if (protocol == bpf_htons(ETH_P_IPV6))
        kind = find_v6(skb, p);
    if (kind == UDP) {
        struct udphdr udp;

        if (bpf_skb_load_bytes(skb, p->tcp_offset, &udp, sizeof(udp)))
            return NOT_TCP;
        p->flow.source_port = udp.source;
        p->flow.destination_port = udp.dest;
    }
    if (kind != TCP)
        return kind;
    if (bpf_skb_load_bytes(skb, p->tcp_offset, &tcp, sizeof(tcp)))
        return OPAQUE; // shorter than a TCP header: no stack accepts it either
    p->flow.source_port = tcp.source;
    p->flow.destination_port = tcp.dest;
    p->sequence = tcp.seq;
    p->flags = ((u8 *)&tcp)[13];
    p->has_data = p->tcp_offset + (((u8 *)&tcp)[12] >> 4) * 4 < p->end;
    return TCP;
}

// TCP flags of a frame as nearly all are: headers in linear memory, without IP
// options, extensions or fragments. 0 for what is not TCP, UNUSUAL for what only
// read_packet() can tell. Some nanoseconds, for those who look at every packet.
#define UNUSUAL 0x100

INLINE u32 usual_flags(struct __sk_buff *skb, u32 protocol)
{
    u8 *data = (u8 *)(long)skb->data, *end = (u8 *)(long)skb->data_end;

    if (protocol == bpf_htons(ETH_P_IP)) {
        struct iphdr *ip = (struct iphdr *)(data + ETH_HLEN);

        if (data + ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr) > end)
            return UNUSUAL;
        if (ip->protocol != IPPROTO_TCP)
            return 0;
        if (ip->ihl != 5 || (ip->frag_off & IPV4_FRAGMENT))
            return UNUSUAL;
        return data[ETH_HLEN + sizeof(struct iphdr) + 13];
    }
    if (protocol == bpf_htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip = (struct ipv6hdr *)(data + ETH_HLEN);

        if (data + ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) > end)
            return UNUSUAL;
        if (ip->nexthdr != IPPROTO_TCP)
            return UNUSUAL;
        return data[ETH_HLEN + sizeof(struct ipv6hdr) + 13];
    }
    return 0;
}

// Opens a connection, whatever other flags ride along.
INLINE int is_opening(const struct packet *p)
{
    return (p->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

// The server's answer to that.
INLINE int is_answer(const struct packet *p)
{
    return (p->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == (TCP_SYN | TCP_ACK);
}

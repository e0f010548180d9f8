// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// The body of connect4 and connect6.
#pragma once

#include "carry.h"
#include "socket.h"
#include "verdict.h"

#define PROCEED 1
#define FAIL 0

// Where to connect instead; nowhere else if `port` is 0.
struct dial {
    struct address address;
    u32 port; // host order
};

// A socket may come back from a failed connect() with our mark on it.
INLINE void unmark(struct bpf_sock_addr *ctx, u32 mark)
{
    if ((mark & STEER_MASK) != STEER_MARK)
        return;
    mark = 0;
    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

// Whether the kernel may carry it to another pod of this node, by the source
// address that it most likely gets. sock_ops sees the real one and asks again:
// where it says no, TC captures the SYN.
INLINE int may_carry(const struct bpf_sock_addr *ctx, u32 pod, const struct pod_config *config,
                     const struct address *destination, u32 port)
{
    struct verdict_key key = {};
    struct bpf_sock *sk = ctx->sk;
    struct address source;

    if (!(config->flags & POD_SAME_NODE))
        return 0;
    source = is_v4(destination) ? config->source_v4 : config->source_v6;
    if (sk && is_v4(destination) && sk->src_ip4)
        map_v4(&source, sk->src_ip4);
    return find_pair(&key, pod, &source, destination, port) != 0;
}

// Draws an endpoint of the service that is dialed. Sets `drawn` where the draw, and with
// it the connection, is the agent's; returns a choice for the kernel to carry to, or 0.
INLINE struct service_choice *draw(u32 pod, const struct address *destination, u32 port,
                                   u32 *drawn)
{
    struct service_key key = {.pod = pod, .port = port, .address = *destination};
    struct service_choices *found = map_find(MAP_SERVICES, &key);
    u32 at, i;

    if (!found || found->epoch != epoch_of(pod) || !lease_is_fresh())
        return 0;
    at = ((u64)bpf_get_prandom_u32() * found->total) >> 32;
#pragma clang loop unroll(disable)
    for (i = 0; i < MAX_CHOICES && i < found->count; i++)
        if (at < found->choices[i].below)
            return &found->choices[i];
    *drawn = 1;
    return 0;
}

// Leads a connection to an endpoint of this node, if the kernel may carry it there. Else
// the agent picks, as if nothing had been drawn.
INLINE int lead(struct bpf_sock_addr *ctx, u32 pod, const struct pod_config *config,
                const struct address *destination, u32 *drawn, struct dial *dial)
{
    u32 port = bpf_ntohs(ctx->user_port);
    struct service_choice *choice;

    if (!(config->flags & POD_SAME_NODE) || !ctx->sk)
        return 0;
    choice = draw(pod, destination, port, drawn);
    if (!choice)
        return 0;
    dial->address = choice->address;
    dial->port = choice->port;
    if (may_carry(ctx, pod, config, &dial->address, dial->port) &&
        set_dialed(ctx->sk, destination, port, choice->slot)) {
        count(DECISION_LED);
        return 1;
    }
    dial->port = 0;
    return 0;
}

// A stock proxy dials the app under the client's address. Like our own such sockets
// (agent/runtime/pod_sockets.py) the dial must take lo, and its mark must come back
// with the app's answers: addressed to the client, they would leave the pod.
INLINE void keep_inside(struct bpf_sock_addr *ctx, u32 pod, const struct address *destination)
{
    u32 mark = STEER_MARK, word0, word1, word2, word3;
    struct bpf_sock *sk = ctx->sk;
    struct address source = {};
    char lo[] = "lo";

    if (!sk || !is_own_address(pod, destination))
        return;
    if (sk->family == AF_INET) {
        word3 = sk->src_ip4;
        asm volatile("" : "+r"(word3)); // as in sk_lookup.c
        if (!word3)
            return;
        map_v4(&source, word3);
    } else {
        word0 = sk->src_ip6[0];
        word1 = sk->src_ip6[1];
        word2 = sk->src_ip6[2];
        word3 = sk->src_ip6[3];
        if (!(word0 | word1 | word2 | word3))
            return;
        source.word[0] = word0;
        source.word[1] = word1;
        source.word[2] = word2;
        source.word[3] = word3;
    }
    if (is_own_address(pod, &source) || is_loopback(&source))
        return;
    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
    bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, lo, sizeof(lo));
}

INLINE int on_connect(struct bpf_sock_addr *ctx, const struct address *destination,
                      struct dial *dial)
{
    struct pod_config *config;
    enum verdict verdict;
    u64 cookie;
    u32 *pod, mark = 0, drawn = 0;

    if (ctx->protocol != IPPROTO_TCP)
        return PROCEED;
    cookie = bpf_get_netns_cookie(ctx);
    pod = map_find(MAP_PODS, &cookie);
    if (!pod)
        return PROCEED;
    if (!ctx->sk)
        return PROCEED;
    if (is_agent_socket(ctx->sk)) {
        count(DECISION_AGENT_SOCKET);
        return PROCEED;
    }
    config = config_of(*pod);
    if (!config)
        return PROCEED;
    bpf_getsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
    if ((config->flags & POD_PROXIED) && is_proxy(mark, bpf_get_current_cgroup_id())) {
        if (set_agent_socket(ctx->sk))
            keep_inside(ctx, *pod, destination);
        count(DECISION_AGENT_SOCKET);
        return PROCEED;
    }

    clear_dialed(ctx->sk); // it may have been led before, and failed
    verdict = judge(*pod, config->flags, destination, bpf_ntohs(ctx->user_port));
    if (verdict == IN_MESH) {
        if (may_carry(ctx, *pod, config, destination, bpf_ntohs(ctx->user_port)) ||
            lead(ctx, *pod, config, destination, &drawn, dial))
            verdict = LEAVE_ALONE;
        else
            verdict = ask_agent(*pod, config->flags, destination);
    }
    switch (verdict) {
    case REFUSE:
        bpf_set_retval(-ECONNREFUSED); // a plain 0 would say EPERM
        return FAIL;
    case LEAVE_ALONE:
        unmark(ctx, mark);
        clear_captured(ctx->sk);
        return PROCEED;
    default:
        break;
    }
    // The application's own mark serves its own policy routes: not ours to
    // replace. TC sees the SYN and captures it there.
    if (mark != 0 && mark != STEER_MARK) {
        count(DECISION_FOREIGN_MARK);
        return PROCEED;
    }
    // Remembered beside the mark, so that a pod which takes the mark off again
    // sends nothing past TC.
    if (!set_captured(ctx->sk))
        return PROCEED;
    set_drawn(ctx->sk, drawn);
    mark = STEER_MARK;
    if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) == 0)
        count(DECISION_CAPTURED_BY_CONNECT);
    return PROCEED;
}

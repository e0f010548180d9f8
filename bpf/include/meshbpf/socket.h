// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// What we remember of a socket, in the socket itself: it lives exactly as
// long, has no limit whose eviction could leak, and only BPF programs and
// holders of CAP_BPF can write it. A mark, in contrast, may be set by any pod
// with CAP_NET_RAW, and proves nothing.
#pragma once

#include "keys.h"

// `agent_sockets` is written by the agent, by bpf(2), before connect(); for a stock
// proxy, which knows nothing of it, by the first hook that sees it dial.
INLINE int is_agent_socket(struct bpf_sock *sk)
{
    return bpf_sk_storage_get(map_handle(MAP_AGENT_SOCKETS), sk, 0, 0) != 0;
}

// A socket that a stock proxy dials with is as good as one of ours.
INLINE int set_agent_socket(struct bpf_sock *sk)
{
    return bpf_sk_storage_get(map_handle(MAP_AGENT_SOCKETS), sk, 0,
                              BPF_SK_STORAGE_GET_F_CREATE) != 0;
}

// Whether it dials from a process of the stock proxy: any pod may set the mark, so
// the cgroup must agree.
INLINE int is_proxy(u32 mark, u64 cgroup)
{
    return mark == AGENT_MARK && map_find(MAP_PROXY_CGROUPS, &cgroup);
}

// A flow captured once goes to the agent until it ends: when the agent has
// died the pod's own stack answers with RST, and no byte leaves in the clear.
INLINE int is_captured(struct bpf_sock *sk)
{
    return bpf_sk_storage_get(map_handle(MAP_CAPTURED), sk, 0, 0) != 0;
}

// Whether its endpoint was drawn at connect, and is not one that the kernel carries to.
INLINE int is_drawn(struct bpf_sock *sk)
{
    u32 *captured = bpf_sk_storage_get(map_handle(MAP_CAPTURED), sk, 0, 0);

    return captured && *captured;
}

INLINE void set_drawn(struct bpf_sock *sk, u32 drawn)
{
    u32 *captured = bpf_sk_storage_get(map_handle(MAP_CAPTURED), sk, 0, 0);

    if (captured)
        *captured = drawn;
}

INLINE int set_captured(struct bpf_sock *sk)
{
    return bpf_sk_storage_get(map_handle(MAP_CAPTURED), sk, 0, BPF_SK_STORAGE_GET_F_CREATE) != 0;
}

INLINE void clear_captured(struct bpf_sock *sk)
{
    bpf_sk_storage_delete(map_handle(MAP_CAPTURED), sk);
}

// What the application dialed, of a socket that we led to an endpoint instead.
INLINE struct dialed *dialed_by(struct bpf_sock *sk)
{
    return bpf_sk_storage_get(map_handle(MAP_DIALED), sk, 0, 0);
}

INLINE int set_dialed(struct bpf_sock *sk, const struct address *address, u32 port, u32 slot)
{
    struct dialed *dialed =
        bpf_sk_storage_get(map_handle(MAP_DIALED), sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

    if (!dialed)
        return 0;
    dialed->address = *address;
    dialed->port = port;
    dialed->slot = slot;
    return 1;
}

INLINE void clear_dialed(struct bpf_sock *sk)
{
    bpf_sk_storage_delete(map_handle(MAP_DIALED), sk);
}

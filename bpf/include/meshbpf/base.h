// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// What every hook includes first: kernel UAPI, map access by number, counters.
//
// MAP_*, ROLE_*, POD_*, DECISION_* and their like come from the catalogue
// (bpf/__init__.py) as -D flags; that file also says why maps are named by
// number and not declared here.
#pragma once

#include <uapi/linux/bpf.h>
#include <linux/in.h>

#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define SOCK_STREAM 1
#define ECONNREFUSED 111

// The loopback device of every netns has this index.
#define LOOPBACK_IFINDEX 1

#define INLINE static __always_inline

#define map_handle(number) ((void *)bpf_pseudo_fd(1, (number)))
#define map_find(number, key) bpf_map_lookup_elem_((u64)bpf_pseudo_fd(1, (number)), (key))
#define map_put(number, key, value)                                                                \
    bpf_map_update_elem_((u64)bpf_pseudo_fd(1, (number)), (key), (value), BPF_ANY)

#define map_drop(number, key) bpf_map_delete_elem_((u64)bpf_pseudo_fd(1, (number)), (key))

#define TEXT_OF_(x) #x
#define TEXT_OF(x) TEXT_OF_(x)

// The index of the pod that this instance was loaded for. Read through asm: a
// constant that the compiler can see is narrowed to 32 bits, and the loader
// would not find its 64-bit placeholder again.
INLINE u32 this_pod(void)
{
    u64 index;

    asm volatile("%0 = " TEXT_OF(POD_INDEX) " ll" : "=r"(index));
    return (u32)index;
}

INLINE void count(u32 decision)
{
    u64 *total = map_find(MAP_DECISIONS, &decision);

    if (total)
        *total += 1; // per CPU: no atomics
}

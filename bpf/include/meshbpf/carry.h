// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Connections that the kernel carries between pods: whether it may, and what we
// keep of each.
//
// A verdict says yes for one source, destination and port, under the epochs
// that both pods had when the agent decided. Whatever changes an answer raises
// an epoch first, so an old yes is a miss; and a miss is only ever a question
// to the agent. While the agent is silent a verdict holds as long as the lease.
//
// Who the source is says an element of `flows`, written by sock_ops from the
// client's own socket before its SYN leaves. It binds the handshake to the
// veths of both pods: the SYN counts that left by the source's, under its
// initial sequence number, and the SYN-ACK that left by the destination's,
// under its own. Nobody else knows those numbers before they are on the wire.
#pragma once

#include "pod.h"

INLINE u64 epoch_of(u32 pod)
{
    u64 *epoch = map_find(MAP_EPOCHS, &pod);

    return epoch ? *epoch : 0;
}

// The verdict that holds now, or 0.
INLINE struct verdict_value *find_verdict(const struct verdict_key *key)
{
    struct verdict_value *found = map_find(MAP_VERDICTS, key);

    if (!found || found->destination_epoch != epoch_of(key->destination))
        return 0;
    if (key->source && found->source_epoch != epoch_of(key->source))
        return 0;
    return lease_is_fresh() ? found : 0;
}

// From pod `source` to a pod of this node at `destination`.
INLINE struct verdict_value *find_pair(struct verdict_key *key, u32 source,
                                       const struct address *source_address,
                                       const struct address *destination, u32 port)
{
    u32 *pod = map_find(MAP_LOCAL_PODS, destination);

    if (!pod || *pod == source)
        return 0;
    key->source = source;
    key->destination = *pod;
    key->source_address = *source_address;
    key->destination_address = *destination;
    key->port = port;
    return find_verdict(key);
}

INLINE struct verdict_value *verdict_of(const struct flow *flow, const struct flow_state *state)
{
    struct verdict_key key = {
        .source = state->source,
        .destination = state->destination,
        .source_address = flow->source,
        .destination_address = flow->destination,
        .port = bpf_ntohs(flow->destination_port),
    };

    return find_verdict(&key);
}

// Whether one more may be added to what a pod has.
INLINE int has_room(u32 pod)
{
    u64 *live = map_find(MAP_FLOW_COUNTS, &pod);

    return live && *live < MAX_POD_FLOWS;
}

INLINE void change_count(u32 pod, s64 by)
{
    u64 *live = map_find(MAP_FLOW_COUNTS, &pod);

    if (live)
        __sync_fetch_and_add(live, by);
}

// The pod that pays for a flow.
INLINE u32 owner_of(const struct flow_state *state)
{
    return state->source ? state->source : state->destination;
}

INLINE int add_flow(const struct flow *flow, const struct flow_state *state)
{
    // A connection of the same four numbers whose end nobody saw.
    int known = map_find(MAP_FLOWS, flow) != 0;

    if (map_put(MAP_FLOWS, flow, state))
        return -1;
    if (!known)
        change_count(owner_of(state), 1);
    return 0;
}

INLINE void drop_flow(const struct flow *flow, u32 owner)
{
    if (map_drop(MAP_FLOWS, flow) == 0)
        change_count(owner, -1);
}

INLINE void turn(struct flow *to, const struct flow *from)
{
    to->source = from->destination;
    to->destination = from->source;
    to->source_port = from->destination_port;
    to->destination_port = from->source_port;
}

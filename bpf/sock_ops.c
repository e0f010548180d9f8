// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: sock_ops, on the cgroup v2 root. Runs a few times in the life of every
// TCP socket; what is not a pod's leaves after one lookup.
// Does: attests the flows that the connect hook left to the kernel, before
// their SYN leaves, when the source address and port are known, and tells the agent
// which of those it gets had their endpoint drawn already; sees to it that
// a connection is established only under a verdict that holds; counts it at its
// end. A flow between pods is watched at the client's socket, a plaintext one
// at the server's: so each is counted once.
// Reads: op, args, family, addresses, ports, byte and sequence counters, sk, the
// netns cookie.
// Maps: pods, pod_config, addresses, exempt_ports, exempt_cidrs, local_pods,
// verdicts, epochs, heartbeat, captured, dialed, agent_sockets, probes; writes flows,
// drawn, flow_counts, flow_slots, flow_quota, flow_records, flow_reports, decisions.
// Returns: 1, always.
// Budget: 8192 verified instructions.
//
// What the kernel's byte counters hold, and we take out: a client's bytes_acked
// has its SYN, both ends' have their FIN once it is acknowledged, and
// bytes_received has the peer's FIN once it was taken in.

#include <meshbpf/carry.h>
#include <meshbpf/socket.h>

// bcc declares it with 32 bits.
static u64 (*socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

// From this end to the other.
INLINE void read_flow(struct bpf_sock_ops *ctx, struct flow *flow)
{
    if (ctx->family == AF_INET) {
        u32 local = ctx->local_ip4, remote = ctx->remote_ip4;

        // As in sk_lookup.c: or clang computes an offset into the context.
        asm volatile("" : "+r"(local), "+r"(remote));
        map_v4(&flow->source, local);
        map_v4(&flow->destination, remote);
    } else {
        flow->source.word[0] = ctx->local_ip6[0];
        flow->source.word[1] = ctx->local_ip6[1];
        flow->source.word[2] = ctx->local_ip6[2];
        flow->source.word[3] = ctx->local_ip6[3];
        flow->destination.word[0] = ctx->remote_ip6[0];
        flow->destination.word[1] = ctx->remote_ip6[1];
        flow->destination.word[2] = ctx->remote_ip6[2];
        flow->destination.word[3] = ctx->remote_ip6[3];
    }
    flow->source_port = bpf_htons((u16)ctx->local_port);
    flow->destination_port = bpf_htons((u16)bpf_ntohl(ctx->remote_port));
}

INLINE u32 pod_of(struct bpf_sock_ops *ctx)
{
    u64 cookie = bpf_get_netns_cookie(ctx);
    u32 *pod = map_find(MAP_PODS, &cookie);

    return pod ? *pod : 0;
}

INLINE void watch_state(struct bpf_sock_ops *ctx)
{
    bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

INLINE void report(const struct flow *flow, const struct flow_state *state, u32 reason)
{
    struct flow_report told = {
        .flow = *flow,
        .reason = reason,
        .socket_cookie = state->socket_cookie,
        .source = state->source,
        .destination = state->destination,
    };
    u32 zero = 0;
    struct flow_quota *quota;

    count(DECISION_DOUBTED);
    if (bpf_map_push_elem(map_handle(MAP_FLOW_REPORTS), &told, BPF_ANY) == 0)
        return;
    quota = map_find(MAP_FLOW_QUOTA, &zero);
    if (quota)
        __sync_fetch_and_add(&quota->reports_lost, 1);
}

// A pod's socket is about to send its SYN.
INLINE void on_opening(struct bpf_sock_ops *ctx)
{
    u32 pod = pod_of(ctx);
    struct verdict_value *verdict;
    struct verdict_key key = {};
    struct flow_state state = {};
    struct flow flow = {};
    struct pod_config *config;
    struct dialed *dialed;
    struct bpf_sock *sk;

    if (!pod)
        return;
    config = config_of(pod);
    if (!config || (config->flags & (POD_SAME_NODE | POD_LEAVING)) != POD_SAME_NODE)
        return;
    sk = ctx->sk;
    if (!sk)
        return;
    if (is_drawn(sk)) {
        read_flow(ctx, &flow);
        map_put(MAP_DRAWN, &flow, &pod);
        return;
    }
    // On its way to the agent, or from it.
    if ((sk->mark & STEER_MASK) == STEER_MARK)
        return;
    if (is_captured(sk) || is_agent_socket(sk))
        return;
    read_flow(ctx, &flow);
    key.port = bpf_ntohs(flow.destination_port);
    if (is_exempt_port(pod, config->flags, key.port) ||
        is_exempt_address(pod, config->flags, &flow.destination))
        return;
    verdict = find_pair(&key, pod, &flow.source, &flow.destination, key.port);
    if (!verdict || !has_room(pod))
        return;
    state.source = pod;
    state.destination = key.destination;
    state.source_cookie = config->cookie;
    state.socket_cookie = socket_cookie(ctx);
    state.opened_ns = bpf_ktime_get_ns();
    dialed = dialed_by(sk);
    state.slot = dialed ? dialed->slot : verdict->slot;
    if (add_flow(&flow, &state))
        return; // the map is full: TC takes the SYN to the agent
    watch_state(ctx);
    count(DECISION_ATTESTED);
}

INLINE void count_opened(const struct flow_state *state)
{
    u32 slot = state->slot;
    struct flow_slot *counters = map_find(MAP_FLOW_SLOTS, &slot);

    if (counters)
        __sync_fetch_and_add(&counters->opened, 1);
}

// A client has its SYN-ACK.
INLINE void on_answered(struct bpf_sock_ops *ctx)
{
    struct flow_state *state;
    struct flow flow = {};

    if (!pod_of(ctx))
        return;
    read_flow(ctx, &flow);
    state = map_find(MAP_FLOWS, &flow);
    if (!state || !state->source || state->open)
        return;
    state->open = 1;
    if (!state->carried)
        state->slot |= SLOT_SOURCE_ONLY; // the destination's agent has it, and counts that end
    count_opened(state);
    if (state->carried && !verdict_of(&flow, state))
        report(&flow, state, REPORT_STALE);
}

// A server's socket has its connection. In the pod these are the agent's too:
// what its listeners accepted, and the app's ends of what it dialed.
INLINE void on_accepted(struct bpf_sock_ops *ctx)
{
    u32 pod = pod_of(ctx), flags;
    struct verdict_value *verdict;
    struct flow_state *known, state = {};
    struct flow outward = {}, flow = {};
    struct bpf_sock *sk;

    if (!pod)
        return;
    flags = pod_flags(pod);
    if ((flags & (POD_PLAINTEXT | POD_LEAVING)) != POD_PLAINTEXT)
        return;
    sk = ctx->sk;
    if (!sk || (sk->mark & STEER_MASK) == STEER_MARK || is_agent_socket(sk))
        return;
    read_flow(ctx, &outward);
    turn(&flow, &outward);
    if (is_loopback(&flow.source) || is_own_address(pod, &flow.source) ||
        is_exempt_port(pod, flags, bpf_ntohs(flow.destination_port)) ||
        is_exempt_address(pod, flags, &flow.source) || is_probe(&flow))
        return;
    known = map_find(MAP_FLOWS, &flow);
    if (known && known->source)
        return; // watched at its client
    state.destination = pod;
    state.socket_cookie = socket_cookie(ctx);
    state.opened_ns = bpf_ktime_get_ns();
    state.carried = 1;
    state.open = 1;
    verdict = verdict_of(&flow, &state);
    if (verdict)
        state.slot = verdict->slot;
    else
        report(&flow, &state, REPORT_STALE);
    if (add_flow(&flow, &state)) {
        report(&flow, &state, REPORT_UNTRACKED);
        return;
    }
    count_opened(&state);
    watch_state(ctx);
}

INLINE void tell_end(const struct flow *flow, const struct flow_state *state, u64 sent,
                     u64 received)
{
    struct flow_record record = {};
    u32 slot = state->slot, zero = 0;
    struct flow_slot *counters = map_find(MAP_FLOW_SLOTS, &slot);
    struct flow_quota *quota = map_find(MAP_FLOW_QUOTA, &zero);

    if (counters && state->open) {
        __sync_fetch_and_add(&counters->sent, sent);
        __sync_fetch_and_add(&counters->received, received);
        __sync_fetch_and_add(&counters->closed, 1);
    } else if (counters) {
        __sync_fetch_and_add(&counters->failed, 1);
    }
    if (!quota)
        return;
    record.flow = *flow;
    record.slot = slot;
    record.opened_ns = state->opened_ns;
    record.closed_ns = bpf_ktime_get_ns();
    record.sent = sent;
    record.received = received;
    record.failed = !state->open;
    // Two CPUs may take the last one both: a bound, not a count.
    if (quota->records && bpf_map_push_elem(map_handle(MAP_FLOW_RECORDS), &record, BPF_ANY) == 0)
        __sync_fetch_and_add(&quota->records, -1);
    else
        __sync_fetch_and_add(&quota->records_dropped, 1);
}

INLINE void on_state(struct bpf_sock_ops *ctx)
{
    u32 before = ctx->args[0], after = ctx->args[1];
    u64 acked = ctx->bytes_acked, received = ctx->bytes_received;
    struct flow_state *state, last;
    struct flow outward = {}, flow = {};
    int plaintext = 0;

    if (after != BPF_TCP_CLOSE && after != BPF_TCP_FIN_WAIT2)
        return;
    read_flow(ctx, &outward);
    flow = outward;
    state = map_find(MAP_FLOWS, &flow);
    if (!state) {
        plaintext = 1;
        turn(&flow, &outward);
        state = map_find(MAP_FLOWS, &flow);
    }
    if (!state || state->socket_cookie != socket_cookie(ctx))
        return;
    if (after == BPF_TCP_FIN_WAIT2) {
        state->received_at_fin = received;
        return;
    }
    if (acked && !plaintext)
        acked -= 1;
    if (acked && (before == BPF_TCP_FIN_WAIT2 ||
                  ((before == BPF_TCP_CLOSING || before == BPF_TCP_LAST_ACK) &&
                   ctx->snd_una == ctx->snd_nxt)))
        acked -= 1;
    if (before == BPF_TCP_CLOSE_WAIT || before == BPF_TCP_LAST_ACK || before == BPF_TCP_CLOSING ||
        (before == BPF_TCP_FIN_WAIT2 && received > state->received_at_fin))
        received -= 1;
    last = *state;
    drop_flow(&flow, owner_of(&last));
    if (plaintext)
        tell_end(&flow, &last, received, acked);
    else
        tell_end(&flow, &last, acked, received);
}

int sock_ops(struct bpf_sock_ops *ctx)
{
    switch (ctx->op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        on_opening(ctx);
        break;
    case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
        on_answered(ctx);
        break;
    case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
        on_accepted(ctx);
        break;
    case BPF_SOCK_OPS_STATE_CB:
        on_state(ctx);
        break;
    }
    return 1;
}

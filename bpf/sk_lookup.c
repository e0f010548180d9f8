// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: sk_lookup, on the pod's netns, one instance per pod. Runs when TCP
// looks for a listener (a SYN, or a segment whose connection is gone), never
// for packets of established connections; and for datagrams to sockets that
// are not connected, of which only redirected DNS queries concern us.
// Does: hands connections to the agent's listeners, whatever address and port
// those are bound to; the accepted socket keeps both original addresses.
// Reads: family, protocol, both addresses and ports, the arriving interface.
// Maps: pod_config, addresses, exempt_*, probes, flows, verdicts, epochs,
// flow_counts, heartbeat, listeners; writes flows, decisions.
// Returns: SK_PASS (assigned, or the stack's own lookup goes on), SK_DROP (the
// sender gets RST at once).
// Budget: 4096 verified instructions.
//
// The order matters:
//  lo, foreign destination: a captured outbound connection, or DNS. Never passed on,
//    in no mode: the stack would give it to the pod's own 0.0.0.0:80.
//  lo, own destination: the pod talking to itself, or the agent to the app.
//  own source, from anywhere: also the pod talking to itself; the stack
//    reports the interface that owns the address, not lo. Its port 15008 is
//    the agent's: a service may choose the calling pod as its endpoint.
//  exempt interface, port, CIDR; a probe of a host process: left alone.
//  what the agent has allowed: to the app. The caller is the attested pod, or an
//    address alone.
//  the rest: 15008 is HBONE, all else plaintext inbound.

#include <meshbpf/carry.h>

INLINE int hand_over(struct bpf_sk_lookup *ctx, u32 pod, u32 flags, u16 role)
{
    struct bpf_sock *listener;
    long error;

    if (!is_answered(flags, role))
        return -1;
    listener = find_listener(pod, role, ctx->family);
    if (!listener)
        return -1;
    // NO_REUSEPORT: during a handover the slot, not a hash, picks the listener.
    error = bpf_sk_assign(ctx, listener, BPF_SK_LOOKUP_F_NO_REUSEPORT);
    bpf_sk_release(listener);
    return error;
}

// An element is the client's own word; that the SYN is the client's too has been
// seen by both host veths.
INLINE int is_attested(const struct flow_state *state, u32 pod)
{
    struct pod_config *source;

    if (state->destination != pod || !state->syn_sent || !state->syn_came)
        return 0;
    source = config_of(state->source);
    return source && source->cookie == state->source_cookie &&
           (source->flags & (POD_ATTACHED | POD_LEAVING)) == POD_ATTACHED;
}

// Whether the stack may hand it to the app without the agent.
INLINE int may_carry(const struct flow *flow, u32 pod, u32 flags)
{
    struct flow_state *state = map_find(MAP_FLOWS, flow);
    struct verdict_key key = {
        .destination = pod,
        .source_address = flow->source,
        .destination_address = flow->destination,
        .port = bpf_ntohs(flow->destination_port),
    };

    if (state && state->source) {
        if (!is_attested(state, pod) || !verdict_of(flow, state))
            return 0;
        state->carried = 1;
        return 1;
    }
    return (flags & POD_PLAINTEXT) && has_room(pod) && find_verdict(&key);
}

int sk_lookup(struct bpf_sk_lookup *ctx)
{
    struct flow flow = {};
    u32 pod = this_pod(), flags, port = ctx->local_port;
    u16 role;

    flags = pod_flags(pod);
    if (!(flags & POD_ATTACHED))
        return SK_PASS;
    if (ctx->protocol != IPPROTO_TCP &&
        !(ctx->protocol == IPPROTO_UDP && port == DNS_PORT && (flags & POD_DNS) &&
          ctx->ingress_ifindex == LOOPBACK_IFINDEX))
        return SK_PASS;
    if (ctx->family == AF_INET) {
        u32 remote_v4 = ctx->remote_ip4, local_v4 = ctx->local_ip4;

        // Without this clang merges the loads of both branches into one, from
        // an offset that it computes; of a context the verifier refuses that.
        asm volatile("" : "+r"(remote_v4), "+r"(local_v4));
        map_v4(&flow.source, remote_v4);
        map_v4(&flow.destination, local_v4);
    } else {
        flow.source.word[0] = ctx->remote_ip6[0];
        flow.source.word[1] = ctx->remote_ip6[1];
        flow.source.word[2] = ctx->remote_ip6[2];
        flow.source.word[3] = ctx->remote_ip6[3];
        flow.destination.word[0] = ctx->local_ip6[0];
        flow.destination.word[1] = ctx->local_ip6[1];
        flow.destination.word[2] = ctx->local_ip6[2];
        flow.destination.word[3] = ctx->local_ip6[3];
    }
    flow.source_port = ctx->remote_port;
    flow.destination_port = bpf_htons(port);

    if (ctx->ingress_ifindex == LOOPBACK_IFINDEX) {
        if (is_loopback(&flow.destination) || is_own_address(pod, &flow.destination))
            return SK_PASS;
        if (ctx->protocol == IPPROTO_UDP) {
            // Only TC sends such a datagram this way; the client repeats a lost one.
            if (hand_over(ctx, pod, flags, ROLE_DNS_UDP))
                return SK_DROP;
            count(DECISION_DNS_QUERY);
            return SK_PASS;
        }
        if (port == DNS_PORT && (flags & POD_DNS) && hand_over(ctx, pod, flags, ROLE_DNS) == 0)
            return SK_PASS;
        if (hand_over(ctx, pod, flags, ROLE_OUTBOUND)) {
            count(DECISION_REFUSED_OUTBOUND_SOCKET);
            return SK_DROP;
        }
        count(DECISION_OUTBOUND);
        return SK_PASS;
    }
    if (flags & POD_LEAVING)
        return SK_PASS;
    if (is_own_address(pod, &flow.source) && port != HBONE_PORT)
        return SK_PASS;
    if (flags & POD_EXEMPT_INTERFACES) {
        struct pod_interface key = {.pod = pod, .ifindex = ctx->ingress_ifindex};

        if (map_find(MAP_EXEMPT_IFACES, &key)) {
            count(DECISION_EXEMPT_IN);
            return SK_PASS;
        }
    }
    if (is_exempt_port(pod, flags, port) || is_exempt_address(pod, flags, &flow.source)) {
        count(DECISION_EXEMPT_IN);
        return SK_PASS;
    }
    if (is_probe(&flow)) {
        count(DECISION_PROBE);
        return SK_PASS;
    }
    if (port != HBONE_PORT && may_carry(&flow, pod, flags)) {
        count(DECISION_KERNEL_IN);
        return SK_PASS;
    }
    role = port == HBONE_PORT ? ROLE_HBONE : ROLE_INBOUND;
    if (hand_over(ctx, pod, flags, role) == 0) {
        count(role == ROLE_HBONE ? DECISION_HBONE : DECISION_INBOUND);
        return SK_PASS;
    }
    if (flags & POD_FAIL_OPEN) {
        count(DECISION_OPEN_IN);
        return SK_PASS;
    }
    count(DECISION_REFUSED_INBOUND);
    return SK_DROP;
}

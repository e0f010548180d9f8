// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: TC egress of each captured interface inside the pod, one instance per
// pod. Runs for every packet that leaves the pod, after routing.
// Does: captures what the connect hook did not see (no cgroup v2, MPTCP,
// sockets with a mark of their own or bound to the interface, forwarded
// traffic), by sending it back up through lo with the steering mark: the pod's
// policy route then makes it local and sk_lookup hands it to the listener.
// Refuses with RST what must not leave while no agent answers. DNS datagrams
// take the same way to the agent's DNS proxy, if the pod has it.
// Reads: headers, skb->sk and its storage.
// Maps: pod_config, addresses, exempt_ports, exempt_cidrs, mesh, heartbeat,
// listeners, proxy_cgroups, flows; writes decisions, captured, agent_sockets, flows,
// flow_counts.
// Returns: GO_ON (leaves as it is), a redirect, or TC_ACT_SHOT.
// Budget: 8192 verified instructions.
//
// A flow is captured or direct for its whole life. For a local socket its
// storage says which; packets without one (forwarded, or sent by the stack's
// control socket) belong to a captured flow exactly when the netns holds a
// socket of the agent that takes their destination for its own address. That
// is a lookup in the kernel's socket table: nothing is evicted from it.

#include <meshbpf/carry.h>
#include <meshbpf/packet.h>
#include <meshbpf/reset.h>
#include <meshbpf/socket.h>
#include <meshbpf/verdict.h>

// The connection that sends. The stack's control sockets (raw), packet sockets,
// request and TIME_WAIT sockets are none, nor is a listener, in whose name newer
// kernels send an RST.
INLINE struct bpf_sock *sender_of(struct __sk_buff *skb)
{
    struct bpf_sock *sk = skb->sk;

    if (!sk)
        return 0;
    sk = bpf_sk_fullsock(sk);
    if (!sk || sk->protocol != IPPROTO_TCP || sk->type != SOCK_STREAM)
        return 0;
    if (sk->state == BPF_TCP_LISTEN)
        return 0;
    return sk;
}

// eth_type_trans() takes a frame for this host's when its destination is the
// device's own address, and lo's is zero: no second program on lo is needed.
INLINE int to_loopback(struct __sk_buff *skb)
{
    u8 nobody[ETH_ALEN] = {};

    if (bpf_skb_store_bytes(skb, 0, nobody, sizeof(nobody), 0))
        return TC_ACT_SHOT;
    skb->mark = STEER_MARK;
    return bpf_redirect(LOOPBACK_IFINDEX, BPF_F_INGRESS);
}

// Where there is no connect hook, or it did not run.
INLINE int is_proxy_dial(struct __sk_buff *skb, struct bpf_sock *sk, u32 pod)
{
    return sk->mark == AGENT_MARK && (pod_flags(pod) & POD_PROXIED) &&
           is_proxy(AGENT_MARK, bpf_skb_cgroup_id(skb)) && set_agent_socket(sk);
}

INLINE int agent_holds(struct __sk_buff *skb, const struct packet *p)
{
    struct bpf_sock_tuple tuple = {};
    struct bpf_sock *sk;
    int holds;

    if (p->is_v6) {
        __builtin_memcpy(tuple.ipv6.saddr, &p->flow.source, 16);
        __builtin_memcpy(tuple.ipv6.daddr, &p->flow.destination, 16);
        tuple.ipv6.sport = p->flow.source_port;
        tuple.ipv6.dport = p->flow.destination_port;
        sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
    } else {
        tuple.ipv4.saddr = p->flow.source.word[3];
        tuple.ipv4.daddr = p->flow.destination.word[3];
        tuple.ipv4.sport = p->flow.source_port;
        tuple.ipv4.dport = p->flow.destination_port;
        sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
    }
    if (!sk)
        return 0;
    holds = sk->state != BPF_TCP_LISTEN;
    bpf_sk_release(sk);
    return holds;
}

// The connect hook left it to the kernel, and sock_ops has said whose it is. A
// SYN that carries data goes to the agent all the same: the data would be on the
// wire before the server has shown that it is the pod.
INLINE int is_attested(struct __sk_buff *skb, const struct packet *p, u32 pod)
{
    struct flow_state *state = map_find(MAP_FLOWS, &p->flow);

    if (!state || state->source != pod)
        return 0;
    if (p->has_data) {
        drop_flow(&p->flow, pod);
        return 0;
    }
    return 1;
}

// A SYN, or what may hide one: a fragment that no local TCP socket sent has
// nothing to lose in the mesh, and cannot be handed to anybody.
INLINE int open_connection(struct __sk_buff *skb, struct packet *p, enum kind kind,
                           struct bpf_sock *sk, u32 pod)
{
    u32 flags = pod_flags(pod);
    enum verdict verdict =
        judge(pod, flags, &p->flow.destination, bpf_ntohs(p->flow.destination_port));

    if (verdict == IN_MESH) {
        if (kind == TCP && is_attested(skb, p, pod))
            return GO_ON;
        verdict = ask_agent(pod, flags, &p->flow.destination);
    }
    if (verdict == LEAVE_ALONE) {
        if (sk)
            clear_captured(sk); // the socket may have been used before
        return GO_ON;
    }
    if (kind == OPAQUE) {
        count(DECISION_OPAQUE);
        return TC_ACT_SHOT;
    }
    if (verdict == REFUSE)
        return refuse(skb, p);
    if (sk && !set_captured(sk)) {
        count(DECISION_NO_MEMORY);
        return TC_ACT_SHOT; // the SYN will come again
    }
    count(DECISION_CAPTURED_BY_TC);
    return to_loopback(skb);
}

// DNS, connected socket or not: the reply that the agent sends from the
// resolver's address fits either. Other UDP is none of our business.
INLINE int send_datagram(struct __sk_buff *skb, struct packet *p, u32 pod)
{
    struct bpf_sock *sk;
    u32 flags;

    if (p->flow.destination_port != bpf_htons(DNS_PORT))
        return GO_ON;
    flags = pod_flags(pod);
    if (!(flags & POD_DNS) || (flags & POD_LEAVING))
        return GO_ON;
    sk = skb->sk;
    if (sk) {
        sk = bpf_sk_fullsock(sk);
        if (sk && is_agent_socket(sk))
            return GO_ON;
    }
    if (is_loopback(&p->flow.destination) || is_own_address(pod, &p->flow.destination) ||
        is_exempt_port(pod, flags, DNS_PORT) || is_exempt_address(pod, flags, &p->flow.destination))
        return GO_ON;
    if (!asks_agent(pod, flags, ROLE_DNS_UDP, &p->flow.destination))
        return GO_ON;
    return to_loopback(skb);
}

int pod_egress(struct __sk_buff *skb)
{
    struct packet packet = {};
    struct bpf_sock *sk = sender_of(skb);
    u32 pod = this_pod();
    enum kind kind;

    // Nearly every packet: of a connection of the pod's own that is not captured.
    // A flow is what it was when it was opened.
    if (sk && !(usual_flags(skb, protocol_of(skb)) & (TCP_SYN | UNUSUAL)) && !is_captured(sk))
        return GO_ON;
    if (sk && (is_agent_socket(sk) || is_proxy_dial(skb, sk, pod))) {
        count(DECISION_AGENT_SOCKET);
        return GO_ON;
    }
    kind = read_packet(skb, &packet);
    if (kind == UDP)
        return send_datagram(skb, &packet, pod);
    if (kind == NOT_TCP)
        return GO_ON;
    if (kind == TCP ? is_opening(&packet) : !sk)
        return open_connection(skb, &packet, kind, sk, pod);
    // A flow is what it was when it was opened, and direct if that was before
    // the attach.
    if (sk ? !is_captured(sk) : !agent_holds(skb, &packet))
        return GO_ON;
    count(DECISION_REDIRECTED);
    return to_loopback(skb);
}

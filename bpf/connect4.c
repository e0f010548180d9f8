// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: cgroup/connect4, on the cgroup v2 root. Runs once per connect() of an
// IPv4 socket, before the source address is chosen. Whether it runs for the
// subflows of an MPTCP socket depends on the kernel: TC takes what it misses.
// Does: marks a pod's socket when its destination is in the mesh, so that the
// pod's policy route hands the SYN to the outbound listener, unless the kernel
// may carry the connection itself. A service's address becomes that of an
// endpoint of this node, where the draw is one that the kernel may carry to: then
// getpeername4.c keeps what the app sees true. What the agent gets is never rewritten,
// so that its getsockname() is the original destination. A stock proxy's own dials are recognised and let through.
// Reads: user_ip4, user_port, protocol, sk, the netns cookie, the caller's cgroup.
// Maps: pods, pod_config, addresses, exempt_ports, exempt_cidrs, mesh,
// local_pods, verdicts, services, epochs, heartbeat, listeners, proxy_cgroups; writes
// decisions, captured, dialed, agent_sockets.
// Returns: 1 (let connect proceed), or 0 with -ECONNREFUSED when the pod fails
// closed and no agent listens.
// Budget: 16384 verified instructions.

#include <meshbpf/connect.h>

int connect4(struct bpf_sock_addr *ctx)
{
    struct address destination;
    struct dial dial = {};
    int result;

    map_v4(&destination, ctx->user_ip4);
    result = on_connect(ctx, &destination, &dial);
    if (dial.port) {
        ctx->user_ip4 = dial.address.word[3];
        ctx->user_port = bpf_htons(dial.port);
    }
    return result;
}

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: cgroup/connect4, on the cgroup v2 root. Runs once per connect() of an
// IPv4 socket, before the source address is chosen. Whether it runs for the
// subflows of an MPTCP socket depends on the kernel: TC takes what it misses.
// Does: marks a pod's socket when its destination is in the mesh, so that the
// pod's policy route hands the SYN to the outbound listener, unless the kernel
// may carry the connection itself. The address is
// never rewritten: getpeername() in the app and getsockname() in the agent
// both stay true. A stock proxy's own dials are recognised and let through.
// Reads: user_ip4, user_port, protocol, sk, the netns cookie, the caller's cgroup.
// Maps: pods, pod_config, addresses, exempt_ports, exempt_cidrs, mesh,
// local_pods, verdicts, epochs, heartbeat, listeners, proxy_cgroups; writes decisions,
// captured, agent_sockets.
// Returns: 1 (let connect proceed), or 0 with -ECONNREFUSED when the pod fails
// closed and no agent listens.
// Budget: 4096 verified instructions.

#include <meshbpf/connect.h>

int connect4(struct bpf_sock_addr *ctx)
{
    struct address destination;

    map_v4(&destination, ctx->user_ip4);
    return on_connect(ctx, &destination);
}

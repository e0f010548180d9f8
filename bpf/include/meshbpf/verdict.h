// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Where a new outbound TCP connection of a pod goes. The connect hook and TC
// ask the same questions here, so that they can never answer differently.
#pragma once

#include "pod.h"

enum verdict {
    LEAVE_ALONE, // the kernel's own path
    IN_MESH,     // the kernel's under a verdict that holds, else the agent's
    CAPTURE,     // to the agent's outbound listener
    REFUSE,      // ECONNREFUSED now: closed mode, and nobody can say yes
};

// `port` in host order. Counts its decision, but for IN_MESH.
INLINE enum verdict judge(u32 pod, u32 flags, const struct address *destination, u32 port)
{
    if (!(flags & POD_ATTACHED) || (flags & POD_LEAVING))
        return LEAVE_ALONE;
    if (is_loopback(destination) || is_own_address(pod, destination) ||
        is_exempt_port(pod, flags, port) || is_exempt_address(pod, flags, destination)) {
        count(DECISION_EXEMPT_OUT);
        return LEAVE_ALONE;
    }
    if (port == DNS_PORT && asks_agent(pod, flags, ROLE_DNS, destination))
        return CAPTURE;
    if (is_in_mesh(destination))
        return IN_MESH;
    // Nobody keeps the map true any more: what it does not know may be mesh by now.
    // A stock proxy knows by itself.
    if ((flags & POD_PROXIED) && !lease_is_fresh())
        return IN_MESH;
    if (!(flags & POD_FAIL_OPEN) && !lease_is_fresh()) {
        count(DECISION_REFUSED_LEASE);
        return REFUSE;
    }
    count(DECISION_OUTSIDE_MESH);
    return LEAVE_ALONE;
}

// What becomes of a connection into the mesh that the kernel may not carry. The
// hook that carries CAPTURE out counts it.
INLINE enum verdict ask_agent(u32 pod, u32 flags, const struct address *destination)
{
    if (agent_accepts(pod, flags, ROLE_OUTBOUND, is_v4(destination) ? AF_INET : AF_INET6))
        return CAPTURE;
    if (flags & POD_FAIL_OPEN) {
        count(DECISION_OPEN_OUT);
        return LEAVE_ALONE;
    }
    count(DECISION_REFUSED_NO_AGENT);
    return REFUSE;
}

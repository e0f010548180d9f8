// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: cgroup/getpeername4, on the cgroup v2 root. Runs at getpeername() of a
// connected IPv4 socket.
// Does: of a socket that the connect hook has led from a service's address to an
// endpoint, tells the application what it has dialed.
// Reads: sk and its storage.
// Maps: dialed.
// Returns: 1, always.
// Budget: 4096 verified instructions.

#include <meshbpf/socket.h>

int getpeername4(struct bpf_sock_addr *ctx)
{
    struct dialed *dialed;

    if (!ctx->sk)
        return 1;
    dialed = dialed_by(ctx->sk);
    if (dialed && is_v4(&dialed->address)) {
        ctx->user_ip4 = dialed->address.word[3];
        ctx->user_port = bpf_htons(dialed->port);
    }
    return 1;
}

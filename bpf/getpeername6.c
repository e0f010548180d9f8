// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: cgroup/getpeername6, on the cgroup v2 root. Runs at getpeername() of a
// connected IPv6 socket, also of one that is connected to a v4-mapped address.
// Does, reads, maps, returns: as getpeername4.c, with user_ip6.
// Budget: 4096 verified instructions.

#include <meshbpf/socket.h>

int getpeername6(struct bpf_sock_addr *ctx)
{
    struct dialed *dialed;

    if (!ctx->sk)
        return 1;
    dialed = dialed_by(ctx->sk);
    if (dialed) {
        ctx->user_ip6[0] = dialed->address.word[0];
        ctx->user_ip6[1] = dialed->address.word[1];
        ctx->user_ip6[2] = dialed->address.word[2];
        ctx->user_ip6[3] = dialed->address.word[3];
        ctx->user_port = bpf_htons(dialed->port);
    }
    return 1;
}

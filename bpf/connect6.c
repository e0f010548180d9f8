// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Hook: cgroup/connect6, on the cgroup v2 root. Runs once per connect() of an
// IPv6 socket, also when it dials a v4-mapped address: such a destination has
// the form in which our maps hold IPv4, and is judged as IPv4.
// Does, reads, maps, returns: as connect4.c, with user_ip6.
// Budget: 16384 verified instructions.

#include <meshbpf/connect.h>

int connect6(struct bpf_sock_addr *ctx)
{
    struct address destination;
    struct dial dial = {};
    int result;

    destination.word[0] = ctx->user_ip6[0];
    destination.word[1] = ctx->user_ip6[1];
    destination.word[2] = ctx->user_ip6[2];
    destination.word[3] = ctx->user_ip6[3];
    result = on_connect(ctx, &destination, &dial);
    if (dial.port) {
        ctx->user_ip6[0] = dial.address.word[0];
        ctx->user_ip6[1] = dial.address.word[1];
        ctx->user_ip6[2] = dial.address.word[2];
        ctx->user_ip6[3] = dial.address.word[3];
        ctx->user_port = bpf_htons(dial.port);
    }
    return result;
}

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// The body of connect4 and connect6.
#pragma once

#include "socket.h"
#include "verdict.h"

#define PROCEED 1
#define FAIL 0

// A socket may come back from a failed connect() with our mark on it.
INLINE void unmark(struct bpf_sock_addr *ctx, u32 mark)
{
    if ((mark & STEER_MASK) != STEER_MARK)
        return;
    mark = 0;
    bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
}

INLINE int on_connect(struct bpf_sock_addr *ctx, const struct address *destination)
{
    u64 cookie;
    u32 *pod, mark = 0;

    if (ctx->protocol != IPPROTO_TCP)
        return PROCEED;
    cookie = bpf_get_netns_cookie(ctx);
    pod = map_find(MAP_PODS, &cookie);
    if (!pod)
        return PROCEED;
    if (!ctx->sk)
        return PROCEED;
    if (is_agent_socket(ctx->sk)) {
        count(DECISION_AGENT_SOCKET);
        return PROCEED;
    }
    bpf_getsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));

    switch (judge(*pod, destination, bpf_ntohs(ctx->user_port))) {
    case REFUSE:
        bpf_set_retval(-ECONNREFUSED); // a plain 0 would say EPERM
        return FAIL;
    case LEAVE_ALONE:
        unmark(ctx, mark);
        clear_captured(ctx->sk);
        return PROCEED;
    case CAPTURE:
        break;
    }
    // The application's own mark serves its own policy routes: not ours to
    // replace. TC sees the SYN and captures it there.
    if (mark != 0 && mark != STEER_MARK) {
        count(DECISION_FOREIGN_MARK);
        return PROCEED;
    }
    // Remembered beside the mark, so that a pod which takes the mark off again
    // sends nothing past TC.
    if (!set_captured(ctx->sk))
        return PROCEED;
    mark = STEER_MARK;
    if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) == 0)
        count(DECISION_CAPTURED_BY_CONNECT);
    return PROCEED;
}

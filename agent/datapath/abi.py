"""Numbers of the kernel's BPF interface that meshbpf uses.

Values are those of `include/uapi/linux/bpf.h`, which never change once
released; the comment names the kernel when it is younger than 6.1, the
oldest that meshbpf runs on.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Cmd(IntEnum):
    """First argument of bpf(2), `enum bpf_cmd`."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_LOAD = 18
    MAP_LOOKUP_AND_DELETE_ELEM = 21
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    LINK_DETACH = 34


class MapType(IntEnum):
    """`enum bpf_map_type`."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    SOCKMAP = 15
    SOCKHASH = 18
    QUEUE = 22
    SK_STORAGE = 24
    RINGBUF = 27

    @property
    def per_cpu(self) -> bool:
        """Whether a lookup returns one value per possible CPU."""
        return self in (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)


class ProgType(IntEnum):
    """`enum bpf_prog_type`."""

    SOCKET_FILTER = 1
    SCHED_CLS = 3
    CGROUP_SKB = 8
    CGROUP_SOCK = 9
    SOCK_OPS = 13
    SK_SKB = 14
    SK_MSG = 16
    CGROUP_SOCK_ADDR = 18
    SK_LOOKUP = 30


class AttachType(IntEnum):
    """`enum bpf_attach_type`."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_INET_SOCK_CREATE = 2
    CGROUP_SOCK_OPS = 3
    SK_SKB_STREAM_PARSER = 4
    SK_SKB_STREAM_VERDICT = 5
    SK_MSG_VERDICT = 7
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_INET4_POST_BIND = 12
    CGROUP_INET6_POST_BIND = 13
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    CGROUP_INET_SOCK_RELEASE = 34
    SK_LOOKUP = 36
    SK_SKB_VERDICT = 38
    TCX_INGRESS = 46  # 6.6
    TCX_EGRESS = 47  # 6.6


class LinkType(IntEnum):
    """`enum bpf_link_type`."""

    CGROUP = 3
    NETNS = 5
    TCX = 11  # 6.6


class MapFlag(IntFlag):
    """`map_flags` of map creation."""

    NONE = 0
    NO_PREALLOC = 1 << 0
    RDONLY_PROG = 1 << 7
    WRONLY_PROG = 1 << 8
    CLONE = 1 << 9
    MMAPABLE = 1 << 10


class Update(IntEnum):
    """`flags` of a map update."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


class MultiAttach(IntFlag):
    """Flags of a tcx link: where it goes among those already there."""

    NONE = 0
    BEFORE = 1 << 3
    AFTER = 1 << 4
    ID = 1 << 5
    LINK = 1 << 13

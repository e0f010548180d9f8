"""Watch the private network: `watching`, then, once told to stop, the counts.

    watch.py PORT...     TCP packets from or to each port, then how many packets
                         of any kind hold the clients' text

Ends when /run/testbed-watched exists, which it removes.
"""

import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

STOP = Path("/run/testbed-watched")
MARKER = b"marker-plaintext"
IPV4, IPV6, TCP = 0x0800, 0x86DD, 6


def device() -> str:
    for line in subprocess.run(
        ["ip", "-o", "-4", "address"], check=True, capture_output=True, text=True
    ).stdout.splitlines():
        _, name, _, address, *_ = line.split()
        if address.startswith("198.18.80."):
            return name
    raise SystemExit("no interface on the private network")


def ports(frame: bytes) -> tuple[int, ...]:
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == IPV4 and frame[23] == TCP:
        return struct.unpack_from("!HH", frame, 14 + (frame[14] & 15) * 4)
    if kind == IPV6 and frame[20] == TCP:
        return struct.unpack_from("!HH", frame, 54)
    return ()


def main() -> None:
    counts = dict.fromkeys(map(int, sys.argv[1:]), 0)
    readable = 0
    STOP.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    sock.bind((device(), 3))
    sock.settimeout(0.5)
    print("watching", flush=True)
    end = time.monotonic() + 300
    while not STOP.exists() and time.monotonic() < end:
        try:
            frame = sock.recv(65536)
        except TimeoutError:
            continue
        readable += MARKER in frame
        for port in set(ports(frame)) & set(counts):
            counts[port] += 1
    STOP.unlink(missing_ok=True)
    print(*counts.values(), readable)


if __name__ == "__main__":
    main()

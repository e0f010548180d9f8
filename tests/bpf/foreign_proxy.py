"""A proxy that knows nothing of us: `python -m tests.bpf.foreign_proxy NETNS CGROUP SPOOF`.

Listens and marks in the pod as ztunnel does, in a cgroup of its own. What comes
to 15001 is told where it was going; for 15006 it asks the app, under the client's
address if SPOOF is 1. Each line `ADDRESS PORT` on standard input is dialed.
"""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

from meshbpf.agent.datapath.netns import Netns
from tests.bpf import lab

MARK = 0x539
IP_FREEBIND = 15


def make(netns: Netns, family: int) -> socket.socket:
    sock = netns.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, lab.SO_MARK, MARK)
    return sock


def ask_app(netns: Netns, client: str, target: tuple[str, int]) -> str:
    with make(netns, lab.family_of(target[0])) as sock:
        sock.settimeout(2)
        try:
            if client:
                lab.transparent(sock)
                sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
                sock.bind((client, 0))
            sock.connect(target)
            sock.sendall(b"hello")
            return sock.recv(200).decode()
        except OSError as error:
            return f"no app: {error}"


def serve(listener: socket.socket, port: int, netns: Netns, spoof: bool) -> None:
    while True:
        sock, peer = listener.accept()
        with sock:
            here = sock.getsockname()
            target, client = (lab.spoken(here[:2]), here[1]), lab.spoken(peer[:2])
            if port == 15006:
                said = ask_app(netns, client if spoof else "", target)
            else:
                sock.recv(100)
                said = f"{target[0]} {target[1]} from {client}"
            sock.sendall(f"{port} {said}".encode())


def main() -> None:
    name, cgroup, spoof = sys.argv[1:]
    Path(cgroup, "cgroup.procs").write_text("0")
    with lab.opened(name) as netns:
        for port in (15001, 15006, 15008):
            listener = make(netns, socket.AF_INET6)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("::", port))
            listener.listen(16)
            argv = (listener, port, netns, spoof == "1")
            threading.Thread(target=serve, args=argv, daemon=True).start()
        print("ready", flush=True)
        for line in sys.stdin:
            address, number = line.split()
            print(ask_app(netns, "", (address, int(number))), flush=True)


if __name__ == "__main__":
    main()

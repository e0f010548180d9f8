"""A client in a pod of the testbed; prints one line of JSON.

client.py ADDRESS PORT [--limit S]    one connection: echo, or the line of port 7009
client.py ADDRESS PORT --again        `started`, then one after another until
                                      /run/testbed-stop exists; counts and failures
client.py ADDRESS PORT --hold N       N connections that echo a byte a second, likewise
"""

import argparse
import json
import socket
import time
from pathlib import Path
from typing import Any

STOP = Path("/run/testbed-stop")
WHOAMI = 7009
TEXT = b"marker-plaintext " * 64


def once(address: str, port: int, limit_s: float) -> dict[str, Any]:
    began = time.monotonic()
    try:
        with socket.create_connection((address, port), limit_s) as sock:
            if port == WHOAMI:
                with sock.makefile() as file:
                    told: dict[str, Any] = json.loads(file.readline())
                    return told
            # Asked now: once both ends have closed there is no peer any more.
            ends = {"local": sock.getsockname()[0], "peer": sock.getpeername()[0]}
            sock.sendall(TEXT)
            sock.shutdown(socket.SHUT_WR)
            got = b""
            while data := sock.recv(65536):
                got += data
            if got != TEXT:
                raise OSError(f"{len(got)} of {len(TEXT)} bytes came back")
            return ends
    except (OSError, ValueError) as error:
        took = round(time.monotonic() - began, 2)
        return {"error": f"{type(error).__name__}: {error}", "seconds": took}


def again(address: str, port: int, limit_s: float) -> dict[str, Any]:
    done, failed, slowest = 0, [], 0.0
    print("started", flush=True)
    while not STOP.exists():
        began = time.monotonic()
        answer = once(address, port, limit_s)
        slowest = max(slowest, time.monotonic() - began)
        if "error" in answer:
            failed.append({"at": round(time.time(), 2), **answer})
        else:
            done += 1
        time.sleep(0.02)
    return {
        "done": done,
        "failed": len(failed),
        "first": failed[:5],
        "slowest_s": round(slowest, 2),
    }


def hold(address: str, port: int, limit_s: float, count: int) -> dict[str, Any]:
    socks = [socket.create_connection((address, port), limit_s) for _ in range(count)]
    ended = 0
    print("started", flush=True)
    while socks and not STOP.exists():
        for sock in list(socks):
            try:
                sock.sendall(b"x")
                if sock.recv(1) != b"x":
                    raise OSError("ended")
            except OSError:
                sock.close()
                socks.remove(sock)
                ended += 1
        time.sleep(1)
    return {"held": len(socks), "ended": ended}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--hold", type=int)
    options = parser.parse_args()
    target = (options.address, options.port, options.limit)
    if options.hold:
        result = hold(*target, options.hold)
    elif options.again:
        result = again(*target)
    else:
        result = once(*target)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

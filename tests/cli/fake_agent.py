"""An agent's control socket with prepared answers: real socket, real client, no data plane."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from meshbpf.agent.api import (
    CONTROL_SOCKET,
    REQUESTS,
    AnyRequest,
    ErrorBody,
    RequestEnvelope,
    Result,
)


class FakeAgent:
    """Answers each verb with its prepared result or error, and remembers the requests."""

    def __init__(self, state_dir: Path, answers: Mapping[str, Result | ErrorBody | bytes]) -> None:
        self.answers = answers
        self.requests: list[AnyRequest] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(state_dir / CONTROL_SOCKET))
        (state_dir / CONTROL_SOCKET).chmod(0o600)
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> FakeAgent:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return  # the listener was shut down
            with peer, peer.makefile("rb") as lines:
                for line in lines:
                    answer = self._answer(line)
                    if not answer:
                        break  # hang up without a word
                    peer.sendall(answer)

    def _answer(self, line: bytes) -> bytes:
        envelope = msgspec.json.decode(line, type=RequestEnvelope)
        self.requests.append(msgspec.json.decode(envelope.args, type=REQUESTS[envelope.verb]))
        answer = self.answers[envelope.verb]
        if isinstance(answer, bytes):
            return answer
        if isinstance(answer, ErrorBody):
            return msgspec.json.encode({"ok": False, "error": answer}) + b"\n"
        return msgspec.json.encode({"ok": True, "result": answer}) + b"\n"

"""One TLS connection over memory: ciphertext in and out, plaintext in and out.

No sockets. The driver hands over what it received, takes what is to be sent,
and moves plaintext in large pieces: one `write` turns a whole chunk into
records, one `read_into` empties all complete records into the caller's
buffer.
"""

from __future__ import annotations

from OpenSSL import SSL

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire.errors import TlsError, UsageError
from meshbpf.agent.wire.tls import Expectation

RECORD_BYTES = 16384
"""The most plaintext that one TLS record holds."""
_RECORD_OVERHEAD_BYTES = 22
"""TLS 1.3 with AES-GCM: header 5, content type 1, tag 16."""
_SMALL_READ_BYTES = 16 * 1024
_TAKE_SLACK_BYTES = 4096


class TlsChannel:
    """Client or server end of a TLS connection; see `Expectation` for whom it accepts."""

    def __init__(self, context: SSL.Context, expectation: Expectation, *, server: bool) -> None:
        self._expectation = expectation
        self._connection = SSL.Connection(context, None)
        self._connection.set_app_data(expectation)
        if server:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._unsent_bytes = 0

    @property
    def peer(self) -> SpiffeId:
        """Who the other end proved to be. UsageError before the handshake."""
        peer = self._expectation.peer
        if peer is None:
            raise UsageError("the TLS handshake is not done yet")
        return peer

    def handshake(self) -> bool:
        """Go on with the handshake; True once it is done.

        Take and send the ciphertext after each call, also after TlsError: it
        may hold the alert that tells the peer why.
        """
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise self._fault("handshake", error) from error
        return True

    def receive(self, ciphertext: bytes | memoryview) -> None:
        """Take in what the socket received. b"" is not the end: that the driver must know."""
        self._connection.bio_write(ciphertext)

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt all complete records that fit; how many bytes. 0 when more input is needed.

        Raises TlsError when a record is forged or the peer closed TLS.
        """
        filled = 0
        size = len(buffer)
        receive = self._connection.recv_into
        # A read never yields more than one record, and a short buffer makes
        # OpenSSL keep the rest, so the loop ends on WantRead or a full buffer.
        while filled < size:
            try:
                filled += receive(buffer[filled : filled + RECORD_BYTES])
            except SSL.WantReadError:
                break
            except SSL.ZeroReturnError:
                if filled:
                    break  # close_notify: seen again by the next call
                raise TlsError("tls-closed", "the peer closed the TLS connection") from None
            except SSL.Error as error:
                raise self._fault("record", error) from error
        return filled

    def write(self, plaintext: bytes | bytearray | memoryview) -> None:
        """Encrypt all of `plaintext`; take the records with `take`."""
        size = len(plaintext)
        if not size:
            return
        try:
            written = self._connection.send(plaintext)
        except SSL.Error as error:
            raise self._fault("write", error) from error
        if written != size:
            raise UsageError("OpenSSL wrote a part: partial writes must be switched off")
        self._unsent_bytes += size + _RECORD_OVERHEAD_BYTES * (-(-size // RECORD_BYTES))

    def take(self) -> bytes:
        """All ciphertext that waits to be sent; b"" when there is none."""
        pieces = []
        expected = self._unsent_bytes + _TAKE_SLACK_BYTES
        self._unsent_bytes = 0
        while True:
            try:
                piece = self._connection.bio_read(expected)
            except SSL.WantReadError:
                break
            pieces.append(piece)
            if len(piece) < expected:
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Say close_notify, if the connection still can."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            # The peer is gone or the handshake never ended: no one to tell.
            self._unsent_bytes = 0

    def _fault(self, when: str, error: SSL.Error) -> TlsError:
        reason = self._expectation.refusal or _openssl_reason(error)
        return TlsError(f"tls-{when}", f"TLS {when} failed: {reason}")


def _openssl_reason(error: SSL.Error) -> str:
    """The last reason of OpenSSL's error queue, or the exception's own name."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1])
    return " ".join(map(str, error.args)) or type(error).__name__

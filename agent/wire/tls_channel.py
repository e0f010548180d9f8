"""One TLS connection over memory: ciphertext in and out, plaintext in and out.

No sockets. The driver hands over what it received, takes what is to be sent,
and moves plaintext in large pieces: one `write` turns a whole chunk into
records, one `read_into` empties all complete records into the caller's
buffer.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

from OpenSSL import SSL

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire.crl import End
from meshbpf.agent.wire.errors import RevokedError, TlsError, UsageError
from meshbpf.agent.wire.records import DirectRecords, records_for
from meshbpf.agent.wire.tls import Expectation

log = logging.getLogger(__name__)

_RARE_BYTES = 16 * 1024


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
        self._records = records_for(self._connection)

    @property
    def peer(self) -> SpiffeId:
        """Who the other end proved to be. UsageError before the handshake."""
        peer = self._expectation.peer
        if peer is None:
            raise UsageError("the TLS handshake is not done yet")
        return peer

    def watched(self, end: End) -> AbstractContextManager[None]:
        """For the time of the block, call `end` once the peer's chain is revoked."""
        standing = self._expectation.standing
        return nullcontext() if standing is None else standing.watched(end)

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

    def receive(self, ciphertext: memoryview) -> None:
        """Take in what the socket received. The end of it only the driver sees."""
        self._records.feed(ciphertext)

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt all complete records that fit; how many bytes. 0 when more input is needed.

        Raises TlsError when a record is forged or the peer closed TLS.
        """
        try:
            return self._records.read_into(buffer)
        except SSL.ZeroReturnError:
            raise TlsError("tls-closed", "the peer closed the TLS connection") from None
        except SSL.Error as error:
            raise self._fault("record", error) from error

    def write(self, plaintext: bytes | bytearray | memoryview) -> None:
        """Encrypt all of `plaintext`; take the records with `take_into`."""
        size = len(plaintext)
        if not size:
            return
        try:
            written = self._records.write(plaintext)
        except SSL.Error as error:
            raise self._fault("write", error) from error
        if written != size:
            raise UsageError("OpenSSL wrote a part: partial writes must be switched off")

    def take_into(self, buffer: memoryview) -> int:
        """Move ciphertext that waits to be sent into `buffer`; how many bytes.

        Call it again while it fills the buffer: there may be more.
        """
        return self._records.take_into(buffer)

    def take(self) -> bytes:
        """All ciphertext that waits to be sent; for handshakes and other rare words."""
        buffer = memoryview(bytearray(_RARE_BYTES))
        taken = bytearray()
        while size := self._records.take_into(buffer):
            taken += buffer[:size]
        return bytes(taken)

    def addresses(self) -> tuple[int, int, int] | None:
        """Where OpenSSL keeps the connection, for the relay in C; see DirectRecords."""
        records = self._records
        return records.addresses() if isinstance(records, DirectRecords) else None

    def failed(self, result: int) -> None:
        """Raise TlsError for an OpenSSL function, called elsewhere, that returned `result`."""
        records = self._records
        try:
            if isinstance(records, DirectRecords):
                records.fail(result)
        except SSL.ZeroReturnError:
            raise TlsError("tls-closed", "the peer closed the TLS connection") from None
        except SSL.Error as error:
            raise self._fault("record", error) from error
        raise TlsError("tls-record", "TLS failed without a reason")

    def close(self) -> None:
        """Say close_notify, if the connection still can."""
        try:
            self._connection.shutdown()
        except SSL.Error:
            # The peer is gone or the handshake never ended: no one to tell.
            log.debug("no close_notify was sent")

    def _fault(self, when: str, error: SSL.Error) -> TlsError:
        reason = self._expectation.refusal or _openssl_reason(error)
        if self._expectation.revoked:
            return RevokedError(f"TLS {when} failed: {reason}")
        return TlsError(f"tls-{when}", f"TLS {when} failed: {reason}")


def _openssl_reason(error: SSL.Error) -> str:
    """The last reason of OpenSSL's error queue, or the exception's own name."""
    queue = error.args[0] if error.args else None
    if isinstance(queue, list) and queue:
        return str(queue[-1][-1])
    return " ".join(map(str, error.args)) or type(error).__name__

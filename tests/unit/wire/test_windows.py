"""Flow control's arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.wire.windows import (
    MAX_WINDOW_BYTES,
    ReceiveWindow,
    SendWindow,
    WindowOverflowError,
)


def test_a_send_window_may_go_below_zero_and_come_back() -> None:
    window = SendWindow(100)
    window.use(80)
    window.change(-60)
    assert window.available == -40
    window.change(50)
    assert window.available == 10


def test_a_send_window_that_passes_its_limit_is_an_error_and_unchanged() -> None:
    window = SendWindow(10)
    with pytest.raises(WindowOverflowError):
        window.change(MAX_WINDOW_BYTES)
    assert window.available == 10


@given(st.lists(st.integers(1, 5000), max_size=60))
def test_a_receive_window_never_loses_or_invents_a_byte(chunks: list[int]) -> None:
    window = ReceiveWindow(4000)
    peer = 4000  # what the peer believes it may send
    for chunk in chunks:
        if chunk > peer:
            assert not window.take(chunk)
            return
        assert window.take(chunk)
        peer -= chunk
        peer += window.credit(chunk)
        assert window.available == peer
        # At most a quarter is held back: the peer can always go on.
        assert peer > 4000 * 3 // 4 - 1

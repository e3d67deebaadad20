"""Commands that are told to end from outside."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from fixtures.core.ending import termination_interrupts


def test_termination_is_an_interrupt() -> None:
    """Inside the block SIGTERM is Ctrl-C; after it the process handles it as before."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), termination_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_beside_the_main_thread() -> None:
    """A thread, to which no signal comes, works as without."""
    before = signal.getsignal(signal.SIGTERM)

    def inside() -> object:
        with termination_interrupts():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is before

"""Processes that tests fork and kill take nothing of the tests' own with them."""

from __future__ import annotations

import os
import signal

import pytest
from support import forked
from tqdm.std import TqdmDefaultWriteLock, tqdm


def test_one_that_is_killed_while_it_draws_leaves_the_bars_free() -> None:
    tqdm.get_lock()
    shared = TqdmDefaultWriteLock.mp_lock
    if shared is None:
        pytest.skip("this machine has no lock among processes")

    def draws() -> None:
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked.ended(forked.start(draws)) == -signal.SIGKILL
    assert shared.acquire(timeout=5)
    shared.release()

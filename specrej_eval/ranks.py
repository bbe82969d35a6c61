"""Several processes of one run that look after each other: if one dies, the others say which, and stop.

A process that waits for a dead one waits for minutes, or fails with a message of the communication library that names
nobody. So each tells the others where it runs, and a thread of its own watches them: on the same machine by process
id, on others by a heartbeat in the store that the launcher has set up. It imports torch only where it is used.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrej_eval import stopping
from specrej_eval.errors import ConfigError, SpecRejError

POLL = 1.0
"""Seconds between two looks at the others."""
GRACE = 3.0
"""Seconds for which a process that is gone may just have finished before us."""
SILENCE = 30.0
"""Seconds without a heartbeat from another machine."""
_PREFIX = "specrej_eval/rank"


class RankError(SpecRejError, RuntimeError):
    """Another process of the run has died, or has stopped with an error."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the other processes."""

    rank: int
    host: str
    pid: int
    started: str
    """When, in the kernel's words: a process id may be given out again."""

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @classmethod
    def of_this_process(cls, rank: int) -> Peer:
        return cls(rank, socket.gethostname(), os.getpid(), _started(os.getpid()) or "")

    @property
    def alive(self) -> bool:
        """Whether it runs; on this machine only."""
        return _started(self.pid) == (self.started or None)


class Watch:
    """Watches the other ranks while ``guard`` is entered.

    Args:
        rank, world_size: this process among those of the run.
        store: the run's rendezvous store, ``torch.distributed``'s.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        self.rank = rank
        self.store = store
        self.me = Peer.of_this_process(rank)
        self.peers: dict[int, Peer | None] = {other: None for other in range(world_size) if other != rank}
        """None until it has said where it runs."""
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._store_is_gone = False
        self._verdict: str | None = None
        """Who is lost. It stays so, and the store is asked no more: its holder may be the next to stop."""
        self._inside = 0
        self._since = 0.0
        self._over = threading.Event()
        store.set(f"{_PREFIX}{rank}", json.dumps([self.me.rank, self.me.host, self.me.pid, self.me.started]))
        self._thread = threading.Thread(target=self._run, name="specrej-ranks", daemon=True)
        self._thread.start()
        # A thread that is in the store's C++ code when the interpreter goes makes it abort: a run that went well would
        # end with SIGABRT, and its launcher would call it failed.
        atexit.register(self.close)

    def close(self) -> None:
        """Watch no more; at the latest when the process ends. It waits for a call of the store that is under way."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=GRACE)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """What happens inside needs all ranks: it ends with a ``RankError`` or with the process if one is lost.

        Raises:
            RankError: names the rank; in place of the communication library's own error.
        """
        self._inside += 1
        self._since = time.monotonic()
        try:
            yield
        except SpecRejError as error:
            self._tell(str(error))
            raise
        except KeyboardInterrupt:
            self._tell("a signal")
            raise
        except RuntimeError as error:
            lost = self._wait_for_loss()
            if lost is None:
                self._tell(f"{type(error).__name__}: {error}")
                raise
            raise RankError(f"{lost}: this process stops too.", hint=stopping.what_is_kept()) from error
        finally:
            self._inside -= 1

    def lost(self) -> str | None:
        """What has become of a rank that is no longer there; None while all are."""
        if self._verdict is None:
            self._verdict = self._look()
        return self._verdict

    def _look(self) -> str | None:
        peers = [peer for peer in self.peers.values() if peer is not None]
        gone = [peer for peer in peers if peer.host == self.me.host and not peer.alive]
        # Those that are gone first. If one of them held the store, each call to it would print a page of C++ frames.
        if gone and 0 in [peer.rank for peer in gone]:
            self._store_is_gone = True
        for peer in [*gone, *peers]:
            if (told := self._get(f"{_PREFIX}{peer.rank}/error")) is not None:
                return f"{peer} has stopped: {told.decode()}"
            if peer in gone:
                return f"{peer} has died"
            if peer.host != self.me.host and self._silent(peer):
                return f"{peer} has not been heard of for {SILENCE:.0f} seconds"
        if self._store_is_gone and self.peers.get(0, self.me) is None:
            return "rank 0, which holds the run's store, has died (or cannot be reached any more)"
        return None

    def _find_peers(self) -> None:
        if self._verdict is not None:
            return
        for other, known in self.peers.items():
            if known is None and (said := self._get(f"{_PREFIX}{other}")) is not None:
                self.peers[other] = Peer(*json.loads(said))

    def _run(self) -> None:
        missing = 0.0
        for count in range(sys.maxsize):
            self._find_peers()  # outside a guard too: to know a peer before it is gone
            if self._over.wait(POLL if None not in self.peers.values() else POLL / 10):
                return
            lost = self.lost()
            if lost is None:
                self._set(f"{_PREFIX}{self.rank}/beat", str(count))
            if lost is None or not self._inside:
                missing = 0.0
                continue
            missing = missing or time.monotonic()
            if time.monotonic() - max(missing, self._since) < GRACE:
                continue
            # the main thread may wait in C code for hours: nothing that it could catch would reach it
            text = f"specrej-eval: {lost}: {stopping.rank_name()} stops too.\n  hint: {stopping.what_is_kept()}\n"
            sys.stderr.write(text)
            sys.stderr.flush()
            os._exit(1)

    def _wait_for_loss(self) -> str | None:
        deadline = time.monotonic() + GRACE - POLL
        while (lost := self.lost()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return lost

    def _tell(self, message: str) -> None:
        self._set(f"{_PREFIX}{self.rank}/error", message)

    def _silent(self, peer: Peer) -> bool:
        beat = self._get(f"{_PREFIX}{peer.rank}/beat") or b""
        last, since = self._beats.get(peer.rank, (None, 0.0))
        if beat != last:
            self._beats[peer.rank] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > SILENCE

    def _set(self, key: str, value: str) -> None:
        if not self._store_is_gone:
            try:
                self.store.set(key, value)
            except RuntimeError:
                self._store_is_gone = True

    def _get(self, key: str) -> bytes | None:
        if not self._store_is_gone:
            try:
                return bytes(self.store.get(key)) if self.store.check([key]) else None
            except RuntimeError:
                self._store_is_gone = True
        return None


def started() -> int:
    """Processes that a launcher says it has started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_seen(started: int, seen: int, *, command: str) -> None:
    """Raises:
    ConfigError: several processes were started, and to accelerate this is the only one.
    """
    if started > 1 and seen == 1:
        raise ConfigError(
            f"{started} processes were started (WORLD_SIZE), but to accelerate this is the only one: each would "
            "answer all prompts.",
            hint=f"start them with `accelerate launch -m {command}` or `torchrun -m {command}`, or unset WORLD_SIZE.",
        )


@contextlib.contextmanager
def asking_accelerate(started: int, *, command: str) -> Iterator[None]:
    """Where accelerate first looks at the processes. Of a WORLD_SIZE that no launcher has set newer releases see one
    process; older ones, and all of them on a CPU that they are told to take, miss the others' address.

    Raises:
        ConfigError: they miss it (see ``check_seen``).
    """
    try:
        yield
    except ValueError as error:
        if "MASTER_ADDR" in str(error):
            check_seen(started, 1, command=command)
        raise


def watch(rank: int, world_size: int) -> Watch | None:
    """Watch the ranks of the process group there is; None for a single process, or where there is no group.

    All ranks have to call it.
    """
    if world_size < 2:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    from datetime import timedelta

    # a connection of our own: the group's may be busy waiting, for a rank that is dead
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch does not list it among its exports
        address, int(port), None, False, timedelta(seconds=60), wait_for_workers=False
    )
    return Watch(rank, world_size, store)


def _started(pid: int) -> str | None:
    """When a process of this machine was started; None if it runs no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        pass
    except OSError:
        return None
    if Path("/proc/self/stat").is_file():
        return None
    try:
        os.kill(pid, 0)  # no /proc: macOS
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "runs"

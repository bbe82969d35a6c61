# torch-free
"""Requests in flight: each is read by a thread of its own, and all news meet in one place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from time import monotonic
from typing import Any

from specrej_eval.engines.servers.protocols.base import Delta, Finish
from specrej_eval.http import BadAnswerError, ServerError, Stream


class News:
    """What streams have brought since somebody looked. Threads put in, the decoding thread takes out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._streams: set[RowStream] = set()
        self.last = monotonic()
        """When there was some."""

    def put(self, stream: RowStream, delta: Delta | None) -> None:
        """A delta of a stream, or its end."""
        with self._changed:
            if delta is None:
                stream.done = True
            else:
                stream.deltas.append(delta)
            self._streams.add(stream)
            self.last = monotonic()
            self._changed.notify()

    def take(self, seconds: float) -> list[tuple[RowStream, list[Delta]]]:
        """Streams with news, waiting at most so long for some. Of a stream that is done all has been taken then."""
        with self._changed:
            if not self._streams:
                self._changed.wait(seconds)
            found = []
            for stream in self._streams:
                found.append((stream, stream.deltas))
                stream.deltas = []
                stream.ended = stream.done
            self._streams = set()
        return found

    def awake(self) -> None:
        """The time of silence begins anew."""
        self.last = monotonic()


class RowStream:
    """One request of one row.

    Args:
        read: makes sense of an event.
    """

    def __init__(self, request_id: str, stream: Stream, read: Callable[[Any], Delta], news: News) -> None:
        self.request_id = request_id
        self.deltas: list[Delta] = []
        self.done = False
        """It brings nothing more; what it brought may not have been taken yet."""
        self.ended = False
        """It is done, and all of it was taken."""
        self.error: ServerError | None = None
        """Why it broke; None while it goes on, and where it came to an end of its own or was cut."""
        self.finish: Finish | None = None
        """Why the server ended it, as far as its events say."""
        self.spoilt = False
        """It brought something that cannot be; nothing of it is taken any more."""
        self.is_cut = False
        self._stream = stream
        self._read = read
        self._news = news
        self._thread = threading.Thread(target=self._run, name="engine-stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cut(self) -> None:
        """End it, whatever it waits for."""
        self.is_cut = True
        self._stream.cut()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        where = self._stream.where
        try:
            for event in self._stream:
                try:
                    delta = self._read(event)
                except BadAnswerError as error:
                    raise ServerError(f"{where}: {error}") from error
                self._news.put(self, delta)
        except ServerError as error:
            self.error = error
        except Exception as error:  # a defect of ours must not leave a row waiting for ever
            self.error = ServerError(f"{where}: {type(error).__name__}: {error}")
        finally:
            self._news.put(self, None)


def cut_all(streams: Collection[RowStream], seconds: float = 1.0) -> None:
    """End streams, and wait for their threads no longer than that."""
    for stream in streams:
        stream.cut()
    until = monotonic() + seconds
    for stream in streams:
        stream.join(max(0.0, until - monotonic()))

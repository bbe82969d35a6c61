"""HTTP connections that another thread can end: requests' sessions over connections that tell which socket is in use.

A socket's own timeout starts anew with each byte, and nothing in requests ends an answer that is being read. So each
request of a thread says what it goes over (``Used``), and whoever wants it ended shuts that socket down.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from time import monotonic
from types import TracebackType
from typing import Any, Self

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class Used:
    """The connection that the requests of this thread go over while it is entered, so that another thread can end
    them."""

    def __init__(self) -> None:
        self.connected = False
        """Whether a connection had to be made for them."""
        self.is_over = False
        """Whether it was ended by ``shut_down``. A connection that is made after that is shut down too."""
        self._connection: HTTPConnection | None = None
        self._socket: Any = None

    def __enter__(self) -> Self:
        _thread.used = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _thread.used = None

    def shut_down(self) -> None:
        """Whoever reads from it sees its end."""
        self.is_over = True  # first: who has no socket yet looks here once it has one
        # a connection lets go of its socket while the last answer on it is still being read
        used = self._socket or getattr(self._connection, "sock", None)
        with contextlib.suppress(OSError):
            if isinstance(used, socket.socket):
                socket.socket.shutdown(used, socket.SHUT_RDWR)  # TLS's own has a say of its own
            elif used is not None:
                used.close()

    def goes_over(self, connection: HTTPConnection, used: Any) -> None:
        """Args:
        used: the connection's socket; None = it is being connected.
        """
        self._connection, self._socket = connection, used
        self.connected = self.connected or used is None
        if self.is_over and used is not None:
            self.shut_down()


class Deadline(Used):
    """Ends the requests of this thread in time, whatever they wait for: another thread watches the clock."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._end = monotonic() + seconds
        self._done = threading.Event()

    @property
    def passed(self) -> bool:
        return monotonic() >= self._end

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="http-deadline", daemon=True).start()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._done.set()

    def _watch(self) -> None:
        wait = self._seconds
        while not self._done.wait(wait):
            self.shut_down()
            wait = 0.1


class _Thread(threading.local):
    used: Used | None = None


_thread = _Thread()
"""What the requests of this thread go over."""


class _Watched(HTTPConnection):
    """Tells a request which socket is in use."""

    def connect(self) -> None:
        if _thread.used is not None:
            _thread.used.goes_over(self, None)
        super().connect()
        if _thread.used is not None:
            _thread.used.goes_over(self, self.sock)

    def request(self, *args: Any, **kwargs: Any) -> None:
        if _thread.used is not None:
            _thread.used.goes_over(self, self.sock)
        super().request(*args, **kwargs)
        if _thread.used is not None:
            _thread.used.goes_over(self, self.sock)


class _WatchedTls(_Watched, HTTPSConnection):
    pass


class _Http(HTTPConnectionPool):
    ConnectionCls = _Watched


class _Https(HTTPSConnectionPool):
    ConnectionCls = _WatchedTls


class Adapter(HTTPAdapter):
    """requests, over watched connections."""

    _POOLS = {"http": _Http, "https": _Https}  # noqa: RUF012 (nobody changes it)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if type(manager) is urllib3.ProxyManager:  # SOCKS has connections of its own
            manager.pool_classes_by_scheme = self._POOLS
        return manager


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """Nowhere: requests would read the whole body of a redirect, even of one that is not followed."""


class Sessions(threading.local):
    """A session for each thread: it is not safe to share."""

    def __init__(self) -> None:
        self.session = _Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, Adapter())

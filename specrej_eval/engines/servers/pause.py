# torch-free
"""A server that stands still because of us, and goes on however we end."""

from __future__ import annotations

import contextlib
import logging

from specrej_eval.engines.servers.protocols.base import EngineProtocol
from specrej_eval.http import ServerError

logger = logging.getLogger(__name__)

_NOT_THERE = (404, 405, 501)
"""Statuses of a server that has no such path."""


class Pause:
    """Whether the server stands still because of us. Both ``begin`` and ``end`` say whether it can still be paused: one
    that was started anew may not."""

    def __init__(self, protocol: EngineProtocol) -> None:
        self.on = False
        self._protocol = protocol

    def begin(self) -> bool:
        """Raises:
        ServerError: after all tries.
        """
        self.on = True  # first: who is interrupted in between ends the pause too
        try:
            self._protocol.pause()
        except ServerError as error:
            self._forgotten(error)
        return self.on

    def end(self) -> bool:
        """Raises:
        ServerError: after all tries.
        """
        if self.on:
            try:
                self._protocol.resume()
            except ServerError as error:
                self._forgotten(error)
                return False
            self.on = False  # not before: if it fails, it is tried once more on the way out
        return True

    def end_quietly(self) -> None:
        """On the way out: whatever happens, nothing else is kept from happening."""
        if self.on:
            with contextlib.suppress(Exception):
                self._protocol.resume(once=True)
                self.on = False

    def _forgotten(self, error: ServerError) -> None:
        if error.status not in _NOT_THERE:
            raise error
        self.on = False
        logger.warning("%s cannot be paused any more (%s).", self._protocol.server.shown_url, error.args[0])

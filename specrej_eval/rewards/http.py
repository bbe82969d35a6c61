"""JSON over HTTP to a server that may be down, slow or wrong: retries, and one error that says what was seen.

Retried: no connection, no answer in time, 408, 425, 429, 5xx, and an answer that is not what was asked for (a gateway's
HTML page with status 200, a wrong number of scores). Not retried: any other 4xx, which would only be refused again.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep
from typing import Any, TypeVar

import requests

from specrej_eval.errors import RewardError, without_passwords

Answer = TypeVar("Answer")
Item = TypeVar("Item")

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds between tries: the first, doubled each time, and the most; each times a random factor in [0.5, 1]."""
TRY_AGAIN = {408, 425, 429}
"""Statuses below 500 that another try may cure."""
SHOWN_BYTES = 200
MAX_PARALLEL = 8
"""Requests in flight at a time, where a protocol takes one text a request."""

_logger = logging.getLogger(__name__)


class ServerError(RewardError):
    """The server could not be asked, or answered something else than asked for."""

    def __init__(self, message: str, *, hint: str | None = None, status: int | None = None, body: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status
        """Of the last answer; None if there was none."""
        self.body = body


class BadAnswerError(ValueError):
    """Raised by a parser: the server's JSON is not what was asked for, in words."""


class JsonServer:
    """Asks one server.

    Args:
        url: what paths are put behind. A name and password in it are sent as basic authentication, never shown.
        key_variables: environment variables of which the first that is set is sent as a bearer token.
        timeout: seconds to wait for a connection, and for the next byte of an answer.
        retries: tries after the first.
    """

    def __init__(self, url: str, *, key_variables: Sequence[str], timeout: float, retries: int) -> None:
        self.url = url.rstrip("/")
        self.shown_url = without_passwords(self.url)
        self.key_variables = tuple(key_variables)
        self.timeout = timeout
        self.retries = retries
        self.num_requests = 0
        """Requests that were answered as asked."""
        self._local = _Local()
        self._random = random.Random()
        self._lock = threading.Lock()

    def post(self, path: str, body: Any, parse: Callable[[Any], Answer]) -> Answer:
        """Send JSON, and return what ``parse`` makes of the JSON that comes back.

        Raises:
            ServerError: after all tries; names the address, the status and the first bytes of the last answer.
        """
        return self._ask("POST", path, body, parse)

    def get(self, path: str) -> Any:
        """The JSON at a path; None where there is none (any 4xx, or an answer that is not JSON).

        Raises:
            ServerError: the server is not there, or fails, after all tries.
        """
        try:
            return self._ask("GET", path, None, lambda answer: answer)
        except ServerError as error:
            if error.status is not None and error.status < 500:
                return None
            raise

    def each(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """``function`` of every item, several at a time, in order. The first failure ends it."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(MAX_PARALLEL, len(items)), thread_name_prefix="reward") as pool:
            return list(pool.map(function, items))  # a failure cancels what has not begun

    def _ask(self, method: str, path: str, body: Any, parse: Callable[[Any], Answer]) -> Answer:
        for number in range(self.retries + 1):
            try:
                return self._try(method, path, body, parse)
            except ServerError as error:
                hopeless = error.status is not None and 300 <= error.status < 500 and error.status not in TRY_AGAIN
                # a page that is not JSON, where JSON was only looked for, is an answer
                looked_for = method == "GET" and error.status == 200
                if hopeless or looked_for or number == self.retries:
                    raise self._final(error, number + 1) from error
                _logger.info("%s; trying again", error)
                sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**number) * self._random.uniform(0.5, 1))
        raise AssertionError("unreachable: the last try returns or raises")

    def _try(self, method: str, path: str, body: Any, parse: Callable[[Any], Answer]) -> Answer:
        where = f"{method} {self.shown_url}{path}"
        try:
            reply = self._local.session.request(
                method,
                f"{self.url}{path}",
                json=body,
                headers=self._headers(),
                timeout=(min(10.0, self.timeout), self.timeout),
                allow_redirects=False,  # a redirected POST becomes a GET
            )
        except requests.Timeout as error:
            raise ServerError(f"{where}: no answer within {self.timeout:g} s") from error
        except requests.RequestException as error:
            raise ServerError(f"{where}: {_cause(error)}") from error
        text = reply.content[:SHOWN_BYTES].decode("utf-8", "replace")
        if reply.status_code != 200:
            moved = f" to {reply.headers['Location']}" if "Location" in reply.headers else ""
            raise ServerError(
                f"{where}: status {reply.status_code} {reply.reason or ''}{moved}: {text!r}",
                status=reply.status_code,
                body=text,
            )
        try:
            answer = parse(reply.json())
        except requests.JSONDecodeError as error:
            raise ServerError(
                f"{where}: status 200, but not JSON ({reply.headers.get('Content-Type', 'of no type')}): {text!r}",
                status=200,
                body=text,
            ) from error
        except BadAnswerError as error:
            raise ServerError(f"{where}: status 200, but {error}: {text!r}", status=200, body=text) from error
        with self._lock:
            self.num_requests += 1
        return answer

    def _final(self, error: ServerError, tries: int) -> ServerError:
        hint = None
        if error.status in (401, 403):
            hint = f"the key is taken from the environment: {' or '.join(self.key_variables)}."
        elif error.status == 413:
            hint = "lower reward_batch_size."
        elif error.status is None:
            hint = "is the server up, and the address right? reward_timeout and reward_retries say how long to wait."
        message = str(error) if tries == 1 else f"{error} (after {tries} tries)"
        return ServerError(f"reward server: {message}", hint=hint, status=error.status, body=error.body)

    def _headers(self) -> dict[str, str]:
        for name in self.key_variables:
            if key := os.environ.get(name):
                return {"Authorization": f"Bearer {key}"}
        return {}


class _Local(threading.local):
    """A session is not safe to share among threads."""

    def __init__(self) -> None:
        self.session = requests.Session()


def number(value: Any) -> float:
    """A score of a JSON answer: a number, or a list of one; null, which is how strict JSON writes NaN, is NaN.

    Raises:
        BadAnswerError: anything else.
    """
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswerError(f"one score was expected, got {str(value)[:60]!r}")
    return float(value)


def numbers(values: Any, count: int) -> list[float]:
    """As many scores as texts were sent.

    Raises:
        BadAnswerError: another number of them, or something that is not a score.
    """
    if not isinstance(values, list):
        raise BadAnswerError(f"{count} scores were expected, got {type(values).__name__}")
    if len(values) != count:
        raise BadAnswerError(f"{count} scores were expected, got {len(values)}")
    return [number(value) for value in values]


def _cause(error: BaseException) -> str:
    """The innermost reason, which is the one that says something: connection refused, unknown host."""
    seen = str(error)
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
        seen = str(error) or seen
    return f"no connection ({seen})"

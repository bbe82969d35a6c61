"""JSON over HTTP to a server that may be down, slow, wrong or hostile: limits, retries, and one error that says what
was seen.

Retried: no connection, no whole answer in time, 408, 425, 429, 5xx, and an answer that is not what was asked for (a
gateway's HTML page with status 200, a wrong number of scores, one without end). Not retried: any other 4xx, which would
only be refused again. Redirects are not followed, so nothing of ours reaches a host that was not named.

An answer may also come as a ``Stream`` of events; who reads it decides about tries.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import sleep
from typing import Any, ClassVar, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import requests
import urllib3
from requests.auth import HTTPBasicAuth

from specrej_eval.connections import Deadline, Sessions, Used
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.redaction import redacted

Answer = TypeVar("Answer")
Item = TypeVar("Item")

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds between tries: the first, doubled each time, and the most; each times a random factor in [0.5, 1]."""
LONGEST_ASKED = 120.0
"""The most seconds waited because a server asks for it (``Retry-After``)."""
TRY_AGAIN = {408, 425, 429}
"""Statuses below 500 that another try may cure."""
SHORT = 2.0
"""Seconds for an answer that is not waited for: on the way out, or where there is another way."""
SHOWN_BYTES = 200
"""Of an answer, in messages."""
MAX_BYTES = 64 * 2**20
"""Of one answer. Scores of 32 texts, token by token, or a thinking judge's log-probs, are a few MiB."""
MAX_LINE = 16 * 2**20
"""Bytes of one event of a stream. The first may hold all token ids of a prompt."""
MAX_DEPTH = 64
"""Lists and objects inside each other; a server's own description of itself has about 20."""
MAX_DIGITS = 300
"""Of a whole number: more are beyond the floats."""
_BEYOND = 10**MAX_DIGITS
MAX_PARALLEL = 8
"""Requests in flight at a time, where a protocol takes one text a request."""

_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What a request and the reading of its answer may raise."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Names:
    """What messages call a server and its arguments."""

    server: str
    address: str
    timeout: str
    retries: str
    key_over_http: str
    too_large: str | None = None
    """What to do about a request that is too large."""


class ServerError(SpecRejError, RuntimeError):
    """The server could not be asked, or answered something else than asked for."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        body: str = "",
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        """Of the last answer; None if there was none."""
        self.body = body
        self.retry_after = retry_after
        """Seconds that the server asks us to wait."""

    @property
    def hopeless(self) -> bool:
        """Whether another try would only be refused again."""
        return self.status is not None and 300 <= self.status < 500 and self.status not in TRY_AGAIN


class BadAnswerError(ValueError):
    """Raised by a parser: the server's JSON is not what was asked for, in words."""


class NotJsonError(BadAnswerError):
    """It is no JSON at all."""


class JsonServer:
    """Asks one server.

    Args:
        url: what paths are put behind. A name and password in it are sent as basic authentication, never shown.
        key_variables: environment variables of which the first that is set is sent as a bearer token: to ``https``
            and this machine alone, unless ``key_over_http`` says otherwise.
        timeout: seconds for one whole answer.
        retries: tries after the first.

    Raises:
        ConfigError: the address is none, or the key is no key.
    """

    failure: ClassVar[type[ServerError]] = ServerError
    """What is raised after all tries."""

    def __init__(
        self,
        url: str,
        *,
        key_variables: Sequence[str],
        timeout: float,
        retries: int,
        key_over_http: bool,
        names: Names,
    ) -> None:
        parts = address(url, names.address)
        host = parts.netloc.rpartition("@")[2]
        self.url = urlunsplit(parts._replace(netloc=host)).rstrip("/")
        self.shown_url = self.url
        self.key_variables = tuple(key_variables)
        self.timeout = timeout
        self.retries = retries
        self.num_requests = 0
        """Requests that were answered as asked."""
        self.num_breaks = 0
        """Connections made, and tries that failed: as long as it stays the same, the server was not started anew."""
        self._names = names
        # a proxy has no part in what stays on this machine
        self._proxies = {"no_proxy": parts.hostname or ""} if is_loopback(parts.hostname) else None
        self._auth: Auth = _no_auth
        self._secrets: list[str] = []
        self._withheld = ""
        name = next((name for name in self.key_variables if os.environ.get(name)), None)
        if parts.username is not None or parts.password is not None:
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            self._auth = HTTPBasicAuth(user.encode(), password.encode())
            self._secrets = [password or user, parts.password or "", self._auth_header()]
        elif name is not None:
            key = _key(name)
            if parts.scheme == "https" or is_loopback(parts.hostname) or key_over_http:
                self._auth, self._secrets = _Bearer(key), [key]
            else:
                self._withheld = name
                _logger.warning(
                    "%s=%s: the key in %s is not sent, since http is not encrypted. %s=True sends it all the same.",
                    names.address,
                    self.shown_url,
                    name,
                    names.key_over_http,
                )
        self._sessions = Sessions()
        self._random = random.Random()
        self._lock = threading.Lock()

    def post(self, path: str, body: Any, parse: Callable[[Any], Answer]) -> Answer:
        """Send JSON, and return what ``parse`` makes of the JSON that comes back.

        Raises:
            ServerError: after all tries; names the address, the status and the first bytes of the last answer.
        """
        return self._ask("POST", path, body, parse)

    def tell(self, path: str, body: Any = None, *, once: bool = False) -> None:
        """Send JSON, and take any answer with status 200 for a yes.

        Args:
            once: do not try again, nor wait for long.

        Raises:
            ServerError: as ``post``.
        """
        self._ask("POST", path, body, lambda _: None, read=lambda _: None, once=once)

    def get(self, path: str, *, once: bool = False) -> Any:
        """The JSON at a path; None where there is none (any 4xx, or an answer that is not JSON).

        Args:
            once: do not try again, nor wait for long.

        Raises:
            ServerError: the server is not there, or fails, after all tries.
        """
        try:
            return self._ask("GET", path, None, lambda answer: answer, once=once)
        except ServerError as error:
            if error.status is not None and error.status < 500:
                return None
            raise

    def each(self, function: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """``function`` of every item, several at a time, in order. The first failure ends it."""
        if len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(MAX_PARALLEL, len(items)), thread_name_prefix="http") as pool:
            return list(pool.map(function, items))  # a failure cancels what has not begun

    def stream(self, path: str, body: Any) -> Stream:
        """Send JSON; the answer comes in events. Nothing is sent before it is read, and nothing tried again."""
        return Stream(self, path, body)

    def wait_after(self, error: ServerError, tries: int) -> float:
        """Seconds to wait before the next try, after so many."""
        pause: float = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (tries - 1)) * self._random.uniform(0.5, 1)
        return max(pause, min(LONGEST_ASKED, error.retry_after))

    def gave_up(self, error: ServerError, tries: int) -> ServerError:
        """What to raise after so many tries of a stream."""
        return self._final(error, tries)

    def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        parse: Callable[[Any], Answer],
        *,
        read: Callable[[bytes], Any] | None = None,
        once: bool = False,
    ) -> Answer:
        retries = 0 if once else self.retries
        timeout = min(SHORT, self.timeout) if once else self.timeout
        for number in range(retries + 1):
            try:
                return self._try(method, path, body, parse, read or read_json, timeout)
            except ServerError as error:
                # a page that is not JSON, where JSON was only looked for, is an answer
                looked_for = method == "GET" and error.status == 200
                if error.hopeless or looked_for or number == retries:
                    raise self._final(error, number + 1) from error
                self.count_break()
                _logger.info("%s; trying again", error)
                sleep(self.wait_after(error, number + 1))
        raise AssertionError("unreachable: the last try returns or raises")

    def _try(
        self,
        method: str,
        path: str,
        body: Any,
        parse: Callable[[Any], Answer],
        read: Callable[[bytes], Any],
        timeout: float,
    ) -> Answer:
        where = f"{method} {self.shown_url}{path}"
        begun = False
        with Deadline(timeout) as deadline:
            try:
                with self._sent(method, path, body, timeout) as reply:
                    begun = True
                    content, whole = _read(reply, MAX_BYTES if reply.status_code == 200 else 10 * SHOWN_BYTES)
            except _FAILURES as error:
                if deadline.passed or isinstance(error, requests.Timeout):
                    what = "no end of the answer" if begun else "no answer"
                    raise ServerError(f"{where}: {what} within {timeout:g} s") from error
                raise self._broken(where, error, begun=begun) from error
            finally:
                if deadline.connected:
                    self.count_break()
            if deadline.passed:  # a connection that is cut may look like the end of an answer
                raise ServerError(f"{where}: no end of the answer within {timeout:g} s")
        if reply.status_code != 200:
            raise self._refused(where, reply, content)
        text = self._beginning(content)
        try:
            if not whole:
                raise BadAnswerError(f"more than {MAX_BYTES // 2**20} MiB")
            answer = parse(read(content))
        except NotJsonError as error:
            kind = self._told(reply.headers.get("Content-Type", "of no type"))
            raise ServerError(
                f"{where}: status 200, but not JSON ({kind}; {error}): {text!r}", status=200, body=text
            ) from error
        except BadAnswerError as error:
            told = self._shown(str(error))
            raise ServerError(f"{where}: status 200, but {told}: {text!r}", status=200, body=text) from error
        with self._lock:
            self.num_requests += 1
        return answer

    def count_break(self) -> None:
        """The server may have been started anew."""
        with self._lock:
            self.num_breaks += 1

    def _sent(self, method: str, path: str, body: Any, read_timeout: float | None) -> requests.Response:
        return self._sessions.session.request(
            method,
            f"{self.url}{path}",
            json=body,
            auth=self._auth,  # always given: else requests puts one from ~/.netrc in its place
            timeout=(min(10.0, self.timeout), read_timeout),
            proxies=self._proxies,
            allow_redirects=False,  # a redirected POST becomes a GET
            stream=True,
        )

    def _broken(self, where: str, error: Exception, *, begun: bool) -> ServerError:
        what = "the answer cannot be read" if begun else "no connection"
        return ServerError(f"{where}: {what} ({self._told(_cause(error))})")

    def _refused(self, where: str, reply: requests.Response, content: bytes) -> ServerError:
        text = self._beginning(content)
        moved = f" to {self._told(reply.headers['Location'])}" if "Location" in reply.headers else ""
        return ServerError(
            f"{where}: status {reply.status_code} {self._told(reply.reason or '')}{moved}: {text!r}",
            status=reply.status_code,
            body=text,
            retry_after=seconds_asked(reply.headers.get("Retry-After", "")),
        )

    def _beginning(self, content: bytes) -> str:
        # cut last: of a key at the cut, the beginning would be shown
        return self._shown(content[: 10 * SHOWN_BYTES].decode("utf-8", "replace"))[:SHOWN_BYTES]

    def _shown(self, text: str) -> str:
        """Without our key, which a server may send back."""
        return redacted(text, self._secrets)

    def _told(self, header: str) -> str:
        """What came outside of the body: one short line, and no control characters."""
        return re.sub(r"[^\x20-\x7e]", "?", self._shown(header))[:SHOWN_BYTES]

    def _final(self, error: ServerError, tries: int) -> ServerError:
        names, hint = self._names, None
        if error.status in (401, 403) and self._withheld:
            hint = (
                f"the key in {self._withheld} was not sent, since http is not encrypted: use https, or "
                f"{names.key_over_http}=True."
            )
        elif error.status in (401, 403):
            hint = f"the key is taken from the environment: {' or '.join(self.key_variables)}."
        elif error.status == 413:
            hint = names.too_large
        elif error.status is None:
            hint = f"is the server up, and the address right? {names.timeout} and {names.retries} say how long to wait."
        message = str(error) if tries == 1 else f"{error} (after {tries} tries)"
        return self.failure(f"{names.server}: {message}", hint=hint, status=error.status, body=error.body)

    def _auth_header(self) -> str:
        request = requests.Request("GET", self.url, auth=self._auth).prepare()
        return str(request.headers["Authorization"]).removeprefix("Basic ")


def address(url: str, argument: str) -> SplitResult:
    """An address taken apart.

    Args:
        argument: that it was given as.

    Raises:
        ConfigError: no host, a port that is no number, or what no address may hold.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        usable = usable and url.isprintable() and " " not in url and not (parts.query or parts.fragment)
        (parts.hostname or "").encode("idna")
        url.encode()
    except ValueError:  # brackets, ports, labels and surrogates of all sorts
        usable = False
    if not usable:
        raise ConfigError(
            f"{argument}={redacted(url)!r} is not the address of a server.",
            hint="http://HOST:PORT or https://HOST, without ?query and #fragment, such as http://localhost:8000",
        )
    return parts


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine by its very name, so that nothing leaves it."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def seconds_asked(retry_after: str) -> float:
    """What a ``Retry-After`` header asks for, in seconds or as a date (RFC 9110, 10.2.3); 0 for anything else."""
    told = retry_after.strip()
    if re.fullmatch(r"[0-9]+", told):
        return float(told[:9]) if len(told) <= 9 else LONGEST_ASKED
    try:
        when = parsedate_to_datetime(told)
        return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def read_json(content: bytes) -> Any:
    """JSON as Python reads it (NaN is a number), of a depth and with numbers that all that follows can bear.

    Raises:
        NotJsonError: it is none.
        BadAnswerError: too deep, or a number beyond the floats.
    """
    try:
        answer = json.loads(content)
    except RecursionError:
        raise BadAnswerError("lists or objects are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise NotJsonError(error.msg) from None
    except UnicodeDecodeError:
        raise NotJsonError("not UTF-8") from None
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        raise BadAnswerError("a number has thousands of digits") from None
    level = [answer]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, list):
                below += value
            elif isinstance(value, dict):
                below += value.values()
            elif isinstance(value, int) and abs(value) >= _BEYOND:
                raise BadAnswerError(f"a number has more than {MAX_DIGITS} digits")
        if not below:
            return answer
        level = below
    raise BadAnswerError("lists or objects are nested too deeply")


def _read(reply: requests.Response, most: int) -> tuple[bytes, bool]:
    """The body, or its first bytes; whether that is all."""
    content = bytearray()
    for chunk in reply.iter_content(65536):
        content += chunk
        if len(content) > most:
            return bytes(content[:most]), False
    return bytes(content), True


def _key(name: str) -> str:
    """Raises:
    ConfigError: what the variable holds cannot stand in a header. requests would say so, and show it.
    """
    key = os.environ[name].strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(
            f"the environment variable {name} holds no key: characters that no HTTP header may have.",
            hint="printable ASCII without spaces.",
        )
    return key


Auth = Callable[[requests.PreparedRequest], requests.PreparedRequest]


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


class _Bearer:
    """A key, as OpenAI's API takes it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Stream:
    """The events (SSE) of one POST: read by one thread, and cut by any.

    It has no deadline: a server may be paused, or busy with others. Whoever waits for it watches the time.
    """

    def __init__(self, server: JsonServer, path: str, body: Any) -> None:
        self._server = server
        self._path = path
        self._body = body
        self._used = Used()

    @property
    def where(self) -> str:
        """The request, for messages."""
        return f"POST {self._server.shown_url}{self._path}"

    def cut(self) -> None:
        """End it, whatever it waits for; who reads it sees its end."""
        self._used.shut_down()

    def __iter__(self) -> Iterator[Any]:
        """The JSON of each event; ends with ``[DONE]``, with the connection, or when it is cut.

        Raises:
            ServerError: no connection, another status than 200, a broken connection, or what is no event.
        """
        server, begun = self._server, False
        try:
            with self._used, server._sent("POST", self._path, self._body, None) as reply:
                begun = True
                if self._used.connected:
                    server.count_break()
                if self._used.is_over:
                    return
                if reply.status_code != 200:
                    content, _ = _read(reply, 10 * SHOWN_BYTES)
                    raise server._refused(self.where, reply, content)
                for line in _lines(reply):
                    name, _, value = line.partition(b":")
                    if self._used.is_over or (name == b"data" and value.strip() == b"[DONE]"):
                        return
                    if name == b"data":
                        yield read_json(value)
        except BadAnswerError as error:  # a ValueError, so before those of a broken connection
            if not self._used.is_over:
                raise ServerError(f"{self.where}: status 200, but an event is bad: {error}", status=200) from error
        except _FAILURES as error:
            if not self._used.is_over:
                raise server._broken(self.where, error, begun=begun) from error


def _lines(reply: requests.Response) -> Iterator[bytes]:
    """Lines, each as soon as it is there.

    Raises:
        BadAnswerError: one without end.
    """
    rest = bytearray()
    for part in reply.iter_content(None if reply.raw.chunked else 1):
        rest += part
        if b"\n" in part:
            *whole, rest = rest.split(b"\n")
            yield from map(bytes, whole)
        if len(rest) > MAX_LINE:
            raise BadAnswerError(f"more than {MAX_LINE // 2**20} MiB")
    yield bytes(rest)


def _cause(error: BaseException) -> str:
    """The innermost reason, which is the one that says something: connection refused, unknown host."""
    seen = str(error)
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
        seen = str(error) or seen
    return seen

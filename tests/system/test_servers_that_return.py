"""A reward server dies at any moment and comes back: in time, unnoticed; too late, and the run goes on another time."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support import FULL
from support import reward_servers as servers

from specrej_eval import http, load
from specrej_eval.errors import RewardError

Counted = Callable[[str, int], None]
PROMPTS = [f"Q: {number} + {number} = ?\nA:" for number in range(5)]
MOMENTS = ("before it answers", "amid its answer", "with refused connections")


class Mortal:
    """A TEI server on one port: it dies at a request, and is there again after so many tries of the client."""

    def __init__(self, at: int, *, moment: str, tries: int) -> None:
        with servers.tei(lambda inputs: float(sum(map(len, inputs)) % 7)) as made:
            self.routes = dict(made.routes)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.left, self.moment, self.tries = at, moment, tries
        self.posts = self.deaths = 0
        self._server: ThreadingHTTPServer | None = None
        self.ending: threading.Thread | None = None
        """Of the server, from a thread of its own: its handler cannot wait for it."""
        self.start()

    def start(self) -> None:
        mortal = self

        class Handler(servers.Handler):
            state = servers.Server()

            def do_POST(self) -> None:
                mortal.posts += 1
                mortal.left -= 1
                if mortal.left != 0:
                    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                    self.send(200, json.dumps(mortal.routes["POST", self.path](body)).encode())
                    return
                if mortal.moment == "amid its answer":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n[[{")
                mortal.deaths += 1
                servers.hang_up(self)
                if mortal.moment == "with refused connections":
                    mortal.ending = threading.Thread(target=mortal.end)
                    mortal.ending.start()

            def do_GET(self) -> None:
                route = mortal.routes.get(("GET", self.path))
                self.send(404 if route is None else 200, json.dumps(route(None) if route else {}).encode())

        # the address is one's own again at once, as a server's that is started again
        self._server = type("S", (ThreadingHTTPServer,), {"daemon_threads": True})(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        if self.ending is not None:
            self.ending.join()
        self.end()

    def end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def waited(self, seconds: float) -> None:
        """In the place of the client's pause before it tries again."""
        self.tries -= 1
        if self.moment != "with refused connections":
            return
        if self.ending is not None:
            self.ending.join()
        if self.tries == 0:
            self.start()


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mortal]]:
    made: list[Mortal] = []

    def make(*args: Any, **kwargs: Any) -> Mortal:
        made.append(Mortal(*args, **kwargs))
        monkeypatch.setattr(http, "sleep", made[-1].waited)
        return made[-1]

    yield make
    for server in made:
        server.stop()


def arguments(url: str, retries: int, **more: Any) -> dict[str, Any]:
    given = {"reward_model": url, "reward_retries": retries, "reward_timeout": 20, "reward_batch_size": 2}
    return {**given, "n": 3, "max_gen_toks": 6, "batch_size": 2, **more}


def told(results: Any) -> list[Any]:
    return [json.loads(json.dumps(result.to_dict()["trajectories"])) for result in results]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_server_that_is_back_in_time_changes_nothing(
    moment: str, mortal: Callable[..., Mortal], counted: Counted
) -> None:
    server = mortal(0, moment=moment, tries=0)
    want = told(load(**arguments(server.url, 0)).generate(PROMPTS))
    for at in range(2, server.posts, 1 if FULL else 4):
        server = mortal(at, moment=moment, tries=2)
        assert told(load(**arguments(server.url, 4)).generate(PROMPTS)) == want, f"died at request {at}"
        assert server.deaths == 1
        server.stop()
        counted("servers that died and came back in time", 1)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_server_that_is_back_too_late_costs_no_finished_answer(
    moment: str, mortal: Callable[..., Mortal], tmp_path: Path, counted: Counted
) -> None:
    server = mortal(0, moment=moment, tries=0)
    want = told(load(**arguments(server.url, 0)).generate(PROMPTS))
    for at in range(2, server.posts, 1 if FULL else 6):
        journal = tmp_path / f"{at}.jsonl"
        server = mortal(at, moment=moment, tries=10**6)
        with pytest.raises(RewardError, match="reward server: POST") as refused:
            load(**arguments(server.url, 0, journal=str(journal))).generate(PROMPTS)
        assert server.url in str(refused.value)
        finished = journal.read_bytes()
        assert finished.endswith(b"\n")
        server.stop()
        server.left = 0
        server.start()
        again = load(**arguments(server.url, 0, journal=str(journal))).generate(PROMPTS)
        assert told(again) == want, f"died at request {at}"
        assert journal.read_bytes().startswith(finished), "a finished answer is lost"
        server.stop()
        counted("servers that died and came back later", 1)

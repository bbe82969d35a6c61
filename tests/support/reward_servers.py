"""Reward servers on loopback: real HTTP, each speaking one protocol, with scores that are functions of the text alone.

``with vllm(score) as server: ... server.url``. ``score`` maps what the server reads (token ids, a text, a pair, the
messages) to a number. ``server.faults`` is a list: each entry is served once, before the server works again.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler"], None]


@dataclass
class Server:
    url: str = ""
    routes: dict[tuple[str, str], Callable[[Any], Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    """Served in turn to POST requests, one each."""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    """(path, body) of every POST request, refused ones included."""
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Refused(Exception):
    """Raised by a route: a status and a JSON body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what is sent in two parts takes 40 ms
    state: Server

    def log_message(self, *args: Any) -> None: ...

    def send(self, status: int, body: bytes, content_type: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer("GET", None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.lock:
            self.state.requests.append((self.path, body))
            self.state.headers.append(dict(self.headers))
            fault = self.state.faults.pop(0) if self.state.faults else None
        if fault is not None:
            fault(self)
            return
        self._answer("POST", body)

    def _answer(self, method: str, body: Any) -> None:
        route = self.state.routes.get((method, self.path))
        if route is None:
            self.send(404, b'{"detail":"Not Found"}')
            return
        try:
            self.send(200, json.dumps(route(body)).encode())
        except Refused as refused:
            self.send(refused.status, json.dumps(refused.body).encode())


@contextmanager
def serve(routes: dict[tuple[str, str], Callable[[Any], Any]]) -> Iterator[Server]:
    state = Server(routes=routes)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"state": state}))
    httpd.daemon_threads = True
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


# ---- faults ------------------------------------------------------------------------------------------------------


def status(code: int, text: str = "it broke", **headers: str) -> Fault:
    return lambda handler: handler.send(code, text.encode(), "text/plain", **headers)


def answer(body: Any) -> Fault:
    """Status 200 with this JSON (NaN as Python writes it), or these bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.send(200, raw)


def html(handler: Handler) -> None:
    handler.send(200, b"<html><body>Back soon!</body></html>", "text/html")


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def goodbye(handler: Handler) -> None:
    """A good answer, after which the connection ends, as by a server that is stopped when nobody asks."""
    handler._answer("POST", handler.state.requests[-1][1])
    handler.close_connection = True


def sleep(seconds: float) -> Fault:
    def fault(handler: Handler) -> None:
        time.sleep(seconds)
        hang_up(handler)

    return fault


def drip(raw: bytes, *, head: bytes = b"", seconds: float = 0.05) -> Fault:
    """``head`` at once, then for ever one byte after another of ``raw``, over and over."""

    def fault(handler: Handler) -> None:
        handler.close_connection = True
        try:
            handler.wfile.write(head)
            while True:
                for byte in raw:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                    time.sleep(seconds)
        except OSError:  # the client has had enough
            pass

    return fault


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def raw(content: bytes) -> Fault:
    """Whatever it is, in the place of an answer."""

    def fault(handler: Handler) -> None:
        handler.wfile.write(content)
        hang_up(handler)

    return fault


def endless(code: int = 200, *, chunked: bool = False, head: bytes = b"") -> Fault:
    """A body without end, as fast as it goes."""

    def fault(handler: Handler) -> None:
        handler.close_connection = True
        block = b"[" * 65536
        try:
            handler.wfile.write(b"HTTP/1.1 %d x\r\n%s" % (code, head))
            handler.wfile.write(b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n")
            while True:
                handler.wfile.write(b"10000\r\n%s\r\n" % block if chunked else block)
        except OSError:
            pass

    return fault


# ---- the protocols, each written from its server's own documentation ---------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@contextmanager
def vllm(
    score: Callable[[Any], float],
    *,
    hears: str = "use_activation",
    always: Callable[[float], float] | None = None,
    classify: bool = True,
    by_token: bool = False,
    describes: bool = True,
) -> Iterator[Server]:
    """
    Args:
        score: of token ids (a tuple) or of messages (a tuple of (role, content) pairs).
        hears: the name of the field that switches the sigmoid; others are ignored, as vLLM ignores them.
        always: the activation where nothing is heard.
        classify: whether the model supports ``/classify``.
        by_token: ``/pooling`` answers token by token.
    """

    def read(body: Any) -> tuple[list[float], int]:
        if "messages" in body:
            inputs: list[Any] = [tuple((turn["role"], turn["content"]) for turn in body["messages"])]
        else:
            inputs = [tuple(ids) for ids in body["input"]]
        raw = [score(entry) for entry in inputs]
        squashed = [sigmoid(value) for value in raw] if body.get(hears, True) else raw
        return [always(value) for value in raw] if always else squashed, sum(len(entry) for entry in inputs)

    def reply(body: Any, entry: Callable[[float], dict[str, Any]]) -> Any:
        scores, tokens = read(body)
        data = [{"index": index, **entry(value)} for index, value in enumerate(scores)]
        return {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    def classified(body: Any) -> Any:
        if not classify:
            raise Refused(400, {"error": {"message": "The model does not support Classification API"}})
        return reply(body, lambda value: {"label": "LABEL_0", "probs": [value], "num_classes": 1})

    def pooled(body: Any) -> Any:
        return reply(body, lambda value: {"object": "pooling", "data": [[9.0], [value]] if by_token else [value]})

    listed = {"object": "list", "data": [{"id": "the-rm", "owned_by": "vllm", "max_model_len": 400}]}
    routes: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("POST", "/classify"): classified,
        ("POST", "/pooling"): pooled,
        ("GET", "/v1/models"): lambda _: listed,
    }
    if describes:
        routes["GET", "/openapi.json"] = lambda _: {"paths": {"/classify": {}, "/pooling": {}, "/v1/models": {}}}
    with serve(routes) as server:
        yield server


@contextmanager
def sglang(score: Callable[[tuple[int, ...]], float]) -> Iterator[Server]:
    def classified(body: Any) -> Any:
        return [
            {"embedding": [score(tuple(ids))], "meta_info": {"id": "x", "prompt_tokens": len(ids)}}
            for ids in body["input_ids"]
        ]

    paths = {"/classify": {}, "/get_model_info": {}, "/v1/models": {}, "/v1/classify": {}}
    with serve(
        {
            ("GET", "/openapi.json"): lambda _: {"paths": paths},
            ("GET", "/get_model_info"): lambda _: {"model_path": "org/the-rm", "tokenizer_path": "org/the-rm"},
            ("POST", "/classify"): classified,
        }
    ) as server:
        yield server


@contextmanager
def tei(score: Callable[[tuple[str, ...]], float], *, kind: str = "reranker", most: int = 3) -> Iterator[Server]:
    """
    Args:
        score: of (text,) or (prompt, response).
    """

    def value(inputs: tuple[str, ...], body: Any) -> float:
        return score(inputs) if body.get("raw_scores") else sigmoid(score(inputs))

    def limited(inputs: list[Any]) -> list[Any]:
        if len(inputs) > most:
            raise Refused(413, {"error": f"batch size {len(inputs)} > maximum allowed batch size {most}"})
        return inputs

    def predicted(body: Any) -> Any:
        return [[{"score": value(tuple(entry), body), "label": "LABEL_0"}] for entry in limited(body["inputs"])]

    def ranked(body: Any) -> Any:
        found = [
            {"index": index, "score": value((body["query"], text), body)}
            for index, text in enumerate(limited(body["texts"]))
        ]
        return sorted(found, key=lambda entry: -entry["score"])

    info = {
        "model_id": "org/the-rm",
        "model_type": {kind: {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
        "max_client_batch_size": most,
        "max_input_length": 512,
    }
    with serve(
        {("GET", "/info"): lambda _: info, ("POST", "/predict"): predicted, ("POST", "/rerank"): ranked}
    ) as server:
        yield server


@contextmanager
def openrlhf(score: Callable[[str], float]) -> Iterator[Server]:
    def rewarded(body: Any) -> Any:
        found = [score(text) for text in body["query"]]
        return {"rewards": found, "scores": found, "extra_logs": {"dummy_scores": found}}

    with serve(
        {
            ("GET", "/openapi.json"): lambda _: {"paths": {"/get_reward": {}}},
            ("POST", "/get_reward"): rewarded,
        }
    ) as server:
        yield server


@contextmanager
def chat(
    grade: Callable[[str], Any],
    *,
    logprobs: bool = True,
    refuses: tuple[str, ...] = (),
) -> Iterator[Server]:
    """An OpenAI-compatible server.

    Args:
        grade: of the user's message: a dict {token: probability} (the likeliest is written), or a text to write.
        logprobs: whether it gives log-probs when asked.
        refuses: request fields it answers with status 400.
    """

    def completed(body: Any) -> Any:
        for name in refuses:
            if name in body:
                raise Refused(400, {"error": {"message": f"Unsupported parameter: '{name}'", "type": "invalid"}})
        wanted = grade(body["messages"][-1]["content"])
        text = wanted if isinstance(wanted, str) else max(wanted, key=wanted.__getitem__)
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        if logprobs and body.get("logprobs") and not isinstance(wanted, str):
            top = [{"token": token, "logprob": math.log(p)} for token, p in wanted.items()]
            choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": top}]}
        return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 11}}

    with serve({("POST", "/v1/chat/completions"): completed}) as server:
        yield server

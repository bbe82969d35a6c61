"""Servers on loopback that decode: real HTTP, the semantics of vLLM, SGLang and OpenAI's completions, a toy model.

``with serve("vllm", tokenizer) as server: ... server.url``. A thread decodes one token a step for each request that
runs; a pause holds it between two steps. What a request draws depends on its ids, seed and arguments alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.tiny_models import EOS

LETTERS = tuple(range(70, 90))
"""Ids of the toy model's vocabulary, beside EOS: letters of ``tiny_tokenizer``."""


def toy_logits(ids: Sequence[int]) -> dict[int, float]:
    """Of the next token, by id; the others are impossible. Depends on the last two ids."""
    key = "/".join(map(str, ids[-2:]))
    noise = hashlib.sha256(key.encode()).digest()
    found = {token: noise[place] / 100 for place, token in enumerate(LETTERS)}
    return {**found, EOS: -0.5}


def probabilities(logits: dict[int, float], body: dict[str, Any]) -> dict[int, float]:
    """After temperature, top_k, top_p and min_p, in that order, as transformers has it."""
    temperature = body.get("temperature", 1.0)
    ranked = sorted(logits, key=lambda token: -logits[token])
    if temperature == 0:
        return {ranked[0]: 1.0}
    top_k = body.get("top_k") or 0
    ranked = ranked[:top_k] if top_k > 0 else ranked
    weights = {token: math.exp((logits[token] - logits[ranked[0]]) / temperature) for token in ranked}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for token, weight in weights.items():
        if mass / total >= body.get("top_p", 1.0):
            break
        if weight >= (body.get("min_p") or 0.0):
            kept[token] = weight
        mass += weight
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


def uniform(seed: int, place: int) -> float:
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def draws(body: dict[str, Any], logits: Callable[[Sequence[int]], dict[int, float]] = toy_logits) -> list[int]:
    """All tokens that a request for rows is answered with, if it is let."""
    native = "input_ids" in body
    sampling = body.get("sampling_params", body)
    sampling = {**sampling, "top_k": max(0, sampling.get("top_k", 0))}
    prompt = list(body["input_ids"] if native else body["prompt"])
    seed = sampling["sampling_seed" if native else "seed"]
    ids: list[int] = []
    while len(ids) < sampling["max_new_tokens" if native else "max_tokens"]:
        ids.append(drawn(probabilities(logits([*prompt, *ids]), sampling), uniform(seed, len(ids))))
        if ids[-1] == EOS:
            break
    return ids


def drawn(distribution: dict[int, float], u: float) -> int:
    chosen, mass = next(iter(distribution)), 0.0
    for token, probability in distribution.items():
        chosen, mass = token, mass + probability
        if u < mass:
            break
    return chosen


@dataclass(eq=False)
class Job:
    """A request being decoded."""

    name: str
    body: dict[str, Any]
    prompt: list[int]
    most: int
    seed: int
    wait: int
    """Steps before its first token."""
    fault: Fault | None
    cached: int
    """Tokens of its prompt that the server has read before."""
    probe: bool
    """One token, not as a stream: what the engine asks at its start."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[float]] = field(default_factory=list)
    finish: str | None = None
    sent: int = 0


Fault = Callable[["Handler", Job, list[tuple[int, Any]]], "list[Any] | None"]
"""(handler, job, events as (tokens so far, event)) -> the events to send; None = the connection is closed."""


@dataclass
class Server:
    """What a test sees, and sets."""

    tokenizer: Any
    kind: str
    url: str = ""
    logits: Callable[[Sequence[int]], dict[int, float]] = toy_logits
    max_num_seqs: int = 10**6
    stagger: int = 0
    """The i-th request waits ``i % (stagger + 1)`` steps for its first token."""
    step_seconds: float = 0.0005
    max_model_len: int = 512
    model: str = "the-lm"
    can_pause: bool = True
    token_ids: bool = True
    without: tuple[str, ...] = ()
    """Paths that are not there."""
    key: str | None = None
    faults: dict[int, Fault] = field(default_factory=dict)
    """By the number of the request, from 0."""
    dies_after: int | None = None
    """Tokens after which the server is gone; ``revive`` brings it back."""
    dies_when: Callable[[], bool] = lambda: False
    """Asked after each step: whether the server is gone now, before it decodes another token."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of requests for tokens."""
    told: list[str] = field(default_factory=list)
    """Everything else that was asked, in order: ``POST /pause?mode=keep``."""
    jobs: list[Job] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    """Prompts, for the prefix cache."""
    incremental: bool = False
    """SGLang's events hold the new ids alone, not all so far."""
    trims_end: bool = False
    """SGLang's last event leaves out the token that ended the answer, and counts it."""
    ends_at: int | None = None
    """A token at which the server ends answers, and which the tokenizer does not know for that."""
    decoded: int = 0
    """Tokens of requests that stream."""
    paused: bool = False
    dead: bool = False
    lock: threading.Condition = field(default_factory=threading.Condition)
    connections: set[Any] = field(default_factory=set)

    def cached_of(self, prompt: list[int]) -> int:
        """Tokens of a prompt that stand at the beginning of what was read before, all but its last."""
        known = 0
        for seen in self.read:
            same = 0
            while same < min(len(seen), len(prompt) - 1) and seen[same] == prompt[same]:
                same += 1
            known = max(known, same)
        self.read.append(prompt)
        return known

    def revive(self) -> None:
        with self.lock:
            self.dead, self.paused, self.dies_after, self.dies_when = False, False, None, lambda: False

    def kill(self) -> None:
        """All connections break; nothing that ran is there any more."""
        with self.lock:
            self.dead = True
            self.jobs.clear()
            for connection in list(self.connections):
                try:
                    connection.shutdown(2)
                except OSError:
                    continue
            self.lock.notify_all()

    def abort(self, names: Sequence[str] | None) -> int:
        with self.lock:
            going = [job for job in self.jobs if job.finish is None and (names is None or job.name in names)]
            for job in going:
                job.finish = "abort"
            self.lock.notify_all()
        return len(going)

    def pause(self) -> None:
        with self.lock:
            self.paused = True

    def resume(self) -> None:
        with self.lock:
            self.paused = False
            self.lock.notify_all()

    def _work(self, over: threading.Event) -> None:
        while not over.wait(self.step_seconds):
            with self.lock:
                if self.dead or self.paused:
                    continue
                running = [job for job in self.jobs if job.finish is None][: self.max_num_seqs]
                for job in running:
                    self._step(job)
                self.lock.notify_all()
                dies = self.dies_after is not None and self.decoded >= self.dies_after
            if dies or self.dies_when():
                self.kill()

    def _step(self, job: Job) -> None:
        if job.wait > 0:
            job.wait -= 1
            return
        logits = self.logits([*job.prompt, *job.ids])
        chosen = drawn(probabilities(logits, job.body), uniform(job.seed, len(job.ids)))
        if self.kind == "sglang" and job.body["temperature"]:  # its log-probs are of what is after the temperature
            logits = {token: value / job.body["temperature"] for token, value in logits.items()}
        norm = math.log(sum(map(math.exp, logits.values())))
        job.ids.append(chosen)
        job.logprobs.append(logits[chosen] - norm)
        job.tops.append(sorted((value - norm for value in logits.values()), reverse=True)[:20])
        self.decoded += not job.probe
        if chosen in (*job.body.get("stop_token_ids", ()), EOS, self.ends_at):
            job.finish = "stop"
        elif len(job.ids) >= job.most:
            job.finish = "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else what is sent in two parts takes 40 ms
    state: Server

    def log_message(self, *args: Any) -> None: ...

    def setup(self) -> None:
        super().setup()
        self.state.connections.add(self.connection)

    def finish(self) -> None:
        self.state.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        if self.state.dead:
            return
        try:
            super().handle()
        except OSError:
            pass

    def answer(self, body: Any, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._told("GET", None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._told("POST", json.loads(self.rfile.read(length) or b"null"))

    def _told(self, method: str, body: Any) -> None:
        state, parts = self.state, urlsplit(self.path)
        if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
            self.answer({"error": "Unauthorized"}, 401)
        elif parts.path in state.without:
            self.answer({"detail": "Not Found"}, 404)
        elif method == "POST" and parts.path in ("/v1/completions", "/generate"):
            self._decode(body)
        else:
            state.told.append(f"{method} {self.path}")
            answer = ROUTES[state.kind](state, method, parts.path, parse_qs(parts.query), body)
            if answer is None:
                self.answer({"detail": "Not Found"}, 404)
            else:
                self.answer(answer)

    def _decode(self, body: dict[str, Any]) -> None:
        state, native = self.state, self.path == "/generate"
        sampling = body.get("sampling_params", body)
        if native:
            sampling = {**sampling, "top_k": max(0, sampling["top_k"]), "return_logprob": body.get("return_logprob")}
        with state.lock:
            number = len(state.requests)
            probe = not body.get("stream")
            if not probe:
                state.requests.append(body)
            job = Job(
                name=body["rid"] if native else f"cmpl-{body.get('request_id')}-0",
                body=sampling,
                prompt=list(body["input_ids"] if native else body["prompt"]),
                most=sampling["max_new_tokens"] if native else body["max_tokens"],
                seed=sampling.get("sampling_seed" if native else "seed", 0),
                wait=number % (state.stagger + 1),
                fault=None if probe else state.faults.pop(number, None),
                cached=0,
                probe=probe,
            )
            if len(job.prompt) + job.most > state.max_model_len:
                job.most = state.max_model_len - len(job.prompt)
            job.cached = state.cached_of(job.prompt)
            state.jobs.append(job)
        try:
            self._stream(job, native) if not probe else self._whole(job)
        finally:
            with state.lock:
                job.finish = job.finish or "abort"
                if job in state.jobs:
                    state.jobs.remove(job)

    def _whole(self, job: Job) -> None:
        with self.state.lock:
            self.state.lock.wait_for(lambda: job.finish is not None or self.state.dead, 10)
        choice = {"index": 0, "text": self.state.tokenizer.decode(job.ids), "finish_reason": job.finish}
        self.answer({"choices": [{**choice, **({"token_ids": job.ids} if self.state.token_ids else {})}]})

    def _stream(self, job: Job, native: bool) -> None:
        state = self.state
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b": hello\n\n")
        while True:
            with state.lock:
                state.lock.wait_for(
                    lambda: len(job.ids) > job.sent or job.finish is not None or state.dead, timeout=0.02
                )
                if state.dead or (job not in state.jobs):
                    self.close_connection = True
                    return
                start, job.sent = job.sent, len(job.ids)
                ends = job.finish is not None
            if select.select([self.connection], [], [], 0)[0]:  # the client has gone
                self.close_connection = True
                return
            events = [
                (place, self._event(job, place, native, last=ends and place == job.sent))
                for place in range(start + 1, job.sent + 1)
            ]
            if ends and not events:
                events.append((job.sent, self._event(job, job.sent, native, last=True, new=False)))
            if job.fault is not None:
                changed = job.fault(self, job, events)
                if changed is None:
                    self.close_connection = True
                    return
            else:
                changed = [event for _, event in events]
            for event in changed:
                content = event if isinstance(event, bytes) else json.dumps(event).encode()
                self._chunk(b"data: " + content + b"\n\n")
            if ends:
                if state.token_ids and not native:
                    details = {"prompt_tokens_details": {"cached_tokens": job.cached}}
                    self._chunk(b"data: " + json.dumps({"choices": [], "usage": details}).encode() + b"\n\n")
                self._chunk(b"data: [DONE]\n\n")
                self._chunk(b"")
                return

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _event(self, job: Job, place: int, native: bool, *, last: bool, new: bool = True) -> dict[str, Any]:
        """After ``place`` tokens; the last one says why it ends."""
        ids = job.ids[place - 1 : place] if new else []
        if native:
            reason = {"stop": {"type": "stop", "matched": (job.ids or [0])[-1]}}.get(
                job.finish or "", {"type": job.finish}
            )
            about: dict[str, Any] = {"completion_tokens": place, "finish_reason": reason if last else None}
            about["cached_tokens"] = job.cached
            if job.body.get("return_logprob"):
                about["output_token_logprobs"] = [[value, 0, None] for value in job.logprobs[:place]]
                if self.state.incremental:
                    about["output_token_logprobs"] = about["output_token_logprobs"][-len(ids) :] if ids else []
            shown = ids if self.state.incremental else job.ids[:place]
            if self.state.trims_end and last and job.finish == "stop":
                shown = shown[:-1]
            return {"text": "", "output_ids": shown, "meta_info": about}
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.state.tokenizer.decode([token for token in ids if token != EOS]),
        }
        choice["finish_reason"] = job.finish if last else None
        if not self.state.token_ids:
            return {"choices": [choice]}
        if job.body.get("logprobs") is not None:
            values = job.logprobs[place - 1 : place] if new else []
            tops = job.tops[place - 1 : place] if new else []
            choice["logprobs"] = {
                "token_logprobs": values,
                "top_logprobs": [{f"token_id:{i}": value for i, value in enumerate(top)} for top in tops],
            }
        return {"choices": [{**choice, "token_ids": ids}], "usage": {"completion_tokens": place}}


# ---- the routes of each kind --------------------------------------------------------------------------------------


def _of_vllm(state: Server, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
    if (method, path) == ("GET", "/v1/models"):
        entry = {"id": "the-lm", "root": f"org/{state.model}", "owned_by": "vllm"}
        entry |= {"max_model_len": state.max_model_len}
        return {"data": [entry]}
    if (method, path) == ("GET", "/version"):
        return {"version": "0.32.0"}
    if (method, path) == ("POST", "/tokenize"):
        return {"tokens": state.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}
    if not state.can_pause:
        return None
    if (method, path) == ("POST", "/pause"):
        if query.get("mode", ["abort"]) != ["keep"]:
            state.abort(None)
        state.pause()
        return {"status": "paused"}
    if (method, path) == ("POST", "/resume"):
        state.resume()
        return {"status": "resumed"}
    if (method, path) == ("GET", "/is_paused"):
        return {"is_paused": state.paused}
    if (method, path) == ("POST", "/abort_requests"):
        return {"status": "aborted", "aborted": state.abort(body.get("request_ids") or None)}
    return None


def _of_sglang(state: Server, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
    del query
    if (method, path) == ("GET", "/v1/models"):
        return {"data": [{"id": "the-lm", "root": "the-lm", "max_model_len": state.max_model_len}]}
    if (method, path) == ("GET", "/get_model_info"):
        return {"model_path": f"org/{state.model}", "tokenizer_path": "org/the-lm"}
    if (method, path) == ("GET", "/get_server_info"):
        return {"version": "0.5.23"}
    if (method, path) == ("GET", "/openapi.json"):
        paths = ["/generate", "/abort_request"]
        paths += ["/pause_generation", "/continue_generation"] if state.can_pause else []
        mode = {"type": "string", "enum": ["abort", "retract", "in_place"], "default": "abort"}
        schemas = {"PauseGenerationReqInput": {"properties": {"mode": mode}}}
        return {"paths": {path: {} for path in paths}, "components": {"schemas": schemas}}
    if (method, path) == ("POST", "/abort_request"):
        state.abort([body["rid"]])
        return b""
    if not state.can_pause:
        return None
    if (method, path) == ("POST", "/pause_generation"):
        if (body or {}).get("mode", "abort") != "in_place":
            state.abort(None)
        state.pause()
        return {"message": "Generation paused successfully.", "status": "ok"}
    if (method, path) == ("POST", "/continue_generation"):
        state.resume()
        return {"message": "Generation continued successfully.", "status": "ok"}
    return None


def _of_completions(state: Server, method: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
    del state, query, body
    return {"data": [{"id": "the-lm"}]} if (method, path) == ("GET", "/v1/models") else None


ROUTES = {"vllm": _of_vllm, "sglang": _of_sglang, "completions": _of_completions}


class Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    """All rows of a prompt knock at once."""


@contextmanager
def serve(kind: str, tokenizer: Any, **settings: Any) -> Iterator[Server]:
    state = Server(tokenizer=tokenizer, kind=kind, **settings)
    httpd = Listening(("127.0.0.1", 0), type("H", (Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    over = threading.Event()
    threads = [
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True),
        threading.Thread(target=state._work, args=(over,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        over.set()
        state.kill()
        httpd.shutdown()
        httpd.server_close()
        for thread in threads:
            thread.join(5)


# ---- faults --------------------------------------------------------------------------------------------------------


def hang_up(after: int) -> Fault:
    """The connection breaks once so many tokens are decoded; those since the last event are lost."""

    def fault(handler: Handler, job: Job, events: list[tuple[int, Any]]) -> list[Any] | None:
        if job.sent < after and job.finish is None:
            return [event for _, event in events]
        for place, event in events:
            if place < after:
                content = json.dumps(event).encode()
                handler._chunk(b"data: " + content + b"\n\n")
        return None

    return fault


def lose(place: int) -> Fault:
    """The event of one token never comes."""
    return lambda handler, job, events: [event for at, event in events if at != place]


def repeat(place: int) -> Fault:
    """The event of one token comes twice."""
    return lambda handler, job, events: [event for at, event in events for _ in range(1 + (at == place))]


def repeat_late(place: int, after: int) -> Fault:
    """The event of one token comes again after that of a later one."""
    kept: dict[Job, Any] = {}

    def fault(handler: Handler, job: Job, events: list[tuple[int, Any]]) -> list[Any]:
        found = []
        for at, event in events:
            found.append(event)
            if at == place:
                kept[job] = event
            if at == after:
                found.append(kept[job])
        return found

    return fault


def send(content: bytes, after: int) -> Fault:
    """Something else in the place of a token's event."""
    return lambda handler, job, events: [content if at == after else event for at, event in events]


def silent(after: int) -> Fault:
    """Nothing more comes, and the connection stays."""

    def fault(handler: Handler, job: Job, events: list[tuple[int, Any]]) -> list[Any] | None:
        if job.sent < after and job.finish is None:
            return [event for _, event in events]
        until = time.monotonic() + 20
        while time.monotonic() < until and not handler.state.dead:
            if select.select([handler.connection], [], [], 0.02)[0]:
                break
        return None

    return fault

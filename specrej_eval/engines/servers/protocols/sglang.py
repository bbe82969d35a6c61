# torch-free
"""SGLang's own API: ``/generate`` on token ids, ``/pause_generation`` in place, ``/continue_generation``.

``/pause_generation`` without a mode aborts everything that runs: it is only called with ``in_place``, and only where
the server's description of itself knows that mode. A seed counts only under ``--enable-deterministic-inference``;
without, rows draw independent noise that no run repeats. Log-probs are of the distribution *after* the temperature.
``top_k`` and ``top_p`` are both measured by the whole distribution (``filter_apply_order="joint"`` in
``layers/sampler.py``), where ours, as transformers', is top_p of what top_k leaves. (From SGLang 0.5.23's
``managers/io_struct.py`` and ``entrypoints/http_server.py``.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from specrej_eval.checked import object_or_empty
from specrej_eval.config import RunConfig
from specrej_eval.core import TokenStat
from specrej_eval.engines.servers.protocols.base import (
    Asked,
    Delta,
    EngineProtocol,
    Finish,
    count_of,
    error_of,
    whole_ids,
)
from specrej_eval.http import BadAnswerError

GENERATE = "/generate"


class Protocol(EngineProtocol):
    """See the module's text."""

    KIND: ClassVar[str] = "SGLang"
    STATS: ClassVar[frozenset[TokenStat]] = frozenset({"logprob"})
    HOW_TO_PAUSE: ClassVar[str] = "a release that has /pause_generation with mode=in_place (0.5.6 or newer)"

    def connect(self) -> None:
        self.identify()
        about = object_or_empty(self.server.get("/get_server_info"))
        self.version = about["version"] if isinstance(about.get("version"), str) else None
        described = object_or_empty(self.server.get("/openapi.json"))
        paths = object_or_empty(described.get("paths"))
        modes = object_or_empty(object_or_empty(described.get("components")).get("schemas"))
        mode = str(object_or_empty(modes.get("PauseGenerationReqInput")).get("properties"))
        needed = ("/pause_generation", "/continue_generation", "/abort_request")
        self.can_pause = all(path in paths for path in needed) and "in_place" in mode
        if self.can_pause:
            self.resume()  # it does not say whether somebody left it paused

    def identify(self) -> None:
        super().identify()
        info = object_or_empty(self.server.get("/get_model_info"))
        self.root = info["model_path"] if isinstance(info.get("model_path"), str) else self.root

    def refuses(self, config: RunConfig, token_stats: Collection[TokenStat]) -> str | None:
        if config.temperature and config.top_k and config.top_p < 1:
            return (
                f"top_k={config.top_k} and top_p={config.top_p:g} together: SGLang measures top_p by all tokens, where "
                "it is a share of what top_k leaves here; give top_k=0 or top_p=1"
            )
        if token_stats and config.temperature != 1:
            return (
                f"log-probs at temperature={config.temperature:g}: SGLang's are of the distribution after the "
                "temperature, ours of the model's own; give temperature=1, or leave logprobs (or the reward) out"
            )
        return None

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        config = asked.config
        sampling = {
            "max_new_tokens": asked.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k or -1,
            "min_p": config.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(asked.stop_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "sampling_seed": asked.seed % 2**31,
        }
        body: dict[str, Any] = {
            "input_ids": list(asked.token_ids),
            "sampling_params": sampling,
            "rid": asked.request_id,
        }
        if asked.token_stats:
            body["return_logprob"] = True
        return GENERATE, {**body, "stream": True}

    def read(self, event: Any) -> Delta:
        error_of(event)
        about = object_or_empty(object_or_empty(event).get("meta_info"))
        token_ids = whole_ids(object_or_empty(event).get("output_ids"))
        total = about.get("completion_tokens")
        if not isinstance(total, int):
            raise BadAnswerError(f"completion_tokens were expected, got {str(total)[:60]!r}")
        reason = about.get("finish_reason")
        finish: Finish | None = None
        if reason is not None:
            kind = object_or_empty(reason).get("type")
            if kind not in ("stop", "length", "abort"):
                raise BadAnswerError(f"finish_reason {str(reason)[:60]!r}")
            finish = kind
            matched = object_or_empty(reason).get("matched")
            left_out = len(token_ids) + 1 == total and token_ids[-1:] != [matched]
            if kind == "stop" and left_out and isinstance(matched, int):
                token_ids = [*token_ids, matched]  # a release that leaves the last one out
        logprobs = about.get("output_token_logprobs")
        stats: dict[TokenStat, list[float]] = {}
        if isinstance(logprobs, list):
            if len(logprobs) < len(token_ids):
                raise BadAnswerError(f"log-probs of {len(token_ids)} tokens were expected, got {len(logprobs)}")
            entries = logprobs[len(logprobs) - len(token_ids) :]
            stats["logprob"] = [_logprob(entry) for entry in entries]
        cached = count_of(about.get("cached_tokens")) if finish else 0
        return Delta(total=total, token_ids=token_ids, stats=stats, finish=finish, cached=cached)

    def pause(self) -> None:
        self.server.tell("/pause_generation", {"mode": "in_place"})

    def resume(self, *, once: bool = False) -> None:
        self.server.tell("/continue_generation", {}, once=once)

    def abort(self, request_ids: Sequence[str]) -> None:
        self.server.each(lambda name: self.server.tell("/abort_request", {"rid": name}, once=True), request_ids)


def _logprob(entry: Any) -> float:
    value = entry[0] if isinstance(entry, list) and entry else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswerError(f"a log-prob was expected, got {str(entry)[:60]!r}")
    return float(value)

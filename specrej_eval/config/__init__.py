"""Every argument, once: the same names in ``--model_args``, YAML, Python and the command line.

Values are coerced and checked here, before a model is loaded. The README's argument table is this file in prose.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from specrej_eval import registry
from specrej_eval.errors import ConfigError, nearest, suggest

logger = logging.getLogger(__name__)

MAX = "max"
"""``n=max``: as many rows as free memory holds."""

ON_GREEDY = ("sample", "greedy", "error")
ON_NAN = ("error", "drop")
PARTIAL_TURN = ("closed", "open")
REWARD_CACHE = ("off", "prompt", "full")
PRM_REDUCE = ("last", "min", "mean", "prod")
REWARD_ENSEMBLE = ("sum", "rank")
SPECIAL_TOKENS_IN_CONTENT = ("encode_as_text", "allow", "error")

HOST_ARGUMENTS = (
    "add_bos_token",
    "autogptq",
    "backend",
    "chat_template_args",
    "delta",
    "device_map",
    "enable_thinking",
    "gguf_file",
    "gptqmodel",
    "logits_cache",
    "max_batch_size",
    "max_cpu_memory",
    "max_length",
    "max_memory",
    "max_memory_per_gpu",
    "mixed_precision_dtype",
    "offload_folder",
    "parallelize",
    "peft",
    "prefix_token_id",
    "quantization_config",
    "revision",
    "softmax_dtype",
    "subfolder",
    "think_end_token",
    "token",
    "tokenizer",
    "tp_plan",
    "truncation",
    "use_fast_tokenizer",
)
"""Arguments of lm-eval's ``HFLM`` (or of ``from_pretrained``) that are passed through."""

SYNONYMS = {
    "llm_name": "pretrained",
    "max_completion_tokens": "max_gen_toks",
    "max_gen_tokens": "max_gen_toks",
    "max_new_tokens": "max_gen_toks",
    "model": "pretrained",
    "model_dir": "pretrained",
    "model_name": "pretrained",
    "model_name_or_path": "pretrained",
    "num_return_sequences": "n",
    "best_of": "n",
    "num_samples": "n",
    "reward_model_name": "reward_model",
    "rm": "reward_model",
    "stop": "until",
    "stop_sequences": "until",
    "torch_dtype": "dtype",
}
"""What other tools call our arguments (the reference code, alpaca_eval's decoders, transformers, vLLM)."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All our arguments with their defaults (ARCHITECTURE: decisions).

    Raises:
        ConfigError: from ``from_args`` or ``replace``, with the rule, the value and the nearest valid name.
    """

    pretrained: str | None = None
    """Language model: a hub name or a folder. None = the embedded demo model."""
    reward_model: str | None = None
    """A checkpoint (hub name or folder), ``likelihood``, ``self_certainty``, ``deepconf``, ``pkg.module:function``,
    ``http://host:port``, ``judge:MODEL@http://host:port/v1``, or several: ``a+0.5*b``. None = the demo pair's."""
    reward_family: str = "auto"
    """How the reward checkpoint is read; ``auto`` looks at its ``architectures``."""
    reward_template: str | None = None
    """Chat template the reward model reads through, Jinja text or a file of it. None = its tokenizer's own."""
    prm_reduce: str = "last"
    """What a process reward model makes of its steps' probabilities: the ``last``, ``min``, ``mean`` or ``prod``."""
    reward_tokenizer: str | None = None
    """For a reward server: the checkpoint (hub name or folder) whose tokenizer and chat template render the rows."""
    reward_batch_size: int = 32
    """Most texts in one request to a reward server."""
    reward_timeout: float = 60.0
    """Seconds to wait for a reward server's answer, before another try."""
    reward_retries: int = 5
    """Tries after the first, with growing pauses, before a reward server counts as failed."""
    reward_ensemble: str = "sum"
    """How several rewards become one: weighted ``sum``, or weighted mean of their ``rank`` among the rows."""
    judge_prompt: str | None = None
    """What a judge is asked, text or a file of it, with {prompt}, {response} and {key}, a word
    for delimiters that no content contains; the form of the grade, 0 to 9, is asked for behind it. None = ours."""
    judge_max_toks: int = 16
    """Most tokens of a judge's answer; give more to one that thinks before it grades."""
    reward_cache: str = "full"
    """What a reward model keeps from look to look: ``off``, the ``prompt``'s KV, or ``full`` = each row's too."""
    reward_kv_budget_tokens: int | None = None
    """Tokens the reward model's caches may hold, over all prompts in flight. None = a share of the free memory."""
    strategy: str = "speculative_rejection"
    """``speculative_rejection`` or ``best_of_n``."""
    alpha: float = 0.5
    """Fraction of the pool rejected at each look, in [0, 1)."""
    n: int | str | None = None
    """Rows started; ``max`` = as many as free memory holds. None = 16, or what the budget and first_look give."""
    first_look: int | None = None
    """Tokens per row before the first look. None = max(8, max_gen_toks // 8), or what n and the budget give."""
    kv_budget_tokens: int | None = None
    """Tokens (shared prompt + suffixes of all rows) one prompt may hold. None = prompt + n * first_look."""
    temperature: float = 1.0
    """0 decodes greedily. Any other draws from softmax(logits / temperature), a tiny one the likeliest token."""
    top_p: float = 1.0
    """Nucleus: the smallest set of tokens with this much probability; 1 switches the filter off."""
    top_k: int = 50
    """0 switches the filter off."""
    min_p: float = 0.0
    """Least probability of a token, as a fraction of the likeliest one's; 0 switches the filter off."""
    max_gen_toks: int = 256
    """Most tokens of an answer."""
    seed: int = 0
    """Of all draws; a row's tokens depend on (seed, task, prompt, repeat, row) and on nothing else."""
    dtype: str = "auto"
    """``auto`` = float32 for the embedded pair, else the checkpoint's."""
    reward_dtype: str = "auto"
    """The same for the reward model."""
    device: str | None = None
    """None = cuda if there is one, else cpu."""
    reward_device: str | None = None
    """None = the language model's device."""
    attn_implementation: str | None = None
    """Attention of the model outside our engine (log-likelihood requests); None = transformers' choice."""
    on_greedy: str = "sample"
    """What a task that asks for greedy decoding gets: ``sample``, ``greedy`` (one row) or ``error``."""
    deepconf_window: int = 64
    """reward_model=deepconf scores a row by its least sure stretch of this many tokens."""
    floor_toks: int = 2
    """likelihood, self_certainty and deepconf rank finished answers of fewer tokens last; 1 switches this off."""
    floor_repetition: float = 0.5
    """The same for rows of which more than this share is repetition (4-token sequences seen before in the row); 1 =
    off."""
    on_nan: str = "error"
    """A reward that is not finite: ``error``, or ``drop`` = rank it last and count it."""
    partial_turn: str = "closed"
    """How a reward model reads an unfinished answer: as a ``closed`` assistant turn, or ``open``."""
    special_tokens_in_content: str | None = None
    """Special tokens such as ``<|im_end|>`` that a user or an answer spells: ``encode_as_text``, ``allow`` (control
    tokens) or ``error``. None = text for rewards, judges and chat messages; as ``--model hf`` for prompts of a harness.
    """
    force_sampling_args: bool = False
    """True: our sampling arguments win over those of a task that samples."""
    logprobs: bool = False
    """True: every trajectory carries the log-prob of each of its tokens."""
    batch_size: int = 4
    """Prompts in flight. Changes results in their last bits at most (see ``promises`` there)."""
    trace_path: str | None = None
    """JSONL file: one event per round, one record per request."""
    journal: str | None = None
    """JSONL file of finished requests: a rerun with the same configuration takes them from there."""
    trust_remote_code: bool = False
    """Run code from a checkpoint, of both models."""

    @classmethod
    def from_args(
        cls, args: Mapping[str, Any], *, host: Iterable[str] = HOST_ARGUMENTS, also: Iterable[str] = ()
    ) -> tuple[Self, dict[str, Any]]:
        """Split ``args`` into ours (coerced and checked) and those meant for the host (``host`` names them).

        Args:
            also: names the caller takes besides, for the suggestion.

        Raises:
            ConfigError: an unknown argument (nearest name suggested) or a bad value.
        """
        ours = {field.name for field in dataclasses.fields(cls)}
        host = set(host)
        for name in args:
            if name not in ours and name not in host:
                raise ConfigError(f"unknown argument {name!r}.", hint=suggest_argument(name, {*ours, *host, *also}))
        config = cls(**{name: value for name, value in args.items() if name in ours})
        if config.strategy == "best_of_n" and args.get("alpha"):
            logger.warning("alpha=%s is not used: best_of_n decodes all rows to the end.", args["alpha"])
        return config.checked(), {name: value for name, value in args.items() if name not in ours}

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some arguments changed.

        Raises:
            ConfigError: as ``from_args``.
        """
        ours = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in ours:
                raise ConfigError(f"unknown argument {name!r}.", hint=suggest_argument(name, ours))
        return dataclasses.replace(self, **changes).checked()

    def checked(self) -> Self:
        """Coerce what a command line leaves as text or floats, and hold each argument to its rule."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("alpha", "temperature", "top_p", "min_p", "floor_repetition", "reward_timeout"):
            values[name] = as_float(name, values[name])
        whole = ("top_k", "max_gen_toks", "seed", "batch_size", "deepconf_window", "floor_toks")
        for name in (*whole, "reward_batch_size", "reward_retries", "judge_max_toks"):
            values[name] = as_int(name, values[name])
        for name in ("first_look", "kv_budget_tokens", "reward_kv_budget_tokens"):
            values[name] = None if values[name] is None else as_int(name, values[name])
        if values["n"] is not None and values["n"] != MAX:
            values["n"] = as_int("n", values["n"], also=f"or {MAX!r}")
        for name in ("force_sampling_args", "logprobs", "trust_remote_code"):
            values[name] = as_bool(name, values[name])
        if isinstance(values["reward_model"], (list, tuple)):
            values["reward_model"] = json.dumps(values["reward_model"], default=str)  # an ensemble, as YAML writes it
        texts = ("pretrained", "reward_model", "reward_template", "reward_tokenizer", "judge_prompt")
        for name in (*texts, "device", "reward_device", "trace_path", "journal"):
            values[name] = None if values[name] is None else str(values[name])
        config = dataclasses.replace(self, **values)
        config._check()
        return config

    def _check(self) -> None:
        # an alpha of 0.5 is a fraction of rows; 50 or "50%" is a usual slip
        _rule("alpha", self.alpha, 0 <= self.alpha < 1, "in [0, 1)", "alpha=0.5 rejects half of the rows at each look.")
        if self.n is not None and self.n != MAX:
            _rule("n", self.n, int(self.n) >= 1, "at least 1, or 'max'")
        for name in ("first_look", "kv_budget_tokens", "reward_kv_budget_tokens"):
            value = getattr(self, name)
            _rule(name, value, value is None or value >= 1, "at least 1")
        _rule("max_gen_toks", self.max_gen_toks, self.max_gen_toks >= 1, "at least 1")
        _rule("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _rule("temperature", self.temperature, self.temperature >= 0, "at least 0 (0 decodes greedily)")
        _rule("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 switches it off)")
        _rule("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _rule("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _rule("deepconf_window", self.deepconf_window, self.deepconf_window >= 1, "at least 1")
        _rule("floor_toks", self.floor_toks, self.floor_toks >= 0, "at least 0 (0 and 1 switch it off)")
        _rule("floor_repetition", self.floor_repetition, 0 <= self.floor_repetition <= 1, "in [0, 1] (1 = off)")
        _choice("strategy", self.strategy, registry.names("specrej_eval.strategies"))
        _choice("on_greedy", self.on_greedy, ON_GREEDY)
        _choice("on_nan", self.on_nan, ON_NAN)
        _choice("partial_turn", self.partial_turn, PARTIAL_TURN)
        if self.special_tokens_in_content is not None:
            _choice("special_tokens_in_content", self.special_tokens_in_content, SPECIAL_TOKENS_IN_CONTENT)
        _choice("prm_reduce", self.prm_reduce, PRM_REDUCE)
        _rule("reward_batch_size", self.reward_batch_size, self.reward_batch_size >= 1, "at least 1")
        _rule("reward_timeout", self.reward_timeout, self.reward_timeout > 0, "above 0")
        _rule("reward_retries", self.reward_retries, self.reward_retries >= 0, "at least 0")
        _rule("judge_max_toks", self.judge_max_toks, self.judge_max_toks >= 1, "at least 1")
        _choice("reward_cache", self.reward_cache, REWARD_CACHE)
        _choice("reward_ensemble", self.reward_ensemble, REWARD_ENSEMBLE)
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _choice("reward_dtype", self.reward_dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.temperature == 0 and self.n != 1:
            raise ConfigError(
                f"temperature=0 decodes greedily, so all n={16 if self.n is None else self.n} rows would be equal.",
                hint="set temperature above 0, or n=1 for plain greedy decoding.",
            )

    @property
    def alpha_fraction(self) -> Fraction:
        """alpha as written: the float 0.7 times 10 is not 7, ``Fraction("0.7")`` times 10 is."""
        return Fraction(str(self.alpha))

    @property
    def rejects(self) -> bool:
        """Whether rows can be rejected at all: false for best_of_n and for alpha=0, which are the same thing."""
        return self.strategy != "best_of_n" and self.alpha > 0

    def to_dict(self) -> dict[str, Any]:
        """For records: without the password that an address may hold."""
        values = dataclasses.asdict(self)
        values["reward_model"] = without_passwords(self.reward_model)
        return values


def without_passwords(name: str | None) -> str | None:
    """A ``reward_model`` as records may hold it: ``http://name:password@host`` becomes ``http://host``."""
    return None if name is None else re.sub(r"(https?://)[^/@\s]*@", r"\1", name)


@functools.cache
def descriptions() -> dict[str, str]:
    """What each argument does: the string below its field."""
    body = next(node for node in ast.parse(inspect.getsource(RunConfig)).body if isinstance(node, ast.ClassDef)).body
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).replace("``", "").split())
    return found


def suggest_argument(name: str, choices: Iterable[str]) -> str:
    """Nearest argument name, and where the whole list is."""
    best = SYNONYMS.get(name.lstrip("-").replace("-", "_")) or nearest(name, choices)
    listing = "The README lists all arguments; `specrej-eval doctor` shows versions."
    return f"did you mean {best!r}? {listing}" if best else f"{listing} Ours: {', '.join(sorted(choices))}."


def as_float(name: str, value: Any) -> float:
    """A finite float, from a number or its text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be a number, got {value!r}.") from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {value!r}.")
    return number


def as_int(name: str, value: Any, *, also: str = "") -> int:
    """An int, from an int, its text, or a float without a fraction (lm-eval's parser gives 1_000 as 1000.0)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        try:
            return int(value if isinstance(value, int) else str(value))  # a seed above 2**53 is no float
        except ValueError:
            number = float(str(value))
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        expected = f"a whole number {also}".strip()
        raise ConfigError(f"{name} must be {expected}, got {value!r}.") from None
    return int(number)


def as_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0", "yes", "no"):
        return value.strip().lower() in ("true", "1", "yes")
    raise ConfigError(f"{name} must be true or false, got {value!r}.")


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """A dict, or the JSON text of one (a command line cannot express more)."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        parsed = json.loads(value)
    except (TypeError, json.JSONDecodeError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name} must be a dict or the JSON text of one, got {value!r}.")
    return parsed


def checked_until(until: Any) -> tuple[str, ...]:
    """Stop strings as a tuple, duplicates removed, order kept.

    Raises:
        ConfigError: an entry is empty, None, or not a string.
    """
    if until is None:
        return ()
    entries = [until] if isinstance(until, str) else until
    if not isinstance(entries, (list, tuple)):
        raise ConfigError(f"until must be a string or a list of strings, got {until!r}.")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(
                f"until must hold non-empty strings, got {entry!r} in {list(entries)!r}.",
                hint="an empty stop string would stop every answer at once; leave it out.",
            )
    return tuple(dict.fromkeys(entries))


def _rule(name: str, value: Any, holds: bool, rule: str, hint: str | None = None) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}.", hint=hint)


def _choice(name: str, value: Any, choices: Iterable[str]) -> None:
    options = tuple(choices)
    if value not in options:
        raise ConfigError(f"unknown {name} {value!r}.", hint=suggest(str(value), options))

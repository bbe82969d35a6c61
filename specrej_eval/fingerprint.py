"""What decides an answer, as plain JSON: two runs with equal fingerprints give equal answers.

Kept beside every record that a later run may go on from, so that a changed argument, checkpoint or reward function is
noticed instead of old answers being passed off as new ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specrej_eval.budget import DEFAULT_N
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD, stamp
from specrej_eval.config import RunConfig, without_passwords
from specrej_eval.errors import ConfigError
from specrej_eval.paths import expanded, is_folder, is_there

EMBEDDED = "embedded"
"""The demo pair's name in records: its folder differs from machine to machine."""

DECIDING = (
    "strategy",
    "alpha",
    "n",
    "first_look",
    "kv_budget_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_gen_toks",
    "seed",
    "on_nan",
    "partial_turn",
    "logprobs",
)
"""Arguments that decide an answer, the models apart."""

NEUTRAL = (
    "attn_implementation",
    "batch_size",
    "device",
    "force_sampling_args",
    "journal",
    "on_greedy",
    "reward_batch_size",
    "reward_cache",
    "reward_device",
    "reward_kv_budget_tokens",
    "reward_retries",
    "reward_timeout",
    "trace_path",
    "trust_remote_code",
)
"""Arguments that decide no answer: how and where it is computed, where records go, what a task may ask for. Any other
argument of ``RunConfig`` is about the models, and part of every fingerprint."""

_BETWEEN_PARTS = re.compile(r"""[+*\[\]{}",\s]""")
"""Where an ensemble's name, ``a+0.5*b`` or a JSON list, falls into its parts."""

_PLACEMENT = {
    "backend",
    "device_map",
    "logits_cache",
    "max_batch_size",
    "max_cpu_memory",
    "max_memory",
    "max_memory_per_gpu",
    "offload_folder",
    "parallelize",
    "token",
    "tp_plan",
}
"""Arguments of the host that say where weights lie or how they are fetched, not what they are."""


def of_models(config: RunConfig, host: Mapping[str, Any]) -> dict[str, Any]:
    """Names, files and dtypes of the two models, and the host's arguments that change what they compute."""
    policy = config.pretrained
    reward = config.reward_model
    if reward is None:
        reward = EMBEDDED if policy is None else "likelihood"
    return {
        "pretrained": policy or EMBEDDED,
        "pretrained_files": stamp(policy or str(DEMO_POLICY)),
        "reward_model": without_passwords(reward),
        "reward_files": _reward_files(str(DEMO_REWARD) if reward == EMBEDDED else reward),
        **{name: value for name, value in _about_models(config).items() if name not in ("pretrained", "reward_model")},
        **{name: _plain(value) for name, value in sorted(host.items()) if name not in _PLACEMENT},
    }


def of_run(config: RunConfig, host: Mapping[str, Any], *, until: Sequence[str] = (), **others: Any) -> dict[str, Any]:
    """Models, strategy and sampling of a whole run; ``others`` = what else decides its answers (a prompt template)."""
    arguments = {name: getattr(config, name) for name in DECIDING if name != "logprobs"}
    if not config.rejects:
        arguments["alpha"] = None  # never used
    if config.n is None and config.kv_budget_tokens is None:
        arguments["n"] = DEFAULT_N  # left out or written out, it is the same run
    return {**of_models(config, host), **arguments, "until": list(until), **_plain(others)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two fingerprints differ in, in words; empty if nothing."""
    names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    return "; ".join(f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now" for name in names)


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], *, what: str, remedy: str) -> None:
    """Raises:
    ConfigError: ``what`` was begun with another configuration; says what differs.
    """
    found = differences(then, _plain(now))
    if found:
        raise ConfigError(f"{what} was begun with another configuration ({found}).", hint=remedy)


def is_demo(fingerprint: Mapping[str, Any]) -> bool:
    """Whether the embedded language model or the embedded reward model had a part in it."""
    return EMBEDDED in (fingerprint.get("pretrained"), fingerprint.get("reward_model"))


def _about_models(config: RunConfig) -> dict[str, Any]:
    found = {name: value for name, value in config.to_dict().items() if name not in (*DECIDING, *NEUTRAL)}
    for name in ("judge_prompt", "reward_template"):
        found[name] = None if found[name] is None else _template(found[name])
    return found


def _reward_files(name: str) -> str | None:
    pieces = [piece for piece in _BETWEEN_PARTS.split(name) if piece]
    if len(pieces) > 1 and not is_there(name):  # an ensemble: what is known of each part
        found = [files for files in map(_reward_files, pieces) if files is not None]
        return hashlib.sha256(" ".join(found).encode()).hexdigest() if found else None
    module, colon, function = name.partition(":")
    if not colon or not function.isidentifier():
        return stamp(name)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    origin = spec.origin if spec is not None else None
    # an edited reward function is another reward
    return hashlib.sha256(Path(origin).read_bytes()).hexdigest() if origin and Path(origin).is_file() else None


def _template(value: str) -> str:
    # an edited template file is another template
    is_file = "{" not in value and is_there(value) and not is_folder(value)
    return hashlib.sha256(expanded(value).read_bytes()).hexdigest() if is_file else value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"

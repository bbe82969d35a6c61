"""`specrej-eval doctor --pretrained M`: how this language model is decoded on this machine, and what that promises.

Results of a run say the same (``attention``, ``promises``); here it is known before the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from specrej_eval.commands.doctor.findings import Finding, Status, show
from specrej_eval.config import ARGUMENTS, RunConfig, Takes, names
from specrej_eval.errors import PromptError
from specrej_eval.options import add_options
from specrej_eval.special_tokens import ALLOW, ENCODE_AS_TEXT, ERROR
from specrej_eval.wording import counted

if TYPE_CHECKING:
    from specrej_eval.engines.transformers.engine import TransformersEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("language model (the names of --model_args)")
    add_options(group, (ARGUMENTS[name] for name in names(Takes.POLICY, without=names(Takes.ALONE))))


def run(args: argparse.Namespace) -> int:
    """Carry out the command; 0 if nothing is broken.

    Raises:
        ConfigError, CheckpointError, MissingDependencyError: it cannot be loaded.
    """
    from specrej_eval.engines.transformers.loading import resolve_engine

    given = vars(args)
    taken = (*names(Takes.POLICY), "token")
    config, host = RunConfig.from_args({name: given[name] for name in taken if name in given})
    return examine(resolve_engine(config, host).load(content_rule=ENCODE_AS_TEXT))


def examine(engine: TransformersEngine) -> int:
    """Print what is found; 0 if nothing is broken, else 1."""
    return show(((title, check(engine)) for title, check in CHECKS), well="This language model can be decoded.")


def check_decoding(engine: TransformersEngine) -> Iterator[Finding]:
    """The path of its attention, and what is promised of its logits; both were measured when it was loaded."""
    told = engine.describe()
    yield Finding("ok", "device", f"{told['dtype']} on {told['device_name']}, context {told['max_length']} tokens")
    if told["attention"] == "shared_prefix":
        kept = f"shared_prefix: a prompt's KV is kept once for all its rows; computed by {told['attention_backend']}"
        kept += ", its decode steps replayed as CUDA graphs" if told["cuda_graphs"] else ""
        yield Finding("ok", "attention", kept)
    else:
        yield Finding("note", "attention", f"{told['attention']}: a slower path, with the same results")
    if told["promises"] == "bits":
        detail = "bits: a row's logits are the same bits whatever else is in the batch"
        yield Finding("ok", "promises", detail)
    else:
        detail = (
            "uniforms: last bits of logits depend on what else is in the batch; random numbers, rounds and rule do not"
        )
        yield Finding("note", "promises", f"{detail} ({_why_not_bits(told)})")


def _why_not_bits(told: dict[str, Any]) -> str:
    from specrej_eval.kv.probe import MOST_THREADS

    if not told["device"].startswith("cpu"):
        return "always so on a GPU"
    if told["dtype"] != "float32":
        return f"always so in {told['dtype']}; dtype=float32 may be better"
    if told["cpu_threads"] > MOST_THREADS:
        return f"always so on {told['cpu_threads']} threads; OMP_NUM_THREADS={MOST_THREADS} may be better"
    return "measured when the model was loaded"


def check_prompts(engine: TransformersEngine) -> Iterator[Finding]:
    """Chat template, and special tokens planted in a chat message."""
    tokeniser = engine.tokeniser
    known = tokeniser.special_ids
    if not engine.has_chat_template:
        yield Finding(
            "note", "chat template", "none: prompts are plain texts, whose special tokens are the caller's own"
        )
        return
    asked = [{"role": "user", "content": "Name a fruit."}]
    plain = engine.encode(asked).token_ids
    yield Finding("ok", "chat template", f"a question of 3 words has {counted(len(plain), 'token')}")
    written = [known[number] for number in (*plain, *engine.eos_ids, *known) if number in known]
    token = written[0] if written else None
    if token is None:
        yield Finding("ok", "special tokens", "the tokenizer has none")
        return
    try:
        planted = engine.encode([{"role": "user", "content": f"Name a fruit.{token}"}]).token_ids
    except PromptError as error:
        refused = tokeniser.rule == ERROR
        told = "is refused (special_tokens_in_content=error)" if refused else f"stops a run: {error.args[0]}"
        yield Finding("ok" if refused else "broken", "special tokens", f"{token!r} in a message {told}")
        return
    more = sum(number in known for number in planted) - sum(number in known for number in plain)
    in_harness = "in prompts of lm-eval and alpaca_eval, where nothing is said, a control token as with --model hf"
    if more:
        status: Status = "note" if tokeniser.rule == ALLOW else "broken"
        yield Finding(status, "special tokens", f"{token!r} in a message is read as a control token")
    else:
        yield Finding("ok", "special tokens", f"{token!r} in a message is read as text; {in_harness}")


CHECKS = (
    ("How it is decoded", check_decoding),
    ("Prompts", check_prompts),
)

"""Arguments about a run in a harness or over a file: what is in flight, whose word counts, what a prompt becomes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from specrej_eval.config.argument import (
    Decides,
    Takes,
    argument,
    as_bool,
    checked_until,
    choice,
    declared,
    number,
    whole,
)

AUTO = "auto"
"""``batch_size``: what memory and rows allow. ``apply_chat_template``: where the tokenizer has one."""


@dataclass(frozen=True, kw_only=True)
class RunningArguments:
    batch_size: int | str = argument(
        AUTO,
        whole(also=AUTO),
        "Prompts in flight; ``auto`` = as many as memory and 512 rows allow where company changes no bit of a result "
        "(float32 on a CPU), else 256 rows, and at least 4 prompts. Changes results in their last bits at most.",
        decides=Decides.NOTHING,
    )
    max_seconds: float | None = argument(
        None,
        number("above 0", lambda value: value > 0),
        "Begin no other prompt after so many seconds, loading not counted. What is in flight is finished and recorded, "
        "the run ends with exit code 75, and the same command goes on from there.",
        none="no limit",
        decides=Decides.NOTHING,
    )
    max_decode_tokens: int | None = argument(
        None,
        whole(),
        "The same after so many decoded tokens of all processes, those of prompts in flight included.",
        none="no limit",
        decides=Decides.NOTHING,
    )
    plan: str | None = argument(
        None,
        choice("only"),
        "``only``: run three prompts, say what the whole run will take (rounds, rows, tokens, memory, hours), and end. "
        "Nothing is recorded.",
        none="run",
        decides=Decides.NOTHING,
    )
    on_greedy: str = argument(
        "sample",
        choice("sample", "greedy", "error"),
        "What a task that asks for greedy decoding gets: ``sample``, with one warning, ``greedy`` (one row) or "
        "``error``.",
        decides=Decides.TASKS,
        takes=(Takes.REQUEST,),
    )
    force_sampling_args: bool = argument(
        False,
        as_bool,
        "True: our sampling arguments win over those of a task that samples.",
        decides=Decides.TASKS,
        takes=(Takes.REQUEST,),
        idle_when_greedy=True,
    )


@dataclass(frozen=True, kw_only=True)
class PromptArguments:
    """How a question becomes a prompt, where no harness says so: of `specrej-eval run` and of alpaca_eval's YAML."""

    until: tuple[str, ...] = argument(
        (),
        lambda _, value: checked_until(value),
        "Stop string, or a list of them.",
        decides=Decides.ANSWERS,
        elsewhere=("stop", "stop_sequences"),
    )
    max_tokens: int | None = argument(
        None,
        whole(None),
        "Largest number of tokens in prompt and answer together.",
        none="no limit",
        decides=Decides.ANSWERS,
    )
    apply_chat_template: bool | str = argument(
        AUTO,
        lambda name, value: AUTO if value == AUTO else as_bool(name, value),
        "auto, true or false; auto = where the language model has a template. The reward model uses its own in any "
        "case.",
        decides=Decides.ANSWERS,
    )

    @classmethod
    def of(cls, args: dict[str, Any]) -> Self:
        """Take those among ``args`` out of it.

        Raises:
            ConfigError: a bad value.
        """
        return cls(**{name: made.read(args.pop(name)) for name, made in declared(cls).items() if name in args})

    def deciding(self) -> dict[str, Any]:
        """Those that decide answers, by name."""
        made = declared(type(self))
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if made[field.name].decides is Decides.ANSWERS
        }


@dataclass(frozen=True, kw_only=True)
class DecoderArguments(PromptArguments):
    """Names in ``completions_kwargs`` of alpaca_eval beside those of ``--model_args``."""

    is_chatml_prompt: bool = argument(
        False,
        as_bool,
        "alpaca_eval only: the prompt template is ChatML, to be read as messages.",
        decides=Decides.ANSWERS,
        takes=(),
    )
    price_per_hour: float = argument(
        0.0,
        number("at least 0", lambda value: value >= 0),
        "alpaca_eval only: what the machine costs, for ``price_per_example``.",
        decides=Decides.NOTHING,
        takes=(),
    )

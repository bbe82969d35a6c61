"""Arguments about what is written down, and where."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval.config.argument import Decides, Takes, argument, as_bool, text


@dataclass(frozen=True, kw_only=True)
class RecordArguments:
    logprobs: bool = argument(
        False,
        as_bool,
        "True: every trajectory carries the log-prob of each of its tokens. The answers are the same.",
        decides=Decides.KEPT,
        takes=(Takes.RUN, Takes.REQUEST),
    )
    trace_path: str | None = argument(
        None,
        text,
        "JSONL file: one event per round, one record per request.",
        decides=Decides.NOTHING,
        private=True,
    )
    journal: str | None = argument(
        None,
        text,
        "JSONL file of finished requests: a rerun with the same configuration takes them from there. `run` keeps its "
        "own.",
        decides=Decides.NOTHING,
        takes=(),
        private=True,
    )

"""Arguments about what is written down, and where."""

from __future__ import annotations

from dataclasses import dataclass

from specrej_eval.config.argument import Decides, Takes, argument, as_bool, number, text, whole


@dataclass(frozen=True, kw_only=True)
class RecordArguments:
    logprobs: bool = argument(
        False,
        as_bool,
        "True: every trajectory carries the log-prob of each of its tokens. The answers are the same.",
        decides=Decides.KEPT,
        takes=(Takes.RUN, Takes.REQUEST),
    )
    audit: float = argument(
        0.0,
        number("in [0, 1]", lambda value: 0 <= value <= 1, "audit=0.02 audits two prompts of a hundred."),
        "Share of prompts, drawn at random, whose rejected rows are decoded to their end once the answer is known: "
        "results say how much reward rejection cost, with intervals. The answers and their cost are the same.",
        decides=Decides.KEPT,
        later=True,
    )
    score_every: int | None = argument(
        None,
        whole(),
        "Also score each live row after every so many tokens, and keep the scores in its ``look_scores``: what "
        "`specrej-eval replay` reads. Answers and costs on record are the same: what it costs is counted nowhere.",
        none="at looks alone",
        decides=Decides.KEPT,
        takes=(Takes.RUN, Takes.REQUEST),
        later=True,
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
    join: bool = argument(
        False,
        as_bool,
        "True: other processes started with it may work on the same ``journal`` (of `run`: the same folder) at the "
        "same time, and share its prompts.",
        decides=Decides.NOTHING,
        private=True,
    )

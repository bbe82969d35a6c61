"""`specrej-eval run`: a file of prompts in, one archive of answers out. The reference code's `main.py`, by our names.

The archive is a folder: what was run (`specrej_run.json`), the answers in the prompts' order (`specrej_outputs.jsonl`),
and every row behind them (`specrej_trajectories.jsonl`). A run that was stopped goes on when the command is run again.
Under `accelerate launch` each process answers its share of the prompts; the answers are those of one process. So are
they of processes that are started one by one on one folder, with `--join true`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from specrej_eval import api, budget
from specrej_eval.answering import answer, requests_for, settle_capacity, summary
from specrej_eval.config import (
    ARGUMENTS,
    DECIDING,
    HOST,
    Decides,
    PromptArguments,
    RunConfig,
    Takes,
    as_bool,
    as_int,
    declared,
    known_elsewhere,
    names,
)
from specrej_eval.core import Question, Spent
from specrej_eval.errors import ConfigError, LimitReached, SpecRejError
from specrej_eval.forecast import duration
from specrej_eval.in_flight import Request
from specrej_eval.options import add_options
from specrej_eval.paths import below
from specrej_eval.ranks import Watch, asking_accelerate, check_seen, started
from specrej_eval.ranks import watch as watch_ranks
from specrej_eval.records import parts
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.fingerprint import from_first_rank, same, warn_of_uncovered
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.records.prompt_files import read_prompts
from specrej_eval.records.run_names import default_name
from specrej_eval.wording import counted

if TYPE_CHECKING:
    from specrej_eval.engines.base import Engine
    from specrej_eval.rewards.base import RewardModel

SUMMARY = "answer a file of prompts and keep the answers, with every row behind them, in one folder"
EXAMPLES = (
    "specrej-eval run --prompts prompts.csv --output results/spr --alpha 0.5 --n 16",
    "specrej-eval run --prompts prompts.csv --output results/bo16 --strategy best_of_n --n 16 --seeds 0,1,2",
    "accelerate launch --multi_gpu --num_processes 8 -m specrej_eval run --prompts prompts.json \\\n"
    "      --output results/llama --pretrained meta-llama/Llama-3.2-1B-Instruct \\\n"
    "      --reward_model Skywork/Skywork-Reward-V2-Llama-3.2-1B",
)

TASK = "specrej_run"
"""Part of the random streams' key: the same prompts have the same rows in every run of one seed."""

OURS = {name: ARGUMENTS[name] for name in names(Takes.RUN)}
_PROMPTS = declared(PromptArguments)

_SYNONYMS = {
    **known_elsewhere(),
    "data_filename": "prompts",
    "output_folder": "output",
    "output_path": "output",
    "local_files_only": "pretrained",
}
HINTS = {
    **{name: f"did you mean --{meant}?" for name, meant in _SYNONYMS.items()},
    **{name: f"{name} is about tasks of lm-eval, and `specrej-eval run` has none." for name in names(Decides.TASKS)},
    "journal": "`specrej-eval run` keeps its own journal; it lies in the folder of --output.",
    "speculative_rejection": "it is --strategy speculative_rejection, the default.",
}
"""What to say of options that this command does not have, those of the reference code among them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    state: Any = None
    watch: Watch | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.state is not None:
            with self.guard():
                self.state.wait_for_everyone()

    def least(self, number: int) -> int:
        """The smallest of the numbers that the processes name."""
        return int(min(self.gathered(number)))

    def gathered(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """What happens inside needs all processes: see ``ranks.Watch.guard``."""
        return contextlib.nullcontext() if self.watch is None else self.watch.guard()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options; those of ``RunConfig`` with its own descriptions and defaults."""
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(hints=HINTS)
    files = parser.add_argument_group("files")
    files.add_argument("--prompts", metavar="FILE", help="JSON, JSONL, CSV or TSV with one prompt a row (required)")
    files.add_argument("--output", metavar="DIR", help="folder of the run (default: results/ and the run's name)")
    files.add_argument("--name", help="name of the run in leaderboards (default: made from strategy, n and the models)")
    files.add_argument("--prompt_column", metavar="COLUMN", help="default: instruction, or else prompt")
    files.add_argument("--limit", metavar="ROWS", help="only the first rows of the file")
    files.add_argument(
        "--seeds", metavar="LIST", help="such as 0,1,2: a run for each, in folders seed0, seed1, ... of --output"
    )
    files.add_argument("--force", action="store_true", help="start again: delete the answers in the folder")
    files.add_argument(
        "--keep_trajectories", metavar="BOOL", help="keep every row of every prompt, not only the best (default: true)"
    )
    prompts = parser.add_argument_group("prompts")
    add_options(prompts, _PROMPTS.values())
    ours = parser.add_argument_group("models, strategy and sampling (the names of --model_args)")
    add_options(ours, OURS.values())
    host = parser.add_argument_group("of the language model's loader (as in lm-eval's --model hf)")
    add_options(host, HOST.values())


def run(args: argparse.Namespace) -> int:
    """Carry out the command; see the module. Returns its exit code.

    Raises:
        ConfigError, CheckpointError: before a model is loaded.
        PromptError: a prompt does not fit; before anything is decoded.
        RewardError, OutOfMemoryError: the answers finished before that are in the archive.
    """
    options = {name: value for name, value in vars(args).items() if name != "hints"}
    if "prompts" not in options:
        raise ConfigError("--prompts is missing.", hint="name the file with the prompts: --prompts prompts.csv")
    seeds = _seeds(options.pop("seeds", None), options.get("seed"))
    loaded: list[tuple[Engine, RewardModel]] = []
    limits: dict[str, Any] = {}
    join = as_bool("join", options.pop("join", False))  # of the journal, which is known later
    ranks = _ranks(options.get("device"))
    with ranks.guard():
        own, config, host = split(options)
        own["join"] = join
        asked = PromptArguments.of(own)
        if ranks.world_size > 1 and config.device is None:
            import torch

            # one GPU for each process of a machine; the CPU where there is none
            config = config.replace(device=f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else None)
        plan = api.resolve(config, host)
        if config.plan is not None:
            _forecast(plan, asked, own, ranks, runs=len(seeds))
            return 0
        for seed in seeds:
            folder = _run(plan if seed is None else plan.replace(seed=seed), asked, own, ranks, seed, loaded, limits)
    if seeds != [None] and ranks.main:
        print(f"next: specrej-eval report {folder.parent}")
        print(f"or keep the best answer to each prompt: specrej-eval gather {folder.parent}/seed* --output DIR")
    return 0


def _seeds(text: str | None, seed: Any) -> list[int | None]:
    """Those of several runs; None alone = one run, with the seed it is given.

    Raises:
        ConfigError: not a list of different whole numbers, or ``seed`` is given too.
    """
    if text is None:
        return [None]
    if not re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text):
        found = re.fullmatch(r"(\d+)(?:-|\.\.|:)(\d+)", text.strip())
        listed = ",".join(map(str, range(int(found[1]), int(found[2]) + 1))) if found else "0,1,2"
        raise ConfigError(
            f"--seeds must be whole numbers with commas between them, got {text!r}.",
            hint=f"{'did you mean' if found else 'for example'} --seeds {listed if len(listed) < 80 else '0,1,2'}",
        )
    seeds: list[int | None] = [int(word) for word in text.split(",")]
    if seed is not None or len(set(seeds)) < len(seeds):
        what = f"--seed {seed} and --seeds {text}" if seed is not None else f"--seeds {text} names one seed twice"
        raise ConfigError(f"{what}: each seed is a run of its own.", hint="for example --seeds 0,1,2")
    return seeds


def _run(
    plan: api.RunPlan,
    asked: PromptArguments,
    own: Mapping[str, Any],
    ranks: Ranks,
    seed: int | None,
    loaded: list[tuple[Engine, RewardModel]],
    limits: dict[str, Any],
) -> Path:
    """One run; its folder.

    Args:
        own: options that are of this command alone.
        seed: of several; the folder is then one below that of ``--output``.
        loaded: the models, loaded by the first run that needs them.
        limits: what of ``max_seconds`` and ``max_decode_tokens`` earlier runs have used.

    Raises:
        LimitReached: one of them is; what is answered is recorded.
    """
    limit, questions = _questions(own)

    fingerprint = from_first_rank(
        lambda: plan.fingerprint(**asked.deciding()),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if ranks.main:
        warn_of_uncovered(fingerprint)
    name = own.get("name") or default_name(fingerprint)
    folder = Path(own.get("output") or below("results", name, what="the run's name"))
    folder = folder if seed is None else folder / f"seed{seed}"
    store = OutputsFolder(folder, rank=ranks.rank, world_size=ranks.world_size, join=own["join"])
    anew = bool(own.get("force"))
    keeps = as_bool("keep_trajectories", own.get("keep_trajectories", True))
    if keeps and not anew:
        plan = plan.as_begun(str(store.trajectories_file))
        fingerprint["environment"].update(plan.engine.environment())
    record = RunRecord(
        name=name,
        fingerprint=fingerprint,
        arguments={**plan.config.to_dict(), "prompts": str(own["prompts"]), "limit": limit},
    )
    nothing = f"nothing to do: {counted(len(questions), 'answer')} in {store.outputs_file} (--force draws them again)"
    if not anew and _is_complete(store, record, questions):
        print(nothing)
        return folder
    if keeps:
        plan = plan.replace(journal=str(store.trajectories_file), join=own["join"])
    _check_join(plan, own)
    if ranks.main:
        with store.alone():
            if _is_completed(store, record, questions):
                print(nothing)
                return folder
            store.begin(record, going_on=not anew, delete=anew, to_start_over="add --force")
        if anew:
            for path in parts.files(store.trajectories_file):
                path.unlink()
    ranks.wait()
    if not ranks.main:
        store.begin(record)
    plan = plan.of_rank(ranks.rank, ranks.world_size)
    if record.embedded_demo_pair and ranks.main and not loaded:
        tqdm.write("DEMO: the embedded demo models answer; they know nothing but small sums.", file=sys.stderr)

    spent = Spent()
    with store.unless_refused():
        if not loaded:
            loaded.append(plan.load())
        # a journal's fingerprint is that of a run without what stands in each entry's key
        models = {name: value for name, value in fingerprint.items() if name not in (*DECIDING, *_PROMPTS)}
        generator = plan.generator(*loaded[0], models=models)
        requests = requests_for(generator.engine, questions, plan.config, asked, task=TASK)
        settle_capacity(generator, requests, store, agree=ranks.least)
        record.described = {**generator.describe(), "world_size": ranks.world_size}
        if ranks.main:
            with store.alone():
                if not _is_completed(store, record, questions):
                    store.write_record(record)
            keys = {request.key for request in requests}
            if not own["join"] and (kept := store.set_apart(lambda item: item.key in keys)):
                told = counted(kept, "answer to another prompt is", "answers to other prompts are")
                tqdm.write(
                    f"{told} kept in {store.kept_file.name}; a run that asks for them again takes them from there.",
                    file=sys.stderr,
                )
        ranks.wait()
        if not ranks.main:
            store.begin(record)  # rank 0 has moved answers since
        share = slice(ranks.rank, None, ranks.world_size)
        generator.processes = ranks.world_size
        generator.started = limits.setdefault("started", generator.started)
        generator.spent_before = limits.get("tokens", 0)
        reached: LimitReached | None = None
        answered: list[Answer] = []
        try:
            answered = answer(
                generator,
                questions[share],
                requests[share],
                store=store,
                progress=ranks.main,
                summary=False,
                spent=spent,
            )
        except LimitReached as error:
            reached = error
        totals = generator.totals
        limits["tokens"] = generator.spent_before + totals.decode_tokens + totals.audit_tokens
    store.close()
    stopped = [each for each in ranks.gathered(None if reached is None else reached.limit) if each is not None]
    if stopped:
        if ranks.main:
            with store.alone():
                record.stopped = stopped[0]
                if not _is_completed(store, record, questions):
                    store.write_record(record)
        ranks.wait()
        answers = OutputsFolder(folder)
        done = sum(answers.get(request.key) is not None for request in requests)
        raise LimitReached.after(done, len(requests), limit=stopped[0], where=str(folder))
    spent = functools.reduce(Spent.add, ranks.gathered(spent), Spent())
    ranks.wait()
    if ranks.main:
        with store.alone():
            _finish(store, record, questions, requests, spent, known=answered if own["join"] else ())
        if seed is None:
            print(f"next: specrej-eval export alpaca {folder} --output {folder.name}.json")
    ranks.wait()
    return folder


def _check_join(plan: api.RunPlan, own: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: ``--join`` with something that several processes cannot share.
    """
    if not own["join"]:
        return
    if own.get("force"):
        raise ConfigError(
            "--force with --join would delete what other processes write.",
            hint="run it once without --join, or delete the folder; then start them all without --force.",
        )
    if plan.config.journal is None:
        raise ConfigError(
            "--join needs the rows of each prompt, by which processes share their work.",
            hint="leave --keep_trajectories out.",
        )
    plan.check_join()
    budget.check_arguments(plan.config)


def _questions(own: Mapping[str, Any]) -> tuple[int | None, list[Question]]:
    limit = None if own.get("limit") is None else as_int("limit", own["limit"])
    return limit, read_prompts(own["prompts"], prompt_column=own.get("prompt_column"), limit=limit)


def _forecast(plan: api.RunPlan, asked: PromptArguments, own: Mapping[str, Any], ranks: Ranks, *, runs: int) -> None:
    """``--plan only``: say what the run will take. Writes nothing.

    Args:
        runs: of several seeds.
    """
    _, questions = _questions(own)
    if ranks.main:
        plan = plan.replace(journal=None, trace_path=None)  # nothing is to be written
        generator = plan.generator(*plan.load())
        requests = requests_for(generator.engine, questions, plan.config, asked, task=TASK)
        forecast = dataclasses.replace(generator.forecast(requests), processes=ranks.world_size)
        print(forecast)
        if runs > 1:
            print(f"  and that {runs} times, once for each of --seeds: {duration(runs * forecast.hours * 3600)}")
    ranks.wait()


def split(options: dict[str, Any]) -> tuple[dict[str, Any], RunConfig, dict[str, Any]]:
    """Options of this command, and those of ``RunConfig`` and of the loader, checked."""
    ours = {*OURS, *HOST}
    own = {name: value for name, value in options.items() if name not in ours}
    own |= {name: _value(name, own[name]) for name in own if name in _PROMPTS}
    config, host = RunConfig.from_args({name: _value(name, options[name]) for name in options if name in ours})
    return own, config, host


def _value(name: str, text: str) -> Any:
    """Text of the command line as ``--model_args`` reads it: none, the loader's booleans and numbers, a list."""
    if name == "until" and not text.startswith("["):
        return text
    if text.lower() == "none":
        return None
    if name not in HOST and name != "until":
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # also a stop string that begins with a bracket


def _ranks(device: str | None) -> Ranks:
    if started() < 2:
        return Ranks()
    import torch
    from accelerate import PartialState

    with asking_accelerate(started(), command="specrej_eval run"):
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    check_seen(started(), state.num_processes, command="specrej_eval run")
    watch = watch_ranks(state.process_index, state.num_processes)
    return Ranks(state.process_index, state.num_processes, state.local_process_index, state, watch)


def _is_complete(store: OutputsFolder, record: RunRecord, questions: Sequence[Question]) -> bool:
    """Whether this very run has been made, of these very prompts."""
    before = store.record()
    if before is None or not before.complete or not same(before.fingerprint, record.fingerprint):
        return False
    if before.name != record.name:
        return False
    try:
        answers = store.answers()
    except ConfigError:
        raise
    except SpecRejError:  # a line is damaged: to be decoded anew
        return False
    return [item.instruction for item in answers] == [question.instruction for question in questions]


def _is_completed(store: OutputsFolder, record: RunRecord, questions: Sequence[Question]) -> bool:
    """Whether another of the processes that join has just made it."""
    return store.join and _is_complete(OutputsFolder(store.path), record, questions)


def _finish(
    writing: OutputsFolder,
    record: RunRecord,
    questions: Sequence[Question],
    requests: Sequence[Request],
    spent: Spent,
    *,
    known: Sequence[Answer] = (),
) -> None:
    """One file of answers in the prompts' order, and what they cost.

    Args:
        known: answers that this process has; of several that join, another may have tidied up what it had written.
    """
    store = OutputsFolder(writing.path)
    over = _is_completed(writing, record, questions)
    if writing.join and not over:
        store.write_record(record)  # whoever was refused may have taken it away
    have = {item.key: item for item in known}
    answers: list[Answer] = []
    for question, request in zip(questions, requests, strict=True):
        found = have.get(request.key) or store.get(request.key)
        assert found is not None, f"{question.name} was not recorded"  # every rank records what it answers
        answers.append(dataclasses.replace(found, index=question.index, fields=dict(question.fields)))
    store.merge_parts(answers)
    if not over:
        store.mark_complete(record, answers, spent)
    for line in summary(answers, spent, name=record.name):
        tqdm.write(line, file=sys.stderr)
    print(f"{counted(len(answers), 'answer')} in {store.outputs_file}")

"""`specrej-eval run`: a file of prompts in, one archive of answers out. The reference code's `main.py`, by our names.

The archive is a folder: what was run (`specrej_run.json`), the answers in the prompts' order (`specrej_outputs.jsonl`),
and every row behind them (`specrej_trajectories.jsonl`). A run that was stopped goes on when the command is run again.
Under `accelerate launch` each process answers its share of the prompts; the answers are those of one process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from specrej_eval import api
from specrej_eval.answering import Question, answer, requests_for
from specrej_eval.config import (
    ARGUMENTS,
    DECIDING,
    HOST,
    MAX,
    PromptArguments,
    RunConfig,
    Takes,
    as_bool,
    as_int,
    declared,
    known_elsewhere,
    names,
)
from specrej_eval.core import Spent
from specrej_eval.errors import ConfigError, SpecRejError, nearest
from specrej_eval.generator import Generator, Request
from specrej_eval.options import add_options
from specrej_eval.progress import summary_line
from specrej_eval.ranks import Watch
from specrej_eval.ranks import watch as watch_ranks
from specrej_eval.records.fingerprint import from_first_rank, of_run, same, warn_of_uncovered
from specrej_eval.records.outputs import Answer, OutputsFolder, RunRecord, total_cost
from specrej_eval.records.prompt_files import read_prompts
from specrej_eval.records.run_names import default_name
from specrej_eval.records.trace import rank_path

TASK = "specrej_run"
"""Part of the random streams' key: the same prompts have the same rows in every run of one seed."""

OURS = {name: ARGUMENTS[name] for name in names(Takes.RUN)}
_PROMPTS = declared(PromptArguments)
_NOT_OURS = ARGUMENTS.keys() - OURS.keys()

SYNONYMS = {
    **known_elsewhere(),
    "data_filename": "prompts",
    "output_folder": "output",
    "output_path": "output",
    "local_files_only": "pretrained",
}
VALUES = {
    "speculative_rejection": "it is --strategy speculative_rejection, the default. ",
    "variance_reduce": "it has no code behind it in the reference code either. ",
}
"""What to say of the reference code's options that are no other name of ours."""


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

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """What happens inside needs all processes: see ``ranks.Watch.guard``."""
        return contextlib.nullcontext() if self.watch is None else self.watch.guard()


def parser() -> argparse.ArgumentParser:
    """All options; those of ``RunConfig`` with its own descriptions and defaults."""
    made = argparse.ArgumentParser(
        prog="specrej-eval run",
        description="Answer a file of prompts and keep the answers, with every row behind them, in one folder.",
        epilog="examples:\n"
        "  specrej-eval run --prompts prompts.csv --output results/spr --alpha 0.5 --n 16\n"
        "  specrej-eval run --prompts prompts.csv --output results/bo16 --strategy best_of_n --n 16\n"
        "  accelerate launch --multi_gpu --num_processes 8 -m specrej_eval run --prompts prompts.json \\\n"
        "      --output results/llama --pretrained meta-llama/Llama-3.2-1B-Instruct \\\n"
        "      --reward_model Skywork/Skywork-Reward-V2-Llama-3.2-1B",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    files = made.add_argument_group("files")
    files.add_argument("--prompts", metavar="FILE", help="JSON, JSONL, CSV or TSV with one prompt a row; needed")
    files.add_argument("--output", metavar="DIR", help="the archive (default: results/ and the run's name)")
    files.add_argument("--name", help="of the run, in leaderboards (default: made of strategy, n and models)")
    files.add_argument("--prompt_column", metavar="COLUMN", help="default: instruction, or else prompt")
    files.add_argument("--limit", metavar="ROWS", help="only the first rows of the file")
    files.add_argument("--overwrite", metavar="BOOL", help="start anew where a folder holds answers (default: false)")
    files.add_argument(
        "--keep_trajectories", metavar="BOOL", help="keep all rows of all prompts, not the best alone (default: true)"
    )
    prompts = made.add_argument_group("prompts")
    add_options(prompts, _PROMPTS.values())
    ours = made.add_argument_group("models, strategy and sampling (the names of --model_args)")
    add_options(ours, OURS.values())
    host = made.add_argument_group("of the language model's loader (as in lm-eval's --model hf)")
    add_options(host, HOST.values())
    return made


def run(words: list[str]) -> int:
    """Carry out the command; see the module. Returns its exit code.

    Raises:
        ConfigError, CheckpointError: before a model is loaded.
        PromptError: a prompt does not fit; before anything is decoded.
        RewardError, OutOfMemoryError: the answers finished before that are in the archive.
    """
    options = parse(words)
    ranks = _ranks(options.get("device"))
    with ranks.guard():
        return _run(options, ranks)


def _run(options: dict[str, Any], ranks: Ranks) -> int:
    own, config, host = split(options)
    asked = PromptArguments.of(own)
    limit = None if own.get("limit") is None else as_int("limit", own["limit"])
    api.check(config, host)
    records = read_prompts(own["prompts"], prompt_column=own.get("prompt_column"), limit=limit)
    questions = [Question(instruction=item.instruction, index=item.index, fields=item.fields) for item in records]

    fingerprint = from_first_rank(
        lambda: of_run(config, host, **asked.deciding()),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if ranks.main:
        warn_of_uncovered(fingerprint)
    name = own.get("name") or default_name(fingerprint)
    store = OutputsFolder(own.get("output") or Path("results") / name, rank=ranks.rank, world_size=ranks.world_size)
    record = RunRecord(
        generator=name,
        fingerprint=fingerprint,
        arguments={**config.to_dict(), "prompts": str(own["prompts"])},
    )
    overwrite = as_bool("overwrite", own.get("overwrite", False))
    if not overwrite and _is_complete(store, record, questions):
        print(f"nothing to do: {len(questions)} answers in {store.outputs_file} (--overwrite true draws them anew)")
        return 0
    if ranks.main:
        store.begin(record, going_on=not overwrite, delete=overwrite)
        if overwrite:
            for path in store.path.glob(f"{store.trajectories_file.stem}*.jsonl"):
                path.unlink()
    ranks.wait()
    if not ranks.main:
        store.begin(record)
    if as_bool("keep_trajectories", own.get("keep_trajectories", True)):
        journal = rank_path(str(store.trajectories_file), ranks.rank, ranks.world_size)
        config = config.replace(journal=journal)
    if ranks.world_size > 1 and config.trace_path is not None:
        config = config.replace(trace_path=rank_path(config.trace_path, ranks.rank, ranks.world_size))
    if record.embedded_demo_pair and ranks.main:
        tqdm.write("DEMO: the embedded demo models answer; they know nothing but small sums.", file=sys.stderr)

    if ranks.world_size > 1 and config.device is None:
        config = config.replace(device=_own_device(ranks))
    engine, reward = api.load_models(config, host)
    # a journal's fingerprint is that of a run without what stands in each entry's key
    models = {name: value for name, value in fingerprint.items() if name not in (*DECIDING, *_PROMPTS)}
    generator = Generator(engine=engine, reward=reward, config=config, identity=host, fingerprint=models)
    requests = requests_for(engine, questions, config, task=TASK, **asked.deciding())
    generator.capacity_tokens = _capacity(record, generator, requests, ranks)
    record.described = {**generator.describe(), "world_size": ranks.world_size}
    if ranks.main:
        store.write_record(record)
    if ranks.main:
        keys = {request.key for request in requests}
        if kept := store.set_apart(lambda item: item.key in keys):
            tqdm.write(
                f"{kept} answers to other prompts are kept in {store.kept_file.name}; a run that asks for them again "
                "takes them from there.",
                file=sys.stderr,
            )
    ranks.wait()
    if not ranks.main:
        store.begin(record)  # rank 0 has moved answers since
    share = slice(ranks.rank, None, ranks.world_size)
    spent = Spent()
    answer(generator, questions[share], requests[share], store=store, progress=ranks.main, summary=False, spent=spent)
    store.close()
    spent = _of_all_ranks(spent, ranks)
    ranks.wait()
    if ranks.main:
        _finish(store.path, record, questions, requests, spent)
    ranks.wait()
    return 0


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options given, by name.

    Raises:
        ConfigError: an unknown option; suggests the name that may be meant.
    """
    dashed = [_underscored(word) for word in words]
    made = parser()
    options, unknown = made.parse_known_args(dashed)
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            known = [action.dest for action in made._actions]
            meant = SYNONYMS.get(name) or nearest(name, known)
            if name in _NOT_OURS:
                raise ConfigError(
                    f"`specrej-eval run` keeps its own {name}.", hint="it lies in the folder of --output."
                )
            hint = VALUES.get(name) or (f"did you mean --{meant}? " if meant else "")
            raise ConfigError(f"unknown option {word.partition('=')[0]!r}.", hint=f"{hint}`--help` lists all options.")
    if unknown:
        raise ConfigError(f"unexpected {unknown[0]!r}.", hint="options are written --name value.")
    if "prompts" not in options:
        raise ConfigError("--prompts is missing: the file with the prompts.", hint="--prompts prompts.csv")
    return vars(options)


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
    except ValueError:
        return text  # also a stop string that begins with a bracket


def _underscored(word: str) -> str:
    """``--top-k`` is ``--top_k``."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _ranks(device: str | None) -> Ranks:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    watch = watch_ranks(state.process_index, state.num_processes)
    return Ranks(state.process_index, state.num_processes, state.local_process_index, state, watch)


def _is_complete(store: OutputsFolder, record: RunRecord, questions: Sequence[Question]) -> bool:
    """Whether this very run has been made, of these very prompts."""
    before = store.record()
    if before is None or not before.complete or not same(before.fingerprint, record.fingerprint):
        return False
    if before.generator != record.generator:
        return False
    try:
        answers = store.answers()
    except ConfigError:
        raise
    except SpecRejError:  # a line is damaged: to be decoded anew
        return False
    return [item.instruction for item in answers] == [question.instruction for question in questions]


def _own_device(ranks: Ranks) -> str | None:
    """One GPU for each process of a machine; None (the CPU) where there is none."""
    import torch

    return f"cuda:{ranks.local_rank}" if torch.cuda.is_available() else None


def _capacity(record: RunRecord, generator: Generator, requests: Sequence[Request], ranks: Ranks) -> int | None:
    """Tokens of KV for ``n=max``: of the run's first start, else the least that any process has room for."""
    config = generator.config
    if record.capacity_tokens is not None or config.n != MAX or config.kv_budget_tokens is not None or not requests:
        return record.capacity_tokens
    longest = max(request.prompt.num_tokens for request in requests)
    measured = generator.engine.capacity_tokens(config, longest)
    if ranks.world_size > 1:
        from accelerate.utils import gather_object

        measured = min(gather_object([measured]))
    record.capacity_tokens = measured
    return measured


def _of_all_ranks(spent: Spent, ranks: Ranks) -> Spent:
    if ranks.world_size == 1:
        return spent
    from accelerate.utils import gather_object

    added = Spent()
    for other in gather_object([spent]):
        added.add(other)
    return added


def _finish(
    folder: Path, record: RunRecord, questions: Sequence[Question], requests: Sequence[Request], spent: Spent
) -> None:
    """One file of answers in the prompts' order, and what they cost."""
    store = OutputsFolder(folder)
    answers: list[Answer] = []
    for question, request in zip(questions, requests, strict=True):
        found = store.get(request.key)
        assert found is not None, f"{question.name} was not recorded"  # every rank records what it answers
        answers.append(dataclasses.replace(found, index=question.index, fields=dict(question.fields)))
    store.merge_parts(answers)
    store.mark_complete(record, answers, spent)
    best = [item.reward for item in answers if item.reward is not None]
    ended = [reward for item in answers for reward in item.finished_rewards]
    line = summary_line(len(answers), spent, best, ended, total=total_cost(answers), source="the records")
    tqdm.write(f"{record.generator}: {line}", file=sys.stderr)
    if empty := [item for item in answers if not item.output.strip()]:
        tqdm.write(f"{len(empty)} answers are empty, such as that to {empty[0].instruction[:60]!r}", file=sys.stderr)
    print(f"{len(answers)} answers in {store.outputs_file}")
    print(f"next: specrej-eval export alpaca {folder} --output {folder.name}.json")

"""`specrej-eval compare`: which method, how much better, at what cost, how sure.

A grid of methods (strategies x alpha x n) on several seeds answers one file of prompts or one lm-eval task, in one
process with the models loaded once; then all of it is held against each other, prompt by prompt. Each cell of the grid
is a folder as `specrej-eval run` writes it, so that `report`, `replay` and `journal` read it, and a comparison that was
stopped goes on when the command is run again. docs/compare.md says what each number is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrej_eval import api, budget
from specrej_eval.commands.compare import judged
from specrej_eval.commands.compare.sources import PromptFile, Source, Tasks
from specrej_eval.commands.run import OURS, split
from specrej_eval.config import HOST, PromptArguments, as_bool, as_int, declared
from specrej_eval.core import Question
from specrej_eval.errors import ConfigError, LimitReached
from specrej_eval.evidence import RESAMPLES
from specrej_eval.evidence.methods import Method, grid, listed, named
from specrej_eval.evidence.tables import as_markdown, print_tables
from specrej_eval.options import add_grid, add_options
from specrej_eval.paths import below, file_name
from specrej_eval.ranks import started
from specrej_eval.records.cell_scores import versioned
from specrej_eval.records.jsonl import as_text, write_atomically
from specrej_eval.records.prompt_files import read_prompts
from specrej_eval.wording import counted, inert

if TYPE_CHECKING:
    from specrej_eval.commands.compare.cells import Decoder, Place
    from specrej_eval.evidence.comparison import Cell

SUMMARY = "run a grid of methods on the same prompts, and say which is how much better, at what cost, how surely"
EXAMPLES = (
    "specrej-eval compare --tasks specrej_arithmetic --limit 50 --alpha 0.5 --n 8,16 --output results/compare",
    "specrej-eval compare --tasks specrej_arithmetic --limit 200 --alpha 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9 \\\n"
    "      --n 8,16,32 --seeds 0,1,2 --output results/paper_grid",
    "specrej-eval compare --prompts prompts.csv --alpha 0.25,0.5 --n 16 --output results/mine \\\n"
    "      --pretrained meta-llama/Llama-3.2-1B-Instruct --reward_model Skywork/Skywork-Reward-V2-Llama-3.2-1B",
)
HINTS = {
    "seed": "did you mean --seeds?",
    "strategies": "did you mean --strategy?",
    "alphas": "did you mean --alpha?",
    "journal": "each cell keeps a journal of its own, in the folder of --output.",
    "join": "one process makes a comparison; it is for `specrej-eval run`, and journal=FILE of lm_eval and Python.",
    "gen_kwargs": "its names are options here (--temperature, ...), and mean what they mean in --model_args.",
    "model_args": "its names are options here: --pretrained, --reward_model, ...",
}
TIMED = 20
"""Prompts of a cell that are decoded for it alone."""
ABOUT = "specrej_compare.json"
ABOUT_VERSION = 1
RESULT, MARKDOWN = "comparison.json", "comparison.md"
_GRID = {*Method("", 1, 0.0).arguments, "seed"}
_PROMPTS = declared(PromptArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    parser.set_defaults(hints=HINTS)
    on = parser.add_argument_group("what to compare on (one of --tasks and --prompts)")
    on.add_argument("--tasks", metavar="LIST", help="tasks of lm-eval that generate; ours are always known")
    on.add_argument("--include_path", metavar="DIR", help="a folder with more tasks")
    on.add_argument("--num_fewshot", metavar="NUMBER", help="examples in each prompt (default: the task's own)")
    on.add_argument("--fewshot_as_multiturn", metavar="BOOL", help="examples are turns of a chat (default: false)")
    on.add_argument("--system_instruction", metavar="TEXT", help="system message of each prompt")
    on.add_argument("--prompts", metavar="FILE", help="JSON, JSONL, CSV or TSV with one prompt a row")
    on.add_argument("--prompt_column", metavar="COLUMN", help="default: instruction, or else prompt")
    on.add_argument("--limit", metavar="PROMPTS", help="only the first ones (of each task)")
    what = parser.add_argument_group("methods (lists with commas)")
    add_grid(what, alpha="0.1,0.5,0.9", n="16")
    what.add_argument("--seeds", metavar="LIST", help="all methods on each of them (default: 0)")
    how = parser.add_argument_group("how to compare")
    how.add_argument("--output", metavar="DIR", help="folder of the comparison (default: below results/)")
    how.add_argument("--force", action="store_true", help="start again: delete the answers in the folder")
    how.add_argument(
        "--timed",
        metavar="PROMPTS",
        help=f"decode so many prompts for each cell alone, for seconds and memory (default: {TIMED}); all = every one",
    )
    how.add_argument("--baseline", metavar="NAME", help="method to hold the others against (default: most rows of bo)")
    how.add_argument("--resamples", metavar="NUMBER", help=f"of the bootstrap (default: {RESAMPLES:,})")
    judged.add_arguments(how)
    how.add_argument("--format", choices=("text", "markdown", "json"), help="of what is printed (default: text)")
    prompts = parser.add_argument_group("prompts")
    add_options(prompts, _PROMPTS.values())
    ours = parser.add_argument_group("models and sampling (the names of --model_args)")
    add_options(ours, (made for name, made in OURS.items() if name not in (*_GRID, "join")))
    host = parser.add_argument_group("of the language model's loader (as in lm-eval's --model hf)")
    add_options(host, HOST.values())


def run(args: argparse.Namespace) -> int:
    """Raises:
    ConfigError, CheckpointError: before a model is loaded; nothing is written then.
    PromptError, RewardError, OutOfMemoryError, LimitReached: the answers finished before are in their cells.
    """
    from specrej_eval.commands.compare.cells import Decoder, Place, pool_of, read_cell
    from specrej_eval.evidence.comparison import SCHEMA_VERSION

    if (processes := started()) > 1:
        raise ConfigError(
            f"compare runs in one process, and a launcher started {processes}.",
            hint="call it without accelerate or torchrun.",
        )
    options = {name: value for name, value in vars(args).items() if name != "hints"}
    methods, seeds = _grid(options)
    pool = pool_of(methods)
    form = options.pop("format", "text")
    judge = judged.Judge.of(options, pool)
    timed, limit = _counts(options)
    resamples = as_int("resamples", options.pop("resamples", RESAMPLES))
    if resamples < 100:
        raise ConfigError(f"--resamples must be at least 100, got {resamples}.", hint="leave it out: 10,000.")
    baseline = options.pop("baseline", None)
    if baseline is not None:
        named(methods, baseline)
    anew = bool(options.pop("force", False))
    of_source = {name: options.pop(name) for name in [*options] if name in _OF_SOURCE}
    output = options.pop("output", None)
    plan, source = _resolved(options, of_source, limit)
    if plan.config.plan is not None:
        raise ConfigError(
            "plan=only plans one run, and a comparison is many.",
            hint="`specrej-eval run --plan only` says what a cell takes.",
        )
    for method in methods:
        known = isinstance(source, PromptFile)
        budget.check_arguments(plan.replace(**method.arguments).config, max_gen_toks_known=known)
    questions = source.questions()
    if not questions:
        raise ConfigError(f"{source.name} has no prompts.", hint="give others.")
    root = Path(
        output or below("results", f"compare_{file_name(Path(source.name).stem)}", what="the comparison's name")
    )

    places = [Place(method, seed, root) for seed in seeds for method in sorted(methods, key=lambda m: m != pool)]
    for place in () if anew else places:
        plan = plan.as_begun(str(place.store.trajectories_file))
    for_pool = {name: value for name in ("score_every", "logprobs") if (value := getattr(plan.config, name))}
    decoder = Decoder(
        source=source,
        plan=plan.replace(score_every=None, logprobs=False),
        questions=questions,
        timed=len(questions) if timed is None else timed,
        arguments={"limit": limit},
        anew=anew,
        for_pool={**for_pool, **judge.for_pool},
        pool=pool,
    )
    for name, newest in ((ABOUT, ABOUT_VERSION), (RESULT, SCHEMA_VERSION)):
        versioned(root / name, newest)
    complete = [decoder.check(place) for place in places]
    _decode(decoder, places, complete, root)
    cells = [read_cell(place, source, is_pool=place.method == pool) for place in places]
    report = _report(root, cells, decoder, questions, baseline=baseline, resamples=resamples, place=places[0])
    judge.add(report, cells, questions, root)
    notes = _notes(report)
    text, markdown = as_text(report, indent=1) + "\n", as_markdown(report, notes) + "\n"
    write_atomically(root / RESULT, text)
    write_atomically(root / MARKDOWN, markdown)
    if form == "json":
        print(text, end="")
    elif form == "markdown":
        print(markdown, end="")
    else:
        print_tables(report, notes, file=sys.stdout)
    print(f"everything, prompt by prompt: {root / RESULT}; for a text: {root / MARKDOWN}", file=sys.stderr)
    return 0


def _counts(options: dict[str, Any]) -> tuple[int | None, int | None]:
    """Prompts of a cell that are decoded for it alone (None = all), and prompts in all (None = all there are)."""
    found: list[int | None] = []
    for name, default, all_of_them in (("timed", TIMED, "all"), ("limit", None, None)):
        value = options.pop(name, default)
        number = None if value is None or value == all_of_them else as_int(name, value)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, got {number}.", hint=f"leave --{name} out.")
        found.append(number)
    return found[0], found[1]


_OF_SOURCE = (
    *("tasks", "include_path", "num_fewshot", "fewshot_as_multiturn", "system_instruction"),
    *("prompts", "prompt_column"),
)


def _grid(options: dict[str, Any]) -> tuple[list[Method], list[int]]:
    """Methods and seeds, taken out of the options."""
    strategies = listed("strategy", options.pop("strategy"))
    alphas = listed("alpha", options.pop("alpha"))
    rows = listed("n", options.pop("n", "16"))
    if "max" in rows:
        raise ConfigError("n=max differs from machine to machine.", hint="give n as numbers: --n 8,16,32")
    seeds = listed("seeds", options.pop("seeds", "0"), of="seed")
    return grid(strategies, alphas, rows), seeds


def _resolved(options: dict[str, Any], of_source: Mapping[str, Any], limit: int | None) -> tuple[api.RunPlan, Source]:
    """What the grid has in common; tasks and prompts are read first, then the models are looked at."""
    tasks, prompts = of_source.get("tasks"), of_source.get("prompts")
    if (tasks is None) == (prompts is None):
        raise ConfigError(
            "give either --tasks or --prompts." if tasks is None else "--tasks and --prompts are two things.",
            hint="for example --tasks specrej_arithmetic, or --prompts prompts.csv",
        )
    given = dict(options)
    own, config, host = split(options)
    asked = PromptArguments.of(own)
    if own:
        raise ConfigError(f"unexpected --{next(iter(own))}.")
    if prompts is not None:
        if lost := [name for name in _OF_SOURCE[1:5] if name in of_source]:
            raise ConfigError(f"--{lost[0]} is about tasks, and there is none.", hint="leave it out.")
        listed_ = read_prompts(str(prompts), prompt_column=of_source.get("prompt_column"), limit=limit)
        return api.resolve(config, host), PromptFile(str(prompts), asked, listed_)
    for name in ("until", "max_tokens"):
        if name in given:
            raise ConfigError(f"--{name} is the task's to say.", hint="leave it out, or compare on --prompts.")
    if "prompt_column" in of_source:
        raise ConfigError("--prompt_column is about a file of prompts, and there is none.", hint="leave it out.")
    budget.check_arguments(config, max_gen_toks_known=False)
    from specrej_eval.harness.lm_eval.tasks import TaskPrompts

    shots = of_source.get("num_fewshot")
    loaded = TaskPrompts.load(
        [name.strip() for name in str(tasks).split(",") if name.strip()],
        include_path=of_source.get("include_path"),
        num_fewshot=None if shots is None else as_int("num_fewshot", shots),
        limit=limit,
        system_instruction=of_source.get("system_instruction"),
        apply_chat_template=asked.apply_chat_template is True,
        fewshot_as_multiturn=as_bool("fewshot_as_multiturn", of_source.get("fewshot_as_multiturn", False)),
    )
    plan = api.RunPlan.of(config, host)
    arguments = {name: value for name, value in given.items() if name in OURS} | dict(host)
    return plan, Tasks(loaded, arguments)


def _decode(decoder: Decoder, places: Sequence[Place], complete: Sequence[bool], root: Path) -> None:
    """All that is not there yet; the cells whose rows others take come first on each seed.

    Raises:
        LimitReached: ``max_seconds`` or ``max_decode_tokens``, which are of all cells together.
    """
    left = sum(not done for done in complete)
    if left < len(places):
        print(f"{left} of {counted(len(places), 'cell')} left to do", file=sys.stderr)
    number = 0
    for place, done in zip(places, complete, strict=True):
        if not done:
            number += 1
            began = time.perf_counter()
            try:
                told = decoder.decode(place)
            except LimitReached as error:
                finished = len(places) - left + number - 1
                raise LimitReached(
                    f"{error.limit} is reached: {finished} of {counted(len(places), 'cell')} are complete, and nothing "
                    f"is compared yet. The answers are kept in {root}.",
                    hint="run the same command again to continue (a limit holds for each start).",
                    limit=error.limit,
                ) from error
            seconds = time.perf_counter() - began
            print(f"[{number}/{left}] {inert(place.told)}: {told}; {seconds:.1f} s", file=sys.stderr)
            _put_about(root, decoder)
        if place.method == decoder.pool and any(
            not done for other, done in zip(places, complete, strict=True) if other.seed == place.seed
        ):
            decoder.use_as_pool(place)


def _put_about(root: Path, decoder: Decoder) -> None:
    """What only the loaded models can tell, for a comparison that is read again without them."""
    if decoder.models is None or ((root / ABOUT).is_file() and not decoder.anew):
        return
    from specrej_eval.evidence.flops import Sizes

    engine, reward = decoder.models
    layers, width = engine.attention_size()
    sizes = Sizes(
        parameters=engine.parameters_per_token(),
        layers=layers,
        attention_width=width,
        reward_parameters=reward.parameters_per_token(),
    )
    told = {
        "schema_version": ABOUT_VERSION,
        "sizes": sizes.to_dict(),
        "bytes_per_token": engine.bytes_per_token(),
        "described": engine.describe(),
    }
    write_atomically(root / ABOUT, as_text(told, indent=1) + "\n")


def _report(
    root: Path,
    cells: Sequence[Cell],
    decoder: Decoder,
    questions: Sequence[Question],
    *,
    baseline: str | None,
    resamples: int,
    place: Place,
) -> dict[str, Any]:
    from specrej_eval.evidence.comparison import compare
    from specrej_eval.evidence.flops import Sizes

    about = versioned(root / ABOUT, ABOUT_VERSION)
    prompts = [
        {
            "index": question.index,
            "prompt_hash": result.prompt_hash,
            "repeat": result.repeat,
            "instruction": question.instruction,
            **question.fields,
        }
        for question, result in zip(questions, cells[0].results, strict=True)
    ]
    report = compare(
        cells,
        prompts=prompts,
        sizes=Sizes.from_dict(about.get("sizes")),
        bytes_per_token=int(about.get("bytes_per_token") or 0),
        baseline=baseline,
        resamples=resamples,
    )
    record = decoder.record_of(place)
    models = {name: record.fingerprint.get(name) for name in ("pretrained", "reward_model")}
    # plain data only: what a fingerprint or an engine says of itself may hold anything
    told: dict[str, Any] = json.loads(
        json.dumps(
            {
                **report,
                "made_by": "compare",
                "task": decoder.source.described(),
                "limit": decoder.arguments.get("limit"),
                "models": models,
                "embedded_demo_pair": record.embedded_demo_pair,
                "hardware": about.get("described"),
            },
            default=str,
        )
    )
    return told


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know."""
    notes = []
    told = ", ".join(f"{name}={value}" for name, value in report["models"].items() if value)
    demo = " (the demo pair, which knows nothing but small sums)" if report["embedded_demo_pair"] else ""
    notes.append(f"models: {told}{demo}")
    if report["limit"] is not None:
        notes.append(f"--limit was {report['limit']}: these are not scores of the whole task")
    if any(method["alpha"] is not None for method in report["methods"]):
        notes.append(
            "Rows are the same in all methods of a seed up to where they are cut. KL ≤: the most an answer's "
            "distribution can have moved from the model's, in nats."
        )
    return notes

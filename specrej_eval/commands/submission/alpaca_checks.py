"""What AlpacaEval's leaderboard takes, and whether answers are what the run beside them answered. Rows count from 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD
from specrej_eval.commands.submission.tree import read_rows
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.fingerprint import has_files_of
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.wording import counted, start_of

COLUMNS = ("dataset", "instruction", "output", "generator")
"""Columns of a row of ``model_outputs.json`` in AlpacaEval's repository, in their order."""
NUM_INSTRUCTIONS = 805
JUDGE = "weighted_alpaca_eval_gpt4_turbo"
"""The annotator of the leaderboard."""
REFERENCE_FILE = "alpaca_eval_gpt4_baseline.json"

_AGAIN = "make the outputs again with `alpaca_eval evaluate_from_model`; do not edit them by hand."
Rows = Sequence[Mapping[str, Any]]


def read_references(path: str | None) -> list[dict[str, Any]]:
    """AlpacaEval's instructions in their order, from a file or from the hub's cache.

    Raises:
        SpecRejError: neither is to be had, or the file is another data set.
    """
    hint = (
        f"download {REFERENCE_FILE} from the data set tatsu-lab/alpaca_eval on the hub and give it as "
        "--reference_outputs, or run this once where the hub can be reached (it stays in the cache)."
    )
    if path is None:
        from huggingface_hub import hf_hub_download

        try:
            # the file behind alpaca_eval.constants.ALPACAEVAL_REFERENCE_OUTPUTS, whose loading script no longer runs
            path = hf_hub_download("tatsu-lab/alpaca_eval", REFERENCE_FILE, repo_type="dataset")
        except Exception as error:  # the hub's client has many kinds of failure; all of them mean the same here
            raise SpecRejError("AlpacaEval's instructions are not in the hub's cache here.", hint=hint) from error
    rows = read_rows(Path(path), what="reference outputs", hint=hint)
    if len(rows) != NUM_INSTRUCTIONS:
        raise SpecRejError(
            f"reference outputs: {path!r} has {len(rows)} rows; AlpacaEval has {NUM_INSTRUCTIONS} instructions.",
            hint=hint,
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("instruction"), str):
            raise SpecRejError(f"reference outputs: row {number} of {path!r} has no 'instruction'.", hint=hint)
    return rows


def check_outputs(rows: Rows, references: Rows, *, name: str, file: Path) -> None:
    """Hold answers to the canonical rows: the same instructions in the same order, each answered once by ``name``.

    Raises:
        ConfigError: with the first row that is wrong.
    """

    def refuse(index: int, row: Mapping[str, Any], what: str, hint: str = _AGAIN) -> ConfigError:
        return ConfigError(f"{str(file)!r}, row {index + 1} ({start_of(row.get('instruction'))}): {what}", hint=hint)

    for index, row in enumerate(rows):
        missing = [column for column in COLUMNS if not isinstance(row.get(column), str)]
        if missing:
            raise refuse(index, row, f"no {' and no '.join(missing)}; needed: {', '.join(COLUMNS)}.")
        if row["generator"] != name:
            hint = "--name must be the generator's name, which is the top-level key of its configuration."
            raise refuse(index, row, f"the generator is {row['generator']!r}, not {name!r}.", hint)
        if not row["output"].strip():
            hint = "an answer that is empty counts as lost; until or the prompt template may stop it at once."
            raise refuse(index, row, "the output is empty.", hint)

    wanted = Counter(reference["instruction"] for reference in references)
    seen: Counter[str] = Counter()
    for index, row in enumerate(rows):
        seen[row["instruction"]] += 1
        if row["instruction"] not in wanted:
            raise refuse(index, row, "this instruction is not one of AlpacaEval's.")
        if seen[row["instruction"]] > wanted[row["instruction"]]:
            raise refuse(index, row, "this instruction was answered before: a duplicate.")
    for index, reference in enumerate(references):
        if seen[reference["instruction"]] < wanted[reference["instruction"]]:
            raise ConfigError(
                f"{str(file)!r} has {len(rows)} rows, not {len(references)}: the answer to instruction {index + 1} "
                f"({start_of(reference['instruction'])}) is missing.",
                hint="run the same command again, without --max_instances; it continues from here.",
            )
    for index, (row, reference) in enumerate(zip(rows, references, strict=True)):
        if row["instruction"] != reference["instruction"]:
            raise refuse(index, row, f"wrong order; {start_of(reference['instruction'])} belongs here.")
        if "dataset" in reference and row["dataset"] != reference["dataset"]:
            raise refuse(index, row, f"the dataset is {row['dataset']!r}, and should be {reference['dataset']!r}.")


def find_run(*, name: str, file: Path, unverified: bool) -> RunRecord | None:
    """The record beside ``model_outputs.json``; None for outputs that are taken unverified.

    Raises:
        SpecRejError: there is none and ``unverified`` was not given, or it is of the embedded demo pair, of another
            generator or of an unfinished run.
    """
    store = OutputsFolder(file.parent)
    record = store.record()
    if record is None:
        if unverified:
            return None
        raise SpecRejError(
            f"nothing says how {str(file)!r} was made: there is no {store.run_file.name} next to it.",
            hint="keep the two together. --unverified accepts such outputs and says so in the submission.",
        )
    if _is_demo(record):
        raise SpecRejError(
            f"{str(file)!r} was made by the embedded demo pair, which knows nothing but small sums.",
            hint="name pretrained and reward_model in the configuration's completions_kwargs, and run it again.",
        )
    if record.name != name:
        raise ConfigError(
            f"{str(store.run_file)!r} records the generator {record.name!r}, not {name!r}.",
            hint="--name must be the generator's name, which is the top-level key of its configuration.",
        )
    if not record.complete:
        raise SpecRejError(
            f"the run in {str(file.parent)!r} is not finished: {counted(len(store.answers()), 'answer')} so far.",
            hint="run the same command again; it continues from there.",
        )
    return record


def _is_demo(record: RunRecord) -> bool:
    """Whether an embedded model had a part in it, under whatever name."""
    files = {"pretrained_files": DEMO_POLICY, "reward_files": DEMO_REWARD}
    named = any(has_files_of(record.fingerprint, name, folder) for name, folder in files.items())
    return named or record.embedded_demo_pair


def check_answers(rows: Rows, *, file: Path) -> list[Answer]:
    """Hold each row to the answer recorded beside it.

    Returns:
        The recorded answers, in the rows' order.

    Raises:
        SpecRejError: a row was not answered by the run, or was answered otherwise.
    """
    store = OutputsFolder(file.parent)
    recorded: dict[str, list[Answer]] = {}
    for answer in store.answers():
        recorded.setdefault(answer.instruction, []).append(answer)
    found = []
    for index, row in enumerate(rows):
        where = f"{str(file)!r}, row {index + 1} ({start_of(row['instruction'])})"
        candidates = recorded.get(row["instruction"], [])
        if not candidates:
            raise SpecRejError(f"{where}: {store.outputs_file.name} next to it has no such answer.", hint=_AGAIN)
        # alpaca_eval strips what it writes; ours is recorded as it was decoded
        same = [answer for answer in candidates if answer.output.strip() == row["output"].strip()]
        if not same:
            raise SpecRejError(f"{where}: the output differs from the answer that the run recorded.", hint=_AGAIN)
        found.append(same[0])
    return found


def check_annotations(annotations: Rows, rows: Rows, *, name: str, file: Path) -> int:
    """Hold the judge's annotations to the answers.

    Returns:
        How many have no preference (the judge failed there).

    Raises:
        ConfigError: another judge, another generator, other answers, or not one annotation for each.
    """
    hint = f"`alpaca_eval evaluate --model_outputs ... --annotators_config {JUDGE}` writes them."
    outputs: dict[str, list[str]] = {}
    for row in rows:
        outputs.setdefault(row["instruction"], []).append(row["output"])
    for index, annotation in enumerate(annotations):
        where = f"{str(file)!r}, row {index + 1} ({start_of(annotation.get('instruction'))})"
        for column, wanted in (("annotator", JUDGE), ("generator_2", name)):
            if annotation.get(column) != wanted:
                raise ConfigError(f"{where}: {column} is {annotation.get(column)!r}, not {wanted!r}.", hint=hint)
        left = outputs.get(str(annotation.get("instruction")), [])
        if annotation.get("output_2") not in left:
            raise ConfigError(f"{where}: output_2 is not an answer of model_outputs.json.", hint=hint)
        left.remove(annotation["output_2"])
    if len(annotations) != len(rows):
        raise ConfigError(f"{str(file)!r} has {len(annotations)} annotations, not {len(rows)}.", hint=hint)
    return sum(annotation.get("preference") is None for annotation in annotations)

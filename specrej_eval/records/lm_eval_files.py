"""lm-eval's results and samples files: read, and held to one another and to the hashes that lm-eval wrote down."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrej_eval.checked import list_or_empty, number_or, object_or_empty
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD
from specrej_eval.config import Decides, names
from specrej_eval.errors import ConfigError, SpecRejError
from specrej_eval.paths import below, is_same, lies_in
from specrej_eval.records.scores import Score
from specrej_eval.wording import counted, start_of

MARK = "specrej_submission"
"""Key of a results file that a submission has written, which is no run."""

_DATE = re.compile(r"_(\d{4}-\d{2}-\d{2}T[\d.-]+)$")
_DECIDES_NOTHING = names(Decides.KEPT, Decides.PLACE, Decides.NOTHING)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a task, as its samples file has it."""

    prompt_hash: str
    prompt: str | None
    """What the language model read."""
    scores: Mapping[tuple[str, str], float]
    """(metric, filter) -> its score, where it is finite."""


@dataclass(frozen=True)
class Results:
    """One results file of a run of ours."""

    path: Path
    content: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return object_or_empty(self.content["config"])

    @property
    def block(self) -> Mapping[str, Any]:
        """What our model wrote about itself; empty for another model's run."""
        return object_or_empty(self.config.get("specrej"))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that decide answers."""
        arguments = object_or_empty(self.block.get("arguments"))
        return {name: value for name, value in arguments.items() if name not in _DECIDES_NOTHING}

    @property
    def tasks(self) -> Mapping[str, Any]:
        """Task -> numbers of samples, ``original`` and ``effective``."""
        return object_or_empty(self.content.get("n-samples"))

    def samples_of(self, task: str, which: str) -> int | None:
        """One of a task's numbers of samples; None where the file does not say."""
        number = number_or(object_or_empty(self.tasks.get(task)).get(which), None)
        return int(number) if number is not None and number >= 0 else None

    @property
    def warnings(self) -> list[str]:
        """What the run warned of."""
        return list(map(str, list_or_empty(self.block.get("warnings"))))

    @property
    def date(self) -> float:
        date = number_or(self.content.get("date"), None)
        return self.path.stat().st_mtime if date is None else date

    @property
    def date_id(self) -> str:
        """The part of the file's name that its samples files share."""
        found = _DATE.search(self.path.stem)
        if found is None:
            raise ConfigError(
                f"{str(self.path)!r} has lost the date in its name, by which its samples are found.",
                hint="give the files the names lm-eval gave them.",
            )
        return found.group(1)

    def samples_file(self, task: str) -> Path:
        """Raises:
        ConfigError: the task is called so that its file would lie elsewhere.
        """
        return below(self.path.parent, f"samples_{task}_{self.date_id}.jsonl", what=f"{self.path.name}: the file name")

    def scores(self) -> Iterator[Score]:
        """Every metric of every task, with the samples behind it where they were logged."""
        for task, values in self.content["results"].items():
            if not isinstance(values, Mapping):
                continue
            each = self._each(task)
            for key, value in values.items():
                metric, _, filter_name = key.partition(",")
                if not filter_name or metric.endswith("_stderr") or not is_number(value):
                    continue
                stderr = values.get(f"{metric}_stderr,{filter_name}")
                yield Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=value,
                    stderr=stderr if is_number(stderr) else None,
                    prompts=self.samples_of(task, "effective"),
                    prompts_in_all=self.samples_of(task, "original"),
                    each=each.get((metric, filter_name), {}),
                )

    def documents(self, task: str) -> Iterator[Document]:
        """The documents in order, each with its scores by every filter; none where no samples were logged, or they
        cannot be read."""
        found: dict[Any, tuple[str, str | None, dict[tuple[str, str], float]]] = {}
        try:
            samples = [sample for _, sample in _lines(self.samples_file(task))]
        except (SpecRejError, OSError, ValueError):
            return
        for place, sample in enumerate(samples):
            document = sample.get("doc_id", place)
            _, _, scores = found.setdefault(document, (str(sample.get("prompt_hash")), _prompt(sample), {}))
            for metric in sample.get("metrics") or ():
                if is_finite(sample.get(metric)):
                    scores[(str(metric), str(sample.get("filter")))] = float(sample[metric])
        yield from (Document(*told) for told in found.values())

    def _each(self, task: str) -> dict[tuple[str, str], dict[str, float]]:
        """(metric, filter) -> prompt -> score; empty where no samples were logged, or they cannot be read."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        seen: Counter[tuple[Any, ...]] = Counter()
        try:
            samples = [sample for _, sample in _lines(self.samples_file(task))]
        except (SpecRejError, OSError, ValueError):
            return {}
        for sample in samples:
            asked = tuple(str(sample.get(name)) for name in ("prompt_hash", "target_hash", "filter"))
            seen[asked] += 1
            for metric in map(str, list_or_empty(sample.get("metrics"))):
                score = number_or(sample.get(metric), None)
                if score is not None and is_finite(score):
                    found.setdefault((metric, asked[2]), {})[f"{asked[0]} {asked[1]} {seen[asked]}"] = float(score)
        return found


def find_results(folder: Path) -> list[Results]:
    """All results files below a folder.

    Raises:
        SpecRejError: there is none, one cannot be read, or one is not of a model of ours.
    """
    if not folder.is_dir():
        raise SpecRejError(f"no such folder: {str(folder)!r}.", hint="give the --output_path of your lm_eval runs.")
    found = []
    for path in sorted(folder.rglob("*.json")):
        results = read_results(path, strict=True)
        if results is None or MARK in results.content:
            continue
        if not results.block:
            raise SpecRejError(
                f"{str(path)!r} was not written by a model of ours: its config has no 'specrej' (model "
                f"{results.config.get('model')!r}).",
                hint="keep runs of other models in another folder.",
            )
        found.append(results)
    if not found:
        raise SpecRejError(
            f"no lm-eval results under {str(folder)!r}.",
            hint=f"run lm_eval with --output_path {folder} --log_samples.",
        )
    return found


def read_results(path: Path, *, strict: bool = False) -> Results | None:
    """A results file; None for another file, and for one that was not written to its end.

    Raises:
        SpecRejError: ``strict``, and a file with the name of one cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if not strict or not path.name.startswith("results_"):
            return None
        raise SpecRejError(f"{str(path)!r} cannot be read: {error}.", hint="delete it if it is half a file.") from error
    results = isinstance(content, dict) and isinstance(content.get("results"), dict)
    return Results(path, content) if results and isinstance(content.get("config"), dict) else None


def check_whole(results: Results) -> None:
    """Raises:
    SpecRejError: a run of the embedded demo pair, or one that did not answer all of its tasks' documents.
    """
    file = str(results.path)
    models = [results.arguments.get(name) for name in ("pretrained", "reward_model")]
    by_path = any(is_same(str(model), demo) for model in models if model for demo in (DEMO_POLICY, DEMO_REWARD))
    if results.block.get("embedded_demo_pair") or not models[0] or by_path:
        raise SpecRejError(
            f"{file!r} is a run of the embedded demo pair, which knows nothing but small sums.",
            hint="name pretrained and reward_model in --model_args.",
        )
    limit = results.config.get("limit")
    if limit is not None:
        told = f"{limit:g}" if number_or(limit, None) is not None else start_of(limit)
        raise SpecRejError(
            f"{file!r} was run with --limit {told}: not scores of the whole task.", hint="run it without --limit."
        )
    for task in results.tasks or (None,):
        done, whole = (None if task is None else results.samples_of(task, which) for which in ("effective", "original"))
        if done is None or whole is None:
            raise SpecRejError(
                f"{file!r} does not say how many samples its tasks have (n-samples).",
                hint="the file was changed after the run; run the task again.",
            )
        if done != whole:
            raise SpecRejError(
                f"{file!r}: task {task!r} answered {done} of {whole} documents.",
                hint="run it without --samples and --limit.",
            )


def check_samples(results: Results, task: str, *, allow_empty: bool) -> Path:
    """Hold a task's samples to the results file and to their own hashes.

    Returns:
        The samples file.

    Raises:
        SpecRejError: it is missing; a document is missing or there twice; an answer is empty; a hash does not match.
            Names file and line.
    """
    file = results.samples_file(task)
    if not file.is_file():
        raise SpecRejError(
            f"{str(results.path)!r}: the samples of task {task!r} are missing; looked for {str(file)!r}.",
            hint="run lm_eval with --log_samples; keep results and samples in one folder.",
        )
    if not lies_in(file, results.path.parent):
        raise SpecRejError(
            f"{str(file)!r} is a link out of the folder of {results.path.name}.",
            hint="put the samples file itself beside the results.",
        )
    hint = "the file was changed after the run, or two were mixed up; run the task again."
    configured = object_or_empty(object_or_empty(results.content.get("configs")).get(task))
    generated = configured.get("output_type") == "generate_until"
    seen: dict[str, dict[str, int]] = {}
    digest = hashlib.sha256()
    for number, sample in _lines(file):
        where = f"{str(file)!r}, line {number} (document {sample.get('doc_id')})"
        documents = seen.setdefault(str(sample.get("filter")), {})
        first = documents.setdefault(str(sample.get("doc_id")), number)
        if first != number:
            raise SpecRejError(f"{where}: the same document as in line {first}.", hint=hint)
        for name, text in _hashed(sample):
            if text is None or hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != sample.get(name):
                raise SpecRejError(f"{where}: {name} is not that of what stands there.", hint=hint)
        digest.update(
            "".join(str(sample[name]) for name in ("doc_hash", "prompt_hash", "target_hash")).encode(
                "utf-8", "surrogatepass"
            )
        )
        if generated and not allow_empty:
            for answer in _answers(sample):
                if not answer.strip():
                    raise SpecRejError(
                        f"{where}: the answer to {start_of(_prompt(sample))} is empty.",
                        hint="--allow_empty takes empty answers, if the model did stop at once.",
                    )
    wanted = results.samples_of(task, "effective")
    for name, documents in seen.items() or [("none", {})]:
        if len(documents) != wanted:
            raise SpecRejError(
                f"{str(file)!r} has {len(documents)} samples (filter {name!r}); {results.path.name} says {wanted}.",
                hint=hint,
            )
    known = object_or_empty(results.content.get("task_hashes")).get(task)
    if known is not None and known != digest.hexdigest():
        raise SpecRejError(f"{str(file)!r} is not the file behind {results.path.name}: task_hashes differ.", hint=hint)
    return file


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8", errors="surrogateescape") as opened:  # what is no UTF-8 has another hash
        for number, line in enumerate(opened, start=1):
            try:
                sample = json.loads(line)
            except (ValueError, RecursionError):
                sample = None
            if not isinstance(sample, dict):
                raise SpecRejError(f"{str(file)!r}, line {number}: not a JSON object.", hint="the file was cut short.")
            yield number, sample


def _hashed(sample: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The three hashes of a sample and what each is of (lm_eval/evaluator.py)."""
    yield "doc_hash", json.dumps(sample.get("doc"), indent=2, ensure_ascii=False)
    yield "prompt_hash", _prompt(sample)
    target = sample.get("target")
    yield "target_hash", target if isinstance(target, str) else None


def _prompt(sample: Mapping[str, Any]) -> str | None:
    try:
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
    except (KeyError, TypeError):
        return None
    return prompt if isinstance(prompt, str) else None


def _answers(sample: Mapping[str, Any]) -> Iterator[str]:
    """All draws; one empty answer where there is none."""
    for draws in list_or_empty(sample.get("resps")) or [[]]:
        yield from map(str, draws or [""] if isinstance(draws, list) else [draws])


def remarks(results: Results) -> list[str]:
    """What a reader of the scores has to know, beside the warnings that the run wrote down."""
    kinds = {
        "degraded": ("answer gave", "answers gave", "up rows for want of memory (degraded)"),
        "truncated": ("prompt was", "prompts were", "cut to fit the context"),
    }
    return [
        f"task {task!r}: {counted(int(number), one, more)} {what}"
        for task, counts in object_or_empty(results.block.get("per_task")).items()
        for kind, (one, more, what) in kinds.items()
        if (number := number_or(object_or_empty(counts).get(kind), 0))
    ]


def is_finite(value: Any) -> bool:
    """Whether it is a number that a float can be: Python writes NaN and infinities into JSON, too."""
    return is_number(value) and abs(value) <= sys.float_info.max


def is_number(value: Any) -> bool:
    """Also one that is not finite, as lm-eval writes a metric of nothing; but none beyond the floats."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 1e300
    return whole or isinstance(value, float)

"""Runs with rows and scores at each look, for the tests of the page, written by the classes that write a run's."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from specrej_eval.config import SAMPLING, RunConfig
from specrej_eval.core import GenerationResult, Ledger, Round, Trajectory, prompt_hash
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.journal import Journal
from specrej_eval.records.outputs import OutputsFolder
from support.run_folders import FINGERPRINT

SIZES = {"parameters": 1000, "layers": 2, "attention_width": 8, "reward_parameters": 500}
LOOKS = (4, 8)
SAMPLED = {name: getattr(RunConfig(), name) for name in SAMPLING} | {"max_gen_toks": 12}

HOSTILE = {
    "script": "</script><script>document.title='owned'</script>",
    "image": "<img src=x onerror=\"document.title='owned'\">",
    "svg": "<svg onload=document.title='owned'></svg>",
    "entity": "&lt;b&gt; &amp; &#x27;",
    "quotes": "\" onmouseover=\"document.title='owned' ' `",
    "comment": "--> <!-- <![CDATA[ ]]>",
    "separators": "one\u2028two\u2029three",
    "direction": "safe\u202egnp.exe\u2066",
    "terminal": "\x1b[2J\x1b]0;owned\x07\x08",
    "surrogate": "half \ud800 of a pair",
    "null": "a\x00b",
    "style": '</style><style>*{display:none}</style><p style="color:red">',
    "link": "javascript:document.title='owned' https://example.com/",
    "template": "${document.title='owned'} {{7*7}} <%= 7 %>",
    "formula": '=HYPERLINK("http://example.com")',
    "latex": r"\input{/etc/passwd} $x_1^2$ & 50 % # ~",
    "markdown": "| a | [b](javascript:c) `d` |",
    "long": "x" * 5000,
    "scripts": "汉字 עברית العربية हिन्दी 👩‍👩‍👧‍👦",
}
"""Kind -> a text that does harm where it is not made inert."""


def key_of(instruction: str, strategy: str, seed: int = 0) -> str:
    return hashlib.sha256(f"{instruction} {strategy} {seed}".encode("utf-8", "surrogatepass")).hexdigest()


def a_result(
    instruction: str, *, n: int = 6, rejects: bool, seed: int = 0, text: Callable[[int], str] | None = None
) -> GenerationResult:
    """Rows of twelve tokens that a strategy which rejects looks at twice, keeping half each time; scores that say
    something of the end."""
    chance = random.Random(f"{instruction.encode('utf-8', 'surrogatepass')!r} {seed}")
    final = [chance.gauss(0, 1) for _ in range(n)]
    early = [[0.6 * score + 0.4 * chance.gauss(0, 1) for _ in LOOKS] for score in final]
    alive, rounds, length = list(range(n)), [], [12] * n
    if rejects:
        for place, tokens in enumerate(LOOKS):
            ordered = sorted(alive, key=lambda row: -early[row][place])
            kept = ordered[: max(1, len(alive) // 2)]
            for row in set(alive) - set(kept):
                length[row] = tokens
            cut = early[kept[-1]][place]
            rounds.append(Round(len(alive), tokens, cut, len(kept), 0, len(alive) - len(kept), 3 + tokens * len(alive)))
            alive = sorted(kept)
    rounds.append(Round(len(alive), 12, None, 0, len(alive), 0, 3 + 12 * len(alive)))
    rows = []
    for row in range(n):
        looks: list[tuple[int, float | None]] = [
            (tokens, early[row][place]) for place, tokens in enumerate(LOOKS) if tokens <= length[row]
        ]
        ended = length[row] == 12
        looks += [(12, final[row])] if ended else []
        rows.append(
            Trajectory(
                row=row,
                text=text(row) if text else f"row {row} of seed {seed}",
                token_ids=list(range(length[row])),
                reward=looks[-1][1],
                finish_reason="eos" if ended else "rejected",
                rounds_survived=len(looks),
                look_scores=looks,
            )
        )
    finished = [row for row in rows if row.finish_reason == "eos"]
    ledger = Ledger(
        prompt_tokens=3,
        decode_tokens=sum(length),
        reward_tokens=sum(length) + 5,
        rows_started=n,
        rows_finished=len(finished),
        rows_rejected=n - len(finished),
        seconds={"prefill": 0.1, "decode": 0.5 + chance.random(), "reward": 0.25, "other": 0.01},
        peak_bytes=2**30,
    )
    return GenerationResult(
        best=max(finished, key=lambda row: row.reward or 0.0),
        trajectories=rows,
        rounds=rounds,
        ledger=ledger,
        prompt_hash=prompt_hash(instruction),
        task="specrej_run",
        resolved={**SAMPLED, "seed": seed, "n": n, "strategy": "speculative_rejection" if rejects else "best_of_n"},
    )


def a_recorded_run(
    folder: Path,
    instructions: Sequence[str],
    *,
    rejects: bool = True,
    n: int = 6,
    seed: int = 0,
    name: str = "a run",
    text: Callable[[int], str] | None = None,
    rows: bool = True,
    **fingerprint: Any,
) -> Path:
    """A folder of `specrej-eval run`, with its journal unless ``rows`` is false."""
    strategy = "speculative_rejection" if rejects else "best_of_n"
    told = {**FINGERPRINT, "strategy": strategy, "alpha": 0.5 if rejects else None, "n": n, "seed": seed, **fingerprint}
    store = OutputsFolder(folder)
    record = RunRecord(
        name=name, fingerprint=told, arguments={"prompts": "p.csv"}, described={"device": "cpu", **SIZES}
    )
    store.begin(record)
    journal = Journal(str(store.trajectories_file), told) if rows else None
    answers = []
    for index, instruction in enumerate(instructions):
        result = a_result(instruction, rejects=rejects, n=n, seed=seed, text=text)
        key = key_of(instruction, strategy, seed)
        if journal is not None:
            journal.put(key, result)
        answers.append(Answer.of(result, key=key, instruction=instruction, index=index))
    if journal is not None:
        journal.close()
    store.merge_parts(answers)
    store.mark_complete(record, answers)
    return folder


def an_lm_eval_run(
    folder: Path,
    instructions: Sequence[str],
    *,
    rejects: bool = True,
    seed: int = 0,
    journal: Path | None = None,
    tasks: Sequence[str] = ("sums",),
) -> Path:
    """Results, samples and journal as lm-eval leaves them with our model; each answer's accuracy is known:
    ``accuracy_of``."""
    strategy = "speculative_rejection" if rejects else "best_of_n"
    place = folder / "rows.jsonl" if journal is None else journal
    folder.mkdir(parents=True, exist_ok=True)
    written = Journal(str(place), {"pretrained": "org/policy"})
    totals, results = Ledger(), []
    stamp = f"2026-11-28T20-00-{int(rejects)}{seed}.000"
    scores: dict[str, Any] = {}
    for task in tasks:
        lines = []
        for number, instruction in enumerate(instructions):
            asked_of = instruction if task == "sums" else f"{instruction} of {task}"
            result = a_result(asked_of, rejects=rejects, seed=seed)
            result.task = task
            results.append(result)
            written.put(key_of(asked_of, strategy, seed), result)
            totals.add(result.ledger)
            lines.append(
                {
                    "doc_id": number,
                    "arguments": {"gen_args_0": {"arg_0": asked_of}},
                    "prompt_hash": result.prompt_hash,
                    "target_hash": "t",
                    "filter": "none",
                    "metrics": ["exact_match"],
                    "exact_match": accuracy_of(result),
                }
            )
        mean = sum(line["exact_match"] for line in lines) / len(lines)
        scores[task] = {"exact_match,none": mean, "exact_match_stderr,none": 0.1}
        (folder / f"samples_{task}_{stamp}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written.close()
    asked = {"strategy": strategy, "alpha": 0.5, "n": 6, "seed": seed}
    block = {
        "arguments": {**asked, "journal": str(place)},
        "totals": totals.to_dict(),
        "per_task": {task: {"resolved": results[0].resolved} for task in tasks},
        "hardware": {"device": "cpu", **SIZES},
        "mean_reward": sum(result.best.reward or 0.0 for result in results) / len(results),
    }
    count = {"original": len(instructions), "effective": len(instructions)}
    content = {
        "results": scores,
        "config": {"model": "specrej", "model_args": {}, "specrej": block},
        "n-samples": dict.fromkeys(tasks, count),
        "date": float(rejects),
    }
    (folder / f"results_{stamp}.json").write_text(json.dumps(content))
    return folder


def accuracy_of(result: GenerationResult) -> float:
    return float((result.best.reward or 0.0) > 1.0)


class PageReader(HTMLParser):
    """What a browser makes of a page, as far as tests ask: elements, attributes, texts of some of them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def rows(self) -> Any:
        """The viewer's data."""
        return next(json.loads(text) for text in self.texts["script"] if text.startswith('{"methods"'))

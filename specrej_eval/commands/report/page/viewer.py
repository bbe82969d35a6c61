"""What the viewer of rows is given: prompts, rows, scores and texts as JSON, within a stated size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any

from specrej_eval.commands.report.page.data import Answered, Key, PageData
from specrej_eval.commands.report.page.measures import look_scores
from specrej_eval.wording import counted, inert_page

_FATES = {"rejected": "rejected", "length": "length", "eos": "finished", "stop": "finished"}


@dataclass(frozen=True, slots=True)
class Rows:
    """The viewer's data, and what was left out of it."""

    json: str
    notes: list[str]


def rows(data: PageData, megabytes: float) -> Rows:
    """All prompts with texts, where there is room; else texts as long as three quarters of it last, then scores alone,
    then no more prompts.

    Args:
        megabytes: the room, in 10^6 bytes.
    """
    room = megabytes * 1e6
    written = _filled(data, 0, room, texts=True)
    whole, bare = len(written), 0
    if whole < len(data.prompts):
        written = _filled(data, 0, 0.75 * room, texts=True)
        whole = len(written)
        written += _filled(data, whole, room - sum(map(len, written)), texts=False)
        bare = len(written) - whole
    notes = []
    more = f"a page holds {megabytes:g} MB of rows; --megabytes gives it more"
    if bare:
        first = counted(whole, "prompt")
        notes.append(f"Texts are here for the first {first}, scores alone for {bare:,} more ({more}).")
    if left := len(data.prompts) - whole - bare:
        notes.append(f"{left:,} of {counted(len(data.prompts), 'prompt')} are left out of the viewer ({more}).")
    methods = [{"name": inert_page(m.run.name), "short": inert_page(m.short), "family": m.family} for m in data.methods]
    return Rows(f'{{"methods":{as_script(methods)},"prompts":[{",".join(written)}]}}', notes)


def _filled(data: PageData, start: int, room: float, *, texts: bool) -> list[str]:
    """The prompts from a place on, as many as the room holds."""
    written: list[str] = []
    for key, text in islice(data.prompts.items(), start, None):
        entry = as_script(_prompt(data, key, text, texts=texts))
        room -= len(entry) + 1
        if room < 0:
            break
        written.append(entry)
    return written


def as_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends that element, and nothing is a line break of
    JavaScript's own (U+2028, U+2029)."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _prompt(data: PageData, key: Key, text: str, *, texts: bool) -> dict[str, Any]:
    by = {
        str(place): _answered(method.answers[key], texts=texts)
        for place, method in enumerate(data.methods)
        if key in method.answers
    }
    name = " ".join(inert_page(text).split()) or f"prompt {key.prompt_hash[:12]}"
    told = {"name": name if len(name) <= 90 else f"{name[:89]}…", "by": by}
    if len(data.tasks) > 1:
        told["task"] = inert_page(key.task)
    return told | ({"text": inert_page(text)} if texts and text else {})


def _answered(answer: Answered, *, texts: bool) -> dict[str, Any]:
    scores = [[inert_page(metric.label), short(value)] for metric, value in answer.scores.items()]
    told: dict[str, Any] = {
        "reward": short(answer.reward),
        "tokens": answer.num_tokens,
        "decoded": answer.ledger.decode_tokens,
        "scores": scores,
        "best": answer.best,
        "rows": [],
    }
    for row in answer.rows:
        looks = [[tokens, short(score)] for tokens, score in look_scores(row)]
        fate = _FATES[row.finish_reason]
        entry: list[Any] = [row.row, fate, row.num_tokens, short(row.reward), row.rounds_survived, looks]
        told["rows"].append([*entry, inert_page(row.text)] if texts else entry)
    if not answer.rows and texts:
        told["text"] = inert_page(answer.text)
    return told


def short(value: float | None) -> float | None:
    """Six digits: more than anyone reads, and half the bytes."""
    return None if value is None else float(f"{value:.6g}")

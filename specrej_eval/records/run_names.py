"""Names of generators: what a leaderboard calls a run, and the folder its answers go to by default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval.config import reward_names
from specrej_eval.paths import file_name, shortened
from specrej_eval.records.fingerprint import EMBEDDED, is_demo


def default_name(fingerprint: Mapping[str, Any], *, n: int | None = None) -> str:
    """What a run with this fingerprint is called, such as ``SpR_alpha0.5_n16_Qwen3-1.7B_Skywork-Reward``.

    Best-of-N, which Speculative Rejection with alpha=0 is too, is ``Bo16_...``. Several seeds merged into one
    (`specrej-eval gather`) count together: four of Best-of-960 are ``Bo3840``, and four of Speculative Rejection with
    16 rows are ``n16x4``, which is not the same as one with 64. ``DEMO_`` stands in front where an embedded model had
    a part.

    Args:
        fingerprint: of ``specrej_eval.records.fingerprint.of_run``; its ``seed`` is a list where several were merged.
        n: rows behind each answer, all seeds together; where only the run itself could tell (``n=max``).
    """
    seeds = fingerprint.get("seed")
    draws = max(1, len(seeds)) if isinstance(seeds, list) else 1  # a record may hold an empty list
    strategy = str(fingerprint.get("strategy"))
    if strategy == "best_of_n" or (strategy == "speculative_rejection" and fingerprint.get("alpha") is None):
        method = f"Bo{_rows(fingerprint, n, draws).removeprefix('n')}"
    else:
        alpha = f"_alpha{fingerprint['alpha']:g}" if isinstance(fingerprint.get("alpha"), int | float) else ""
        short = "SpR" if strategy == "speculative_rejection" else file_name(strategy)
        method = f"{short}{alpha}_{_rows(fingerprint, n, draws, apart=True)}"
    models = (model_name(fingerprint.get("pretrained")), model_name(fingerprint.get("reward_model")))
    return shortened("_".join((*(["DEMO"] if is_demo(fingerprint) else []), method, *models)))


def model_name(name: Any) -> str:
    """The last part of a checkpoint's name, in characters that any file system takes.

    >>> model_name("Qwen/Qwen3-1.7B"), model_name("my.rewards:brevity"), model_name("http://host:8000/v1")
    ('Qwen3-1.7B', 'brevity', 'host-8000-v1')
    """
    text = str(name)
    if text == EMBEDDED:
        return "demo"
    if reward_names.is_judge(text):
        return f"judge-{model_name(text.removeprefix(reward_names.JUDGE).partition('@http')[0])}"
    parts = reward_names.parts(text)
    if len(parts) > 1:
        return shortened("-".join(model_name(part["reward_model"]) for part in parts))
    if reward_names.is_address(text):
        place = text.partition("://")[2].partition("?")[0].partition("#")[0]  # a record may hold what is no address
        host, slash, path = place.partition("/")
        return file_name(host.rpartition("@")[2] + slash + path.rstrip("/"))
    module, colon, function = text.rpartition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return file_name(function)
    return file_name(Path(text).name or Path(text).resolve().name)


def _rows(fingerprint: Mapping[str, Any], n: int | None, draws: int, *, apart: bool = False) -> str:
    """``n16``; of several draws their sum, or ``n16x4`` if they are told apart; ``kv4000`` where only that is known."""
    each = fingerprint.get("n")
    if isinstance(each, int) and n is None:
        n = each * draws
    if n is not None and (draws == 1 or not apart or n % draws):
        return f"n{n}"
    single = f"n{n // draws}" if n is not None else f"n{each}" if each else f"kv{fingerprint.get('kv_budget_tokens')}"
    return file_name(single) + (f"x{draws}" if draws > 1 else "")

"""Writes docs/arguments.md's tables from the declarations in specrej_eval/config/: `python .ci/arguments.py`."""

from __future__ import annotations

from pathlib import Path

from specrej_eval.config import HOST, Argument, Takes, declared
from specrej_eval.config.decoding import DecodingArguments
from specrej_eval.config.engines import EngineArguments
from specrej_eval.config.models import ModelArguments
from specrej_eval.config.records import RecordArguments
from specrej_eval.config.rewards import RewardArguments
from specrej_eval.config.running import DecoderArguments, PromptArguments, RunningArguments

FILE = Path(__file__).resolve().parents[1] / "docs" / "arguments.md"
BEGIN = "<!-- made by `python .ci/arguments.py`: edit the declarations in specrej_eval/config/, not these tables -->"
END = "<!-- end of the tables -->"

ROOMS = {
    "Strategy and sampling": declared(DecodingArguments),
    "Rewards": declared(RewardArguments),
    "Language model": declared(ModelArguments),
    "Device": declared(EngineArguments),
    "Runs and tasks": declared(RunningArguments),
    "Records": declared(RecordArguments),
    "Prompts, where no harness makes them: `specrej-eval run` and alpaca_eval's YAML": declared(DecoderArguments),
    "Passed on to the loader, as `--model hf` takes them": HOST,
}
ALPACA_EVAL_ALONE = declared(DecoderArguments).keys() - declared(PromptArguments).keys()
"""Their help says so."""


def tables() -> str:
    """One table for each room."""
    parts = []
    for title, arguments in ROOMS.items():
        lines = [_row(made) for made in arguments.values()]
        head = "| argument | default | what it does | decides | also taken by, or not |\n|---|---|---|---|---|"
        parts.append("\n".join([f"### {title}", "", head, *lines]))
    return "\n\n".join(parts)


def rewritten(text: str) -> str:
    """A file's text with today's tables between its two marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _row(made: Argument) -> str:
    default = made.none if made.default in (None, ()) else f"`{made.default}`" if made.default != "" else ""
    other = f" Also `{'`, `'.join(made.synonyms)}`." if made.synonyms else ""
    takes = [taker.value for taker in Takes if taker in made.takes and taker is not Takes.RUN]
    if made.not_in_python:
        takes.append("not Python, `run`, YAML")
    elif Takes.RUN not in made.takes and made.name not in ALPACA_EVAL_ALONE:
        takes.append("not `run`")
    if made.not_in_lm_eval:
        takes.append("not `lm_eval`")
    cells = [f"`{made.name}`", default, made.help + other, made.decides.value.partition(":")[0], ", ".join(takes)]
    return f"| {' | '.join(cell.replace('``', '`').replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    FILE.write_text(rewritten(FILE.read_text(encoding="utf-8")), encoding="utf-8")

"""Writes the model/reward pairs of model_configs/ and the table of its README: `python .ci/model_configs.py`.

One table here instead of thirty files kept alike by hand; tests/test_model_configs.py holds files and README to it.
spr.yaml and bon.yaml are written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "model_configs"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

# what loads a reward model: nothing more than this version, or a family of its own that is still to come
SEQUENCE_CLASSIFIER = "sequence classifier with one label"
ARMORM, ULTRARM, STARLING = "ArmoRM", "UltraRM", "Starling-RM"


class Model(NamedTuple):
    name: str  # on the hub, or a folder
    short: str
    arguments: tuple[tuple[str, str], ...] = ()  # its own completions_kwargs, as YAML
    remark: str = ""


class Reward(NamedTuple):
    name: str
    short: str
    family: str = SEQUENCE_CLASSIFIER


class Pair(NamedTuple):
    model: Model
    reward: Reward
    n: str  # rows of Speculative Rejection
    best_of: int
    group: str


class Entry(NamedTuple):
    """A Best-of-N entry of AlpacaEval's leaderboard."""

    stem: str
    generator: str
    model: Model
    reward: Reward
    template: str
    n: int
    temperature: str
    dtype: str
    origin: str  # what its own configuration says, and what it does not say
    pretty_name: str


PAPER_MODELS = (
    Model("mistralai/Mistral-7B-v0.3", "Mistral-7B-v0.3", remark="a base model: it reads the bare instruction"),
    Model("meta-llama/Meta-Llama-3-8B", "Llama-3-8B", remark="a base model: it reads the bare instruction"),
    Model("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B-Instruct"),
)
PAPER_REWARDS = (
    Reward("weqweasdas/RM-Mistral-7B", "RM-Mistral-7B"),
    Reward("sfairXC/FsfairX-LLaMA3-RM-v0.1", "FsfairX"),
    Reward("RLHFlow/ArmoRM-Llama3-8B-v0.1", "ArmoRM", ARMORM),
)
# Qwen3 thinks first unless told otherwise, and 2048 tokens would often end within the thoughts
NO_THINKING = (("enable_thinking", "false"),)
SMALL = (
    (Model("Qwen/Qwen3-1.7B", "Qwen3-1.7B", NO_THINKING), "Skywork-Reward-V2-Qwen3-0.6B"),
    (Model("Qwen/Qwen3-4B", "Qwen3-4B", NO_THINKING), "Skywork-Reward-V2-Qwen3-4B"),
    (Model("Qwen/Qwen3-8B", "Qwen3-8B", NO_THINKING), "Skywork-Reward-V2-Qwen3-8B"),
    (Model("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct"), "Skywork-Reward-V2-Llama-3.2-1B"),
    (Model("meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct"), "Skywork-Reward-V2-Llama-3.2-3B"),
)
PAIRS = (
    *(Pair(model, reward, "max", 120, "paper") for model in PAPER_MODELS for reward in PAPER_REWARDS),
    *(
        Pair(model, Reward(f"Skywork/{reward}", reward.replace("-Reward", "")), "64", 64, "small")
        for model, reward in SMALL
    ),
)

ULTRA_TEMPLATE = (
    "User: You are now a helpful assistant, your answer should focus the question give reasonable solutions, "
    "self-consistent, of high-quality to make users satisfied. Please try to make the answer more informative, "
    "detailed, and polite.</s>\nUser: {instruction}</s>\nAssistant: "
)
ULTRA_ORIGIN = (
    "The original names vLLM, 16 completions and UltraRM, and no sampling arguments: temperature, length and dtype are "
    "those of the entry {base} without best-of-16."
)
LEADERBOARD = (
    Entry(
        stem="bon-ultralm-13b",
        generator="ultralm-13b-best-of-16-rerun",
        model=Model(
            "./ultralm-13b", "UltraLM-13b", remark="openbmb/UltraLM-13b holds deltas to LLaMA-13b: recover it first"
        ),
        reward=Reward("openbmb/UltraRM-13b", "UltraRM-13b", ULTRARM),
        template=ULTRA_TEMPLATE,
        n=16,
        temperature="0.7",
        dtype="float16",
        origin=ULTRA_ORIGIN.format(base="ultralm-13b"),
        pretty_name="UltraLM 13B (best-of-16, rerun)",
    ),
    Entry(
        stem="bon-ultralm-13b-v2.0",
        generator="ultralm-13b-v2.0-best-of-16-rerun",
        model=Model("openbmb/UltraLM-13b-v2.0", "UltraLM-13b-v2.0"),
        reward=Reward("openbmb/UltraRM-13b", "UltraRM-13b", ULTRARM),
        template=ULTRA_TEMPLATE,
        n=16,
        temperature="0.7",
        dtype="float16",
        origin=ULTRA_ORIGIN.format(base="ultralm-13b-v2.0"),
        pretty_name="UltraLM 13B V2.0 (best-of-16, rerun)",
    ),
    Entry(
        stem="bon-storm-7b",
        generator="Storm-7B-best-of-64-rerun",
        model=Model("jieliu/Storm-7B", "Storm-7B"),
        reward=Reward("Nexusflow/Starling-RM-34B", "Starling-RM-34B", STARLING),
        template="GPT4 Correct User: {instruction}<|end_of_turn|>GPT4 Correct Assistant:",
        n=64,
        temperature="1.0",
        dtype="bfloat16",
        origin="The original gives n, temperature, length and dtype; the reward model is named in Storm-7B's model "
        "card. The two need about 85 GB in bfloat16: give them two devices (reward_device), or a larger one.",
        pretty_name="Storm-7B (best-of-64, rerun)",
    ),
)

LENGTH = """\
    # the paper's; tokens of the answer alone (max_tokens would be prompt and answer together)
    max_gen_toks: 2048
"""
SAMPLING = """\
    temperature: 1.0  # these three are the paper's
    top_k: 50
    top_p: 1.0
"""
DTYPES = """\
    dtype: bfloat16
    reward_dtype: bfloat16
"""
ROWS_MAX = """\
    # As many rows as free memory holds when the run begins: the paper's way. Another GPU starts another number of rows,
    # and more rows cost more; the number is written into specrej_run.json. Give a number for results that do not depend
    # on the machine.
    n: max
"""
ROWS_EQUAL = """\
    # the same 64 rows in both files of this pair, so that their answers compare row by row
    n: 64
"""
ROWS_120 = """\
    # the paper's baseline: the largest batch that its Best-of-N finished on one H100 with 80 GB
    n: 120
"""
COMMENT_WIDTH = 118


def stem(pair: Pair) -> str:
    """What follows ``spr-`` and ``bon-`` in a pair's file names."""
    name = f"{pair.model.short}-{pair.reward.short}" if pair.group == "paper" else pair.model.short
    return name.lower()


def render(pair: Pair, *, rejects: bool) -> str:
    method = "Speculative Rejection" if rejects else f"Best-of-{pair.best_of}"
    origin = "a pair of the paper" if pair.group == "paper" else "a small pair for one GPU"
    name = f"{pair.model.short}-{'SpR' if rejects else f'best-of-{pair.best_of}'}-{pair.reward.short}"
    if rejects:
        rows = "    alpha: 0.5  # of the rows, at each look\n" + (ROWS_MAX if pair.n == "max" else ROWS_EQUAL)
    else:
        rows = ROWS_120 if pair.best_of == 120 else ROWS_EQUAL
    return "".join(
        (
            comment(f"{method}: {pair.model.name} with {pair.reward.name}, {origin}. {standing(pair.reward)}"),
            comment(f"{pair.model.short} is {pair.model.remark}.") if pair.model.remark else "",
            f"{name}:\n",
            '  prompt_template: "{instruction}"  # goes through the chat template where the model has one\n',
            f"  fn_completions: {'specrej_completions' if rejects else 'specrej_best_of_n'}\n",
            "  completions_kwargs:\n",
            f"    pretrained: {pair.model.name}\n    reward_model: {pair.reward.name}\n",
            rows,
            LENGTH,
            SAMPLING,
            DTYPES,
            *(f"    {argument}: {value}\n" for argument, value in pair.model.arguments),
            f'  pretty_name: "{pair.model.short} ({method}, {pair.reward.short})"\n',
            f"  link: https://huggingface.co/{pair.model.name}\n",
        )
    )


def render_entry(entry: Entry) -> str:
    remark = f" {entry.model.remark}." if entry.model.remark else ""
    original = entry.generator.removesuffix("-rerun")
    link = "openbmb/UltraLM-13b" if entry.model.name.startswith("./") else entry.model.name
    return "".join(
        (
            comment(f"AlpacaEval's entry {original}, which alpaca_eval cannot rerun. {standing(entry.reward)}"),
            comment(f"{entry.origin}{remark}"),
            f"{entry.generator}:\n",
            f"  # alpaca_eval's own for {original}\n",
            f"  prompt_template: {json.dumps(entry.template)}\n",
            "  fn_completions: specrej_best_of_n\n",
            "  completions_kwargs:\n",
            f"    pretrained: {entry.model.name}\n    reward_model: {entry.reward.name}\n",
            f"    n: {entry.n}\n",
            "    max_gen_toks: 2048\n",
            f"    temperature: {entry.temperature}\n",
            "    top_k: 0  # vLLM's default: switched off\n",
            "    top_p: 1.0\n",
            f"    dtype: {entry.dtype}\n    reward_dtype: {entry.dtype}\n",
            f'  pretty_name: "{entry.pretty_name}"\n',
            f"  link: https://huggingface.co/{link}\n",
        )
    )


def standing(reward: Reward) -> str:
    """What has to be there for the reward model to load."""
    if reward.family == SEQUENCE_CLASSIFIER:
        return f"The reward model is a {SEQUENCE_CLASSIFIER}."
    return f"Needs the reward family {reward.family}: see README.md."


def comment(text: str) -> str:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > COMMENT_WIDTH:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return "\n".join((*lines, line)) + "\n"


def files() -> dict[str, str]:
    """File name -> content, of all files made here."""
    made = {}
    for pair in PAIRS:
        made[f"spr-{stem(pair)}.yaml"] = render(pair, rejects=True)
        made[f"bon-{stem(pair)}.yaml"] = render(pair, rejects=False)
    return made | {f"{entry.stem}.yaml": render_entry(entry) for entry in LEADERBOARD}


def table() -> str:
    """The README's table of these files."""
    lines = ["| files | language model | reward model | its family |", "|---|---|---|---|"]
    for pair in PAIRS:
        names = f"`spr-{stem(pair)}.yaml` `bon-{stem(pair)}.yaml`"
        lines.append(f"| {names} | `{pair.model.name}` | `{pair.reward.name}` | {pair.reward.family} |")
    for entry in LEADERBOARD:
        lines.append(f"| `{entry.stem}.yaml` | `{entry.model.name}` | `{entry.reward.name}` | {entry.reward.family} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    made = files()
    for path in FOLDER.glob("*-*.yaml"):
        if path.name not in made:
            path.unlink()
    for name, content in made.items():
        (FOLDER / name).write_text(content, encoding="utf-8")
    readme = FOLDER / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

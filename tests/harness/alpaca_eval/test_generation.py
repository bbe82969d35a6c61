"""alpaca_eval with our decoders: from a YAML file to model_outputs.json and what lies beside it."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from arithmetic import distinct_problems, question
from support import FULL, ROOT, forked
from support import reward_servers as servers
from support.alpaca_runs import alpaca_eval, package_digest
from support.fake_hub import add_dataset_files
from support.openai_server import JudgeServer

from specrej_eval import load
from specrej_eval.api import RunPlan
from specrej_eval.config import PromptArguments, RunConfig
from specrej_eval.core import Message
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.errors import ConfigError, LimitReached
from specrej_eval.records.outputs import OutputsFolder, open_run

JUDGE = "specrej_reward_judge"
INSTRUCTIONS = [f"Q: {a} + {b} + 60 + 70 + 72 + 89 + 50 + 79 = ?\nA:" for a, b in ((39, 16), (12, 45), (88, 21))]
INSTRUCTIONS += [f"Q: 39 + 16 + 60 + 70 + 72 + 89 + 50 + {last} = ?\nA:" for last in (11, 12, 13, 14)]
KWARGS: dict[str, Any] = {"alpha": 0.5, "n": 4, "max_gen_toks": 96, "until": ["\n"]}


def dataset(folder: Path, instructions: list[str] = INSTRUCTIONS, name: str = "ref.json") -> str:
    rows = [
        {"dataset": "sums", "instruction": text, "output": f"I do not know {i}.", "generator": "reference"}
        for i, text in enumerate(instructions)
    ]
    (folder / name).write_text(json.dumps(rows))
    return name


def config(folder: Path, name: str = "spr", file: str | None = None, **entry: Any) -> str:
    kwargs = {**KWARGS, **entry.pop("completions_kwargs", {})}
    content = {
        name: {
            "prompt_template": "{instruction}",
            "fn_completions": "specrej_completions",
            "completions_kwargs": kwargs,
            **entry,
        }
    }
    path = folder / "configs_of_mine" / (file or f"{name}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return str(path.relative_to(folder))


def outputs(folder: Path, name: str = "spr", file: str = "model_outputs.json") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "results" / name / file).read_text())
    return rows


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`evaluate_from_model` in a folder of its own, judged by the embedded reward model."""
    monkeypatch.chdir(tmp_path)
    import alpaca_eval.main

    def call(model_configs: Any, *, evaluation_dataset: str = "ref.json", **kwargs: Any) -> Any:
        return alpaca_eval.main.evaluate_from_model(
            model_configs,
            evaluation_dataset=evaluation_dataset,
            annotators_config=JUDGE,
            is_return_instead_of_print=True,
            **kwargs,
        )

    return call


def test_answers_are_those_of_the_python_api_and_the_sidecar_says_what_they_cost(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    dataset(tmp_path)
    evaluate(config(tmp_path))
    rows = outputs(tmp_path)
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    assert all(set(row) == {"dataset", "instruction", "output", "generator"} for row in rows)
    assert {row["generator"] for row in rows} == {"spr"}

    record, answers = open_run(tmp_path / "results" / "spr")
    assert record.complete and record.name == "spr" and record.embedded_demo_pair
    assert [item.instruction for item in answers] == INSTRUCTIONS
    assert [item.output.strip() for item in answers] == [row["output"] for row in rows]
    for item in answers:
        assert item.reward == max(item.finished_rewards)
        assert item.ledger.decode_tokens > item.num_tokens > 0 and item.seconds > 0
        assert item.rounds[0].rows == 4 and item.fields == {"dataset": "sums"}
    assert record.totals["decode_tokens"] == sum(item.ledger.decode_tokens for item in answers)

    # the same answer as anywhere else: only the stream's task differs, so hold a greedy-like single row against it
    from specrej_eval.answering import answer, requests_for
    from specrej_eval.core import Question

    generator = load(**{name: value for name, value in KWARGS.items() if name != "until"})
    questions = [Question(instruction=INSTRUCTIONS[0])]
    requests = requests_for(
        generator.engine, questions, generator.config, PromptArguments(until=("\n",)), task="alpaca_eval"
    )
    assert answer(generator, questions, requests, progress=False)[0].output == answers[0].output


# limits and plans


def test_a_limit_ends_a_run_at_an_answers_boundary_and_the_same_call_goes_on(
    evaluate: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path)
    short = {"max_gen_toks": 24, "batch_size": 1}
    evaluate(config(tmp_path, name="whole", completions_kwargs=short))
    whole = [item.output for item in open_run(tmp_path / "results" / "whole")[1]]
    folder = tmp_path / "results" / "spr"
    limited = config(tmp_path, completions_kwargs={**short, "max_decode_tokens": 100})
    counts = []
    for _ in INSTRUCTIONS:  # each call of one process has the whole limit to itself
        try:
            evaluate(limited, chunksize=3)
            break
        except LimitReached as error:
            record, answers = open_run(folder)
            counts.append(len(answers))
            assert f"max_decode_tokens=100 is reached: {counts[-1]} of {len(INSTRUCTIONS)} prompts" in str(error)
            assert str(Path("results") / "spr") in str(error) and error.exit_code == 75
            assert not record.complete and record.stopped == "max_decode_tokens=100"
            assert not list(folder.rglob("leaderboard.csv")), "part of the prompts is not judged"
    assert 2 <= len(counts) < len(INSTRUCTIONS) and counts == sorted(set(counts))
    record, answers = open_run(folder)
    assert record.complete and not record.stopped
    assert [item.output for item in answers] == whole


def test_a_limit_of_time_begins_nothing_after_it(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path, INSTRUCTIONS[:3])
    kwargs = {"max_gen_toks": 8, "batch_size": 1, "max_seconds": 1e-6}
    with pytest.raises(LimitReached, match=r"max_seconds=1e-06 is reached: 0 of 3 prompts"):
        evaluate(config(tmp_path, completions_kwargs=kwargs))
    evaluate(config(tmp_path, completions_kwargs={**kwargs, "max_seconds": 600}))
    assert len(outputs(tmp_path)) == 3


@pytest.mark.parametrize("name, value", [("max_seconds", 60), ("max_decode_tokens", 1000)])
def test_a_limit_without_a_folder_is_refused_before_anything_is_decoded(
    name: str, value: float, evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path)
    monkeypatch.setattr(RunPlan, "load", lambda *_, **__: pytest.fail("models were loaded"))
    with pytest.raises(ConfigError, match=f"{name} needs a folder"):
        evaluate(config(tmp_path, completions_kwargs={name: value}), output_path=None)


def test_a_plan_is_refused_with_the_command_that_makes_one(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path)
    monkeypatch.setattr(RunPlan, "load", lambda *_, **__: pytest.fail("models were loaded"))
    with pytest.raises(ConfigError, match="plan=only answers nothing") as caught:
        evaluate(config(tmp_path, completions_kwargs={"plan": "only"}))
    assert "specrej-eval run --plan only" in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_nothing_that_is_written_or_printed_holds_a_secret(
    evaluate: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    password, token = "Tr0ub4dor3", "hf_" + "aB3" * 11
    dataset(tmp_path, INSTRUCTIONS[:2])
    with servers.chat(lambda text: {"7": 0.5, "3": 0.5}) as server, caplog.at_level("DEBUG"):
        name = f"likelihood+judge:m@{server.url.replace('http://', f'http://me:{password}@')}"
        kwargs = {"reward_model": name, "token": token, "n": 2, "max_gen_toks": 8}
        evaluate(config(tmp_path, completions_kwargs=kwargs))
    told = capsys.readouterr()
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    files = [path.read_text() for path in (tmp_path / "results").rglob("*") if path.is_file()]
    for text in (told.out, told.err, caplog.text, *files):
        assert password not in text and token not in text


def test_models_are_loaded_once_for_all_chunks_and_both_strategies(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval import api
    from specrej_eval.harness.alpaca_eval import decoder as alpaca_eval_decoder

    loads = []
    original = api.RunPlan.load
    monkeypatch.setattr(alpaca_eval_decoder, "_loaded", {})
    monkeypatch.setattr(api.RunPlan, "load", lambda *args, **options: loads.append(args) or original(*args, **options))
    dataset(tmp_path, INSTRUCTIONS[:4])
    evaluate(config(tmp_path), chunksize=2)
    bon = config(tmp_path, "bon", fn_completions="specrej_best_of_n")
    evaluate(config(tmp_path, "spr2"), reference_model_configs=bon, chunksize=3)
    assert len(loads) == 1
    assert [row["output"] for row in outputs(tmp_path, "spr2")] == [row["output"] for row in outputs(tmp_path)]
    reference = OutputsFolder(tmp_path / "results" / "spr2", prefix="specrej_reference")
    assert [item.instruction for item in reference.answers()] == INSTRUCTIONS[:4]
    assert {item.resolved["strategy"] for item in reference.answers()} == {"best_of_n"}
    assert {row["generator"] for row in outputs(tmp_path, "spr2", "reference_outputs.json")} == {"bon"}


def test_a_rerun_decodes_nothing_and_a_changed_configuration_is_refused(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval.generator import Generator

    dataset(tmp_path)
    evaluate(config(tmp_path), chunksize=3)
    before = (tmp_path / "results" / "spr" / "model_outputs.json").read_bytes()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "run", refuse)
        evaluate(config(tmp_path), chunksize=3)
        (tmp_path / "results" / "spr" / "model_outputs.json").unlink()
        evaluate(config(tmp_path), chunksize=3)  # from the sidecar
    assert (tmp_path / "results" / "spr" / "model_outputs.json").read_bytes() == before

    for changed, told in (
        ({"completions_kwargs": {"alpha": 0.25}}, r"alpha was 0.5, is now 0.25"),
        ({"completions_kwargs": {"seed": 1}}, r"seed was 0, is now 1"),
        ({"prompt_template": "Please: {instruction}"}, r"prompt_template was '\{instruction\}', is now 'Please"),
        ({"fn_completions": "specrej_best_of_n"}, r"strategy was 'speculative_rejection', is now 'best_of_n'"),
        ({"completions_kwargs": {"reward_model": "likelihood"}}, r"reward_model was 'embedded', is now 'likelihood'"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            evaluate(config(tmp_path, **changed))
        assert "--is_load_outputs False" in str(caught.value)
    assert (tmp_path / "results" / "spr" / "model_outputs.json").read_bytes() == before


def test_outputs_of_another_decoder_are_not_taken_over(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path)
    folder = tmp_path / "results" / "spr"
    folder.mkdir(parents=True)
    rows = [{"dataset": "sums", "instruction": INSTRUCTIONS[0], "output": "42", "generator": "spr"}]
    (folder / "model_outputs.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match="written by another decoder"):
        evaluate(config(tmp_path))
    assert json.loads((folder / "model_outputs.json").read_text()) == rows


@pytest.mark.parametrize("damage", ["cut short", "another data set"])
def test_outputs_that_do_not_begin_the_data_set_are_built_again(
    evaluate: Callable[..., Any], tmp_path: Path, damage: str
) -> None:
    dataset(tmp_path)
    evaluate(config(tmp_path), chunksize=2)
    path = tmp_path / "results" / "spr" / "model_outputs.json"
    whole = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
        evaluate(config(tmp_path), chunksize=2)
        assert path.read_bytes() == whole
    else:
        dataset(tmp_path, INSTRUCTIONS[2:], "fewer.json")
        evaluate(config(tmp_path), evaluation_dataset="fewer.json", chunksize=2)
        assert [row["instruction"] for row in outputs(tmp_path)] == INSTRUCTIONS[2:]
        assert json.loads(whole)[2:] == outputs(tmp_path)
    assert path.with_name("model_outputs.previous.json").is_file()


def test_max_instances_means_the_same_on_a_second_run(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path)
    evaluate(config(tmp_path), max_instances=3)
    first = outputs(tmp_path)
    assert [row["instruction"] for row in first] == INSTRUCTIONS[:3]
    evaluate(config(tmp_path), max_instances=3)
    assert outputs(tmp_path) == first
    evaluate(config(tmp_path))
    assert [row["instruction"] for row in outputs(tmp_path)] == INSTRUCTIONS
    assert outputs(tmp_path)[:3] == first


def everything(folder: Path) -> dict[str, str]:
    """All answers that are recorded there, those to other instructions too."""
    store = OutputsFolder(folder / "results" / "spr")
    return {item.key: item.output for item in (*store.answers(), *store.kept())}


OTHERS = ["Q: 1 + 1 = ?\nA:", "Q: 2 + 1 = ?\nA:"]
ASKED_AGAIN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fewer": (INSTRUCTIONS, {"max_instances": 2}),
    "fewer, in chunks": (INSTRUCTIONS[1:3], {"chunksize": 1}),
    "turned": (INSTRUCTIONS[::-1], {}),
    "others": (OTHERS, {}),
    "others, fewer": (OTHERS, {"max_instances": 1}),
    "some, and another": ([INSTRUCTIONS[3], OTHERS[0], INSTRUCTIONS[0]], {"chunksize": 2}),
    "more": ([*INSTRUCTIONS, *OTHERS], {}),
}


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        pytest.param(place, asked, marks=[] if place == (None, 13)[number % 2] else [pytest.mark.full])
        for number, asked in enumerate(ASKED_AGAIN)
        for place in (None, 13, *(range(2, 30, 3) if FULL else ()))
    ],
)
def test_no_second_command_removes_an_answer(
    evaluate: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int | None,
    asked: str,
    counted: Callable[[str, int], None],
) -> None:
    """A finished folder, or one whose run was killed at some moment, asked other questions; then the first again."""
    dataset(tmp_path)
    path = config(tmp_path, completions_kwargs={"n": 2, "max_gen_toks": 16, "batch_size": 1})
    if place is None:
        evaluate(path)
    else:
        assert forked.killed(lambda: evaluate(path) and None, place)
        counted("kills -9: evaluate_from_model", 1)
    known = everything(tmp_path)
    assert known or FULL
    drawn: list[str] = []
    opened = TransformersEngine.open_all
    monkeypatch.setattr(
        TransformersEngine,
        "open_all",
        lambda self, openings: (
            drawn.extend(each.prompt.conversation[-1]["content"] for each in openings) or opened(self, openings)
        ),
    )
    wanted, options = ASKED_AGAIN[asked]
    evaluate(path, evaluation_dataset=dataset(tmp_path, wanted, "again.json"), **options)
    wanted = wanted[: options.get("max_instances")]
    assert [row["instruction"] for row in outputs(tmp_path)] == wanted
    now = everything(tmp_path)
    assert known.items() <= now.items(), "answers are gone or changed"
    assert [item.instruction for item in open_run(tmp_path / "results" / "spr")[1]] == wanted
    evaluate(path)
    assert [row["instruction"] for row in outputs(tmp_path)] == INSTRUCTIONS
    assert now.items() <= everything(tmp_path).items()
    assert len(drawn) == len(set(drawn)), "decoded twice"
    told = {item.instruction for item in OutputsFolder(tmp_path / "results" / "spr").answers() if item.key in known}
    assert not told & set(drawn)
    assert place is not None or set(drawn) == set(wanted) - set(INSTRUCTIONS)
    counted("second commands", 2)


def test_answers_drawn_anew_on_demand_leave_the_old_ones_beside_them(
    evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    """alpaca_eval's own way to say so: is_load_outputs=False without chunks."""
    dataset(tmp_path)
    path = config(tmp_path, completions_kwargs={"n": 2, "max_gen_toks": 16})
    evaluate(path)
    file = tmp_path / "results" / "spr" / "specrej_outputs.jsonl"
    for number, asked in enumerate((INSTRUCTIONS[:2], INSTRUCTIONS[1:]), start=1):
        before = file.read_bytes()
        options = {"chunksize": None, "is_load_outputs": False}
        evaluate(path, evaluation_dataset=dataset(tmp_path, asked, "again.json"), **options)
        aside = file.with_name(f"{file.name}.previous{'' if number == 1 else f'.{number}'}")
        assert aside.read_bytes() == before
        assert [item.instruction for item in open_run(file)[1]] == asked


def test_what_a_refusal_says_to_do_works_in_this_very_command(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path)
    evaluate(config(tmp_path, completions_kwargs={"n": 2, "max_gen_toks": 16}))
    changed = config(tmp_path, completions_kwargs={"n": 3, "max_gen_toks": 16})
    with pytest.raises(ConfigError, match="n was 2, is now 3") as refused:
        evaluate(changed)
    told = str(refused.value.hint)
    words = told.partition("`")[2].partition("`")[0].split()
    assert words and "specrej-eval run" not in told
    options = dict(zip((word[2:] for word in words[::2]), map(ast.literal_eval, words[1::2]), strict=True))
    evaluate(changed, **options)
    with pytest.raises(ConfigError, match="is now 2") as refused:
        evaluate(config(tmp_path, completions_kwargs={"n": 2, "max_gen_toks": 16}), max_instances=2)
    assert "delete the folder" in str(refused.value.hint), "with max_instances these options would mean nothing"


def numbers_only(conversation: list[Message], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


SEEN: list[list[Message]] = []


def remember(conversation: list[Message], responses: list[str]) -> list[float]:
    SEEN.append(list(conversation))
    return [float(index) for index, _ in enumerate(responses)]


@pytest.mark.parametrize(
    "template, chatml",
    [
        ("{instruction}", False),
        ("### Instruction:\n{instruction}\n\n### Response (use {braces} if you like):\n", False),
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>", True),
    ],
)
def test_the_reward_model_reads_the_bare_instruction_whatever_the_template(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, chatml: bool
) -> None:
    SEEN.clear()
    monkeypatch.setattr("specrej_eval.harness.alpaca_eval.decoder._loaded", {})
    odd = "What does {output} mean, {instruction}? 1e-3"
    dataset(tmp_path, [odd, INSTRUCTIONS[0]])
    kwargs = {"reward_model": f"{__name__}:remember", "is_chatml_prompt": chatml, "max_gen_toks": 8}
    evaluate(config(tmp_path, prompt_template=template, completions_kwargs=kwargs))
    asked = {conversation[-1]["content"] for conversation in SEEN}
    assert asked == {odd, INSTRUCTIONS[0]}
    assert all(len(conversation) == 1 for conversation in SEEN)


def test_outputs_that_look_like_numbers_stay_text(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    """Read back between chunks: pandas would make numbers of them, and alpaca_eval would write numbers."""
    dataset(tmp_path)
    path = config(tmp_path, completions_kwargs={"until": ["+"], "max_gen_toks": 8})  # answers such as " 39"
    evaluate(path, chunksize=2)
    rows = outputs(tmp_path)
    assert all(isinstance(row["output"], str) for row in rows)
    assert sum(row["output"].isdigit() for row in rows) >= 5


@pytest.mark.parametrize(
    "entry, told",
    [
        ({"completions_kwargs": {"alhpa": 0.5}}, "did you mean 'alpha'"),
        ({"completions_kwargs": {"max_new_tokens": 5}}, "did you mean 'max_gen_toks'"),
        ({"completions_kwargs": {"model_name": "x/y"}}, "did you mean 'pretrained'"),
        ({"completions_kwargs": {"alpha": 1.5}}, r"alpha must be in \[0, 1\)"),
        ({"completions_kwargs": {"price_per_hour": -1}}, "price_per_hour must be at least 0"),
        ({"completions_kwargs": {"pretrained": "./no/such"}}, "there is no folder"),
        ({"completions_kwargs": {"is_chatml_prompt": "perhaps"}}, "must be true or false"),
        ({"completions_kwargs": {"journal": "run.jsonl", "join": True}}, "one process writes the folder"),
        ({"alpha": 0.5}, "'alpha' next to fn_completions, where it has no effect"),
        ({"prompt_template": "Say something.\n"}, r"does not hold \{instruction\}"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_loaded_or_written(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], told: str
) -> None:
    from specrej_eval import api

    dataset(tmp_path)
    monkeypatch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ConfigError, OSError), match=told):
        evaluate(config(tmp_path, **entry))
    assert not list((tmp_path / "results").rglob("*.json*"))


@pytest.mark.parametrize("name", ["../../..", "..", "/tmp/specrej_elsewhere", "a/../../../b", "a\nb", "x" * 300])
def test_a_generators_name_leads_to_no_other_folder(name: str, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    work = tmp_path / "one" / "two" / "three"
    work.mkdir(parents=True)
    os.chdir(work)  # the fixture goes back
    dataset(work)
    before = {path for path in tmp_path.rglob("*")}
    file = config(work, name, file="mine.yaml")
    with pytest.raises(ConfigError, match=r"top-level key .* cannot be part of a path"):
        evaluate(file)
    made = {path for path in tmp_path.rglob("*")} - before
    assert {path.name for path in made} == {"configs_of_mine", "mine.yaml"}
    import alpaca_eval.main

    rows = [{"instruction": text, "output": "x", "generator": name} for text in INSTRUCTIONS]
    with pytest.raises(ConfigError, match=r"generator's name .* cannot be part of a path"):
        alpaca_eval.main.evaluate(pd.DataFrame(rows), reference_outputs="ref.json", annotators_config=JUDGE)
    assert {path for path in tmp_path.rglob("*")} - before == made and not Path("/tmp/specrej_elsewhere").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"evaluation_datset": "ref.json"}, "did you mean --evaluation_dataset"),
        ({"max_instance": 3}, "did you mean --max_instances"),
        ({"evaluation_dataset": "reff.json"}, "did you mean 'ref.json'"),
        ({"evaluation_dataset": "ref.jsonl"}, r"reads .json, .csv, .tsv, not .jsonl"),
        ({"evaluation_dataset": "broken.json"}, "broken.json' cannot be read"),
        ({"evaluation_dataset": "empty.json"}, "has no rows"),
        ({"evaluation_dataset": "bare.json"}, "no column 'output'"),
        ({"annotators_config": "weighted_alpaca_eval_gpt4_turbo"}, "OPENAI_API_KEY is not set"),
    ],
)
def test_bad_options_are_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], told: str
) -> None:
    import alpaca_eval.main

    from specrej_eval import api

    monkeypatch.chdir(tmp_path)
    for key in ("OPENAI_API_KEY", "OPENAI_API_KEYS"):
        monkeypatch.delenv(key, raising=False)
    dataset(tmp_path)
    (tmp_path / "ref.jsonl").write_text("{}\n")
    (tmp_path / "broken.json").write_text('[{"instruction": "half')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bare.json").write_text('[{"instruction": "1+1"}]')
    monkeypatch.setattr(api.RunPlan, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"evaluation_dataset": "ref.json", "annotators_config": JUDGE, **options}
    with pytest.raises(ConfigError, match=told):
        alpaca_eval.main.evaluate_from_model(config(tmp_path), **given)
    assert not list((tmp_path / "results").rglob("*.json*"))


def test_options_of_the_judge_pass(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path, INSTRUCTIONS[:2])
    evaluate(config(tmp_path), position_swap=True, caching_path=None, seed=1, annotation_kwargs={"chunksize": 1})
    assert len(outputs(tmp_path)) == 2


def test_a_run_that_is_over_stays_complete_and_in_order(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    dataset(tmp_path)
    evaluate(config(tmp_path))
    files = ("specrej_run.json", "specrej_outputs.jsonl")
    before = {name: (tmp_path / "results" / "spr" / name).read_bytes() for name in files}
    record = open_run(tmp_path / "results" / "spr")[0]
    assert record.complete and record.num_prompts == len(INSTRUCTIONS) and record.described["device"] == "cpu"
    lines = before["specrej_outputs.jsonl"].decode().splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == INSTRUCTIONS
    evaluate(config(tmp_path))
    assert {name: (tmp_path / "results" / "spr" / name).read_bytes() for name in files} == before


def test_empty_answers_are_pointed_out(
    evaluate: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset(tmp_path, INSTRUCTIONS[:2])
    evaluate(config(tmp_path, completions_kwargs={"until": [" "]}))  # every answer begins with a space
    assert "2 answers are empty" in caplog.text


def test_prices_and_times_are_filled_in() -> None:
    from specrej_eval.harness.alpaca_eval.decoder import specrej_best_of_n

    done = specrej_best_of_n(INSTRUCTIONS[:2], price_per_hour=36.0, **{**KWARGS, "alpha": 0.0})
    assert {len(done[name]) for name in ("completions", "time_per_example", "price_per_example")} == {2}
    for seconds, price in zip(done["time_per_example"], done["price_per_example"], strict=True):
        assert seconds > 0 and price == pytest.approx(seconds / 100)
    assert done["completions_all"][0]["resolved"]["strategy"] == "best_of_n"


def test_a_judge_that_does_not_fit_beside_the_models_gets_their_room(
    evaluate: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from specrej_eval.harness.alpaca_eval import decoder as alpaca_eval_decoder
    from specrej_eval.harness.alpaca_eval import judge as alpaca_eval_judge
    from specrej_eval.rewards import choose
    from specrej_eval.rewards.base import RewardPlan

    original = choose.resolve_reward

    def resolve_reward(*args: Any, **kwargs: Any) -> RewardPlan:
        plan = original(*args, **kwargs)

        def load(device: str) -> Any:
            judging = sys._getframe(1).f_code.co_filename == alpaca_eval_judge.__file__
            if judging and alpaca_eval_decoder._loaded:
                raise torch.OutOfMemoryError("no room")
            return plan.load(device)

        return RewardPlan(plan.name, load)

    monkeypatch.setattr(choose, "resolve_reward", resolve_reward)
    alpaca_eval_judge._scorer.cache_clear()
    dataset(tmp_path, INSTRUCTIONS[:2])
    evaluate(config(tmp_path))
    assert "these were unloaded" in caplog.text and not alpaca_eval_decoder._loaded
    monkeypatch.undo()
    alpaca_eval_decoder.release_models()
    alpaca_eval_judge._scorer.cache_clear()
    monkeypatch.setattr(choose, "resolve_reward", lambda _: RewardPlan("too large", lambda device: _no_memory()))
    with pytest.raises(torch.OutOfMemoryError):
        alpaca_eval_judge._scorer(RunConfig())


def _no_memory() -> Any:
    raise torch.OutOfMemoryError("no room")


# the literal commands, each in a process of its own


@pytest.mark.slow
def test_the_bare_literal_command_with_alpaca_evals_own_data_and_judge(tmp_path: Path) -> None:
    """`alpaca_eval evaluate_from_model model_configs/spr.yaml` and nothing else: its data set comes out of the hub's
    cache, its GPT judge answers over HTTP."""
    shutil.copytree(ROOT / "model_configs", tmp_path / "model_configs")
    instructions = INSTRUCTIONS[: 4 if FULL else 2]
    rows = json.loads((tmp_path / dataset(tmp_path, instructions)).read_text())
    environment = add_dataset_files(tmp_path / "hub", {"alpaca_eval_gpt4_baseline.json": rows})
    name = next(iter(yaml.safe_load((ROOT / "model_configs" / "spr.yaml").read_text())))
    before = package_digest()
    with JudgeServer(lambda first, second: 0.9 if len(first) > len(second) else 0.1) as server:
        command = ("evaluate_from_model", "model_configs/spr.yaml")
        done = alpaca_eval(*command, cwd=tmp_path, env={**environment, **server.environment})
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == len(instructions)
        if FULL:  # test_repairs.py has the same of a plain evaluate
            again = alpaca_eval(*command, cwd=tmp_path, env={**environment, **server.environment})
            assert again.returncode == 0, again.stderr
            assert name in again.stdout and "length_controlled_winrate" in again.stdout
            assert len(server.requests) == len(instructions), "judged again what was judged already"
    assert [row["instruction"] for row in outputs(tmp_path, name)] == instructions
    table = pd.read_csv(
        tmp_path / "results" / name / "weighted_alpaca_eval_gpt4_turbo" / "leaderboard.csv", index_col=0
    )
    # a chain of sums is longer than "I do not know", so the judge prefers it
    assert table.loc[name, "win_rate"] == pytest.approx(90, abs=0.1)
    assert table.loc[name, "n_total"] == len(instructions)
    assert len(table) > 100, "the public leaderboard's rows are shown beside it"
    assert name in done.stdout and "length_controlled_winrate" in done.stdout
    assert package_digest() == before, "alpaca_eval's installed files were written to"


@pytest.mark.full
def test_the_literal_command_in_a_users_folder(tmp_path: Path) -> None:
    """With today's setuptools, from a folder that holds our model_configs: a file, a folder, an absolute path, -m."""
    done = subprocess.run([sys.executable, "-m", "specrej_eval", "init"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = dataset(tmp_path, INSTRUCTIONS[:2])
    common = ("--evaluation_dataset", data, "--annotators_config", JUDGE)
    spr = yaml.safe_load((tmp_path / "model_configs" / "spr.yaml").read_text())
    name = next(iter(spr))
    assert "DEMO" in name

    first = alpaca_eval("evaluate_from_model", "model_configs/spr.yaml", *common, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "DEMO" in first.stderr
    assert name in first.stdout and "length_controlled_winrate" in first.stdout
    expected = outputs(tmp_path, name)

    folder = tmp_path / "model_configs" / "mine"
    folder.mkdir()
    (folder / "configs.yaml").write_text((tmp_path / "model_configs" / "spr.yaml").read_text())
    absolute = str(tmp_path / "model_configs" / "spr.yaml")
    for words, module in ((("model_configs/mine",), False), ((absolute,), True)):
        place = f"elsewhere_{module}"
        program = [sys.executable, "-m", "alpaca_eval.main"] if module else None
        given = ("evaluate_from_model", *words, *common, "--output_path", place)
        done = alpaca_eval(*given, cwd=tmp_path, command=program)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / place / "model_outputs.json").read_text()) == expected


@pytest.mark.full
def test_kill_in_the_middle_and_rerun_give_the_same_bytes(tmp_path: Path) -> None:
    """As a process of its own; system/test_kills.py has the same at chosen moments, in `make test` too."""
    instructions = [question(operands) for operands in distinct_problems("test", 24, seed=5)]
    data = dataset(tmp_path, instructions)
    path = config(tmp_path, completions_kwargs={"n": 16, "batch_size": 1})
    words = ["evaluate_from_model", path, "--evaluation_dataset", data, "--annotators_config", JUDGE]
    chunk = 10
    words += ["--chunksize", str(chunk)]
    whole = alpaca_eval(*words, "--output_path", "undisturbed", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    script = Path(sys.executable).with_name("alpaca_eval")
    sidecar = tmp_path / "killed" / "specrej_outputs.jsonl"
    killed_at = []
    for wanted in (4, 15):  # in the first chunk, and in the second
        process = subprocess.Popen(
            [str(script), *words, "--output_path", "killed"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if sidecar.is_file() and sidecar.read_bytes().count(b"\n") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
        killed_at.append(sidecar.read_bytes().count(b"\n"))
    assert killed_at == sorted(set(killed_at)) and killed_at[0] >= 4 and killed_at[-1] < len(instructions)
    done = alpaca_eval(*words, "--output_path", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{killed_at[-1] - chunk} of {chunk} answers are already recorded" in done.stderr
    assert open_run(tmp_path / "killed")[0].complete
    assert (tmp_path / "killed/model_outputs.json").read_bytes() == (
        tmp_path / "undisturbed/model_outputs.json"
    ).read_bytes()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_killed_at_random_moments_until_it_is_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills anywhere: while packages are imported, models loaded, answers decoded, files written, pairs judged."""
    instructions = [question(operands) for operands in distinct_problems("test", 60, seed=6)]
    data = dataset(tmp_path, instructions)
    path = config(tmp_path, completions_kwargs={"n": 16, "batch_size": 2})
    words = ["evaluate_from_model", path, "--evaluation_dataset", data, "--annotators_config", JUDGE]
    words += ["--chunksize", "8"]
    started = time.monotonic()
    whole = alpaca_eval(*words, "--output_path", "undisturbed", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    length = time.monotonic() - started

    random_seconds = random.Random(0)
    script = Path(sys.executable).with_name("alpaca_eval")
    kills = finished = 0
    while kills < 25 and not finished:
        process = subprocess.Popen(
            [str(script), *words, "--output_path", "killed"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            _, errors = process.communicate(timeout=random_seconds.uniform(0.15, 0.5) * length)
            assert process.returncode == 0, errors
            finished = 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills >= 2, "it was never killed"
    done = alpaca_eval(*words, "--output_path", "killed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("model_outputs.json", "reference_outputs.json", f"{JUDGE}/annotations.json"):
        mine, theirs = ((tmp_path / folder / name).read_bytes() for folder in ("killed", "undisturbed"))
        if name.endswith("annotations.json"):  # its rows carry dates and times
            mine, theirs = (
                json.dumps([row["preference"] for row in json.loads(text)]).encode() for text in (mine, theirs)
            )
        assert mine == theirs, f"{name} after {kills} kills"
    with capsys.disabled():
        print(f"\nevaluate_from_model: {kills} kills at random moments, then the same bytes")

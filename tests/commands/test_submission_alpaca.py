"""`specrej-eval submission alpaca`: the tree of a pull request to AlpacaEval, and every reason to refuse one."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from specrej_eval import cli
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD, stamp
from specrej_eval.commands.submission import alpaca_checks, leaderboard_rows
from specrej_eval.commands.submission.alpaca_checks import JUDGE
from specrej_eval.config import RunConfig
from specrej_eval.harness.alpaca_eval import config as alpaca_config
from specrej_eval.records.answers import Answer, RunRecord
from specrej_eval.records.fingerprint import of_run
from specrej_eval.records.outputs import OutputsFolder

NAME = "Small-SpR-Judge"
TEMPLATE = "Q: {instruction}\nA:"
KWARGS = {"pretrained": "org/small", "reward_model": "org/judge", "alpha": 0.5, "n": 8, "max_gen_toks": 64}
INSTRUCTIONS = [f"Question number {i}: what is {i} plus one?" for i in range(804)]
INSTRUCTIONS.insert(500, INSTRUCTIONS[17])  # a set may ask the same thing twice
REFERENCES = [
    {"dataset": "helpful" if i % 2 else "koala", "instruction": text, "output": "a reference", "generator": "gpt4"}
    for i, text in enumerate(INSTRUCTIONS)
]
CONFIGS = f"src/alpaca_eval/models_configs/{NAME}/configs.yaml"
OUTPUTS = f"results/{NAME}/model_outputs.json"
ANNOTATIONS = f"results/{NAME}/{JUDGE}/annotations.json"
LEADERBOARD = f"src/alpaca_eval/{leaderboard_rows.LEADERBOARD}"
WEIGHTS = f"src/alpaca_eval/{leaderboard_rows.WEIGHTS}"

Rows = list[dict[str, Any]]


class Run:
    """A finished run in ``results/NAME`` of the current folder, and the command on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.results = folder / "results" / NAME
        self.out = folder / "out"
        self._capsys = capsys
        self.rows: Rows = [
            {**row, "output": f"It is {index + 1}.", "generator": NAME} for index, row in enumerate(REFERENCES)
        ]
        (folder / "reference.json").write_text(json.dumps(REFERENCES))
        self.write_config(KWARGS)
        self.write_rows()
        self.write_run()

    def write_config(self, kwargs: dict[str, Any], **entry: Any) -> Path:
        path = self.folder / "model_configs" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        content = {
            "prompt_template": TEMPLATE,
            "fn_completions": "specrej_completions",
            "completions_kwargs": kwargs,
            "pretty_name": "Small (SpR)",
            **entry,
        }
        path.write_text(yaml.safe_dump({NAME: content}))
        return path

    def write_rows(self, rows: Rows | None = None) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        (self.results / "model_outputs.json").write_text(json.dumps(self.rows if rows is None else rows))

    def write_run(
        self,
        *,
        complete: bool = True,
        generator: str = NAME,
        answers: Callable[[list[Answer]], list[Answer]] = list,
        kwargs: dict[str, Any] | None = None,
        **fingerprint: Any,
    ) -> None:
        kwargs = KWARGS if kwargs is None else kwargs
        config, host = RunConfig.from_args(kwargs)
        decided = of_run(config, host, prompt_template=TEMPLATE, is_strip_output=True, apply_chat_template="auto")
        record = RunRecord(name=generator, fingerprint={**decided, **fingerprint}, described={"specrej_eval": "9.8.7"})
        made = [
            Answer(
                instruction=row["instruction"],
                output=f" {row['output']}\n",
                reward=1.0,
                finish_reason="stop",
                num_tokens=3,
                n=8,
                seeds=[0],
                key=str(index),
            )
            for index, row in enumerate(self.rows)
        ]
        made = answers(made)
        store = OutputsFolder(self.results)
        store.begin(record, going_on=False)
        store.merge_parts(made)
        if complete:
            store.mark_complete(record, made)

    def write_judged(self, **changes: Any) -> None:
        """What alpaca_eval leaves beside the outputs once its judge has seen them."""
        folder = self.results / JUDGE
        folder.mkdir(exist_ok=True)
        annotations = [
            {
                "instruction": row["instruction"],
                "output_1": reference["output"],
                "generator_1": "gpt4_1106_preview",
                "output_2": row["output"],
                "generator_2": NAME,
                "annotator": JUDGE,
                "preference": 1.75,
            }
            for row, reference in zip(self.rows, REFERENCES, strict=True)
        ]
        (folder / "annotations.json").write_text(json.dumps(annotations, indent=1))
        values = {
            "win_rate": "75.25",
            "standard_error": "1.5",
            "mode": "dev",
            "avg_length": str(int(sum(len(row["output"]) for row in self.rows) / 805)),
            "n_wins": "605",
            "n_wins_base": "200",
            "n_draws": "0",
            "n_total": "805",
            "discrete_win_rate": "75.1552",
            "length_controlled_winrate": "70.0625",
            "lc_standard_error": "0.25",
            "glm_name": "length_controlled_v1",
            **changes,
        }
        write_csv(folder / "leaderboard.csv", ["", *values], ["another", *values.values()], [NAME, *values.values()])
        weights = folder / "glm_weights" / "length_controlled_v1"
        weights.mkdir(parents=True, exist_ok=True)
        write_csv(weights / "baseline_gpt4_1106_preview.csv", ["", "b", "a"], [NAME, "0.5", "-1.25"])

    def submit(self, *words: object, name: str = NAME, reference: bool = True) -> str:
        """The command's output; it must succeed."""
        code, out, err = self.call(*words, name=name, reference=reference)
        assert code == 0, err
        return out

    def refused(self, *words: object, name: str = NAME, reference: bool = True) -> str:
        """The error; nothing may have been written."""
        before = {path for path in self.out.rglob("*") if path.is_file()}
        code, out, err = self.call(*words, name=name, reference=reference)
        assert (code, out) == (1, "")
        assert {path for path in self.out.rglob("*") if path.is_file()} == before
        assert "hint: " in err
        return err

    def call(self, *words: object, name: str, reference: bool) -> tuple[int, str, str]:
        fixed = ["submission", "alpaca", "--name", name, "--output", str(self.out)]
        fixed += ["--reference_outputs", "reference.json"] if reference else []
        code = cli.main([*fixed, *map(str, words)])
        out, err = self._capsys.readouterr()
        return code, out, err

    def made(self, path: str) -> str:
        return (self.out / path).read_text(encoding="utf-8")


def write_csv(path: Path, *lines: list[str]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    path.write_text(text.getvalue())


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(tmp_path, capsys)


# --- the tree ---


def test_outputs_and_configuration_as_the_repository_keeps_them(finished: Run) -> None:
    finished.rows[3]["score"] = 1.0  # a column of somebody's own is not for the repository
    finished.write_rows()
    text = finished.submit()
    assert sorted(path.name for path in finished.out.rglob("*") if path.is_file()) == [
        "configs.yaml",
        "model_outputs.json",
        "prompt.txt",
    ]
    rows = json.loads(finished.made(OUTPUTS))
    assert [row["instruction"] for row in rows] == INSTRUCTIONS
    assert {tuple(row) for row in rows} == {("dataset", "instruction", "output", "generator")}
    assert rows[3]["output"] == "It is 4."
    assert finished.made(f"src/alpaca_eval/models_configs/{NAME}/prompt.txt") == TEMPLATE
    config = yaml.safe_load(finished.made(CONFIGS))
    assert config == {
        NAME: {
            "prompt_template": f"{NAME}/prompt.txt",
            "fn_completions": None,
            "completions_kwargs": KWARGS,
            "pretty_name": "Small (SpR)",
            "link": "https://huggingface.co/org/small",
        }
    }
    assert "specrej_completions" in finished.made(CONFIGS) and "specrej-eval 9.8.7" in finished.made(CONFIGS)
    # what is missing is said, with the command that makes it
    assert "still missing: annotations.json, the leaderboard's row, the row of" in text
    assert f"--annotators_config {JUDGE}" in text and f"git switch -c {NAME}" in text


def test_alpaca_eval_resolves_the_configuration_it_is_given(finished: Run) -> None:
    """The tree's configuration must work where it ends up: alpaca_eval/models_configs."""
    finished.submit()
    folder = finished.out / "src/alpaca_eval/models_configs"
    entry = yaml.safe_load((folder / NAME / "configs.yaml").read_text())[NAME]
    assert (folder / entry["prompt_template"]).read_text() == TEMPLATE


def test_judged_outputs_bring_annotations_leaderboard_and_weights(finished: Run) -> None:
    finished.write_judged()
    text = finished.submit()
    assert "still missing" not in text
    assert finished.made(ANNOTATIONS) == (finished.results / JUDGE / "annotations.json").read_text()
    bundled = leaderboard_rows.installed(leaderboard_rows.LEADERBOARD)
    assert bundled is not None
    before, after = bundled.read_text().splitlines(), finished.made(LEADERBOARD).splitlines()
    assert after[:-1] == before, "all other lines stay byte for byte"
    row = dict(zip(before[0].split(","), after[-1].split(","), strict=True))
    assert row[""] == NAME and row["mode"] == "community" and row["win_rate"] == "75.25"
    assert row["length_controlled_winrate"] == "70.0625" and row["n_total"] == "805"
    # the package on PyPI has no weights, so there is nothing to put the row among
    assert finished.made(f"append/{WEIGHTS}").splitlines() == [",b,a", f"{NAME},0.5,-1.25"]
    assert "append the last line" in text


def test_a_checkout_gets_its_own_files_with_one_row_more(finished: Run) -> None:
    finished.write_judged()
    repo = finished.folder / "alpaca_eval"
    header = leaderboard_rows.installed(leaderboard_rows.LEADERBOARD)
    assert header is not None
    first = header.read_text().splitlines()[0]
    (repo / LEADERBOARD).parent.mkdir(parents=True)
    (repo / LEADERBOARD).write_text(f"{first}\n{NAME}{',1' * 11}\nother{',2' * 11}\n{NAME}{',3' * 11}")
    (repo / WEIGHTS).parent.mkdir(parents=True)
    (repo / WEIGHTS).write_text(",a,b\nother,0.10,0.20")
    finished.submit("--alpaca_eval_repo", repo)
    made = finished.made(LEADERBOARD).splitlines()
    assert made[1].startswith(f"{NAME},75.25,") and made[2:] == [f"other{',2' * 11}"]
    assert finished.made(WEIGHTS) == f",a,b\nother,0.10,0.20\n{NAME},-1.25,0.5\n", "columns in the file's order"


def test_files_given_by_name_win(finished: Run) -> None:
    finished.write_judged()
    for file in ("annotations.json", "leaderboard.csv"):
        (finished.results / JUDGE / file).rename(finished.folder / file)
    weights = finished.results / JUDGE / "glm_weights" / "length_controlled_v1" / "baseline_gpt4_1106_preview.csv"
    weights.rename(finished.folder / "w.csv")
    (finished.results).rename(finished.folder / "elsewhere")
    text = finished.submit(
        *("--model_outputs", "elsewhere/model_outputs.json", "--model_config", "model_configs/mine.yaml"),
        *("--annotations", "annotations.json", "--leaderboard", "leaderboard.csv", "--weights", "w.csv"),
    )
    assert "still missing" not in text
    assert f"{NAME}," in finished.made(LEADERBOARD)


def test_the_hub_cache_is_asked_where_no_reference_is_given(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--reference_outputs" in finished.refused(reference=False)
    snapshot = cache / "datasets--tatsu-lab--alpaca_eval" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / alpaca_checks.REFERENCE_FILE).write_text(json.dumps(REFERENCES))
    refs = cache / "datasets--tatsu-lab--alpaca_eval" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    finished.submit(reference=False)
    assert len(json.loads(finished.made(OUTPUTS))) == 805


def test_best_of_n_and_merged_seeds(finished: Run) -> None:
    kwargs = {name: value for name, value in KWARGS.items() if name != "alpha"}
    finished.write_config({**kwargs, "n": "max", "journal": "run.jsonl"}, fn_completions="specrej_best_of_n")
    finished.write_run(kwargs={**kwargs, "n": "max", "strategy": "best_of_n"}, seed=[0, 8])
    finished.submit()
    text = finished.made(CONFIGS)
    assert "best of n" in text and "seeds 0, 8" in text and "n: max was 8 rows" in text
    assert "run.jsonl" not in text, "a file of this machine"


def test_what_a_reader_has_to_know_is_said(finished: Run) -> None:
    def worse(answers: list[Answer]) -> list[Answer]:
        answers[4].degraded = True
        answers[5].finish_reason = "length"
        return answers

    kwargs = {**KWARGS, "pretrained": "./small"}
    finished.write_config(kwargs)
    finished.write_run(answers=worse, kwargs=kwargs)
    text = finished.submit()
    assert "1 answer gave up rows for want of memory (degraded), the first in row 5" in text
    assert "1 answer was cut at their length limit" in text
    assert "pretrained=./small" in text


# --- refusals: the outputs ---


def test_wrong_order(finished: Run) -> None:
    rows = finished.rows
    rows[2], rows[3] = rows[3], rows[2]
    finished.write_rows()
    error = finished.refused()
    assert "row 3 ('Question number 3:" in error and "wrong order; 'Question number 2:" in error


def test_wrong_count(finished: Run) -> None:
    finished.write_rows(finished.rows[:-1])
    error = finished.refused()
    assert "804 rows, not 805" in error and "instruction 805 ('Question number 803:" in error


def test_duplicates(finished: Run) -> None:
    finished.write_rows([*finished.rows[:10], finished.rows[4], *finished.rows[11:]])
    error = finished.refused()
    assert "row 11 ('Question number 4:" in error and "duplicate" in error


def test_an_answer_too_many(finished: Run) -> None:
    finished.write_rows([*finished.rows, finished.rows[0]])
    assert "row 806 ('Question number 0:" in finished.refused()


def test_an_instruction_of_another_set(finished: Run) -> None:
    finished.rows[7]["instruction"] = "What else?"
    finished.write_rows()
    error = finished.refused()
    assert "row 8 ('What else?')" in error and "not one of AlpacaEval's" in error


def test_a_missing_instruction(finished: Run) -> None:
    del finished.rows[9]
    finished.write_rows()
    assert "instruction 10 ('Question number 9:" in finished.refused()


@pytest.mark.parametrize("output", ["", " \n"])
def test_empty_outputs(finished: Run, output: str) -> None:
    finished.rows[5]["output"] = output
    finished.write_rows()
    error = finished.refused()
    assert "row 6 ('Question number 5:" in error and "empty" in error


def test_another_generator_in_a_row(finished: Run) -> None:
    finished.rows[6]["generator"] = "gpt4"
    finished.write_rows()
    error = finished.refused()
    assert "row 7 ('Question number 6:" in error and "'gpt4'" in error


@pytest.mark.parametrize("column", alpaca_checks.COLUMNS)
def test_missing_columns(finished: Run, column: str) -> None:
    del finished.rows[8][column]
    finished.write_rows()
    error = finished.refused()
    assert "row 9 (" in error and f"no {column}" in error


def test_another_dataset(finished: Run) -> None:
    finished.rows[1]["dataset"] = "koala"
    finished.write_rows()
    error = finished.refused()
    assert "row 2 (" in error and "'helpful'" in error


@pytest.mark.parametrize("content", ["{}", '["text"]', '[{"instruction": '])
def test_outputs_that_are_no_rows(finished: Run, content: str) -> None:
    (finished.results / "model_outputs.json").write_text(content)
    assert "model_outputs.json" in finished.refused()


def test_no_outputs(finished: Run) -> None:
    (finished.results / "model_outputs.json").unlink()
    assert "evaluate_from_model" in finished.refused()


@pytest.mark.parametrize("number", [804, 20])
def test_a_reference_that_is_not_alpaca_eval(finished: Run, number: int) -> None:
    (finished.folder / "reference.json").write_text(json.dumps(REFERENCES[:number]))
    error = finished.refused()
    assert f"has {number} rows" in error and "805 instructions" in error


# --- refusals: the run behind them ---


@pytest.mark.parametrize("words", [[], ["--unverified"]])
@pytest.mark.parametrize("model", ["pretrained", "reward_model"])
def test_a_run_of_the_embedded_pair(finished: Run, model: str, words: list[str]) -> None:
    finished.write_run(**{model: "embedded"})
    assert "embedded demo pair" in finished.refused(*words)


@pytest.mark.parametrize(
    ("model", "folder"), [("pretrained_files", DEMO_POLICY), ("reward_files", DEMO_REWARD)], ids=["policy", "reward"]
)
def test_a_run_of_the_embedded_pair_under_another_name(finished: Run, model: str, folder: Path) -> None:
    finished.write_run(**{model: stamp(str(folder))})
    assert "embedded demo pair" in finished.refused()


def test_an_unfinished_run(finished: Run) -> None:
    finished.write_run(complete=False)
    assert "not finished: 805 answers so far" in finished.refused()


def test_a_run_without_a_record(finished: Run) -> None:
    (finished.results / "specrej_run.json").unlink()
    error = finished.refused()
    assert "no specrej_run.json next to it" in error and "--unverified" in error
    text = finished.submit("--unverified")
    assert "nothing says how" in text
    assert "without the record of the run" in finished.made(CONFIGS)


def test_a_configuration_of_the_demo_pair_stays_refused_without_a_record(finished: Run) -> None:
    (finished.results / "specrej_run.json").unlink()
    finished.write_config({"alpha": 0.5})
    assert "names no model" in finished.refused("--unverified")


def test_another_generators_run(finished: Run) -> None:
    finished.write_run(generator="other")
    assert "records the generator 'other'" in finished.refused()


def test_an_output_edited_by_hand(finished: Run) -> None:
    finished.rows[12]["output"] += " Surely."
    finished.write_rows()
    error = finished.refused()
    assert "row 13 (" in error and "differs from the answer that the run recorded" in error


def test_an_answer_the_run_does_not_have(finished: Run) -> None:
    finished.write_run(answers=lambda answers: answers[:30] + answers[31:])
    error = finished.refused()
    assert "row 31 (" in error and "specrej_outputs.jsonl" in error


@pytest.mark.parametrize(
    ("changed", "then", "now"),
    [
        ({"alpha": 0.25}, "alpha was 0.5", "0.25"),
        ({"n": 16}, "n was 8", "16"),
        ({"seed": 3}, "seed was 0", "3"),
        ({"pretrained": "org/large"}, "pretrained was 'org/small'", "'org/large'"),
        ({"until": ["\n"]}, "until was []", "['\\n']"),
        ({"apply_chat_template": True}, "apply_chat_template was 'auto'", "True"),
    ],
)
def test_a_configuration_of_another_run(finished: Run, changed: dict[str, Any], then: str, now: str) -> None:
    finished.write_config({**KWARGS, **changed})
    error = finished.refused()
    assert f"mine.yaml' is not the configuration that was run ({then}, is now {now})" in error


def test_another_prompt_template(finished: Run) -> None:
    finished.write_config(KWARGS, prompt_template="{instruction}")
    assert "prompt_template" in finished.refused()


def test_a_prompt_template_in_a_file(finished: Run) -> None:
    (finished.folder / "model_configs" / "prompt.txt").write_text(TEMPLATE)
    finished.write_config(KWARGS, prompt_template="prompt.txt")
    finished.submit()
    assert finished.made(f"src/alpaca_eval/models_configs/{NAME}/prompt.txt") == TEMPLATE
    finished.write_config(KWARGS, prompt_template="promt.txt")
    assert "'promt.txt'" in finished.refused("--force")


# --- refusals: names and configurations ---


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "two words"])
def test_a_name_that_is_no_folder(finished: Run, name: str) -> None:
    assert "--name" in finished.refused(name=name)


def test_no_configuration_of_this_name(finished: Run) -> None:
    (finished.folder / "model_configs" / "mine.yaml").unlink()
    assert "--model_config FILE.yaml" in finished.refused()


def test_another_generators_configuration(finished: Run) -> None:
    path = finished.folder / "other.yaml"
    path.write_text((finished.folder / "model_configs" / "mine.yaml").read_text().replace(NAME, "other"))
    assert "of 'other', not of" in finished.refused("--model_config", path)


def test_a_configuration_of_another_decoder(finished: Run) -> None:
    finished.write_config(KWARGS, fn_completions="vllm_local_completions")
    assert "'vllm_local_completions'" in finished.refused()


def test_a_misspelt_argument(finished: Run) -> None:
    finished.write_config({**KWARGS, "alhpa": 0.5})
    assert "'alhpa'" in finished.refused()


# --- refusals: what the judge left ---


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("annotator", "specrej_reward_judge", "annotator is 'specrej_reward_judge'"),
        ("generator_2", "other", "generator_2 is 'other'"),
        ("output_2", "Something else.", "output_2 is not an answer"),
        ("instruction", "What else?", "row 41 ('What else?')"),
    ],
)
def test_annotations_of_something_else(finished: Run, column: str, value: str, message: str) -> None:
    finished.write_judged()
    path = finished.results / JUDGE / "annotations.json"
    annotations = json.loads(path.read_text())
    annotations[40][column] = value
    path.write_text(json.dumps(annotations))
    error = finished.refused()
    assert "row 41 (" in error and message in error


def test_annotations_that_are_not_all_there(finished: Run) -> None:
    finished.write_judged()
    path = finished.results / JUDGE / "annotations.json"
    annotations = json.loads(path.read_text())
    path.write_text(json.dumps(annotations[:-1]))
    assert "has 804 annotations, not 805" in finished.refused()
    annotations[0]["preference"] = None
    path.write_text(json.dumps(annotations))
    assert "no preference for 1 answer" in finished.submit()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("avg_length", "9000", "avg_length"),
        ("n_total", "100", "n_total"),
        ("glm_name", "length_controlled_minimal", "length_controlled_minimal"),
        ("lc_standard_error", "", "no lc_standard_error"),
    ],
)
def test_a_leaderboard_row_of_something_else(finished: Run, column: str, value: str, message: str) -> None:
    finished.write_judged(**{column: value})
    error = finished.refused()
    assert "leaderboard.csv" in error and message in error


def test_given_files_must_have_a_row_of_this_name(finished: Run) -> None:
    write_csv(finished.folder / "none.csv", ["", "a"], ["other", "1"])
    for argument in ("--leaderboard", "--weights"):
        code, _, err = finished.call(argument, "none.csv", name=NAME, reference=True)
        assert code == 1 and "none.csv" in err
    assert not finished.out.exists()


def test_a_file_that_is_not_there(finished: Run) -> None:
    for argument in ("--annotations", "--leaderboard"):
        code, _, err = finished.call(argument, "no.file", name=NAME, reference=True)
        assert code == 1 and argument in err and "no.file" in err


# --- an existing tree ---


def test_an_existing_tree_is_left_alone_without_force(finished: Run) -> None:
    finished.write_judged()
    finished.submit()
    stranger = finished.out / "results" / "another" / "model_outputs.json"
    stranger.parent.mkdir()
    stranger.write_text("[]")
    before = finished.made(CONFIGS)
    (finished.out / CONFIGS).write_text("# edited")
    assert "--force" in finished.refused()
    assert finished.made(CONFIGS) == "# edited"
    # judged anew later: annotations of other outputs must not stay
    (finished.results / JUDGE / "annotations.json").unlink()
    finished.submit("--force")
    assert finished.made(CONFIGS) == before
    assert not (finished.out / ANNOTATIONS).exists()
    assert stranger.read_text() == "[]"


# --- what must not drift ---


def test_every_completion_function_that_is_known_is_there() -> None:
    from specrej_eval.harness.alpaca_eval import decoder

    assert all(callable(getattr(decoder, name)) for name in alpaca_config.STRATEGIES)


def test_a_configurations_fingerprint_is_the_decoders(finished: Run) -> None:
    """The same file, read here and there, is the same run."""
    from specrej_eval.harness.alpaca_eval.decoder import Generation

    kwargs: dict[str, Any] = {"alpha": 0.25, "until": ["\n"], "max_tokens": 99, "apply_chat_template": "false"}
    theirs = Generation.of("specrej_completions", kwargs).fingerprint(prompt_template=TEMPLATE)
    config = alpaca_config.read(finished.write_config({**kwargs, "pretrained": "org/small", "reward_model": "org/r"}))
    mine = config.fingerprint()
    for name in ("attention_backend", "compile"):  # what auto came to: known where the run is only
        del theirs["environment"][name]
    assert mine.keys() == theirs.keys()
    models = {"pretrained", "reward_model", "pretrained_files", "reward_files", "uncovered"}
    assert {name: mine[name] for name in mine.keys() - models} == {
        name: theirs[name] for name in theirs.keys() - models
    }


def test_the_bundled_leaderboard_is_as_it_was_installed() -> None:
    assert importlib.util.find_spec("alpaca_eval") is not None
    assert not leaderboard_rows.altered(leaderboard_rows.LEADERBOARD)


def test_an_altered_leaderboard_is_noticed(finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = leaderboard_rows.installed(leaderboard_rows.LEADERBOARD)
    assert original is not None
    copy = tmp_path / "leaderboard.csv"
    copy.write_text(original.read_text() + f"local-experiment{',1' * 11}\n")
    monkeypatch.setattr(
        leaderboard_rows, "installed", lambda path: copy if path == leaderboard_rows.LEADERBOARD else None
    )
    finished.write_judged()
    assert "alpaca_eval has written other rows" in finished.submit()


# --- secrets ---


def test_secrets_of_the_configuration_are_left_out_and_refused_elsewhere(finished: Run) -> None:
    password, token = "Tr0ub4dor3", "hf_" + "aB3" * 11
    kwargs = {**KWARGS, "reward_model": f"http://me:{password}@host:8000", "token": token}
    finished.write_config(kwargs)
    finished.write_run(kwargs=kwargs)
    finished.submit()
    assert not [path for path in finished.out.rglob("*") if path.is_file() and password in path.read_text()]
    text = (finished.out / CONFIGS).read_text()
    assert "reward_model: http://host:8000" in text and token not in text
    for secret, what in ((password, "the password of an address"), (token, "the value of token=")):
        finished.rows[7]["output"] = f"It is {secret}."
        finished.write_rows()
        finished.write_run(kwargs=kwargs)
        error = finished.refused("--force", "--allow_lookalikes")
        assert f"{OUTPUTS}, line " in error and f"holds {what}" in error and secret not in error


def test_an_answer_that_only_looks_like_a_secret_is_taken_when_told(finished: Run) -> None:
    finished.rows[7]["output"] = "Clone it: git clone https://user:pass1234@example.com/x.git"
    finished.write_rows()
    finished.write_run()
    assert "what looks like an address with a password" in finished.refused()
    finished.submit("--allow_lookalikes")

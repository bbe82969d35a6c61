"""Length-controlled win rates: upstream's number where it means something, an honest one elsewhere, never a crash."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import alpaca_eval.main
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
from alpaca_eval import constants, metrics
from alpaca_eval.metrics import glm_winrate
from support.alpaca_runs import LITERAL, sums, write
from support.alpaca_runs import alpaca_eval as run_alpaca_eval
from support.fake_hub import add_dataset_files
from support.openai_server import JudgeServer

from specrej_eval.errors import ConfigError
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.alpaca_eval.repairs import winrate as alpaca_eval_winrate

COLUMNS = {
    *("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate"),
    *("length_controlled_winrate", "lc_standard_error"),
}
"""What upstream gives, and so what a row of the public leaderboard has."""
MINIMAL = alpaca_eval_winrate.MINIMAL


pytestmark = pytest.mark.usefixtures("alpaca_eval_stays_as_installed", "own_folder")


@pytest.fixture(autouse=True)
def _no_reference_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_eval_winrate, "_reference", {})


def reference(count: int = 805) -> list[dict[str, Any]]:
    return [
        {"dataset": "x", "instruction": f"prompt {i}", "output": "r" * (20 + i % 37), "generator": "gpt4_1106_preview"}
        for i in range(count)
    ]


def gamed() -> str:
    """df_gamed.csv in the form of the hub's: two models that play with length, and how hard each prompt is."""
    randomness = random.Random(0)
    difficulty = [randomness.gauss(0, 1) for _ in range(805)]
    rows = [
        {
            "model": f"gpt4_1106_preview_{style}",
            "index": i,
            "preference": min(1.0, max(0.0, 0.5 + shift + randomness.gauss(0, 0.1))),
            "std_delta_len": shift * 4 + randomness.gauss(0, 0.5),
            "instruction_difficulty": difficulty[i],
            "not_gamed_baseline": False,
        }
        for style, shift in (("concise", -0.3), ("verbose", 0.2))
        for i in range(805)
    ]
    text = io.StringIO()
    pd.DataFrame(rows).to_csv(text, index=False)
    return text.getvalue()


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    files = {"alpaca_eval_gpt4_baseline.json": reference(), "df_gamed.csv": gamed()}
    return add_dataset_files(tmp_path_factory.mktemp("hub"), files)


@pytest.fixture
def hub(hub_files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", hub_files["HF_HUB_CACHE"])


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


def annotations(count: int = 805, **changes: Any) -> list[dict[str, Any]]:
    """Longer answers win more often, by a judge that is unsure."""
    randomness = random.Random(1)
    rows = []
    for row in reference(count):
        length = randomness.randrange(5, 80)
        wins = 1 / (1 + math.exp(-(length - len(row["output"])) / 30 - 0.4 + randomness.gauss(0, 0.5)))
        rows.append(
            {
                "instruction": row["instruction"],
                "output_1": row["output"],
                "output_2": "m" * length,
                "generator_1": "gpt4_1106_preview",
                "generator_2": "mine",
                "annotator": "judge",
                "preference": 1 + wins,
            }
            | changes
        )
    return rows


def upstream(rows: Any, **options: Any) -> dict[str, Any]:
    original = glm_winrate.get_length_controlled_winrate.__specrej_eval_original__
    found: dict[str, Any] = original(rows, save_weights_dir=None, **options)
    return found


def ours(rows: Any, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = metrics.get_length_controlled_winrate(rows, **options)
    return found


# --- AlpacaEval's own prompts ---------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_the_805_prompts_in_their_order_give_upstreams_number() -> None:
    rows = annotations()
    found = ours(rows)
    assert found == upstream(rows) and set(found) == COLUMNS
    assert found["length_controlled_winrate"] != pytest.approx(found["win_rate"], abs=0.1), "the data is no test else"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("change", ["order", "prompt", "fewer"])
def test_any_other_prompts_do_not(change: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = annotations()
    if change == "order":
        rows[0], rows[1] = rows[1], rows[0]
    elif change == "prompt":
        rows[804]["instruction"] = "another"
    else:
        rows = rows[:804]
    found = ours(rows)
    assert found.pop("glm_name") == MINIMAL and set(found) == COLUMNS
    said = {"order": "another order", "prompt": "not AlpacaEval's", "fewer": "805 prompts, these are 804"}[change]
    assert said in caplog.text and "cannot be compared with the public leaderboard" in caplog.text


@pytest.mark.usefixtures("no_hub")
def test_805_prompts_that_cannot_be_compared_are_not_taken_for_alpaca_evals(caplog: pytest.LogCaptureFixture) -> None:
    assert ours(annotations())["glm_name"] == MINIMAL
    assert "could not be loaded" in caplog.text


def by_length(first: str, second: str) -> float:
    """A judge that likes length, and a little whatever begins with m."""
    return 0.6 / (1 + math.exp((len(second) - len(first)) / 20)) + 0.4 * (first[0] == "m")


def literal_command_with_gpt4(tmp_path: Path, count: int, env: dict[str, str]) -> tuple[pd.DataFrame, str]:
    """The default judge is a server on the loopback; its judgments are those of `by_length`, in whatever order."""
    models = [{**row, "output": "m" * (10 + 7 * i % 61), "generator": "mine"} for i, row in enumerate(reference(count))]
    write(tmp_path / "X.json", [*reference(count), *models])
    write(tmp_path / "Y.json", reference(count))
    with JudgeServer(by_length) as server:
        done = run_alpaca_eval(*LITERAL, cwd=tmp_path, env=env | server.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(server.requests) == count, "the reference against itself needs no judge"
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    board = pd.read_csv(tmp_path / "leader_board.csv", index_col=0)
    assert board["n_total"].tolist() == [count, count]
    baseline = board.loc["gpt4_1106_preview", ["win_rate", "length_controlled_winrate", "standard_error"]]
    assert [*baseline, board.loc["gpt4_1106_preview", "lc_standard_error"]] == [50, 50, 0, 0]
    return board, done.stdout


def saved_annotations(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "leader_board" / constants.DEFAULT_ANNOTATOR_CONFIG / "annotations.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_the_literal_command_with_the_default_judge(tmp_path: Path) -> None:
    board, out = literal_command_with_gpt4(tmp_path, 12, {})
    rows = saved_annotations(tmp_path)
    for row in rows:
        one = 1 - by_length(row["output_1"], row["output_2"])
        other = by_length(row["output_2"], row["output_1"])
        assert min(abs(row["preference"] - 1 - p) for p in (one, other)) < 1e-6
    mean = np.mean([row["preference"] for row in rows])
    assert board.loc["mine", "win_rate"] == pytest.approx((mean - 1) * 100)
    assert set(board["glm_name"]) == {MINIMAL}
    assert "these are 12. It cannot be compared" in out


@pytest.mark.full
def test_the_literal_command_on_the_canonical_prompts(tmp_path: Path, hub_files: dict[str, str]) -> None:
    """Upstream's number to the last digit that is saved, and no column but upstream's."""
    board, out = literal_command_with_gpt4(tmp_path, 805, hub_files)
    assert set(board.columns) == COLUMNS | {"mode", "avg_length"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", hub_files["HF_HUB_CACHE"])
        expected = upstream(saved_annotations(tmp_path))
    for name, value in expected.items():
        assert board.loc["mine", name] == pytest.approx(value, abs=1e-5), name
    assert "NOTE" not in out


# --- fewer prompts, other prompts -----------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_the_minimal_model_is_upstreams() -> None:
    rows = annotations(100)
    found, expected = ours(rows), upstream(rows, glm_name=MINIMAL)
    assert found["length_controlled_winrate"] == expected["length_controlled_winrate"]
    assert found["win_rate"] == expected["win_rate"]
    assert expected["lc_standard_error"] == pytest.approx(0), "all predictions are the same: that is no standard error"


@pytest.mark.usefixtures("no_hub")
def test_the_minimal_model_needs_no_hub_and_any_number_of_rows() -> None:
    rows = annotations(900)
    assert ours(rows)["glm_name"] == MINIMAL
    assert ours(rows, glm_name=MINIMAL) == ours(rows)


@pytest.mark.usefixtures("no_hub")
def test_its_standard_error_is_the_spread_over_new_judgments() -> None:
    """Against fits to 80 data sets drawn alike."""
    randomness = np.random.default_rng(0)

    def draw() -> list[dict[str, Any]]:
        lengths = randomness.normal(0, 1, 60)
        wins = randomness.random(60) < 1 / (1 + np.exp(-0.8 - 1.5 * np.tanh(lengths)))
        return [
            {
                **{"output_1": "a" * (100 + round(20 * delta)), "output_2": "b" * 100},
                **{"generator_1": "r", "generator_2": "m", "annotator": "j", "instruction": str(i)},
                "preference": 1.0 + (not won),
            }
            for i, (delta, won) in enumerate(zip(lengths, wins, strict=True))
        ]

    info = {**glm_winrate.GLM_INFO[MINIMAL], "kwargs": {"n_splits": 0, "C": 100}}  # without the penalty that CV picks
    found = [ours(draw(), glm_info=info, glm_name=MINIMAL) for _ in range(80)]
    spread = float(np.std([each["length_controlled_winrate"] for each in found]))
    assert float(np.mean([each["lc_standard_error"] for each in found])) == pytest.approx(spread, rel=0.2)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (annotations(3), "3 judged pairs are too few"),
        (annotations(1), "1 judged pair is too few"),
        (annotations(9, preference=2.0), "all preferences are the same"),
        (annotations(9, preference=float("nan")), "0 judged pairs are too few"),
    ],
    ids=["three", "one", "always won", "never judged"],
)
def test_where_nothing_can_be_fitted_it_is_the_plain_win_rate(
    rows: list[dict[str, Any]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = ours(rows)
    assert found["glm_name"] == "none" and reason in caplog.text
    for controlled, plain in (("length_controlled_winrate", "win_rate"), ("lc_standard_error", "standard_error")):
        assert found[controlled] == pytest.approx(found[plain], nan_ok=True)


@pytest.mark.usefixtures("no_hub")
def test_answers_of_equal_length_have_no_length_to_control() -> None:
    rows = annotations(40, output_1="abc", output_2="xyz")
    found = ours(rows)
    assert found["glm_name"] == MINIMAL
    assert abs(found["length_controlled_winrate"] - found["win_rate"]) < 5
    assert found["lc_standard_error"] == pytest.approx(found["standard_error"], rel=0.1)


@pytest.mark.usefixtures("no_hub")
def test_a_fit_that_fails_costs_a_note_not_the_judgments(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("liblinear is out of sorts")

    monkeypatch.setattr(glm_winrate, "fit_LogisticRegressionCV", fail)
    found = ours(annotations(20))
    assert found["glm_name"] == "none" and found["length_controlled_winrate"] == found["win_rate"]
    assert "liblinear is out of sorts" in caplog.text


def test_difficulties_that_cannot_be_had_leave_the_minimal_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_dataset_files(tmp_path / "hub", {"alpaca_eval_gpt4_baseline.json": reference()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert ours(annotations())["glm_name"] == MINIMAL
    assert "length_controlled_v1 cannot be fitted" in caplog.text and "df_gamed.csv" in caplog.text
    with pytest.raises(ConfigError, match="df_gamed"):
        ours(annotations(), baseline="gpt4")  # no other number will do


@pytest.mark.usefixtures("no_hub")
def test_missing_judgments_are_left_out() -> None:
    rows = annotations(40)
    kept = ours(rows)
    for row in rows[:5]:
        row["preference"] = None
    found = ours(rows)
    assert found["n_total"] == 35 and found["glm_name"] == MINIMAL
    assert abs(found["length_controlled_winrate"] - kept["length_controlled_winrate"]) < 10


@pytest.mark.usefixtures("no_hub")
def test_the_reference_itself_is_50_whatever_the_prompts() -> None:
    rows = annotations(3, generator_2="gpt4_1106_preview", preference=1.5)
    found = ours(rows)
    assert (found["length_controlled_winrate"], found["lc_standard_error"]) == (50, 0)
    assert found["glm_name"] == MINIMAL, "the same as in the other rows of its leaderboard"


@pytest.mark.usefixtures("no_hub")
def test_a_reference_without_a_name_and_texts_that_became_numbers() -> None:
    rows = annotations(20)
    for i, row in enumerate(rows):
        del row["generator_1"], row["generator_2"]
        row["output_1"], row["output_2"] = 10**i, 7
    assert ours(rows)["n_total"] == 20


@pytest.mark.usefixtures("no_hub")
def test_a_data_frame_gets_its_predictions_in_place() -> None:
    frame = pd.DataFrame(annotations(30))
    ours(frame)
    assert frame["glm_preference"].between(0, 1).all()
    ours(frame := pd.DataFrame(annotations(3)))
    assert frame["glm_preference"].tolist() == (frame["preference"] - 1).tolist()
    ours(frame := pd.DataFrame(annotations(30)), is_add_glm_preference_inplace=False)
    assert "glm_preference" not in frame.columns


# --- what the user asks for by name ---------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_a_model_asked_for_is_fitted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    rows = annotations(100)
    found = ours(rows, glm_name="length_controlled_v1")
    assert found.pop("glm_name") == "length_controlled_v1" and found == upstream(rows)
    assert "its difficulties do not fit" in caplog.text
    caplog.clear()
    whole = annotations()
    assert ours(whole, glm_name="length_controlled_v1") == upstream(whole)
    assert "do not fit" not in caplog.text


@pytest.mark.usefixtures("hub")
def test_beyond_the_last_difficulty_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="difficulties for 805 prompts, got 806 rows"):
        ours(annotations(806), glm_name="length_controlled_v1")
    with pytest.raises(ConfigError, match="Did you mean 'length_controlled_minimal'"):
        ours(annotations(10), glm_name="length_controlled_minimum")


# --- files and lengths ----------------------------------------------------------------------------


@pytest.mark.usefixtures("no_hub")
def test_weights_go_to_the_output_folder_or_nowhere(tmp_path: Path) -> None:
    rows = annotations(30)
    ours(rows)
    assert list(tmp_path.iterdir()) == []
    with alpaca_eval_runs.run_in(tmp_path / "out", {}):
        ours(rows)
        ours(annotations(30, generator_1="meta/llama"))  # a name that is no file name
    weights = tmp_path / "out/glm_weights" / MINIMAL / "baseline_gpt4_1106_preview.csv"
    assert pd.read_csv(weights, index_col=0).index.tolist() == ["mine"]
    assert [path for path in tmp_path.rglob("*.csv")] == [weights]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("metric", ["get_length_controlled_winrate", "get_winrate"])
def test_mean_lengths_of_both_sides_are_printed(metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    alpaca_eval.main.evaluate(
        model_outputs=sums("model", prefix="longer "),
        reference_outputs=sums("ref", wrong_by=1),
        annotators_config="specrej_reward_judge",
        output_path=None,
        fn_metric=metric,
        sort_by="length_controlled_winrate",  # what fire passes on when nothing is said
    )
    out = capsys.readouterr().out
    assert "Mean length in characters: model 9.0, reference ref 2.0" in out
    assert "standard_error" in out


@pytest.mark.usefixtures("no_hub")
def test_a_note_on_one_of_several_generators_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    alpaca_eval.main.make_leaderboard(
        all_model_outputs=[*sums("model"), *sums("few", wrong_by=2)[:3], *sums("fewer", wrong_by=2)[:3]],
        reference_outputs=sums("ref", wrong_by=1),
        annotators_config="specrej_reward_judge",
        leaderboard_path="board.csv",
    )
    told = [line for line in capsys.readouterr().out.splitlines() if "length_controlled_winrate is" in line]
    assert len(told) == 2 and told[1].startswith(
        "NOTE: few, fewer: length_controlled_winrate is the plain win rate: 3 "
    )
    assert len(told) == 2 and told[0].startswith("NOTE: model: length_controlled_winrate is ")


def test_prompts_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load() -> dict[str, list[str]]:
        loaded.append(1)
        return {"instruction": ["a"]}

    monkeypatch.setattr(constants, "ALPACAEVAL_REFERENCE_OUTPUTS", load)
    for _ in range(2):
        assert alpaca_eval_winrate._canonical_instructions(constants) == ("a",)
    assert len(loaded) == 1


def test_a_newer_metric_is_left_alone() -> None:
    import types

    glm = types.SimpleNamespace(get_length_controlled_winrate=lambda annotations: {})
    module: Any = types.SimpleNamespace(glm_winrate=glm, get_winrate=max)
    alpaca_eval_winrate.control_length_where_valid(module)
    assert module.get_winrate is max and set(vars(module)) == {"glm_winrate", "get_winrate"}

"""`specrej-eval report --html`: what the page says, that it says it safely, and that it is the same every time."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support import FULL
from support.page_runs import HOSTILE, SIZES, PageReader, a_recorded_run, a_result, accuracy_of, an_lm_eval_run
from support.run_folders import a_run, an_answer

from specrej_eval import cli
from specrej_eval.commands.report.page import charts, measures, viewer
from specrej_eval.commands.report.page.charts import NARROW, WIDE, Axis, Bars, Curve, Point
from specrej_eval.commands.report.page.data import Key, Metric, read
from specrej_eval.commands.report.page.figures import chapters
from specrej_eval.commands.report.page.scene import DARK, LIGHT, Dot, Text, as_png, as_svg, text_width
from specrej_eval.commands.report.page.tables import Cell, Table, as_latex, as_markdown
from specrej_eval.commands.report.runs import find_runs
from specrej_eval.core import GenerationResult, prompt_hash
from specrej_eval.records.cell_scores import CellMetrics, CellPreferences
from specrej_eval.records.jsonl import checked_line
from specrej_eval.wording import inert_page

QUESTIONS = [f"question {number}" for number in range(30)]


def page_of(tmp_path: Path, *words: object, code: int = 0) -> str:
    out = tmp_path / "page.html"
    assert cli.main(["report", *map(str, words), "--html", str(out)]) == code
    return out.read_text(encoding="utf-8")


def two_runs(folder: Path) -> list[Path]:
    return [
        a_recorded_run(folder / "bo", QUESTIONS, rejects=False, name="bo"),
        a_recorded_run(folder / "spr", QUESTIONS, rejects=True, name="spr"),
    ]


def raw(folder: Path) -> list[dict[str, Any]]:
    """The results of a run's journal, read by nothing of ours."""
    lines = (folder / "specrej_trajectories.jsonl").read_text().splitlines()
    return [json.loads(line)["result"] for line in lines if "result" in json.loads(line)]


def cells(page: str, table: str) -> list[list[str]]:
    found = re.search(rf'<table id="{table}".*?</table>', page, re.DOTALL)
    assert found is not None, table
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", line) for line in re.findall(r"<tr>.*?</tr>", found[0])][1:]


# --- numbers ---


def test_the_numbers_of_a_page_are_those_of_the_raw_records(tmp_path: Path) -> None:
    folders = two_runs(tmp_path / "runs")
    page = page_of(tmp_path, *folders)
    for row, folder in zip(cells(page, "summary-0"), folders, strict=True):
        results = raw(folder)
        rewards = [max(t["reward"] for t in r["trajectories"] if t["finish_reason"] == "eos") for r in results]
        tokens = [sum(len(t["token_ids"]) for t in r["trajectories"]) for r in results]
        operations = []
        for result in results:
            lengths = [len(t["token_ids"]) for t in result["trajectories"]]
            attended = 3 * 4 / 2 + sum(3 * length + length * (length + 1) / 2 for length in lengths)
            linear = 2 * SIZES["parameters"] * (sum(lengths) + 3)
            scored = 2 * SIZES["reward_parameters"] * (sum(lengths) + 5)
            operations.append(linear + 4 * SIZES["layers"] * SIZES["attention_width"] * attended + scored)
        assert row[1].startswith(f"{statistics.fmean(rewards):.3f} [")
        assert row[2] == f"{statistics.fmean(tokens):,.0f}"
        assert row[4] == f"{statistics.fmean(operations) / 1e3:.0f}k"
        rejected = statistics.fmean(t["finish_reason"] == "rejected" for r in results for t in r["trajectories"])
        assert row[6] == f"{100 * rejected:.1f} %"
    ours, theirs = (
        [max(t["reward"] for t in r["trajectories"] if t["finish_reason"] == "eos") for r in raw(folder)]
        for folder in (folders[1], folders[0])
    )
    gap = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    (told,) = cells(page, "differences")
    assert told[2].startswith(f"{gap:+.3f} [") and told[3] == "30"


def test_the_viewer_has_every_row_with_its_scores_and_its_fate(tmp_path: Path) -> None:
    folders = two_runs(tmp_path / "runs")
    data = PageReader(page_of(tmp_path, *folders)).rows()
    assert [method["family"] for method in data["methods"]] == ["best_of_n", "rejecting"]
    assert len(data["prompts"]) == 30
    for place, folder in enumerate(folders):
        for prompt, result in zip(data["prompts"], raw(folder), strict=True):
            shown = prompt["by"][str(place)]
            assert shown["best"] == result["best"]
            for row, told in zip(shown["rows"], result["trajectories"], strict=True):
                fate = {"eos": "finished"}.get(told["finish_reason"], told["finish_reason"])
                assert row[:3] == [told["row"], fate, len(told["token_ids"])]
                assert row[3] == pytest.approx(told["reward"], rel=1e-5) and row[6] == told["text"]
                assert [look[0] for look in row[5]] == [look[0] for look in told["look_scores"]]
                assert [look[1] for look in row[5]] == pytest.approx([s for _, s in told["look_scores"]], rel=1e-5)


def test_accuracy_and_rows_of_lm_eval_meet_at_the_prompt(tmp_path: Path) -> None:
    order = QUESTIONS[:]
    random.Random(0).shuffle(order)
    folders = [an_lm_eval_run(tmp_path / "bo", QUESTIONS, rejects=False), an_lm_eval_run(tmp_path / "spr", order)]
    data = read(find_runs(*folders))
    metric = Metric("sums", "exact_match", "none")
    assert data.metrics == [Metric("sums", "reward", ""), metric]
    for method, rejects in zip(data.methods, (False, True), strict=True):
        for question in QUESTIONS:
            result = a_result(question, rejects=rejects)
            key = Key("sums", result.prompt_hash, 0)
            assert method.each(metric)[key] == accuracy_of(result)
            assert method.each(data.metrics[0])[key] == result.best.reward
            assert data.prompts[key] == question


def test_a_journal_of_several_runs_gives_each_page_its_own_rows(tmp_path: Path) -> None:
    shared = tmp_path / "shared.jsonl"
    folders = [
        an_lm_eval_run(tmp_path / str(seed), QUESTIONS, seed=seed, journal=shared, rejects=rejects)
        for seed, rejects in ((0, True), (1, True), (0, False))
    ]
    for method, seed, rejects in zip(read(find_runs(*folders)).methods, (0, 0, 1), (False, True, True), strict=True):
        del seed
        assert len(method.answers) == 30
        wanted = method.run.arguments
        for (key, answer), question in zip(method.answers.items(), QUESTIONS, strict=True):
            result = a_result(question, rejects=rejects, seed=wanted["seed"])
            assert key.prompt_hash == result.prompt_hash
            assert [row.text for row in answer.rows] == [row.text for row in result.trajectories]


def test_a_journal_that_moved_with_its_folder_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    an_lm_eval_run(tmp_path / "old", QUESTIONS)
    (tmp_path / "old").rename(tmp_path / "new")
    assert "question 3" in page_of(tmp_path, tmp_path / "new")
    (tmp_path / "new" / "rows.jsonl").unlink()
    assert cli.main(["report", str(tmp_path / "new"), "--html", str(tmp_path / "other.html")]) == 1
    assert "no rows are recorded" in capsys.readouterr().err and not (tmp_path / "other.html").exists()


def test_a_score_whose_draw_nobody_can_tell_is_given_to_no_answer(tmp_path: Path) -> None:
    """Two draws of one prompt, one document: whose accuracy is it?"""
    folder = an_lm_eval_run(tmp_path / "spr", QUESTIONS)
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    again = {key: value for key, value in json.loads(lines[1]).items() if key != "checksum"}
    again["key"], again["result"]["repeat"] = "f" * 64, 1
    (folder / "rows.jsonl").write_text("".join(lines) + checked_line(again))
    (method,) = read(find_runs(folder)).methods
    scored = {key.prompt_hash for key in method.each(Metric("sums", "exact_match", "none"))}
    assert len(scored) == 29 and a_result(QUESTIONS[0], rejects=True).prompt_hash not in scored


@given(st.integers(0, 200), st.integers(5, 200))
def test_wilsons_interval_is_scipys(hits: int, number: int) -> None:
    hits = min(hits, number)
    wanted = stats.binomtest(hits, number).proportion_ci(0.95, method="wilson")
    assert measures.wilson(hits, number) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_rewards_of_two_reward_models_are_held_against_each_other_nowhere(tmp_path: Path) -> None:
    runs = [
        a_recorded_run(tmp_path / "bo", QUESTIONS, rejects=False),
        a_recorded_run(tmp_path / "spr", QUESTIONS),
        a_recorded_run(tmp_path / "other", QUESTIONS, n=8, reward_files="another checkpoint of that name"),
    ]
    page = page_of(tmp_path, *runs)
    assert len(cells(page, "differences")) == 1, "the run that another checkpoint scored is not among them"
    assert "Left out, scored by another reward model: SpecRej \N{GREEK SMALL LETTER ALPHA}=0.5 n=8" in page
    drawn = re.search(r'<figure id="reward-against-tokens">.*?</figure>', page, re.DOTALL)
    assert drawn is not None and "n=8" not in drawn[0].partition("<figcaption>")[0]


def test_each_seed_is_held_against_the_baseline_of_its_own_seed(tmp_path: Path) -> None:
    runs = [
        a_recorded_run(tmp_path / f"{rejects}{seed}", QUESTIONS, rejects=rejects, seed=seed)
        for rejects in (False, True)
        for seed in (0, 1)
    ]
    for told, ours, theirs in zip(cells(page_of(tmp_path, *runs), "differences"), runs[2:], runs[:2], strict=True):
        gaps = [
            a["trajectories"][a["best"]]["reward"] - b["trajectories"][b["best"]]["reward"]
            for a, b in zip(raw(ours), raw(theirs), strict=True)
        ]
        assert told[1].startswith("Best-of-6, seed=") and told[0][-1] == told[1][-1]
        assert told[3].startswith(f"{statistics.fmean(gaps):+.3f} [")


def test_answers_made_of_another_runs_rows_have_no_seconds(tmp_path: Path) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    journal = folder / "specrej_trajectories.jsonl"
    lines = []
    for number, line in enumerate(journal.read_text().splitlines()):
        record = {key: value for key, value in json.loads(line).items() if key != "checksum"}
        if number > 10:  # the first line is the header
            record["result"]["resolved"]["rows_from"] = "records"
            record["result"]["ledger"]["seconds"] = {}
        lines.append(checked_line(record, ensure_ascii=False))
    journal.write_text("".join(lines))
    (method,) = read(find_runs(folder)).methods
    found = measures.spend(method, "p.csv")
    timed = [sum(result["ledger"]["seconds"].values()) for result in raw(folder)[:10]]
    assert found is not None and found.seconds == pytest.approx(statistics.fmean(timed))
    assert cells(page_of(tmp_path, folder), "times")[0][-1] == "10"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400])
def test_a_score_that_is_no_finite_number_is_in_no_mean(value: str, tmp_path: Path) -> None:
    folder = an_lm_eval_run(tmp_path / "spr", QUESTIONS)
    (samples,) = folder.glob("samples_*.jsonl")
    first, *others = samples.read_text().splitlines(keepends=True)
    samples.write_text(re.sub(r'("exact_match": )[\d.]+', rf"\g<1>{value}", first) + "".join(others))
    (method,) = read(find_runs(folder)).methods
    each = method.each(Metric("sums", "exact_match", "none"))
    assert len(each) == 29 and all(map(math.isfinite, each.values())) and len(method.answers) == 30
    assert "nan" not in page_of(tmp_path, folder).partition('<script type="application/json"')[0].lower()


def test_each_task_of_a_run_has_charts_and_a_table_of_its_own(tmp_path: Path) -> None:
    tasks = ("sums", "words")
    folders = [an_lm_eval_run(tmp_path / n, QUESTIONS, rejects=n == "spr", tasks=tasks) for n in ("bo", "spr")]
    page = page_of(tmp_path, *folders)
    data = read(find_runs(*folders))
    assert data.tasks == list(tasks) and len(data.prompts) == 60
    for place, task in enumerate(tasks):
        assert f"<h3>{task}</h3>" in page and f'<figure id="{task}-reward-against-tokens">' in page
        for told, method in zip(cells(page, f"summary-{place}"), data.methods, strict=True):
            share = statistics.fmean(method.each(Metric(task, "exact_match", "none")).values())
            assert told[2].startswith(f"{100 * share:.1f} % [") and told[-1] == "30"
    texts = {prompt["task"] for prompt in PageReader(page).rows()["prompts"]}
    assert texts == set(tasks)


def test_a_cell_of_a_comparison_brings_its_tasks_scores_along_as_long_as_they_are_of_its_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_recorded_run(tmp_path / "bo", QUESTIONS, rejects=False)
    results = results_of(folder)
    scores = [float(number % 3 == 0) for number in range(30)]
    CellMetrics({"exact_match": scores}, [{}] * 6).write(folder, results, scored_by="a task")
    (method,) = read(find_runs(folder)).methods
    each = method.each(Metric("p.csv", "exact_match", "none"))
    assert [each[Key("p.csv", r.prompt_hash, 0)] for r in results] == scores
    assert cli.main(["report", str(folder)]) == 0
    assert re.search(r"exact_match +0\.3333 ± 0\.0875", capsys.readouterr().out), "in the terminal, too"
    told = json.loads((folder / "specrej_metrics.json").read_text())
    for changed in ({"of": "of other texts"}, {"best": {"exact_match": scores[:-1]}}, {"best": {"exact_match": "x"}}):
        (folder / "specrej_metrics.json").write_text(json.dumps(told | changed))
        (method,) = read(find_runs(folder)).methods
        assert [metric.name for metric in method.metrics] == ["reward"]


def judged_by_alpaca_eval(folder: Path, *, judge: str = "a_judge") -> dict[str, float]:
    """What alpaca_eval leaves in the folder of a run; instruction -> preference."""
    (folder / judge).mkdir()
    answers = [json.loads(line) for line in (folder / "specrej_outputs.jsonl").read_text().splitlines()]
    preferred = {a["instruction"]: 1 + number / 40 for number, a in enumerate(answers)}
    annotations = [
        {
            "instruction": a["instruction"],
            "output_1": "of the reference",
            "output_2": a["output"],
            "generator_2": "spr",
            "preference": preferred[a["instruction"]],
        }
        for a in answers
    ]
    annotations[1]["preference"] = None  # the judge did not say
    annotations[2]["output_2"] = "another answer, from before"
    (folder / judge / "annotations.json").write_text(json.dumps([*annotations, {"generator_2": "another"}, "nothing"]))
    (folder / judge / "leaderboard.csv").write_text(
        ",win_rate,standard_error,length_controlled_winrate,lc_standard_error,n_total\nspr,36.25,4.1,41.5,0.4,30\n"
    )
    return preferred


def test_win_rates_stand_beside_rewards_answer_by_answer_and_as_a_whole(tmp_path: Path) -> None:
    folders = two_runs(tmp_path / "runs")
    preferred = judged_by_alpaca_eval(folders[1])
    bo, spr = sorted(read(find_runs(*folders)).methods, key=lambda method: str(method.run.path))
    each = spr.each(Metric("p.csv", "win_rate", "a_judge"))
    expected = {question: 100 * (preferred[question] - 1) for question in [QUESTIONS[0], *QUESTIONS[3:]]}
    known = {prompt_hash(question): value for question, value in expected.items()}
    assert {key.prompt_hash: value for key, value in each.items()} == pytest.approx(known)
    assert not bo.each(Metric("p.csv", "win_rate", "a_judge"))
    page = page_of(tmp_path, *folders)
    summary = cells(page, "summary-0")
    assert summary[0][2] == "-" and summary[1][2].startswith(f"{statistics.fmean(expected.values()):.3f} [")
    (judged,) = cells(page, "judged")
    assert judged[1:4] == ["a_judge", "36.25 ± 4.10", "41.50 ± 0.40"] and judged[-1] == "30"
    shown = PageReader(page).rows()["prompts"][0]["by"]["1"]["scores"]
    assert shown == [["win_rate (a_judge)", pytest.approx(expected[QUESTIONS[0]])]]
    assert "win_rate (a_judge)" in page and 'id="judged"' not in page_of(tmp_path, folders[0])


@pytest.mark.parametrize("name", ["specrej_metrics.json", "specrej_preferences.json"])
def test_scores_of_a_newer_version_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_recorded_run(tmp_path / "bo", QUESTIONS, rejects=False)
    (folder / name).write_text(json.dumps({"schema_version": 99}))
    told = refused(capsys, tmp_path, folder)
    assert "newer version" in told and name in told


def test_a_cells_preferences_are_shown_as_long_as_they_are_of_its_texts(tmp_path: Path) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    results = results_of(folder)
    preferred = [None, *(number / 100 for number in range(29))]
    CellPreferences("a_judge", "bo4", preferred).write(folder, [result.text for result in results])
    metric = Metric("p.csv", "win_rate", "a_judge, against bo4")
    (method,) = read(find_runs(folder)).methods
    assert [*method.each(metric).values()] == pytest.approx([float(number) for number in range(29)])
    told = json.loads((folder / "specrej_preferences.json").read_text())
    for changed in ({"of": "of other texts"}, {"preferred": preferred[:-1]}, {"preferred": ["x"] * 30}, {"against": 3}):
        (folder / "specrej_preferences.json").write_text(json.dumps({**told, **changed}))
        (method,) = read(find_runs(folder)).methods
        assert [metric.name for metric in method.metrics] == ["reward"]


def test_survival_is_the_share_of_rows_that_rounds_have_left(tmp_path: Path) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS, n=8)
    (method,) = read(find_runs(folder)).methods
    points = measures.survival(method, "p.csv")
    assert points == [(0.0, 1.0), (4.0, 0.5), (8.0, 0.25), (12.0, 0.25)]


def test_correlations_are_made_prompt_by_prompt(tmp_path: Path) -> None:
    folder = a_recorded_run(tmp_path / "bo", QUESTIONS, rejects=False)
    (method,) = read(find_runs(folder)).methods
    first, second = measures.partial_scores(method, "p.csv")
    assert (first.look, first.tokens, first.rows, first.prompts) == (1, 4, 180, 30)
    wanted = []
    for result in raw(folder):
        rows = result["trajectories"]
        early, late = [row["look_scores"][1][1] for row in rows], [row["reward"] for row in rows]
        wanted.append(stats.pearsonr(early, late).statistic)
    assert second.pearson[1] == pytest.approx(statistics.median(wanted))
    assert len(first.points) + len(first.answers) == 180 and len(first.answers) == 30


# --- the same bytes ---


def test_a_page_is_the_same_bytes_whenever_and_wherever_it_is_made(tmp_path: Path) -> None:
    folders = two_runs(tmp_path / "runs")
    first = page_of(tmp_path, *folders)
    for number, folder in enumerate(reversed(folders)):  # the order in which runs ended is no matter
        os.utime(folder / "specrej_run.json", (1e9 + number, 1e9 + number))
    (tmp_path / "moved").mkdir()
    moved = [folder.rename(tmp_path / "moved" / folder.name) for folder in folders]
    out = tmp_path / "again.html"
    words = [sys.executable, "-m", "specrej_eval", "report", *map(str, moved), "--html", str(out)]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert out.read_bytes() == first.encode()
    assert str(tmp_path) not in first, "a page that is sent around says nothing of whose machine it was made on"


def unmeasured(page: str) -> str:
    """All but the one section of what the machine measured."""
    before, _, rest = page.partition('<section id="measured">')
    assert rest.count('<section id="') == 0 and "</section>" in rest
    return before + rest.partition("</section>")[2]


def test_only_the_section_of_measurements_knows_seconds_and_memory(tmp_path: Path) -> None:
    one, other = ([*two_runs(tmp_path / name)] for name in ("one", "other"))
    for folder in other:
        for path in folder.glob("*.jsonl"):
            changed = []
            for line in path.read_text().splitlines():
                record = {key: value for key, value in json.loads(line).items() if key != "checksum"}
                of_result = record.get("result", record)
                if "ledger" in of_result:
                    of_result["ledger"]["seconds"]["decode"] *= 3.7
                    of_result["ledger"]["peak_bytes"] += 12345678
                    of_result["ledger"]["reward_calls"] += 1
                changed.append(checked_line(record, ensure_ascii=False))
            path.write_text("".join(changed))
    pages = [page_of(tmp_path / name, *folders) for name, folders in (("one", one), ("other", other))]
    assert pages[0] != pages[1] and unmeasured(pages[0]) == unmeasured(pages[1])


# --- nothing in a text does anything ---


def hostile_runs(folder: Path) -> list[Path]:
    questions = [f"{text} asked" for text in HOSTILE.values()] + ["last"]
    texts = list(HOSTILE.values())
    return [
        a_recorded_run(
            folder / name,
            questions,
            rejects=rejects,
            n=len(texts),
            name=HOSTILE["script"],
            text=lambda row: texts[row],
            reward_model=HOSTILE["image"],
            pretrained=f"org/{HOSTILE['style']}",
        )
        for name, rejects in (("bo", False), ("spr", True))
    ]


def test_no_hostile_text_adds_an_element_or_an_attribute_to_a_page(
    tmp_path: Path, counted: Callable[[str, int], None]
) -> None:
    page = page_of(tmp_path, *hostile_runs(tmp_path / "runs"))
    reader = PageReader(page)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == 2 and tags.count("style") == 1
    assert not {"img", "iframe", "object", "embed", "a", "link", "base", "form"} & set(tags)
    for tag, attributes in reader.elements:
        assert "style" not in attributes and "src" not in attributes and "href" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    script = next(text for text in reader.texts["script"] if text.startswith('{"methods"'))
    assert not set("<>&\u2028\u2029") & set(script), "nothing in the data ends its element or a line"
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u2029\u202a-\u202e\u2066-\u2069]", page)
    data = reader.rows()
    assert [row[6] for row in data["prompts"][0]["by"]["0"]["rows"]] == [inert_page(text) for text in HOSTILE.values()]
    assert HOSTILE["scripts"] == inert_page(HOSTILE["scripts"]), "every letter of every script stays as it is"
    counted("hostile texts planted in a page", len(HOSTILE) * 2)


@given(st.text())
def test_any_text_comes_out_of_the_viewers_data_as_it_went_in(text: str) -> None:
    written = viewer.as_script({"text": text})
    assert written.isascii() and not set("<>&") & set(written)
    assert json.loads(written)["text"] == text


def test_the_policy_lets_nothing_run_but_the_pages_own_script_and_style(tmp_path: Path) -> None:
    page = page_of(tmp_path, *two_runs(tmp_path / "runs"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and policy[1].startswith("default-src 'none'; ") and "unsafe" not in policy[1]
    assert page.index("Content-Security-Policy") < page.index("<style>"), "it holds for all that comes after it"
    for name, element in (("script", "<script>"), ("style", "<style>")):
        (text,) = re.findall(rf"{element}(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy[1]
    page = page.replace("http://www.w3.org/2000/svg", "", 1)  # the name of SVG, which nothing fetches
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page


@pytest.mark.parametrize("kind", HOSTILE)
def test_tables_to_paste_hold_no_command_and_no_further_cell(kind: str) -> None:
    table = Table("t", ("run", "value"), [[Cell(HOSTILE[kind]), Cell("1", 1.0)]])
    latex = as_latex(table).splitlines()
    row = latex[4]
    assert len(latex) == 7 and row.endswith(r"& 1 \\")
    bare = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar)\{\}", "", row[:-3])
    bare = re.sub(r"\\[&%$#_{}]", "", bare)
    assert bare.count("&") == 1 and not set("\\%$#_{}~^") & set(bare), bare
    lines = as_markdown(table).splitlines()
    assert len(lines) == 3 and len(re.findall(r"(?<!\\)\|", lines[2])) == 3 and "<" not in lines[2]


@pytest.mark.parametrize("style", ["text", "markdown", "latex", "csv"])
def test_no_table_moves_a_terminals_cursor(style: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate((HOSTILE["terminal"], HOSTILE["direction"], "=1+1")):
        a_run(tmp_path / str(number), [an_answer("q", reward=1.0)], pretrained=text, seed=number)
    assert cli.main(["report", str(tmp_path), "--format", style]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and "\x07" not in told and "\u202e" not in told


# --- charts ---


def shown(scene: Any) -> list[tuple[float, float, float, float, str]]:
    """The boxes of a chart's texts."""
    found = []
    for mark in scene.marks:
        if isinstance(mark, Text):
            wide = text_width(mark.text, mark.size)
            left = mark.x - {"start": 0, "middle": wide / 2, "end": wide}[mark.anchor]
            found.append((left, mark.y - 9, left + wide, mark.y + 2, mark.text))
    return found


def points(number: int, chance: random.Random) -> list[Point]:
    told = []
    for place in range(number):
        y, reach = chance.random(), chance.random() / 4
        family = chance.choice(("best_of_n", "rejecting", "other"))
        told.append(Point(f"method {place} n=16", family, 100 + 900 * chance.random(), y, y - reach, y + reach))
    return told


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_names_lie_within_the_chart_and_off_each_other(width: int, counted: Callable[[str, int], None]) -> None:
    for seed in range(40):
        chance = random.Random(seed)
        scene = charts.pareto("t", points(4, chance), x_label="x", y_label="y", share=True, width=width)
        boxes = shown(scene)
        names = [box for box in boxes if box[4].startswith("method")]
        assert len(names) == 4
        for box in boxes:
            assert box[0] >= -1 and box[2] <= width + 1 and box[1] >= 0 and box[3] <= scene.height, box
        for place, one in enumerate(names):
            for other in names[place + 1 :]:
                apart = (
                    one[2] <= other[0] + 1 or other[2] <= one[0] + 1 or one[3] <= other[1] + 1 or other[3] <= one[1] + 1
                )
                assert apart, (seed, one, other)
    counted("charts whose names were looked at", 40)


def test_full_marks_are_those_that_nothing_beats() -> None:
    told = [
        Point(str(i), "other", x, y, None, None) for i, (x, y) in enumerate([(1, 1), (2, 3), (3, 2), (4, 4), (1, 1)])
    ]
    assert charts.frontier(told) == {0, 1, 3, 4}
    scene = charts.pareto("t", told, x_label="x", y_label="y", share=False, width=WIDE)
    assert [mark.hollow for mark in scene.marks if isinstance(mark, Dot)] == [False, False, True, False, False]


@given(
    st.lists(st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: value or 0.0), min_size=1, max_size=6),
    st.sampled_from([WIDE, NARROW]),
)
def test_charts_of_any_numbers_are_drawn(values: list[float], width: int) -> None:
    """One value, equal values, negative ones, huge ones."""
    told = [Point(f"m{i}", "best_of_n", abs(value), value, value - 1, value + 1) for i, value in enumerate(values)]
    scenes = [
        charts.pareto("t", told, x_label="x", y_label="y", share=False, width=width),
        charts.survival("t", [Curve("m", "rejecting", [(0, 1.0), (abs(v), 0.5)]) for v in values], width=width),
        charts.bars("t", [Bars("m", [abs(v), 0.0]) for v in values], ("a", "b"), x_label="x", width=width),
        charts.scatter(
            "t",
            charts.Cloud([(v, -v) for v in values], [(0.0, 1.0)]),
            x_label="x",
            y_label="y",
            role="other",
            width=width,
        ),
    ]
    for scene in scenes:
        written = as_svg(scene, alone=True)
        assert "nan" not in written and "inf" not in written.replace("infer", "")
        ElementTree.fromstring(written)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1517), (-5.6, 3.4), (0.61, 0.62), (0, 3e12)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    ticks = Axis("x", low, high).ticks()
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-9 * abs(high) <= tick <= high + 1e-9 * abs(high) for tick in ticks)
    step = ticks[1] - ticks[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


def test_light_and_dark_have_a_colour_for_every_role_and_letters_stand_out() -> None:
    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert LIGHT.keys() == DARK.keys()
    for colours in (LIGHT, DARK):
        for role in ("ink", "soft", "best_of_n", "rejecting", "other"):
            one, other = sorted((light(colours[role]), light(colours["page"])))
            assert (other + 0.05) / (one + 0.05) >= 4.5, (role, "WCAG AA")


def test_plots_are_written_as_svg_and_need_nothing(tmp_path: Path) -> None:
    folders = two_runs(tmp_path / "runs")
    words = [*map(str, folders), "--plots", str(tmp_path / "plots"), "--plot_format", "svg"]
    assert cli.main(["report", *words]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"reward-against-tokens.svg", "reward-against-flops.svg", "reward-against-seconds.svg"} <= names
    assert {"survival.svg", "tokens.svg", "time.svg", "memory.svg", "correlation.svg"} <= names
    for path in (tmp_path / "plots").iterdir():
        ElementTree.fromstring(path.read_text())


def test_plots_are_written_as_png_where_there_is_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [plots]")
    data = read(find_runs(*hostile_runs(tmp_path / "runs")))
    figures = [figure for part in chapters(data) for figure in part.figures]
    assert len(figures) >= 6
    for figure in figures[:3]:
        drawn = as_png(figure.draw(WIDE))
        assert drawn.startswith(b"\x89PNG") and drawn == as_png(figure.draw(WIDE))


def test_without_matplotlib_one_error_says_what_to_install_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = two_runs(tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = [tmp_path / "page.html", tmp_path / "plots"]
    words = ["report", *map(str, folders), "--html", str(out[0]), "--plots", str(out[1])]
    assert cli.main(words) == 1
    told = capsys.readouterr().err
    assert "pip install 'specrej-eval[plots]'" in told and "--plot_format svg" in told
    assert not out[0].exists() and not out[1].exists()


# --- large runs ---


def test_a_large_run_is_cut_at_the_stated_size_and_the_page_says_so(tmp_path: Path) -> None:
    questions = [f"{number} {'why? ' * 40}" for number in range(400)]
    folder = a_recorded_run(tmp_path / "spr", questions, text=lambda row: f"row {row} " + "because " * 200)
    whole = page_of(tmp_path, folder)
    assert "left out of the viewer" not in whole and "scores alone" not in whole
    page = page_of(tmp_path, folder, "--megabytes", "0.3")
    data = PageReader(page).rows()
    script = next(text for text in PageReader(page).texts["script"] if text.startswith('{"methods"'))
    assert len(script) <= 0.3e6 + 200
    with_texts = sum("text" in prompt for prompt in data["prompts"])
    assert 0 < with_texts < len(data["prompts"]) < 400
    bare = len(data["prompts"]) - with_texts
    assert f"Texts are here for the first {with_texts} prompts, scores alone for {bare} more" in page
    assert f"{400 - len(data['prompts'])} of 400 prompts are left out of the viewer" in page
    assert all(len(row) == 6 for prompt in data["prompts"][with_texts:] for row in prompt["by"]["0"]["rows"])
    assert unviewed(page) == unviewed(whole), "charts and tables are of all rows whatever the viewer holds"


def unviewed(page: str) -> str:
    without = re.sub(r'<p class="note">.*?</p>', "", page)
    return re.sub(r'<script type="application/json" id="rows">.*?</script>', "", without, flags=re.DOTALL)


# --- bad input ---


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: object) -> str:
    out = tmp_path / "out" / "page.html"
    assert cli.main(["report", *map(str, words), "--html", str(out)]) == 1
    assert not out.exists() and not out.parent.exists()
    return capsys.readouterr().err


def test_runs_without_rows_have_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS, rows=False)
    told = refused(capsys, tmp_path, folder)
    assert "no rows are recorded" in told and "journal=" in told


def test_runs_on_other_prompts_have_no_page_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_recorded_run(tmp_path / "one", QUESTIONS[:5])
    other = a_recorded_run(tmp_path / "other", QUESTIONS[5:], rejects=False)
    assert "no two of these runs answered a common prompt" in refused(capsys, tmp_path, one, other)


def test_a_record_of_a_newer_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    record = json.loads((folder / "specrej_run.json").read_text())
    (folder / "specrej_run.json").write_text(json.dumps({**record, "schema_version": 99}))
    assert "newer version" in refused(capsys, tmp_path, folder)
    (folder / "specrej_run.json").write_text(json.dumps(record))
    journal = folder / "specrej_trajectories.jsonl"
    journal.write_text(journal.read_text().replace('{"journal":', '{"journal": 99, "was":', 1))
    told = refused(capsys, tmp_path, folder)
    assert "newer version" in told or "damaged" in told


def test_a_damaged_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    journal = folder / "specrej_trajectories.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace("row 2 of", "row 9 of")
    journal.write_text("".join(lines))
    assert "1 damaged line" in refused(capsys, tmp_path, folder)


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "many"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path), "--html", "x.html", "--megabytes", size])
    assert "must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plot_format", "svg"], "--plot_format is about --plots"),
        (["--megabytes", "3"], "--megabytes is about --html"),
        (["--html", "x.html", "--format", "csv"], "--format csv is about the table"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    folder = a_recorded_run(own_folder / "spr", QUESTIONS[:2])
    assert cli.main(["report", str(folder), *words]) == 1
    assert told in capsys.readouterr().err and not (own_folder / "x.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["report", str(folder), "--html", str(tmp_path / "file" / "page.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err and (tmp_path / "file").read_text() == "not a folder"


def test_nothing_is_written_where_one_of_the_files_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_recorded_run(tmp_path / "spr", QUESTIONS)
    (tmp_path / "plots").write_text("not a folder")
    words = ["--html", str(tmp_path / "page.html"), "--plots", str(tmp_path / "plots"), "--plot_format", "svg"]
    assert cli.main(["report", str(folder), *words]) == 1
    assert "cannot be written" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_pages_plots_and_latex_are_made_without_a_browser_and_without_latex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = two_runs(tmp_path / "runs")

    def called(*_: object, **__: object) -> None:
        raise AssertionError("another program was called")

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(subprocess, "Popen", called)
    monkeypatch.setitem(sys.modules, "playwright", None)
    page = page_of(tmp_path, *folders, "--plots", tmp_path / "plots", "--plot_format", "svg")
    assert "\\toprule" in page and list((tmp_path / "plots").glob("*.svg"))
    assert cli.main(["report", *map(str, folders), "--format", "latex"]) == 0
    assert "\\begin{tabular}" in capsys.readouterr().out


# --- the terminal ---


def test_a_report_ends_with_what_to_conclude(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = two_runs(tmp_path / "runs")
    assert cli.main(["report", *map(str, folders)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Speculative Rejection, alpha=0.5, n=6: ") and "Best-of-N, n=6" in last
    assert cli.main(["report", str(folders[0])]) == 0
    assert "one run" in capsys.readouterr().out.strip().splitlines()[-1]


def test_a_wide_terminal_gets_a_table_of_rich(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    folders = two_runs(tmp_path / "runs")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for columns, drawn in (("180", True), ("60", False)):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["report", *map(str, folders)]) == 0
        told = capsys.readouterr().out
        assert ("\u2500" in told) == drawn and "Best-of-N, n=6" in told
        assert told.strip().splitlines()[-1].startswith("Speculative Rejection")


# --- a run that was stopped ---


def results_of(folder: Path) -> list[GenerationResult]:
    return [GenerationResult.from_dict(result) for result in raw(folder)]


@pytest.mark.slow
def test_a_run_stopped_anywhere_and_resumed_has_the_page_of_one_that_was_not(
    tmp_path: Path, counted: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files as a kill leaves them, cut at any byte; real kills: ``tests/system/test_page_of_killed_runs.py``."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("instruction\n" + "".join(f'"{11 + number} + 22 = ?"\n' for number in range(5)))
    monkeypatch.chdir(tmp_path)
    words = ["run", "--prompts", str(prompts), "--n", "4", "--max_gen_toks", "24", "--batch_size", "2"]
    whole = tmp_path / "whole" / "spr"
    assert cli.main([*words, "--output", str(whole)]) == 0
    page = page_of(tmp_path, whole)
    described = json.loads((whole / "specrej_run.json").read_text())["described"]
    assert described["parameters"] > 1e6 and described["reward_parameters"] > 2e6 and described["layers"] == 4
    assert cells(page, "summary-0")[0][4].endswith("M"), "so that there are FLOPs"
    chance = random.Random(5)
    for number in range(times := 12 if FULL else 2):
        folder = tmp_path / str(number) / "spr"
        folder.mkdir(parents=True)
        record = json.loads((whole / "specrej_run.json").read_text())
        record |= {"complete": False, "totals": {}, "spent": {}, "num_prompts": None}
        (folder / "specrej_run.json").write_text(json.dumps(record))
        for name in ("specrej_trajectories.jsonl", "specrej_outputs.jsonl"):
            content = (whole / name).read_bytes()
            start = content.index(b"\n") + 1 if "trajectories" in name else 0
            (folder / name).write_bytes(content[: chance.randrange(start, len(content))])
        assert cli.main([*words, "--output", str(folder)]) == 0
        assert unmeasured(page_of(tmp_path / str(number), folder)) == unmeasured(page)
        assert [r.text for r in results_of(folder)] and len(results_of(folder)) == 5
    counted("runs cut at a random byte, resumed and put on a page", times)

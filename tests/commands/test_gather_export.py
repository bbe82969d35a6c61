"""`specrej-eval gather` against brute force over all rows, what it refuses, and `specrej-eval export`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_folders import a_run, an_answer

from specrej_eval import cli
from specrej_eval.commands.gather import gather, write
from specrej_eval.core import Audit, Ledger
from specrej_eval.errors import ConfigError
from specrej_eval.records.answers import Answer, audit_sample
from specrej_eval.records.outputs import RecordedRun, open_run


def gathered(*runs: str, **options: Any) -> list[Answer]:
    return gather([RecordedRun.read(path) for path in runs], **options).answers


def command(*words: object) -> int:
    return cli.main([str(word) for word in words])


# gather against brute force


@st.composite
def experiments(draw: st.DrawFn) -> tuple[list[list[Answer]], list[Answer]]:
    """All answers of an experiment (every seed answers every prompt), and the same cut into shards in any order."""
    seeds = draw(st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True))
    prompts = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6))
    indexed = draw(st.booleans())
    rows: list[Answer] = []
    shards: list[list[Answer]] = []
    for seed in seeds:
        pieces: dict[int, list[Answer]] = defaultdict(list)
        for index, text in enumerate(prompts):
            answer = an_answer(
                text,
                reward=draw(st.integers(-3, 3)),
                seed=seed,
                index=index if indexed else None,
                repeat=prompts[:index].count(text),
                n=draw(st.integers(1, 9)),
            )
            rows.append(answer)
            pieces[draw(st.integers(0, 2))].append(answer)
        shards += pieces.values()
    return draw(st.permutations(shards)), rows


@given(experiment=experiments(), data=st.data())
def test_gather_is_brute_force_over_all_rows_however_the_runs_are_grouped(
    tmp_path_factory: pytest.TempPathFactory, experiment: tuple[list[list[Answer]], list[Answer]], data: st.DataObject
) -> None:
    shards, rows = experiment
    folder = tmp_path_factory.mktemp("experiment")
    runs = [a_run(folder / str(i), shard, seed=shard[0].seeds[0]) for i, shard in enumerate(shards)]

    # some of one seed's shards are gathered first, and what comes out is gathered with the rest
    seed = shards[0][0].seeds[0]
    of_seed = [i for i, shard in enumerate(shards) if shard[0].seeds == [seed]]
    first = data.draw(st.sets(st.sampled_from(of_seed), min_size=1))
    write(gather([RecordedRun.read(runs[i]) for i in sorted(first)]), folder / "first")
    rest = [path for i, path in enumerate(runs) if i not in first]
    write(gather([RecordedRun.read(path) for path in (*rest, folder / "first")]), folder / "all")
    record, answers = open_run(folder / "all")

    expected: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for row in rows:
        expected[row.instruction, row.repeat].append(row)
    assert {(answer.instruction, answer.repeat) for answer in answers} == expected.keys()
    assert len(answers) == len(expected) == record.num_prompts
    for answer in answers:
        drawn = expected[answer.instruction, answer.repeat]
        assert answer.reward == max(row.reward for row in drawn)
        assert answer.output in {row.output for row in drawn if row.reward == answer.reward}
        assert answer.n == sum(row.n for row in drawn)
        assert answer.seeds == sorted(row.seeds[0] for row in drawn)
        assert sorted(answer.finished_rewards) == sorted(reward for row in drawn for reward in row.finished_rewards)
        assert answer.ledger.decode_tokens == sum(row.ledger.decode_tokens for row in drawn)
        assert answer.seconds == pytest.approx(sum(row.seconds for row in drawn))
    assert record.totals["rows_started"] == sum(row.n for row in rows)
    assert Ledger(**record.totals).seconds["decode"] == pytest.approx(0.5 * len(rows))
    if answers[0].index is not None:
        assert [answer.index for answer in answers] == list(range(len(answers)))
    assert record.complete


@given(experiment=experiments())
def test_the_order_of_the_runs_decides_nothing(
    tmp_path_factory: pytest.TempPathFactory, experiment: tuple[list[list[Answer]], list[Answer]]
) -> None:
    shards, _ = experiment
    folder = tmp_path_factory.mktemp("experiment")
    runs = [a_run(folder / str(i), shard, seed=shard[0].seeds[0]) for i, shard in enumerate(shards)]
    one, other = gathered(*runs), gathered(*reversed(runs))
    assert sorted(map(repr, one)) == sorted(map(repr, other))


# names and records


def seeds_of_best_of_960(folder: Path) -> list[str]:
    return [
        a_run(
            folder / f"seed{seed}",
            [an_answer(text, reward=float(seed), seed=seed, index=i, n=960) for i, text in enumerate("ab")],
            name="Bo960_policy_judge",
            seed=seed,
            n=960,
        )
        for seed in (0, 8, 16, 24)
    ]


def test_four_seeds_of_best_of_960_are_best_of_3840(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = seeds_of_best_of_960(tmp_path)
    assert command("gather", *runs, "--output", tmp_path / "all") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == (
        "Bo3840_policy_judge: 2 answers of 4 runs, seeds 0, 8, 16, 24, n=3840, mean reward 24.000"
    )
    assert not printed.err
    record, answers = open_run(tmp_path / "all")
    assert record.name == "Bo3840_policy_judge"
    assert record.fingerprint["seed"] == [0, 8, 16, 24]
    assert [answer.n for answer in answers] == [3840, 3840]
    assert [part["seeds"] for part in record.described["gathered"]] == [[0], [8], [16], [24]]
    assert record.arguments == {"prompts": "p.csv", "seed": [0, 8, 16, 24]}

    # two and two, and then both, is the same
    for name, pair in (("low", runs[:2]), ("high", runs[2:])):
        assert command("gather", *pair, "--output", tmp_path / name) == 0
    assert open_run(tmp_path / "low")[0].name == "Bo1920_policy_judge"
    assert command("gather", tmp_path / "high", tmp_path / "low", "--output", tmp_path / "again") == 0
    again, same = open_run(tmp_path / "again")
    assert (again.name, again.fingerprint) == (record.name, record.fingerprint)
    assert [answer.output for answer in same] == [answer.output for answer in answers]
    assert len(again.described["gathered"]) == 4


def test_merged_speculative_rejection_does_not_pass_for_one_run_of_more_rows(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / str(seed), [an_answer("a", seed=seed)], seed=seed, strategy="speculative_rejection", alpha=0.5)
        for seed in (0, 1)
    ]
    assert gather([RecordedRun.read(path) for path in runs]).record.name == "SpR_alpha0.5_n4x2_policy_judge"


def test_shards_keep_the_runs_name_and_name_renames(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / text, [an_answer(text, index=i)], name="mine") for i, text in enumerate("ab")]
    sources = [RecordedRun.read(path) for path in runs]
    assert gather(sources).record.name == "mine"
    assert gather(sources).record.fingerprint == sources[0].record.fingerprint
    assert gather(sources, name="yours").record.name == "yours"


def test_shards_that_were_files_of_their_own_stay_one_after_another(tmp_path: Path) -> None:
    """Each counts its prompts from 0; one prompt is in both, and was drawn with the same key."""
    runs = [
        a_run(tmp_path / name, [an_answer(text, index=i) for i, text in enumerate(texts)])
        for name, texts in (("first", "abc"), ("second", "dea"))
    ]
    write(gather([RecordedRun.read(path) for path in runs]), tmp_path / "all")
    _, answers = open_run(tmp_path / "all")
    assert [answer.instruction for answer in answers] == list("abcdea")
    assert all(answer.index is None for answer in answers)


def test_equal_rewards_go_to_the_lower_seed(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(seed), [an_answer("a", reward=1.0, seed=seed)], seed=seed) for seed in (7, 3)]
    (answer,) = gathered(*runs)
    assert "seed 3" in answer.output


def test_the_audit_of_one_seed_is_not_passed_off_as_that_of_the_best_of_several(tmp_path: Path) -> None:
    def of(seed: int, text: str) -> Answer:
        audit = Audit(rows=[], num_rows=3, regret=2.0, better=1)
        found = an_answer(text, reward=float(seed), seed=seed, audit=audit)
        found.resolved["audit"] = 1.0
        found.ledger.rows_rejected = 3
        return found

    runs = [a_run(tmp_path / str(seed), [of(seed, "a")], seed=seed) for seed in (1, 2)]
    (merged,) = gathered(*runs)
    assert merged.audit is None and audit_sample([merged]).estimate() is None
    assert open_run(runs[0])[0].audit["best_rejected"] == 1.0
    shards = [a_run(tmp_path / text, [of(1, text)], seed=1) for text in "ab"]
    alone = audit_sample(gathered(*shards)).estimate()
    assert alone is not None and alone.regret == 2.0 and alone.prompts_audited == 2


# what gather refuses


def refused(*runs: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        gathered(*runs, **options)
    return str(caught.value)


def test_the_same_rows_twice_would_count_double(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", [an_answer("a", index=0), an_answer("b", index=1)])
    other = a_run(tmp_path / "other", [an_answer("b", index=1), an_answer("c", index=2)])
    message = refused(one, other)
    assert "prompt 1 ('b') was answered with seed=0 in" in message and one in message and other in message
    assert "counted twice" in refused(one, one)
    merged = [a_run(tmp_path / f"s{seed}", [an_answer("a", seed=seed)], seed=seed) for seed in (1, 2)]
    write(gather([RecordedRun.read(path) for path in merged]), tmp_path / "merged")
    assert "seed=2" in refused(str(tmp_path / "merged"), merged[1])


def test_a_prompt_asked_twice_in_one_run_is_two_prompts(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / str(seed), [an_answer("a", seed=seed, repeat=repeat) for repeat in (0, 1)], seed=seed)
        for seed in (0, 1)
    ]
    assert [(answer.repeat, answer.n) for answer in gathered(*runs)] == [(0, 8), (1, 8)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reward_model": "org/other"}, "reward_model: 'org/judge' in one, 'org/other' in another"),
        ({"reward_files": "def"}, "reward_model: other files"),
        ({"temperature": 0.7}, "temperature: 1.0 in one, 0.7 in another"),
        ({"strategy": "speculative_rejection", "alpha": 0.5}, "alpha: None in one, 0.5 in another; strategy"),
        ({"prompt_template": "Q: {instruction}"}, "prompt_template: None in one"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    one = a_run(tmp_path / "one", [an_answer("a")])
    other = a_run(tmp_path / "other", [an_answer("a", seed=1)], seed=1, **changes)
    message = refused(one, other, incomplete=True)
    assert "differ in more than the seed" in message and named in message
    assert "seed:" not in message


def test_a_prompt_that_one_seed_lacks(tmp_path: Path) -> None:
    texts = ["a", "b", "c", "d", "e"]
    one = a_run(tmp_path / "one", [an_answer(text, index=i) for i, text in enumerate(texts)])
    other = a_run(tmp_path / "other", [an_answer("a", seed=1, index=0)], seed=1)
    message = refused(one, other)
    assert "seed=1" in message and other in message
    assert "lacks 4 of 5 prompts: prompt 1 ('b'); prompt 2 ('c'); prompt 3 ('d'); ..." in message
    result = gather([RecordedRun.read(one), RecordedRun.read(other)], incomplete=True)
    assert [(answer.instruction, answer.n) for answer in result.answers] == [("a", 8)]
    assert result.left_out == 4 and not result.record.complete


def test_runs_of_other_prompts_at_the_same_places(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", [an_answer("a", index=0)])
    other = a_run(tmp_path / "other", [an_answer("b", seed=1, index=0)], seed=1)
    assert "lacks 1 of 2 prompts: prompt 0 ('b')" in refused(one, other)
    assert "no prompt was answered by all of the seeds 0, 1" in refused(one, other, incomplete=True)


def test_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path / "one", [an_answer(text, index=i) for i, text in enumerate("abc")])
    other = a_run(tmp_path / "other", [an_answer("b", seed=1, index=1)], seed=1, complete=False)
    assert f"{other!r} is not finished: it has 1 answer so far" in refused(one, other)
    assert command("gather", one, other, "--output", tmp_path / "all") == 1
    assert "--incomplete" in capsys.readouterr().err
    assert command("gather", one, other, "--output", tmp_path / "all", "--incomplete") == 0
    assert "2 prompts left out" in capsys.readouterr().err
    record, answers = open_run(tmp_path / "all")
    assert [answer.instruction for answer in answers] == ["b"]
    assert not record.complete
    assert "not finished" in refused(str(tmp_path / "all")), "what was made of parts is a part for ever"


def test_an_answer_without_a_finite_reward(tmp_path: Path) -> None:
    one = a_run(tmp_path / "one", [an_answer("a"), an_answer("b", reward=None)])
    other = a_run(tmp_path / "other", [an_answer(text, seed=1) for text in "ab"], seed=1)
    assert "instruction 'b' has no finite reward" in refused(one, other)
    assert [answer.instruction for answer in gathered(one, other, incomplete=True)] == ["a"]


def test_a_run_without_answers_and_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = a_run(tmp_path / "empty", [], complete=False)
    for path, message in ((empty, "has no answers yet"), (tmp_path, "is not a run of specrej-eval")):
        assert command("gather", path, "--output", tmp_path / "all") == 1
        assert message in capsys.readouterr().err


def test_gather_never_overwrites_what_was_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(tmp_path / text, [an_answer(text, index=i)]) for i, text in enumerate("abc")]
    before = (tmp_path / "c" / "specrej_outputs.jsonl").read_bytes()
    for output in (runs[2], runs[0]):
        assert command("gather", *runs[:2], "--output", output) == 1
    printed = capsys.readouterr().err
    assert "would overwrite" in printed and "is one of the runs to gather" in printed
    assert (tmp_path / "c" / "specrej_outputs.jsonl").read_bytes() == before
    for taken in (runs[:2], runs):  # but what was gathered may be gathered anew
        assert command("gather", *taken, "--output", tmp_path / "all") == 0
    assert len(open_run(tmp_path / "all")[1]) == 3


def test_gather_says_which_prompts_no_shard_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path / "one", [an_answer("a", index=0), an_answer("b", index=1)])
    other = a_run(tmp_path / "other", [an_answer("e", index=4), an_answer("g", index=6)])
    assert command("gather", one, other, "--output", tmp_path / "all") == 0
    assert "prompts 2-3, 5 are in none of the runs" in capsys.readouterr().err


# export


def test_export_writes_what_alpaca_eval_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spr = a_run(
        tmp_path / "spr",
        [an_answer("a", reward=1.5, output="\n one \n"), an_answer("b")],
        name="SpR",
        strategy="speculative_rejection",
        alpha=0.5,
    )
    bo4 = a_run(tmp_path / "bo4", [an_answer("a", output="zwölf"), an_answer("b")], name="Bo4")
    output = tmp_path / "new" / "outputs.json"
    assert command("export", "alpaca", spr, bo4, "--output", output) == 0
    assert not capsys.readouterr().err
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert [list(row) for row in rows] == [["instruction", "output", "generator", "score"]] * 4
    assert [(row["instruction"], row["generator"]) for row in rows] == [
        ("a", "SpR"), ("b", "SpR"), ("a", "Bo4"), ("b", "Bo4")
    ]  # fmt: skip
    assert (rows[0]["output"], rows[0]["score"]) == ("one", 1.5)
    assert "zwölf" in output.read_text(encoding="utf-8")

    made = json.loads((tmp_path / "new" / "outputs.specrej.json").read_text(encoding="utf-8"))["generators"]
    assert made.keys() == {"SpR", "Bo4"}
    assert made["SpR"]["fingerprint"] == open_run(spr)[0].fingerprint
    assert {key: made["SpR"][key] for key in ("reward_model", "reward_files", "n", "embedded_demo_pair")} == {
        "reward_model": "org/judge", "reward_files": "abc", "n": 4, "embedded_demo_pair": False
    }  # fmt: skip
    assert not list(output.parent.glob(".*")), "written in one step, with nothing left behind"


def test_export_takes_gathered_runs(tmp_path: Path) -> None:
    runs = seeds_of_best_of_960(tmp_path)
    write(gather([RecordedRun.read(path) for path in runs]), tmp_path / "all")
    assert command("export", "alpaca", tmp_path / "all", "--output", tmp_path / "x.json") == 0
    assert {row["generator"] for row in json.loads((tmp_path / "x.json").read_text())} == {"Bo3840_policy_judge"}
    made = json.loads((tmp_path / "x.specrej.json").read_text())["generators"]["Bo3840_policy_judge"]
    assert (made["n"], made["fingerprint"]["seed"]) == (3840, [0, 8, 16, 24])


def test_export_of_one_run_under_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = a_run(tmp_path / "one", [an_answer("a")], name="Bo4")
    other = a_run(tmp_path / "other", [an_answer("a", seed=1)], name="Bo4", seed=1)
    output = tmp_path / "x.json"
    assert command("export", "alpaca", one, "--name", "mine", "--output", output) == 0
    assert json.loads(output.read_text())[0]["generator"] == "mine"
    assert json.loads((tmp_path / "x.specrej.json").read_text())["generators"].keys() == {"mine"}
    before = output.read_bytes()
    capsys.readouterr()
    for words, message in (
        ((one, other), "are both called 'Bo4'"),
        ((one, other, "--name", "mine"), "would give 2 runs the same name"),
    ):
        assert command("export", "alpaca", *words, "--output", output) == 1
        assert message in capsys.readouterr().err
    assert command("export", "alpaca", one, "--output", tmp_path / "x.csv") == 1
    assert "must end with .json" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_export_says_what_makes_runs_incomparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = a_run(tmp_path / "whole", [an_answer(text) for text in "abc"], name="whole")
    part = a_run(
        tmp_path / "part",
        [an_answer("a"), an_answer("a", repeat=1), an_answer("x", reward=None)],
        name="part",
        complete=False,
        pretrained="embedded",
    )
    assert command("export", "alpaca", whole, part, "--output", tmp_path / "x.json") == 0
    printed = capsys.readouterr().err
    for remark in (
        "part is not finished: it has 3 answers so far",
        "part has answers to 1 prompt asked before ('a')",
        "part has no answer to 2 prompts of whole ('b')",
        "part has answers to 2 prompts that whole lacks ('a')",
        "part: no finite reward for 1 answer",
        "part was made with embedded demo models",
    ):
        assert remark in printed
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["generator"] for row in rows] == ["whole"] * 3 + ["part"] * 3
    assert rows[-1]["score"] is None

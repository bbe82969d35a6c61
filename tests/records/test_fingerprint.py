"""Fingerprints: equal for runs with equal answers, different for all others, and readable when they differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.other_values import OTHER

from specrej_eval.config import ARGUMENTS, DECIDING, NEUTRAL, Decides, RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.records.fingerprint import (
    check_same,
    differences,
    is_demo,
    of_models,
    of_run,
    same,
)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig) if field.name not in NEUTRAL])
def test_every_argument_but_the_neutral_ones_is_part_of_it(name: str) -> None:
    if (
        ARGUMENTS[name].decides is Decides.KEPT
    ):  # keeps more of the same answers; a journal has to tell them apart, a run need not
        assert name in DECIDING
        return
    assert name in OTHER, f"say in OTHER what {name} could be, or where it is declared that it decides nothing"
    base, changed = RunConfig(n=16), RunConfig(**{"n": 16, name: OTHER[name]})
    assert differences(of_run(base, {}), of_run(changed, {})), name
    if name not in DECIDING:
        assert differences(of_models(base, {}), of_models(changed, {})), name


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_arguments_are_not(name: str) -> None:
    config = dataclasses.replace(RunConfig(), **{name: "something else"})
    assert same(of_run(config, {}), of_run(RunConfig(), {}))


def test_what_is_left_out_and_what_is_written_out_are_the_same_run() -> None:
    assert of_run(RunConfig(), {}) == of_run(RunConfig(n=16), {})
    bon = RunConfig(strategy="best_of_n")
    assert of_run(bon, {}) == of_run(bon.replace(alpha=0.9), {}), "Best-of-N has no alpha"
    assert of_run(RunConfig(), {"token": "secret", "device_map": "auto"}) == of_run(RunConfig(), {})
    assert of_run(RunConfig(), {"revision": "v2"}) != of_run(RunConfig(), {})
    assert of_run(RunConfig(), {}, prompt_template="{instruction}") != of_run(RunConfig(), {})


def test_an_edited_reward_function_is_another_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "a_reward_of_mine.py"
    module.write_text("def score(conversation, responses): return [0.0 for _ in responses]\n")
    config = RunConfig(reward_model="a_reward_of_mine:score")
    before = of_models(config, {})
    module.write_text("def score(conversation, responses): return [1.0 for _ in responses]\n")
    assert differences(before, of_models(config, {})) == "reward_model: a_reward_of_mine.py changed"


def test_another_checkpoint_in_the_same_folder_is_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = RunConfig(pretrained=str(tmp_path), reward_model="likelihood")
    before = of_models(config, {})
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert differences(before, of_models(config, {})) == "pretrained: config.json changed"


def test_an_edited_template_file_is_another_template(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("one")
    config = RunConfig(reward_template=str(file))
    before = of_models(config, {})
    file.write_text("two")
    assert differences(before, of_models(config, {})).startswith("reward_template")


def test_no_password_is_written_down() -> None:
    config = RunConfig(reward_model="http://me:secret@host:8000")
    assert "secret" not in str(of_run(config, {}))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("http://me:secret@host:8000/v1", "http://host:8000/v1"),
        ("http://me:sec@ret@host", "http://host"),
        ("judge:m@http://me:secret@host", "judge:m@http://host"),
        ("http://me:secret@a+0.5*http://me:secret@b", "http://a+0.5*http://b"),
        ("http://a:1+judge:m@http://b", "http://a:1+judge:m@http://b"),
        (
            '["http://a:1", {"reward_model": "judge:m@http://b"}]',
            '["http://a:1", {"reward_model": "judge:m@http://b"}]',
        ),
    ],
)
def test_only_the_password_is_left_out_of_a_name(name: str, written: str) -> None:
    assert RunConfig(reward_model=name).to_dict()["reward_model"] == written


def test_the_demo_pair_is_known_wherever_it_lies() -> None:
    assert of_models(RunConfig(), {})["pretrained"] == "embedded"
    assert is_demo(of_models(RunConfig(), {}))
    assert not is_demo(of_models(RunConfig(pretrained="a/b", reward_model="likelihood"), {}))


def test_a_difference_is_told_in_words() -> None:
    then, now = of_run(RunConfig(), {}), of_run(RunConfig(alpha=0.25, seed=3), {})
    with pytest.raises(
        ConfigError, match=r"out was started.*alpha was 0.5, is now 0.25; seed was 0, is now 3.*\n.*delete it"
    ):
        check_same(then, now, what="out", remedy="delete it")
    check_same(then, then, what="out", remedy="delete it")


@pytest.mark.parametrize("name", ["~nobody/there", "x" * 5000, '["' + "a" * 300 + '", "likelihood"]', "with\0nothing"])
def test_any_text_can_be_asked_for_as_a_name(name: str) -> None:
    """Reward names may be long lists; a path that the file system does not take is simply not there."""
    config = RunConfig(pretrained="owner/model", reward_model=name)
    assert of_models(config, {})["reward_model"] == name
    assert RunConfig(reward_template=name, judge_prompt=name) and of_models(RunConfig(judge_prompt=name), {})

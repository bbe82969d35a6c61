"""The command ``lm_eval``: what is told in one message where lm-eval, or we, would end in a traceback."""

from __future__ import annotations

import sys
import types

import pytest

from specrej_eval import stopping
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval import command
from specrej_eval.harness.lm_eval.model import SpecRejLM

NO_MODEL = "Attempted to load model '{}', but no model for this name found! Supported model names: hf, vllm, specrej"


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_of_ours_is_one_message_and_a_traceback_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: bool
) -> None:
    def cli_evaluate() -> None:
        SpecRejLM.create_from_arg_string("alhpa=0.5")

    main = types.ModuleType("lm_eval.__main__")
    main.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]  # a stand-in for lm-eval's own
    command.wrap_command(main)
    monkeypatch.setattr("sys.argv", ["lm_eval", "--model", "specrej", "--model_args", "alhpa=0.5"])
    monkeypatch.setenv("SPECREJ_DEBUG", "1" if debug else "0")
    with pytest.raises(ConfigError if debug else SystemExit) as caught:
        main.cli_evaluate()
    told = str(caught.value) if debug else capsys.readouterr().err
    assert "unknown argument 'alhpa'" in told and "did you mean 'alpha'" in told
    assert debug or caught.value.code == 1


def ended(words: list[str], monkeypatch: pytest.MonkeyPatch) -> BaseException:
    """How lm-eval's own command ends."""
    import lm_eval.__main__ as main

    command.wrap_command(main)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    with pytest.raises((SystemExit, ValueError)) as caught:
        main.cli_evaluate()
    return caught.value


@pytest.mark.usefixtures("few_tasks_here")
@pytest.mark.parametrize("words", [["--model", "spcrej", "--tasks", "gsm8k"], ["run", "-M", "specrej", "-t", "gsm8kk"]])
def test_a_name_lm_eval_does_not_know_is_one_message(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ended(words, monkeypatch)
    told = capsys.readouterr().err
    assert isinstance(found, SystemExit) and found.code == 1 and "Traceback" not in told
    assert "did you mean --model specrej?" in told or "Did you mean 'gsm8k'?" in told


@pytest.mark.parametrize(
    ("message", "options", "told"),
    [
        ("Tasks not found: gsm8kk", {}, ["no task 'gsm8kk'", "Did you mean 'gsm8k'?", "`lm-eval ls tasks`"]),
        (
            "Tasks not found: specrej_arithmetic",
            {},
            ["is a task of specrej-eval: add --include_path"],
        ),
        (
            "Tasks not found: specrej_promtps",
            {},
            ["Did you mean 'specrej_prompts'?", "`specrej-eval init`"],
        ),
        ("Tasks not found: gsm8kk, no_such_thing", {}, ["no tasks 'gsm8kk', 'no_such_thing'", "Did you mean 'gsm8k'?"]),
        ("Tasks not found: mine", {"include_path": "/no/such"}, ["--include_path /no/such is no folder."]),
        (NO_MODEL.format("spcrej"), {}, ["no model 'spcrej'", "did you mean --model specrej?"]),
        (NO_MODEL.format("best_of_m"), {}, ["no model 'best_of_m'", "did you mean --model best_of_n?"]),
        (NO_MODEL.format("vlm"), {}, ["did you mean --model vllm?", "lm-eval's own: hf, vllm."]),
    ],
)
def test_the_message_names_the_nearest_and_what_to_add(
    message: str, options: dict[str, str], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "task_names", lambda _: ["gsm8k", "mmlu"])
    found = str(command.unknown_name(message, options))
    assert not [part for part in told if part not in found], found


def test_what_is_no_run_of_ours_ends_as_lm_eval_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def cli_evaluate() -> None:
        raise ValueError("Tasks not found: gsm8kk")

    monkeypatch.setattr(command, "task_names", lambda _: ["gsm8k"])
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "hf", "--tasks", "gsm8kk"])
    main = types.ModuleType("lm_eval.__main__")
    main.cli_evaluate = cli_evaluate  # type: ignore[attr-defined]  # a stand-in for lm-eval's own
    command.wrap_command(main)
    with pytest.raises(ValueError, match=r"^Tasks not found: gsm8kk$"):
        main.cli_evaluate()
    with stopping.command(), pytest.raises(SystemExit):  # `specrej-eval lm-eval`
        main.cli_evaluate()


@pytest.mark.parametrize("message", ["", "Tasks: none", "some other ValueError of lm-eval"])
def test_other_errors_of_lm_eval_stay_its_own(message: str) -> None:
    assert command.unknown_name(message, {}) is None

"""The `specrej-eval` command: help, mistakes, `report` on results files as lm-eval writes them, `path`, `doctor`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specrej_eval import cli
from specrej_eval.commands import doctor
from specrej_eval.commands import report as summary
from specrej_eval.errors import ConfigError


def arguments(**changes: Any) -> dict[str, Any]:
    return {"strategy": "speculative_rejection", "alpha": 0.5, "n": 16, "seed": 0} | changes


def write_results(
    folder: Path,
    *,
    date: float,
    resolved: dict[str, Any] | None = None,
    scores: dict[str, dict[str, Any]] | None = None,
    limit: float | None = None,
    warnings: tuple[str, ...] = (),
    hardware: Any = "4 cores",
    rejected: int = 30,
) -> Path:
    """One results file with the fields of lm-eval 0.4.13 that matter here, and our own block."""
    config: dict[str, Any] = {"model": "hf", "model_args": {"pretrained": "x"}, "limit": limit}
    if resolved is not None:
        config |= {"model": "specrej", "model_args": {}}
        config["specrej"] = {
            "arguments": resolved,
            "totals": {
                "requests": 4,
                "prompt_tokens": 100,
                "decode_tokens": 12345,
                "reward_tokens": 6789,
                "reward_calls": 8,
                "rows_started": 60,
                "rows_finished": 60 - rejected,
                "rows_rejected": rejected,
                "seconds": {"prefill": 0.5, "decode": 2.0, "reward": 1.0, "other": 0.25},
                "peak_bytes": 1,
            },
            "mean_reward": 1.5,
            "hardware": hardware,
            "warnings": list(warnings),
        }
    content = {
        "results": scores
        or {"sums": {"alias": "sums", "exact_match,none": 0.75, "exact_match_stderr,none": 0.25, "sample_len": 4}},
        "config": config,
        "date": date,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps(content))
    return path


def report(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["report", *map(str, words)]) == 0
    return capsys.readouterr().out


# --- help and mistakes ---


def test_help_lists_every_command_and_shows_runnable_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert "--model specrej --model_args alpha=0.5" in text


OF_OURS = [name for name in cli.COMMANDS if cli.load(name).add_arguments is not None]


@pytest.mark.parametrize("name", OF_OURS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"specrej-eval {name}" in text.partition("examples:")[2]
    assert "(default: None)" not in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_file_of_commands_is_a_command(name: str) -> None:
    """The contract of the folder: what a new file there must have, and that nothing else must be edited for it."""
    command = cli.load(name)
    assert 10 < len(command.SUMMARY) < 110 and command.SUMMARY[0].islower() and not command.SUMMARY.endswith(".")
    assert command.EXAMPLES and all(
        f"specrej-eval {name}" in text or "specrej_eval" in text for text in command.EXAMPLES
    )
    assert callable(command.run)


def test_the_folder_of_commands_holds_nothing_else() -> None:
    files = {path.name for path in Path(str(cli.commands.__file__)).parent.iterdir() if path.name[0] != "_"}
    assert {file.removesuffix(".py").replace("_", "-") for file in files} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", OF_OURS)
def test_options_have_one_spelling_in_all_commands(name: str) -> None:
    options = {action.dest: action for action in cli._options(cli.parser_of(name))}
    assert not {"out", "overwrite", "output_path", "output_dir"} & options.keys()
    assert "force" not in options or options["force"].nargs == 0, "--force is a flag"
    for action in options.values():
        assert not [text for text in action.option_strings if "-" in text[2:]], "words of a name are joined by _"
        assert action.help, f"{action.dest} says nothing"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--out", "x"], {"output": "x", "force": False}),
        (["--out=x", "--force"], {"output": "x", "force": True}),
        (["--output", "x", "--overwrite", "true"], {"output": "x", "force": True}),
        (["--output", "x", "--overwrite=false"], {"output": "x", "force": False}),
        (["--output", "x", "--overwrite"], {"output": "x", "force": True}),
    ],
)
def test_old_spellings_are_taken_with_a_note(
    words: list[str], wanted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = vars(cli.parse("submission", ["lm-eval", "results", *words]))
    assert {name: found[name] for name in wanted} == wanted
    old = [word.partition("=")[0] for word in words if word.startswith(("--out=", "--overwrite")) or word == "--out"]
    assert capsys.readouterr().err == "".join(
        f"note: {word} is called {'--output' if word == '--out' else '--force'} now\n" for word in old
    )


@pytest.mark.parametrize("name", OF_OURS)
def test_a_misspelt_option_of_any_command_suggests_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [action for action in cli._options(cli.parser_of(name)) if len(action.dest) > 5]
    needed = {"gather": ["a", "--output", "b"], "export": ["alpaca", "a", "--output", "b"], "path": ["tasks"]}
    needed |= {"journal": ["merge", "a", "--output", "b"], "submission": ["lm-eval", "a", "--output", "b"]}
    needed |= {"report": ["a"], "score": ["--input", "a"]}
    for action in options[:3]:
        wrong = f"--{action.dest[:-1]}zq"
        with pytest.raises(ConfigError, match=f"unknown option '{wrong}'"):
            cli.parse(name, [*needed.get(name, []), wrong])


def test_help_imports_no_heavy_package() -> None:
    program = (
        "import sys\nfrom specrej_eval import cli\nassert cli.main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'alpaca_eval', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("typed", "meant"), [("docter", "doctor"), ("lm_eval", "lm-eval"), ("reports", "report")])
def test_an_unknown_command_suggests_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([typed]) == 2
    assert f"did you mean `specrej-eval {meant}`?" in capsys.readouterr().err


def test_a_command_like_no_other_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["xyzzy"]) == 2
    assert ", ".join(cli.COMMANDS) in capsys.readouterr().err


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage:" in capsys.readouterr().out


# --- path ---


def test_path_prints_a_folder_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tasks", "model_configs"):
        assert cli.main(["path", name]) == 0
        assert Path(capsys.readouterr().out.strip()).is_dir()


# --- report ---


def test_report_shows_scores_and_costs_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "brave-otter", date=1.0, resolved=arguments())
    write_results(tmp_path / "n1" / "calm-newt", date=2.0, resolved=arguments(strategy="best_of_n", n=1), rejected=0)
    write_results(tmp_path / "n16" / "shy-crow", date=3.0, resolved=arguments(strategy="best_of_n"), rejected=0)
    lines = report(capsys, tmp_path).splitlines()
    assert lines[0].split("  ")[0] == "run" and "exact_match ± stderr" in lines[0]
    assert [line.partition("   ")[0].strip() for line in lines[2:5]] == [
        "Speculative Rejection, alpha=0.5, n=16",
        "Sampling, n=1",
        "Best-of-N, n=16",
    ]
    assert lines[2].split()[-9:] == ["0.7500", "±", "0.2500", "1.500", "12,345", "6,789", "50.0%", "3.8", "27%"]
    assert lines[3].split()[-3] == "0.0%"
    assert "hardware: 4 cores" in lines


def test_report_counts_only_the_newest_of_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """lm-eval makes up a new folder name for every run that is given no `pretrained`."""
    new = {"sums": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.1}}
    write_results(tmp_path / "newer", date=2.0, resolved=arguments(), scores=new)
    write_results(tmp_path / "older", date=1.0, resolved=arguments(trace_path="elsewhere.jsonl"))
    text = report(capsys, tmp_path)
    assert "0.5000 ± 0.1000" in text and "0.7500" not in text


def test_report_tells_apart_runs_that_would_share_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(seed=0))
    write_results(tmp_path, date=2.0, resolved=arguments(seed=1))
    text = report(capsys, tmp_path)
    assert "n=16, seed=0" in text and "n=16, seed=1" in text


def test_report_names_metrics_filters_and_tasks_where_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "sums": {"exact_match,strict": 0.25, "exact_match,loose": 0.5, "exact_match_stderr,strict": "N/A"},
        "words": {"bleu,none": 12.0},
    }
    write_results(tmp_path, date=1.0, resolved=arguments(), scores=scores)
    text = report(capsys, tmp_path, "--format", "markdown")
    assert text.startswith("| run ") and text.splitlines()[1].endswith("-: |")
    for word in ("sums", "words", "strict", "loose", "exact_match", "bleu", "12.0000"):
        assert word in text
    assert text.count("12,345") == 1, "what a run cost is said once"


def test_report_shows_a_run_of_another_model_without_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0)
    assert report(capsys, tmp_path).splitlines()[2].split() == ["hf", "0.7500", "±", "0.2500", *"------"]


def test_report_warns_of_what_makes_runs_incomparable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments(), limit=2.0, warnings=("greedy task was sampled",))
    write_results(tmp_path, date=2.0, resolved=arguments(alpha=0.25), hardware={"device": "gpu", "memory_gib": 80})
    text = report(capsys, tmp_path)
    assert "their seconds do not compare" in text
    assert "not scores of the whole task" in text
    assert "warning: greedy task was sampled (Speculative Rejection, alpha=0.5, n=16)" in text
    assert "hardware: device=gpu, memory_gib=80" in text


def test_report_as_json_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments())
    (row,) = json.loads(report(capsys, tmp_path, "--format", "json"))
    assert (row["value"], row["stderr"], row["rejected_share"], row["seconds"]) == (0.75, 0.25, 0.5, 3.75)
    assert row["scoring_share"] == 1 / 3.75


def test_report_passes_over_files_that_are_not_results(tmp_path: Path) -> None:
    write_results(tmp_path, date=1.0, resolved=arguments())
    (tmp_path / "half.json").write_text('{"results": {"su')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "other.json").write_text('{"results": {}, "config": null}')
    assert len(summary.find_runs(tmp_path)) == 1


def test_report_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "--output_path" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


# --- doctor ---


def test_doctor_finds_nothing_broken_where_the_tests_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert code == 0, text
    for word in ("specrej_eval.pth", "lm-eval", "torch", "sdpa", "demo policy", "specrej, best_of_n"):
        assert word in text


def test_doctor_fails_on_a_package_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "4.40.0" if name == "transformers" else real(name)
    )
    (finding,) = [found for found in doctor.check_versions() if found.status == "broken"]
    assert finding.subject == "transformers"
    assert "4.40.0 is outside" in finding.detail and "pip install" in finding.detail


def test_doctor_fails_when_the_demo_weights_are_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("specrej_eval.demo.POLICY_DIR", tmp_path)
    found = {finding.subject: finding for finding in doctor.check_files()}
    assert found["demo policy"].status == "broken" and str(tmp_path) in found["demo policy"].detail


def test_doctor_exits_with_one_if_anything_needed_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(status: doctor.Status) -> Any:
        return lambda: iter([doctor.Finding(status, "thing", "detail")])

    monkeypatch.setattr(doctor, "SECTIONS", (("A", check("ok")), ("B", check("note"))))
    assert cli.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "SECTIONS", (("A", check("ok")), ("B", check("broken"))))
    assert cli.main(["doctor"]) == 1
    assert "1 thing broken." in capsys.readouterr().out


def test_doctor_says_so_when_the_off_switch_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECREJ_EVAL_AUTOLOAD", "0")
    finding = next(doctor.check_startup_hook())
    assert (finding.status, finding.subject) == ("note", "SPECREJ_EVAL_AUTOLOAD")
    assert "off" in finding.detail

"""The `specrej-eval` command: help, mistakes, `report` on results files as lm-eval writes them, `path`, `doctor`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specrej_eval import cli
from specrej_eval.commands import doctor
from specrej_eval.errors import ConfigError

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
    needed |= {"report": ["a"], "replay": ["a"], "score": ["--input", "a"]}
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

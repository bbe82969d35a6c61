"""alpaca_eval 0.6.6 as its users get it with us: what it cannot do by itself works, and its files stay as they are."""

from __future__ import annotations

import copy
import getpass
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import alpaca_eval.main
import huggingface_hub.constants
import pandas as pd
import pytest
from alpaca_eval import annotators, constants, decoders, utils
from support.alpaca_runs import alpaca_eval as run_alpaca_eval
from support.alpaca_runs import sums, write
from support.fake_hub import add_dataset_files
from support.openai_server import JudgeServer

from specrej_eval import registry
from specrej_eval.errors import ConfigError
from specrej_eval.harness import startup as startup_hooks
from specrej_eval.harness.alpaca_eval import prompts as alpaca_eval_prompts
from specrej_eval.harness.alpaca_eval import registration
from specrej_eval.harness.alpaca_eval import runs as alpaca_eval_runs
from specrej_eval.harness.alpaca_eval import swap as alpaca_eval_swap
from specrej_eval.harness.alpaca_eval.prompts import RenderedPrompt, make_prompts
from specrej_eval.harness.alpaca_eval.repairs import cache as alpaca_eval_cache
from specrej_eval.harness.alpaca_eval.repairs import configs as alpaca_eval_configs
from specrej_eval.harness.alpaca_eval.repairs import data as alpaca_eval_data
from specrej_eval.harness.alpaca_eval.repairs import leaderboard as alpaca_eval_leaderboard
from specrej_eval.harness.alpaca_eval.repairs import pkg_resources, unknown_user
from specrej_eval.harness.patching import is_patched

PACKAGE = Path(alpaca_eval.__file__).parent


pytestmark = pytest.mark.usefixtures("alpaca_eval_stays_as_installed", "own_folder")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def python(program: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake(name: str, **members: Any) -> Any:
    """A module of an alpaca_eval that is not 0.6.6."""
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


# --- the import itself ----------------------------------------------------------------------------


def test_alpaca_eval_imports_without_pkg_resources_and_leaves_no_stand_in_behind(tmp_path: Path) -> None:
    program = (
        "import sys\nassert 'specrej_eval' not in sys.modules\n"
        "import alpaca_eval.utils as utils, importlib.metadata as metadata\n"
        "assert utils.get_multi_package_version(['alpaca_eval']) == 'alpaca_eval==' + metadata.version('alpaca_eval')\n"
        "assert utils.check_pkg_atleast_version('pandas', '0.1')\n"
        "assert not utils.check_pkg_atleast_version('pandas', '1000')\n"
        "from specrej_eval.harness.startup import failed_repairs\n"
        "print('pkg_resources' in sys.modules, failed_repairs)"
    )
    assert python(program, tmp_path) == "False {}"


def test_a_real_pkg_resources_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fake("pkg_resources")
    monkeypatch.setitem(sys.modules, "pkg_resources", real)
    assert pkg_resources.stand_in_for_pkg_resources(utils) is None
    assert sys.modules["pkg_resources"] is real


def test_the_stand_in_goes_even_if_the_module_cannot_be_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    autoload = startup_hooks.autoload_module()

    class Broken:
        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: Any) -> None:
            assert "pkg_resources" in sys.modules
            raise ImportError("broken")

    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    monkeypatch.delitem(sys.modules, "pkg_resources")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = importlib.machinery.ModuleSpec("alpaca_eval.utils", autoload.HookLoader(Broken()))
    with pytest.raises(ImportError, match="broken"):
        importlib.util.module_from_spec(spec).__spec__.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "pkg_resources" not in sys.modules


def test_a_user_without_a_name_gets_one_while_constants_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    undo = unknown_user.name_unknown_user(constants)
    assert undo is not None and getpass.getuser() == "unknown"
    undo()
    assert "LOGNAME" not in os.environ


def test_alpaca_eval_imports_for_a_bare_user_id(tmp_path: Path) -> None:
    """As in a container started with --user 12345."""
    program = (
        "import os, pwd\n"
        "for name in ('LOGNAME', 'USER', 'LNAME', 'USERNAME'): os.environ.pop(name, None)\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from alpaca_eval import constants; print(constants.CURRENT_USER, 'LOGNAME' in os.environ)"
    )
    assert python(program, tmp_path) == "unknown False"


def test_a_user_with_a_name_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ada")
    assert unknown_user.name_unknown_user(constants) is None
    assert getpass.getuser() == "ada"


def test_one_repair_that_fails_warns_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def sabotage(module: Any) -> None:
        raise RuntimeError("sabotage")

    done: list[Any] = []

    def works(module: Any) -> None:
        done.append(module)

    monkeypatch.setattr(startup_hooks, "failed_repairs", {})
    monkeypatch.setattr(startup_hooks, "OURS", ("nosuch_module", registration.__name__))
    monkeypatch.setattr(registration, "AFTER", {"alpaca_eval.decoders": (sabotage, works)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        startup_hooks.repair_alpaca_eval(decoders)
    assert done == [decoders]
    assert [warning.category for warning in caught] == [RuntimeWarning] * 2
    assert "sabotage" in str(caught[1].message) and "specrej-eval doctor" in str(caught[1].message)
    assert len(startup_hooks.failed_repairs) == 2


def test_every_repair_has_a_table_and_what_it_names_is_watched_for() -> None:
    autoload = startup_hooks.autoload_module()
    homes = [f"{startup_hooks.REPAIRS}.{name}" for name in registry.names(startup_hooks.REPAIRS)]
    assert len(homes) >= 7
    for table, hooks in (("AFTER", autoload.HOOKS), ("BEFORE", autoload.BEFORE)):
        named = set()
        for home in (*homes, *startup_hooks.OURS):
            module = importlib.import_module(home)
            assert hasattr(module, "AFTER") or hasattr(module, "BEFORE"), f"{home} has neither AFTER nor BEFORE"
            entries = getattr(module, table, {})
            named |= set(entries)
            assert all(callable(repair) for repairs in entries.values() for repair in repairs)
        assert named == {name for name in hooks if name.startswith("alpaca_eval")}


def test_hooks_that_run_twice_patch_once() -> None:
    before = utils.make_prompts, utils.pd, annotators.BaseAnnotator.__init__, alpaca_eval.main.evaluate
    for name in startup_hooks.autoload_module().HOOKS:
        if name.startswith("alpaca_eval"):
            startup_hooks.repair_alpaca_eval(sys.modules[name])
    assert before == (utils.make_prompts, utils.pd, annotators.BaseAnnotator.__init__, alpaca_eval.main.evaluate)


def test_a_late_activation_repairs_what_is_there(tmp_path: Path) -> None:
    """Switched off at start, with an alpaca_eval that could be imported all the same."""
    write(tmp_path / "pkg_resources.py", "from importlib.metadata import distribution as get_distribution\n")
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "import alpaca_eval, alpaca_eval.main, alpaca_eval.annotators.base as base\n"
        "from alpaca_eval import decoders\nold = alpaca_eval.evaluate\n"
        "import specrej_eval; specrej_eval.activate()\n"
        "print(alpaca_eval.evaluate is not old, alpaca_eval.main.ALL_FUNCTIONS['evaluate'] is alpaca_eval.evaluate,\n"
        "      base.get_fn_completions is decoders.get_fn_completions,\n"
        "      decoders.get_fn_completions('specrej_reward_judge').__name__)"
    )
    assert python(program, tmp_path, {"SPECREJ_EVAL_AUTOLOAD": "0"}) == "True True True specrej_reward_judge"


# --- commands -------------------------------------------------------------------------------------


def test_commands_are_the_replaced_functions_with_their_own_help() -> None:
    for name, function in alpaca_eval.main.ALL_FUNCTIONS.items():
        assert function is getattr(alpaca_eval.main, name) is getattr(alpaca_eval, name)
        assert is_patched(alpaca_eval.main, name)
        assert function.__doc__ and "Parameters" in function.__doc__
    assert "is_overwrite_leaderboard" in inspect.signature(alpaca_eval.main.evaluate).parameters


FORMS = {
    "alpaca_eval": None,
    "python -m": [sys.executable, "-m", "alpaca_eval.main"],
    "specrej-eval alpaca-eval": [sys.executable, "-m", "specrej_eval", "alpaca-eval"],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_command_is_repaired(tmp_path: Path, form: str) -> None:
    """Without model outputs `evaluate` prints the bundled leaderboard; an unknown judge is one message."""
    env = {"SPECREJ_EVAL_AUTOLOAD": "0"} if form.startswith("specrej") else {}
    outputs = write(tmp_path / "outputs.json", sums("model", 2))
    words = ("evaluate", "--model_outputs", outputs, "--reference_outputs", outputs, "--annotators_config")
    done = run_alpaca_eval(*words, "specrej_reward_jugde", cwd=tmp_path, command=FORMS[form], env=env)
    assert done.returncode == 1
    assert "did you mean 'specrej_reward_judge'" in done.stderr
    assert "Traceback" not in done.stderr


def test_upstreams_own_errors_keep_their_traceback(tmp_path: Path) -> None:
    done = run_alpaca_eval("evaluate", "--model_outputs", "outputs.parquet", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and ".parquet not supported" in done.stderr


# --- data -----------------------------------------------------------------------------------------


def test_the_default_data_set_comes_from_the_json_of_the_hub(hub: Path) -> None:
    rows = [{"instruction": "17", "output": "25", "dataset": "x"}, {"instruction": "b", "output": "c"}]
    first = [{**row, "output": "old"} for row in rows]
    add_dataset_files(hub, {"alpaca_eval_gpt4_baseline.json": rows, "alpaca_eval.json": first})
    frame = utils.load_or_convert_to_dataframe(constants.ALPACAEVAL_REFERENCE_OUTPUTS_2)
    assert frame["instruction"].tolist() == ["17", "b"] and frame["output"].tolist() == ["25", "c"]
    frame = utils.load_or_convert_to_dataframe(constants.ALPACAEVAL_REFERENCE_OUTPUTS_1)
    assert frame["output"].tolist() == ["old", "old"]


def test_the_function_that_loads_it_is_still_the_one_leaderboards_are_found_by() -> None:
    key = (str(constants.ALPACAEVAL_REFERENCE_OUTPUTS_2), constants.ANNOTATOR_CONFIG_AE2)
    assert key in constants.PRECOMPUTED_LEADERBOARDS
    assert constants.get_alpaca_eval_data.__module__ == "alpaca_eval.constants"


def test_human_annotations_too(hub: Path) -> None:
    add_dataset_files(hub, {"alpaca_farm_human_crossannotations.json": [{"instruction": "a", "preference": 1}]})
    assert constants.ALPACAFARM_GOLD_CROSSANNOTATIONS()["preference"].tolist() == [1]


def test_a_data_set_that_cannot_be_had_says_what_to_do(hub: Path) -> None:
    with pytest.raises(ConfigError, match="could not download") as caught:
        constants.get_alpaca_eval_data()
    assert "--evaluation_dataset" in str(caught.value)


def test_other_data_sets_are_loaded_as_ever(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [{"a": 1}])
    assert constants.datasets.load_dataset("json", data_files=str(path))["train"]["a"] == [1]


def test_datasets_that_still_run_scripts_are_left_alone() -> None:
    old = fake("datasets", __version__="3.6.0")
    module = fake("constants", datasets=old)
    alpaca_eval_data.serve_datasets_as_json(module)
    assert module.datasets is old
    alpaca_eval_data.serve_datasets_as_json(fake("constants"))  # an alpaca_eval without it


def test_texts_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    rows = [{"instruction": "007", "output": "17", "date": "2020-01-01", "n": 3, "x": 0.5}] * 2
    frame = utils.load_or_convert_to_dataframe(write(tmp_path / "rows.json", rows))
    assert frame.to_dict(orient="records") == rows
    assert frame["output"].str.len().tolist() == [2, 2]
    for suffix, separator in (("csv", ","), ("tsv", "\t")):
        table = [separator.join(row) for row in (("instruction", "output", "n"), ("007", "NA", "3"), ("1e3", "", "4"))]
        frame = utils.load_or_convert_to_dataframe(write(tmp_path / f"rows.{suffix}", "\n".join(table)))
        assert frame["instruction"].tolist() == ["007", "1e3"]
        assert frame["output"].tolist() == ["NA", ""]
        assert frame["n"].tolist() == [3, 4]


def test_leaderboards_are_read_as_ever(tmp_path: Path) -> None:
    path = write(tmp_path / "board.csv", ",win_rate,mode\nmodel,50.5,\n")
    assert utils.load_or_convert_to_dataframe(path).to_dict(orient="index")["model"]["win_rate"] == 50.5
    path = write(tmp_path / "columns.json", {"a": {"0": 1, "1": 2}})
    assert utils.load_or_convert_to_dataframe(path)["a"].tolist() == [1, 2]


def test_recomputing_metrics_reads_texts_back_as_texts(tmp_path: Path) -> None:
    padded = [{**row, "output": "0" * i + row["output"]} for i, row in enumerate(sums("model"))]
    outputs, reference = write(tmp_path / "model.json", padded), write(tmp_path / "ref.json", sums("ref", wrong_by=1))
    evaluate = {"reference_outputs": str(reference), "annotators_config": "specrej_reward_judge"}
    evaluate |= {
        "model_outputs": str(outputs),
        "output_path": str(tmp_path / "out"),
        "is_return_instead_of_print": True,
    }
    first, _ = alpaca_eval.main.evaluate(**evaluate)
    board = str(tmp_path / "out" / "specrej_reward_judge" / "leaderboard.csv")
    second, read_back = alpaca_eval.main.evaluate(
        **evaluate, is_recompute_metrics_only=True, precomputed_leaderboard=board
    )
    third, _ = alpaca_eval.main.evaluate(**evaluate, is_recompute_metrics_only=True)  # found by itself
    assert read_back["output_2"].tolist() == [row["output"] for row in padded]
    for again in (second, third):
        assert again.loc["model", "length_controlled_winrate"] == first.loc["model", "length_controlled_winrate"]


# --- configurations -------------------------------------------------------------------------------

MODEL = "spr:\n  prompt_template: {template}\n  fn_completions: test_completions\n  completions_kwargs: {{}}\n"


def load_model(name: Any) -> dict[str, Any]:
    found: dict[str, Any] = utils.load_configs(name, relative_to=constants.MODELS_CONFIG_DIR)
    return found


def template_of(configs: dict[str, Any]) -> str:
    """Read as `evaluate_from_model` reads it."""
    (config,) = configs.values()
    text: str = utils.read_or_return(config["prompt_template"], relative_to=constants.MODELS_CONFIG_DIR)
    return text


@pytest.mark.parametrize("name", ["model_configs/spr.yaml", "model_configs/spr", "ABSOLUTE"])
def test_a_model_is_found_from_the_working_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model_configs/template.txt", "Q: {instruction}")
    write(tmp_path / "model_configs/spr.yaml", MODEL.format(template="template.txt"))
    write(tmp_path / "model_configs/spr/configs.yaml", MODEL.format(template="template.txt"))
    found = load_model(tmp_path / "model_configs/spr.yaml" if name == "ABSOLUTE" else name)
    assert list(found) == ["spr"] and template_of(found) == "Q: {instruction}"


def test_bundled_models_and_judges_are_found_first(tmp_path: Path) -> None:
    write(tmp_path / "gpt4/configs.yaml", MODEL.format(template='"{instruction}"'))
    assert list(load_model("gpt4")) == ["gpt4"]
    assert load_model("gpt4")["gpt4"]["prompt_template"] == "gpt4/chatml_prompt.txt", "as upstream reads it"
    annotator = annotators.PairwiseAnnotator(annotators_config="gpt4", caching_path=None)
    assert Path(annotator.annotators_config) == constants.EVALUATORS_CONFIG_DIR / "gpt4" / "configs.yaml"


@pytest.mark.parametrize("place", ["model_configs", ".", "elsewhere", "bundled"])
def test_a_template_is_searched_where_it_can_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    name = "gpt4/chatml_prompt.txt" if place == "bundled" else "template.txt"
    file = write(tmp_path / "model_configs/spr.yaml", MODEL.format(template=name))
    if place == "elsewhere":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    if place != "bundled":
        write(tmp_path / place / name, f"from {place}: {{instruction}}")
    expected = (
        (constants.MODELS_CONFIG_DIR / name).read_text() if place == "bundled" else f"from {place}: {{instruction}}"
    )
    assert template_of(load_model(file)) == expected


@pytest.mark.parametrize("template", ['"{instruction}\\nA:"', "'Say: {instruction}'", "|\n    two\n    lines"])
def test_a_template_can_be_the_text_itself(tmp_path: Path, template: str) -> None:
    write(tmp_path / "spr.yaml", MODEL.format(template=template))
    expected = {'"': "{instruction}\nA:", "'": "Say: {instruction}", "|": "two\nlines\n"}[template[0]]
    assert template_of(load_model("spr.yaml")) == expected


def test_a_template_longer_than_a_file_name_may_be(tmp_path: Path) -> None:
    text = "{instruction} " + "x" * 5000
    assert template_of(load_model({"spr": {"prompt_template": text, "fn_completions": "test_completions"}})) == text


def test_a_model_as_a_dict_and_without_arguments() -> None:
    found = load_model({"spr": {"prompt_template": "{instruction}", "fn_completions": "specrej_completions"}})
    assert found["spr"]["completions_kwargs"] == {}


def test_base_dir_is_a_place_to_look_not_the_only_one(tmp_path: Path) -> None:
    """Upstream hands the models' base_dir to the annotator, which then finds no judge."""
    write(tmp_path / "mine/spr.yaml", MODEL.format(template='"{instruction}"'))
    assert list(utils.load_configs("spr.yaml", relative_to=tmp_path / "mine")) == ["spr"]
    bundled = utils.load_configs("gpt4", relative_to=tmp_path / "mine")
    assert Path(bundled["gpt4"]["prompt_template"]).is_file()
    annotator = annotators.PairwiseAnnotator(annotators_config="gpt4", base_dir=tmp_path / "mine", caching_path=None)
    assert annotator.annotator_name == "gpt4"


MISTAKES = {
    "model_configs/sprr.yaml": "did you mean 'model_configs/spr.yaml'",
    "two.yaml": "exactly one model, got 2: a, b",
    "list.yaml": "must hold a name with a mapping below it",
    "broken.yaml": "cannot be read as YAML",
    "lacking.yaml": "needs prompt_template",
    "gone.yaml": "no prompt_template 'nosuch.txt'",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_configuration_are_one_clear_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model_configs/spr.yaml", MODEL.format(template='"{instruction}"'))
    write(tmp_path / "two.yaml", "a: {prompt_template: x}\nb: {prompt_template: x}")
    write(tmp_path / "list.yaml", "- a\n- b")
    write(tmp_path / "broken.yaml", "a: {b: [")
    write(tmp_path / "lacking.yaml", "spr: {prompt_tmplate: x, fn_completions: test_completions}")
    write(tmp_path / "gone.yaml", MODEL.format(template="nosuch.txt"))
    with pytest.raises(ConfigError) as caught:
        load_model(name)
    assert MISTAKES[name] in str(caught.value)


JUDGE = """\
mine:
  prompt_template: {template}
  fn_completions: test_completions
  completions_kwargs: {{value: "1.25"}}
  fn_completion_parser: eval_parser
  is_randomize_output_order: false
"""


@pytest.mark.parametrize("name", ["judges/mine", "judges/mine.yaml", "mine"])
def test_a_judge_is_found_from_the_working_directory(tmp_path: Path, name: str) -> None:
    write(tmp_path / "judges/mine/configs.yaml", JUDGE.format(template='"{instruction} {output_1} {output_2}"'))
    write(tmp_path / "judges/mine.yaml", JUDGE.format(template="mine/prompt.txt"))
    write(tmp_path / "judges/mine/prompt.txt", "{instruction} {output_1} {output_2}")
    write(tmp_path / "mine/configs.yaml", JUDGE.format(template='"{instruction} {output_1} {output_2}"'))
    annotator = annotators.PairwiseAnnotator(annotators_config=name)
    found = annotator.annotate_head2head(sums("ref", wrong_by=1), sums("model"))
    assert [row["preference"] for row in found] == [1.25] * 8


def test_a_newer_load_configs_is_left_alone() -> None:
    def load_configs(configs: Any) -> Any:
        return configs

    module = fake("utils", load_configs=load_configs, constants=constants)
    alpaca_eval_configs.find_configs_outside_the_package(module)
    assert module.load_configs is load_configs


# --- prompts --------------------------------------------------------------------------------------

FRAME = pd.DataFrame(
    [
        {"instruction": "say {output_1}", "output_1": "{output_2}", "output_2": "{{instruction}}"},
        {"instruction": "b", "output_1": "\\1", "output_2": "\n"},
    ]
)


def test_a_field_is_never_looked_at_again_once_it_is_filled_in() -> None:
    prompts, _ = utils.make_prompts(FRAME, "{instruction}|{output_1}|{output_2}")
    assert prompts == ["say {output_1}|{output_2}|{{instruction}}", "b|\\1|\n"]


def test_prompts_carry_the_bare_fields_through_copies_and_processes() -> None:
    prompts, _ = utils.make_prompts(FRAME, "{instruction}|{output_1}|{output_2}")
    for copied in (prompts[0], copy.deepcopy(prompts[0]), pickle.loads(pickle.dumps(prompts[0]))):
        assert isinstance(copied, RenderedPrompt) and copied == str(prompts[0])
        assert dict(copied.row) == FRAME.iloc[0].to_dict()


def test_braces_that_are_no_column_are_text(caplog: pytest.LogCaptureFixture) -> None:
    template = 'JSON {"a": 1} {unknown_1} {{instruction}} { instruction } {}'
    for _ in range(2):
        prompts, _ = utils.make_prompts(FRAME[1:], template)
        assert prompts == ['JSON {"a": 1} {unknown_1} {b} { instruction } {}']
    assert caplog.text.count("{unknown_1} stays as it is") == 1


def test_a_template_that_names_no_column_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"did you mean \{instruction\}"):
        make_prompts(FRAME, "{instructions}")


def test_several_rows_in_one_prompt() -> None:
    prompts, padded = utils.make_prompts(
        FRAME, "1: {instruction} {output_1}; 2: {instruction} {output_1}", batch_size=2
    )
    assert prompts == ["1: say {output_1} {output_2}; 2: b \\1"]
    assert [row["instruction"] for row in prompts[0].rows] == FRAME["instruction"].tolist()
    assert padded.equals(FRAME) and padded is not FRAME
    with pytest.raises(ValueError, match="repeated batch_size=1 times"):
        utils.make_prompts(FRAME, "{instruction} {instruction}")
    with pytest.raises(ValueError, match="dividable"):
        utils.make_prompts(FRAME[:1], "{instruction} {instruction}", batch_size=2)


def test_ordinary_prompts_are_upstreams_to_the_byte() -> None:
    upstream = utils.make_prompts.__specrej_eval_original__
    frame = pd.DataFrame(sums("x")).rename(columns={"output": "output_1"}).assign(output_2="two\nlines", input=None)
    template = (constants.EVALUATORS_CONFIG_DIR / "alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt").read_text()
    assert utils.make_prompts(frame, template)[0] == upstream(frame, template)[0]
    template = (constants.EVALUATORS_CONFIG_DIR / "alpaca_farm/chatml_b5_without_inputs.txt").read_text()
    assert utils.make_prompts(frame[:5], template, batch_size=5)[0] == upstream(frame[:5], template, batch_size=5)[0]
    assert utils.make_prompts(frame[:0], "{instruction}")[0] == []


def test_a_newer_make_prompts_is_left_alone() -> None:
    def newer(examples: Any) -> Any:
        return examples

    module = fake("utils", make_prompts=newer)
    alpaca_eval_prompts.keep_fields_with_prompts(module)
    assert module.make_prompts is newer


# --- decoders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registration.DECODERS)
def test_our_decoders_are_known(name: str) -> None:
    assert decoders.get_fn_completions(name).__name__ == name


def test_other_decoders_are_upstreams() -> None:
    assert decoders.get_fn_completions("test_completions").__module__ == "alpaca_eval.decoders.test"
    assert decoders.get_fn_completions(print) is print
    with pytest.raises(ValueError, match="Unknown decoder: zzz") as caught:
        decoders.get_fn_completions("zzz")
    assert not isinstance(caught.value, ConfigError)


def test_a_slip_in_one_of_our_names_is_corrected() -> None:
    with pytest.raises(ConfigError, match="did you mean 'specrej_completions'"):
        decoders.get_fn_completions("specrej_completion")


# --- leaderboards ---------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *args: Any, **kwargs: Any) -> str:
    utils.print_leaderboard(*args, **kwargs)
    return capsys.readouterr().out


def test_a_leaderboard_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    board = pd.DataFrame(
        {"win_rate": [40.0, 60.0], "standard_error": [1.0, 2.0], "n_total": [9, 9], "avg_length": [5, 6]},
        index=["a", "b"],
    ).assign(length_controlled_winrate=[41.25, 59.0], lc_standard_error=[0.5, 0.25])
    text = printed(capsys, board, leaderboard_mode=None, cols_to_print=["win_rate", "standard_error", "n_total"])
    header, first, second = text.splitlines()
    assert header.split() == [*alpaca_eval_leaderboard.COLUMNS[:-1]]
    assert first.split() == ["a", "41.25", "0.50", "40.00", "1.00", "9", "5"] and second.split()[0] == "b"
    assert "length_controlled_winrate" in printed(capsys, board, "minimal", ["nosuch", "win_rate"])


def test_modes_choose_rows_and_rows_without_one_stay(capsys: pytest.CaptureFixture[str]) -> None:
    board = pd.DataFrame({"win_rate": [1.0, 2.0, 3.0, 4.0], "mode": ["minimal", "verified", "community", None]})
    board.index = pd.Index(["m", "v", "c", "x"])

    def rows(*args: Any, **kwargs: Any) -> list[str]:
        return [line.split()[0] for line in printed(capsys, board, *args, **kwargs).splitlines()[1:]]

    assert rows("verified", ["win_rate"]) == ["m", "v", "x"]
    assert rows("minimal", ["win_rate"], current_name="c") == ["m", "c", "x"]
    assert rows(["c"], ["win_rate"]) == ["c"]
    assert rows(None, ["win_rate"]) == ["m", "v", "c", "x"]
    assert rows(leaderboard_mode="minimal", cols_to_print=["win_rate"]) == ["m", "x"]


def test_a_print_leaderboard_that_takes_the_argument_is_left_alone() -> None:
    def newer(df_leaderboard: Any, leaderboard_mode: Any, cols_to_print: Any) -> None: ...

    module = fake("utils", print_leaderboard=newer, constants=constants)
    alpaca_eval_leaderboard.print_whole_leaderboard(module)
    assert module.print_leaderboard is newer


def evaluate_quietly(**arguments: Any) -> Any:
    board, annotations = alpaca_eval.main.evaluate(
        **{"annotators_config": "specrej_reward_judge", "is_return_instead_of_print": True, **arguments}
    )
    return board, annotations


def test_get_winrate_is_sorted_by_what_it_gives() -> None:
    board, _ = evaluate_quietly(
        model_outputs=sums("model"), reference_outputs=sums("ref", wrong_by=1), fn_metric="get_winrate"
    )
    assert "length_controlled_winrate" not in board.columns and board.index.tolist() == ["model"]


def test_a_board_inside_the_package_is_read_and_never_written(tmp_path: Path) -> None:
    """The digest of the module's fixture is the other half of this test."""
    board = constants.PRECOMPUTED_LEADERBOARDS[
        (str(constants.ALPACAEVAL_REFERENCE_OUTPUTS_2), constants.ANNOTATOR_CONFIG_AE2)
    ]
    both = {"model_outputs": sums("model"), "reference_outputs": sums("ref", wrong_by=1)}
    for _ in range(2):  # the second time upstream would have skipped it: "already in the precomputed leaderboard"
        found, annotations = evaluate_quietly(**both, precomputed_leaderboard=board, output_path=str(tmp_path / "out"))
        assert len(found) > 100 and "model" in found.index and len(annotations) == 8
    mine = tmp_path / "mine.csv"
    evaluate_quietly(**both, precomputed_leaderboard=str(mine))
    evaluate_quietly(**both, precomputed_leaderboard=str(mine), is_overwrite_leaderboard=True)
    mine_board = pd.read_csv(write(mine, mine.read_text()) if mine.exists() else tmp_path / "missing", index_col=0)
    assert mine_board.index.tolist() == ["model"], "a leaderboard of the user's own is kept as ever"


def test_make_leaderboard_without_a_path_writes_beside_the_results(tmp_path: Path) -> None:
    outputs = [*sums("model"), *sums("other", wrong_by=2)]
    for _ in range(2):
        board, annotations = alpaca_eval.main.make_leaderboard(
            all_model_outputs=outputs,
            reference_outputs=sums("ref", wrong_by=1),
            annotators_config="specrej_reward_judge",
            is_return_instead_of_print=True,
        )
        assert sorted(board.index) == ["model", "other"] and len(annotations) == 16
    assert (tmp_path / "results" / "specrej_reward_judge_leaderboard.csv").is_file()


def test_it_begins_with_the_bundled_entries(tmp_path: Path) -> None:
    values = {"annotators_config": "weighted_alpaca_eval_gpt4_turbo", "output_path": str(tmp_path / "out")}
    path = alpaca_eval_runs._own_leaderboard(values, alpaca_eval.main)
    bundled = constants.ALPACAEVAL_LEADERBOARD_PATHS / path.name
    assert path.is_relative_to(tmp_path) and path.read_bytes() == bundled.read_bytes()


def test_a_saved_leaderboard_of_evaluators_is_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        alpaca_eval.main.analyze_evaluators(annotators_config=None, is_save_leaderboard=True)
    saved = pd.read_csv(tmp_path / "results_evaluators/evaluators_leaderboard.csv", index_col=0)
    assert "alpaca_eval_gpt4" in saved.index and "alpaca_eval_gpt4" in capsys.readouterr().out


# --- annotation cache -----------------------------------------------------------------------------


class Judge:
    """Counts the pairs it is given; `value` is what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs = 0
        judge = self

        def counting_judge(prompts: list[str], value: str = "1.75", **options: Any) -> dict[str, list[Any]]:
            judge.pairs += len(prompts)
            return {
                "completions": [value] * len(prompts),
                "price_per_example": [0.5] * len(prompts),
                "time_per_example": [2.0] * len(prompts),
            }

        monkeypatch.setitem(registration.DECODERS, "counting_judge", __name__)
        monkeypatch.setitem(globals(), "counting_judge", counting_judge)

    def config(self, folder: Path, **changes: Any) -> str:
        config = {
            "prompt_template": "{instruction} {output_1} {output_2}",
            "fn_completions": "counting_judge",
            "completions_kwargs": {"value": "1.75"},
            "fn_completion_parser": "eval_parser",
            "is_randomize_output_order": False,
        }
        return str(write(folder / "counting/configs.yaml", {"counting": config | changes}).parent)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    return Judge(monkeypatch)


def annotate(config: str, out: Path, **arguments: Any) -> list[float]:
    _, annotations = evaluate_quietly(
        model_outputs=sums("model"),
        reference_outputs=sums("ref", wrong_by=1),
        annotators_config=config,
        output_path=str(out),
        fn_metric="get_winrate",
        **arguments,
    )
    return [row["preference"] for row in annotations]


def test_the_same_judge_is_asked_once(judge: Judge, tmp_path: Path) -> None:
    for _ in range(2):
        assert annotate(judge.config(tmp_path), tmp_path / "out") == [1.75] * 8
    assert judge.pairs == 8
    assert len(list((tmp_path / "out").glob("annotations_cache_seed0_*.json"))) == 1
    assert [path.name for path in (tmp_path / "counting").iterdir()] == ["configs.yaml"], "nothing beside the judge"


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "completions_kwargs": ({"completions_kwargs": {"value": "1.25"}}, {}),
    "prompt": ({"prompt_template": "other {instruction} {output_1} {output_2}"}, {}),
    "order of the answers": ({"is_randomize_output_order": True}, {}),
    "decoding arguments": ({}, {"annotation_kwargs": {"temperature": 0.5}}),
    "seed": ({}, {"seed": 1}),
    "position_swap": ({}, {"position_swap": True}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_judgment_makes_it_another_judge(judge: Judge, tmp_path: Path, change: str) -> None:
    config, arguments = CHANGES[change]
    annotate(judge.config(tmp_path), tmp_path / "out")
    before, judge.pairs = judge.pairs, 0
    annotate(judge.config(tmp_path, **config), tmp_path / "out", **arguments)
    assert before == 8 and judge.pairs in (8, 16)


def test_another_endpoint_is_another_judge(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate(judge.config(tmp_path), tmp_path / "out")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    annotate(judge.config(tmp_path), tmp_path / "out")
    assert judge.pairs == 16


def test_the_digest_is_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judges = ("weighted_alpaca_eval_gpt4_turbo", "alpaca_farm", "specrej_reward_judge")
    program = (
        "from alpaca_eval import annotators\nfrom specrej_eval.harness.alpaca_eval.repairs.cache import digest_of\n"
        f"for name in {judges}:\n"
        "    print(digest_of(annotators.PairwiseAnnotator(annotators_config=name), {}))"
    )
    monkeypatch.setenv("OPENAI_BASE_URL", "x")
    here = [alpaca_eval_cache.digest_of(annotators.PairwiseAnnotator(annotators_config=name), {}) for name in judges]
    assert python(program, tmp_path, {"PYTHONHASHSEED": "1"}).split() == here and len(set(here)) == 3


def test_a_cache_that_was_cut_short_is_begun_anew(
    judge: Judge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    annotate(judge.config(tmp_path), tmp_path / "out")
    (cache,) = (tmp_path / "out").glob("annotations_cache_*.json")
    cache.write_text(cache.read_text()[:100])
    assert annotate(judge.config(tmp_path), tmp_path / "out") == [1.75] * 8
    assert judge.pairs == 16 and "cannot be read" in caplog.text
    assert len(json.loads(cache.read_text())) == 8


def test_no_output_folder_no_file(judge: Judge, tmp_path: Path) -> None:
    config = judge.config(tmp_path)
    evaluate_quietly(
        model_outputs=sums("model"),
        reference_outputs=sums("ref", wrong_by=1),
        annotators_config=config,
        output_path=None,
    )
    annotator = annotators.PairwiseAnnotator(annotators_config=config)  # by itself, outside of any run
    for _ in range(2):
        annotator.annotate_head2head(sums("ref", wrong_by=1), sums("model"))
    assert judge.pairs == 16, "kept in memory"
    assert {path.name for path in tmp_path.rglob("*.json")} == set()


def test_saved_completions_can_be_parsed_again(judge: Judge, tmp_path: Path) -> None:
    """A completion "1.75" that came back as a number could not."""
    for _ in range(2):
        assert annotate(judge.config(tmp_path), tmp_path / "out", is_reapply_parsing=True) == [1.75] * 8
    assert judge.pairs == 8


def test_a_file_the_user_names_is_the_users(judge: Judge, tmp_path: Path) -> None:
    for value in ("1.75", "1.25"):
        config = judge.config(tmp_path, completions_kwargs={"value": value})
        assert annotate(config, tmp_path / "out", caching_path=str(tmp_path / "mine.json")) == [1.75] * 8
    assert (tmp_path / "mine.json").is_file() and judge.pairs == 8


def test_a_newer_cache_is_left_alone() -> None:
    class Newer:
        def __init__(self, cache: Any = None) -> None: ...

        def _initialize_cache(self) -> None: ...

        def __call__(self, rows: Any) -> None: ...

    module = fake("base", BaseAnnotator=Newer, BaseAnnotatorJSON=Newer)
    before = dict(vars(Newer))
    alpaca_eval_cache.cache_in_output_folder(module)
    alpaca_eval_configs.find_annotators_outside_the_package(module)
    assert dict(vars(Newer)) == before


# --- position_swap --------------------------------------------------------------------------------


def test_both_orders_are_judged_and_averaged(judge: Judge, tmp_path: Path) -> None:
    """This judge likes whatever comes second: swapped, that is no preference at all."""
    config = judge.config(tmp_path)
    board, rows = evaluate_quietly(
        model_outputs=sums("model"),
        reference_outputs=sums("ref", wrong_by=1),
        annotators_config=config,
        output_path=str(tmp_path / "out"),
        position_swap=True,
    )
    assert judge.pairs == 16
    for row in rows:
        assert (row["preference"], row["preference_in_order"], row["preference_swapped"]) == (1.5, 1.75, 1.25)
        assert (row["preference_price_per_example"], row["preference_time_per_example"]) == (1.0, 4.0)
        assert row["output_2"] == row["output_2"] and row["generator_2"] == "model"
    assert board.loc["model", "win_rate"] == 50
    assert rows[0]["output_1"] == sums("ref", wrong_by=1)[0]["output"]


def test_position_swap_is_true_or_false_and_excludes_noise(judge: Judge, tmp_path: Path) -> None:
    config = judge.config(tmp_path)
    with pytest.raises(ConfigError, match="position_swap must be true or false"):
        annotators.PairwiseAnnotator(annotators_config=config, position_swap="both")
    with pytest.raises(ConfigError, match="cannot be combined"):
        annotators.PairwiseAnnotator(annotators_config=config, position_swap="true", p_label_flip=0.1)


def test_an_alpaca_eval_that_swaps_by_itself_is_left_alone() -> None:
    class Newer:
        def __init__(self, input_keys: Any, output_keys: Any, position_swap: bool = False) -> None: ...

    before = dict(vars(Newer))
    alpaca_eval_swap.add_position_swap(fake("pairwise", PairwiseAnnotatorLocal=Newer))
    assert dict(vars(Newer)) == before


# --- the default judge and the default data set, as a command -------------------------------------


def test_a_plain_evaluate_with_all_defaults(tmp_path: Path) -> None:
    """Data from the hub, GPT-4 (here: a server on the loopback) as judge, the bundled leaderboard; twice."""
    reference = sums("gpt4_1106_preview", wrong_by=1, prefix="about ")
    env = add_dataset_files(tmp_path / "hub", {"alpaca_eval_gpt4_baseline.json": reference})
    write(tmp_path / "results/mine/model_outputs.json", sums("mine"))
    with JudgeServer(lambda first, second: 0.9 if "about" not in first else 0.1) as server:
        for _ in range(2):
            done = run_alpaca_eval(
                *("--model_outputs", "results/mine/model_outputs.json"), cwd=tmp_path, env=env | server.environment
            )
            assert done.returncode == 0, done.stderr
            (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("mine "))
            assert float(row[3]) == pytest.approx(90, abs=0.01), done.stdout
            assert "gpt4_1106_preview" in done.stdout
    assert len(server.requests) == 8, "the second run takes the judgments from its cache"
    assert server.requests[0]["model"] == "gpt-4-1106-preview"

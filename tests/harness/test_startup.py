"""What a user has after `pip install specrej-eval`: plain `lm_eval` knows our models, and nothing else has changed.

The wheel is built once and installed into a fresh virtual environment. That environment sees the dependencies of the
running one through a folder of links, in which our own install is left out: whatever works there, the wheel did.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support import ROOT

from specrej_eval import __version__

OURS = ("specrej_eval", "_specrej_eval", "_editable_impl_specrej_eval")
NAMES = ("specrej", "best_of_n", "best-of-n")

REGISTRY = "from lm_eval.api.registry import model_registry as registry; import lm_eval.models; "
SHOW = "import json; print(json.dumps(sorted(registry.keys())))"


class Environment:
    """A virtual environment, and a way to run things in it that inherits nothing from ours."""

    def __init__(self, folder: Path, dependencies: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        self.site = Path(self.output("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "dependencies.pth").write_text(f"{dependencies}\n")
        for script in distribution("lm_eval").entry_points.select(group="console_scripts"):
            file = self.bin / script.name
            call = f"import sys\nfrom {script.module} import {script.attr}\nsys.exit({script.attr}())\n"
            file.write_text(f"#!{self.bin / 'python'}\n{call}")
            file.chmod(0o755)

    def copy(self, folder: Path) -> Environment:
        """The same elsewhere, files and all, without another run of pip."""
        shutil.copytree(self.folder, folder, symlinks=True)
        other = copy.copy(self)
        other.folder, other.bin = folder, folder / "bin"
        other.site = folder / self.site.relative_to(self.folder)
        return other

    def pip(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), *map(str, arguments)]
        done = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def run(
        self, *command: object, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SPECREJ_EVAL"))}
        clean |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        clean |= {"HF_DATASETS_CACHE": str(self.folder / "datasets"), "VIRTUAL_ENV": str(self.folder)}
        return subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env=clean | (env or {}),
            cwd=cwd or self.folder,  # never the checkout: its packages must not be importable by accident
        )

    def output(self, *python: object, env: dict[str, str] | None = None, quiet: bool = True) -> str:
        """What `python ...` prints; it must succeed, and say on stderr what it says without us, nothing else (old
        ``requests`` warn of new ``chardet``)."""
        done = self.run(self.bin / "python", *python, env=env)
        assert done.returncode == 0, done.stderr
        if quiet and done.stderr:
            without = self.run(self.bin / "python", *python, env={**(env or {}), "SPECREJ_EVAL_AUTOLOAD": "0"})
            assert done.stderr == without.stderr
        return done.stdout

    def leftovers(self) -> list[str]:
        """Everything of ours in site-packages."""
        return sorted(path.name for path in self.site.iterdir() if path.name.startswith(OURS))


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory, few_tasks: Path) -> Path:
    """Links to every installed package but ours. Startup files below a path entry are not read."""
    folder = tmp_path_factory.mktemp("dependencies")
    for path in few_tasks.iterdir():
        (folder / path.name).symlink_to(path)
    for source in {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}:
        for path in source.iterdir():
            if not path.name.startswith(OURS) and path.suffix != ".pth" and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, dependencies: Path, wheel: Path) -> Environment:
    """Shared by the tests that change nothing in it."""
    environment = Environment(tmp_path_factory.mktemp("installed"), dependencies)
    environment.pip("install", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture
def own_copy(tmp_path: Path, installed: Environment) -> Environment:
    """An environment to break."""
    return installed.copy(tmp_path / "venv")


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.json").write_text('{"question": "1+1=", "answer": "2"}\n{"question": "2+2=", "answer": "4"}\n')
    (folder / "tiny.yaml").write_text(
        f"""\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(folder / "docs.json"))}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"]}}
metric_list: [{{metric: exact_match}}]
"""
    )
    return folder


# --- the wheel ------------------------------------------------------------------------------------


def test_the_wheel_holds_what_an_install_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {
        "_specrej_eval_autoload.py",
        "specrej_eval.pth",
        "specrej_eval.start",
        "specrej_eval/commands/report/page/page.css",
        "specrej_eval/commands/report/page/page.js",
        "specrej_eval/demo/policy/model.safetensors",
        "specrej_eval/kv/native/kernels.cpp",
        "specrej_eval/py.typed",
    }
    for folder, below in (("specrej_eval", ""), ("tasks", "specrej_eval/_"), ("model_configs", "specrej_eval/_")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        needed |= {f"{below}{path.relative_to(ROOT).as_posix()}" for path in files}
    assert sorted(needed - names) == []
    roots = {name.partition("/")[0] for name in names}
    assert roots - needed == {"specrej_eval", f"specrej_eval-{__version__}.dist-info"}, (
        "nothing else may lie in site-packages"
    )


def test_the_wheel_declares_entry_points_for_lm_eval_releases_that_read_them(installed: Environment) -> None:
    program = (
        "from importlib.metadata import entry_points\n"
        "print(*sorted(f'{point.name}={point.value}' for point in entry_points(group='lm_eval.models')))"
    )
    assert installed.output("-c", program).split() == [
        "best_of_n=specrej_eval.harness.lm_eval.model:BestOfNLM",
        "specrej=specrej_eval.harness.lm_eval.model:SpecRejLM",
    ]


# --- interpreter start ----------------------------------------------------------------------------


def test_interpreter_start_imports_our_one_small_module_and_nothing_else(own_copy: Environment) -> None:
    modules = "import sys; print(*sys.modules)"
    with_hook = set(own_copy.output("-c", modules).split())
    (own_copy.site / "specrej_eval.pth").unlink()
    without = set(own_copy.output("-c", modules).split())
    assert with_hook - without == {"_specrej_eval_autoload"}


def test_the_hook_adds_one_finder_however_often_it_is_installed(installed: Environment) -> None:
    program = (
        "import sys, _specrej_eval_autoload as autoload; autoload.install(); autoload.install()\n"
        "print([type(finder).__name__ for finder in sys.meta_path].count('HookFinder'))\n"
        "autoload.uninstall(); print(autoload.installed())"
    )
    assert installed.output("-c", program).split() == ["1", "False"]


def test_an_orphaned_startup_file_is_silent(own_copy: Environment) -> None:
    (own_copy.site / "_specrej_eval_autoload.py").unlink()
    shutil.rmtree(own_copy.site / "__pycache__", ignore_errors=True)
    assert own_copy.output("-c", "print('fine')") == "fine\n"


def test_uninstalling_leaves_nothing(own_copy: Environment) -> None:
    own_copy.output("-c", "import specrej_eval.cli, _specrej_eval_autoload")
    own_copy.pip("uninstall", "--yes", "specrej-eval")
    assert own_copy.leftovers() == []
    assert "specrej" not in json.loads(own_copy.output("-c", REGISTRY + SHOW))


# --- the registry ---------------------------------------------------------------------------------


def test_our_models_stand_beside_all_built_in_ones_and_torch_is_not_imported(installed: Environment) -> None:
    program = REGISTRY + (
        "import sys; from lm_eval.models import MODEL_MAPPING; "
        "print(sorted(set(registry.keys()) ^ set(MODEL_MAPPING)), 'torch' in sys.modules)"
    )
    assert installed.output("-c", program) == f"{sorted(NAMES)} False\n"


@pytest.mark.parametrize(
    "first",
    [
        "from lm_eval.api.registry import get_model; get_model('dummy')",
        "import lm_eval.models.dummy",
        "import lm_eval.models, importlib; importlib.reload(lm_eval.models)",
        "import lm_eval.models, _specrej_eval_autoload as a; a.install()",
    ],
    ids=["get_model", "submodule", "reload", "install again"],
)
def test_every_way_to_a_model_passes_the_hook(installed: Environment, first: str) -> None:
    known = json.loads(
        installed.output("-c", f"{first}; from lm_eval.api.registry import model_registry as registry; {SHOW}")
    )
    assert {"hf", "dummy", "vllm", *NAMES} <= set(known)


def test_the_hook_works_in_a_spawned_process(installed: Environment) -> None:
    script = installed.folder / "spawn.py"
    script.write_text(
        "import multiprocessing\n\n"
        "def known(_):\n    import lm_eval.models\n    from lm_eval.api.registry import model_registry\n"
        "    return 'specrej' in model_registry\n\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n        print(pool.map(known, [0]))\n"
    )
    assert installed.output(script) == "[True]\n"


def test_the_hooked_package_keeps_its_own_loader(installed: Environment) -> None:
    program = (
        "import inspect, importlib.resources, lm_eval.models as models\n"
        "assert type(models.__loader__).__name__ == type(models.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert 'MODEL_MAPPING' in inspect.getsource(models)\n"
        "assert importlib.resources.files(models).joinpath('dummy.py').is_file()"
    )
    installed.output("-c", program)


def test_alpaca_eval_imports_knows_us_and_keeps_its_source(installed: Environment) -> None:
    program = (
        "import inspect, sys, alpaca_eval.main as main\n"
        "assert 'ALL_FUNCTIONS' in inspect.getsource(main) and type(main.__loader__).__name__ == 'SourceFileLoader'\n"
        "from alpaca_eval import decoders\n"
        "print(decoders.get_fn_completions('specrej_reward_judge').__module__, 'pkg_resources' in sys.modules)"
    )
    assert installed.output("-c", program, quiet=False) == "specrej_eval.harness.alpaca_eval.judge False\n"


def test_python_m_alpaca_eval_main_runs_the_hooked_functions(installed: Environment) -> None:
    """runpy executes the module anew, as __main__; a spawned process that imports it again must run nothing."""
    sabotage = (
        "import runpy, sys, alpaca_eval.main as main\n"
        "main.main = lambda: print('hooked', sys.argv[1:])\n"
        "sys.argv = ['x', 'evaluate']\n"
        "runpy.run_module('alpaca_eval.main', run_name='__mp_main__', alter_sys=True)\n"
        "print('nothing yet')\n"
        "runpy.run_module('alpaca_eval.main', run_name='__main__', alter_sys=True)\n"
    )
    assert installed.output("-c", sabotage, quiet=False).splitlines() == ["nothing yet", "hooked ['evaluate']"]


def test_a_failing_hook_warns_and_leaves_the_harness_working(installed: Environment) -> None:
    sabotage = (
        "import specrej_eval.harness.startup as hooks\n"
        "def fail(module): raise RuntimeError('sabotage')\n"
        "hooks.register_lm_eval_models = fail\n"
    )
    for flags in ([], ["-W", "error"]):
        done = installed.run(installed.bin / "python", *flags, "-c", f"{sabotage}{REGISTRY}{SHOW}")
        assert done.returncode == 0, done.stderr
        assert "sabotage" in done.stderr and "specrej-eval doctor" in done.stderr
        assert "hf" in json.loads(done.stdout) and "specrej" not in json.loads(done.stdout)


def test_an_lm_eval_that_reads_entry_points_is_left_alone(installed: Environment) -> None:
    fake = "import lm_eval.api.registry as module; module.load_plugins = lambda *arguments: None; "
    assert "specrej" not in json.loads(installed.output("-c", fake + REGISTRY + SHOW))


@pytest.mark.parametrize("value", ["0", *(pytest.param(value, marks=pytest.mark.full) for value in ("false", "off"))])
def test_the_off_switch_stops_the_hook_but_not_an_explicit_call(installed: Environment, value: str) -> None:
    off = {"SPECREJ_EVAL_AUTOLOAD": value}
    assert "specrej" not in json.loads(installed.output("-c", REGISTRY + SHOW, env=off))
    late = "from specrej_eval.harness.startup import activate; activate(); "
    for program in (late + REGISTRY + SHOW, REGISTRY + late + SHOW):  # before and after lm_eval.models is imported
        assert {"hf", *NAMES} <= set(json.loads(installed.output("-c", program, env=off)))


def test_where_startup_files_are_not_read_our_own_command_still_works(
    dependencies: Path, wheel: Path, tiny_task: Path, tmp_path: Path
) -> None:
    """`pip install --target DIR` and PYTHONPATH=DIR: DIR is no site directory."""
    bare = Environment(tmp_path / "venv", dependencies)
    bare.pip("install", "--no-deps", "--no-index", "--target", tmp_path / "target", wheel)
    env = {"PYTHONPATH": str(tmp_path / "target")}
    assert "specrej" not in json.loads(bare.output("-c", REGISTRY + SHOW, env=env))
    # fmt: off
    done = bare.run(
        bare.bin / "python", "-m", "specrej_eval", "lm-eval", "run", "--model", "nosuch", "--tasks", "tiny",
        "--include_path", tiny_task, env=env,
    )
    # fmt: on
    assert done.returncode == 1
    assert "lm-eval has no model 'nosuch'" in done.stderr
    assert all(name in done.stderr for name in ("hf", *NAMES)), "lm-eval lists the names it knows"


def test_an_editable_install_has_the_hook_and_reads_the_checkout(tmp_path: Path, dependencies: Path) -> None:
    environment = Environment(tmp_path / "venv", dependencies)
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", ROOT)
    assert {"hf", *NAMES} <= set(json.loads(environment.output("-c", REGISTRY + SHOW)))
    assert environment.output("-m", "specrej_eval", "path", "tasks") == f"{ROOT / 'tasks'}\n"
    environment.pip("uninstall", "--yes", "specrej-eval")
    assert environment.leftovers() == []


# --- real runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["lm-eval", "run"], pytest.param(["python", "-m", "lm_eval"], marks=pytest.mark.full)],
    ids=" ".join,
)
def test_other_models_run_as_before(
    installed: Environment, tiny_task: Path, tmp_path: Path, command: list[str]
) -> None:
    # fmt: off
    done = installed.run(
        *command, "--model", "dummy", "--tasks", "tiny", "--include_path", tiny_task, "--output_path", tmp_path / "out",
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["n-samples"]["tiny"]["effective"] == 2


def test_the_literal_command_runs_from_an_installed_wheel(installed: Environment, tmp_path: Path) -> None:
    tasks = installed.output("-m", "specrej_eval", "path", "tasks").strip()
    assert Path(tasks).is_relative_to(installed.site)
    # fmt: off
    done = installed.run(
        "lm_eval", "--model", "specrej", "--model_args", "alpha=0.5", "--tasks", "specrej_arithmetic",
        "--include_path", tasks, "--log_samples", "--output_path", tmp_path / "demo", "--limit", "2",
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "demo").rglob("results_*.json")).read_text())
    assert results["config"]["model"] == "specrej"
    assert results["config"]["specrej"]["arguments"]["alpha"] == 0.5
    assert results["config"]["specrej"]["totals"]["requests"] == 2
    table = installed.output("-m", "specrej_eval", "report", tmp_path / "demo")
    assert "Speculative Rejection, alpha=0.5" in table


LAUNCHERS = {
    "accelerate launch": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m"],
}


def test_a_launchers_processes_pass_the_hook(installed: Environment) -> None:
    script = installed.folder / "registry.py"
    script.write_text(REGISTRY + SHOW)
    done = installed.run("python", "-m", *LAUNCHERS["torchrun"][:-1], script)
    assert done.returncode == 0, done.stderr
    assert {"hf", *NAMES} <= set(json.loads(done.stdout))


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_know_our_models(installed: Environment, tmp_path: Path, launcher: str) -> None:
    tasks = installed.output("-m", "specrej_eval", "path", "tasks").strip()
    # fmt: off
    done = installed.run(
        "python", "-m", *LAUNCHERS[launcher], "lm_eval", "--model", "best_of_n",
        "--model_args", "n=2,force_sampling_args=true,seed=1", "--tasks", "specrej_arithmetic", "--include_path", tasks,
        "--output_path", tmp_path / "demo", "--limit", "2",
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    results = json.loads(next((tmp_path / "demo").rglob("results_*.json")).read_text())
    assert results["config"]["specrej"]["arguments"]["strategy"] == "best_of_n"
    assert results["config"]["specrej"]["totals"]["rows_started"] == 4

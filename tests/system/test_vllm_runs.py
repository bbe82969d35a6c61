"""Whole runs over vLLM itself, where it is installed (`make test-vllm`): lm-eval's command, journals, kills, and the
suite of changed arguments. What it promises in place of equal bits (one distribution) is the contract's affair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.smollm2 import smollm2_folder  # noqa: F401
from support.tiny_models import save, tiny_causal_lm, tiny_tokenizer

from specrej_eval import checkpoint

pytestmark = pytest.mark.full
Counted = Callable[..., None]
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SMALL = "reward_model=likelihood,n=6,enforce_eager=True,dtype=float32,max_gen_toks=24"
QUESTIONS = 8
HEADS = 36
"""Dimensions of the embedded model's."""


@pytest.fixture(scope="module", autouse=True)
def vllm_is_here() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = tiny_causal_lm(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    return str(save(model, tiny_tokenizer(), tmp_path_factory.mktemp("vllm") / "tiny"))


def start(
    folder: str, path: Path, *, model_args: str = SMALL, launcher: tuple[str, ...] = (), questions: int = QUESTIONS
) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "lm_eval", "--model", "specrej"]
    command += ["--model_args", f"engine=vllm,pretrained={folder},{model_args}"]
    command += ["--tasks", "specrej_arithmetic", "--include_path", str(ROOT / "tasks"), "--limit", str(questions)]
    command += ["--output_path", str(path / "out"), "--log_samples"]
    return subprocess.Popen(
        command, env=ENV, cwd=path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finished(process: subprocess.Popen[str], code: int | None = 0) -> str:
    out, _ = process.communicate(timeout=280)
    assert code is None or process.returncode == code, out[-3000:]
    return out


def specrej_block(path: Path) -> dict[str, Any]:
    [file] = sorted((path / "out").rglob("results*.json"))
    found: dict[str, Any] = json.loads(file.read_text())["config"]["specrej"]
    return found


def answers_in(journal: Path) -> int:
    """Whole lines that hold an answer."""
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(b'"trajectories"' in line for line in lines)


def test_the_demo_task_runs_through_lm_eval(folder: str, tmp_path: Path) -> None:
    out = finished(start(folder, tmp_path))
    assert "specrej_arithmetic" in out
    block = specrej_block(tmp_path)
    assert block["arguments"]["engine"] == "vllm" and block["hardware"]["promises"] == "distribution"
    assert block["hardware"]["vllm"].startswith("0.")
    totals = block["totals"]
    assert totals["requests"] == QUESTIONS and totals["rows_started"] == 6 * QUESTIONS
    assert totals["rows_finished"] + totals["rows_rejected"] == totals["rows_started"]


def test_a_real_model_runs_the_demo_task_through_lm_eval(
    smollm2_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    few = "reward_model=likelihood,n=4,enforce_eager=True,dtype=bfloat16,max_gen_toks=16"
    finished(start(str(smollm2_folder), tmp_path, model_args=few, questions=2))
    block = specrej_block(tmp_path)
    assert block["totals"]["requests"] == 2 and block["totals"]["rows_started"] == 8
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 2 and any(answers) and not any("\n" in answer for answer in answers), answers


def test_the_embedded_model_is_none_for_vllms_cpu_build(tmp_path: Path) -> None:
    """What its refusal before loading claims: given as a folder, vLLM itself has no kernel for it."""
    out = finished(start(str(checkpoint.DEMO_POLICY), tmp_path, questions=1), code=None)
    assert "vLLM cannot" in out and str(HEADS) in out and not list((tmp_path / "out").rglob("results*.json")), out[
        -3000:
    ]


def test_ranks_divide_the_prompts(folder: str, tmp_path: Path) -> None:
    finished(start(folder, tmp_path, launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2")))
    block = specrej_block(tmp_path)
    assert block["world_size"] == 2 and block["totals"]["requests"] == QUESTIONS


def test_log_likelihood_tasks_are_refused(folder: str, tmp_path: Path) -> None:
    task = tmp_path / "tasks"
    task.mkdir()
    (task / "choices.jsonl").write_text('{"q": "a", "label": 0}\n')
    (task / "choices.yaml").write_text(
        "task: choices\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {task / 'choices.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['b', 'c']\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "specrej", "--tasks", "choices", "--include_path", str(task)]
    command += ["--model_args", f"engine=vllm,pretrained={folder},{SMALL}"]
    done = subprocess.run(command, env=ENV, cwd=tmp_path, text=True, capture_output=True, timeout=280)
    assert done.returncode != 0 and "engine=vllm answers no log-likelihood requests" in done.stdout + done.stderr


def test_a_run_that_is_killed_loses_no_answer(folder: str, tmp_path: Path, counted: Counted) -> None:
    journal = tmp_path / "journal.jsonl"
    arguments = f"{SMALL},batch_size=1,journal={journal}"
    kept = 0
    for _ in range(2):
        process = start(folder, tmp_path, model_args=arguments)
        deadline = time.monotonic() + 250
        while answers_in(journal) <= kept and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert answers_in(journal) > kept, "an answer that was finished is kept"
        kept = answers_in(journal)
        counted("kills -9: engine=vllm")
    finished(start(folder, tmp_path, model_args=arguments))
    block = specrej_block(tmp_path)
    assert block["spent"]["taken_from_records"] == kept and block["spent"]["decoded"] == QUESTIONS - kept
    assert answers_in(journal) == QUESTIONS


SCRIPT = """
import sys, specrej_eval
args = dict(item.split("=", 1) for item in sys.argv[1].split(","))
found = specrej_eval.load(**args).generate(["abc", "def"])
print("TAKEN", sum(result.taken for result in found))
"""


def answered(folder: str, journal: Path, **changes: str) -> str:
    """Two prompts from Python, with a journal; what was printed."""
    words = dict(item.split("=", 1) for item in f"engine=vllm,pretrained={folder},{SMALL}".split(","))
    words |= {"max_gen_toks": "8", "journal": str(journal), **changes}
    if words["engine"] == "transformers":
        del words["enforce_eager"]
    told = ",".join(f"{name}={value}" for name, value in words.items())
    done = subprocess.run([sys.executable, "-c", SCRIPT, told], env=ENV, text=True, capture_output=True, timeout=280)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def journalled(folder: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    assert "TAKEN 0" in answered(folder, journal)
    return journal.read_bytes()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("enforce_eager", "True", "TAKEN 2"),
        ("gpu_memory_utilization", "0.3", "TAKEN 2"),
        ("temperature", "0.5", "TAKEN 0"),
        ("n", "5", "TAKEN 0"),
        ("seed", "3", "TAKEN 0"),
        ("max_model_len", "300", "max_model_len was None, is now 300"),
        ("dtype", "bfloat16", "dtype was 'float32', is now 'bfloat16'"),
        ("engine", "transformers", "engine was 'vllm', is now 'auto'"),
    ],
)
def test_a_changed_argument_is_noticed_by_the_journal(
    name: str, value: str, expected: str, folder: str, journalled: bytes, tmp_path: Path, counted: Counted
) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journalled)
    assert expected in answered(folder, journal, **{name: value})
    counted("arguments changed: engine=vllm")

"""Which attention backend a run gets: by name, by ``auto``, and what is kept of what `doctor --attention` found."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.attention_kernels import on_the_cpu, packages
from support.recorded_graphs import record

import specrej_eval
from specrej_eval import registry
from specrej_eval.api import resolve
from specrej_eval.commands.doctor import attention as doctor
from specrej_eval.config import RunConfig
from specrej_eval.engines.transformers.loading import EnginePlan, resolve_engine
from specrej_eval.errors import ConfigError, MissingDependencyError, OutOfMemoryError
from specrej_eval.kv import choose, contract, graphs
from specrej_eval.kv.native import build
from specrej_eval.records import fingerprint

OTHERS = [name for name in registry.names("specrej_eval.kv.attention") if name != "sdpa"]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and nothing said yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choose, "_said", set())
    return choose.store()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, with both packages installed."""
    monkeypatch.setattr(choose, "device_name", lambda device: "a GPU" if device.type == "cuda" else "cpu")
    for name, module in packages().items():
        monkeypatch.setitem(sys.modules, name, module)


def on_a_cpu() -> str:
    """What ``auto`` comes to there."""
    return "sdpa" if build.why_not() else "cpp"


def verify(name: str, device: torch.device = GPU, *, right: bool = True) -> None:
    choose.record(choose.build(name), device, right=right)


# ---- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_a_package_that_is_missing_is_one_error_before_a_model_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    told = rf"install with: pip install 'specrej-eval\[{name.replace('_', '-')}\]'"
    with pytest.raises(MissingDependencyError, match=told) as caught:
        choose.resolve(name, "cuda")
    assert "is not installed" in str(caught.value)


def test_a_package_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="undefined symbol"):
        choose.resolve("flash_attn", "cuda")


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_a_cpu_is_one_error_before_a_model_is_loaded(name: str) -> None:
    config, host = RunConfig.from_args({"pretrained": None, "attention_backend": name, "device": "cpu"})
    with pytest.raises(ConfigError, match=f"attention_backend={name}: it runs on cuda only, not on cpu"):
        resolve(config, host)


def test_a_misspelt_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'flashinfer'"):
        RunConfig.from_args({"attention_backend": "flash_infer"})
    assert RunConfig.from_args({"attention_backend": "flash-attn"})[0].attention_backend == "flash_attn"


@pytest.mark.usefixtures("gpu")
def test_one_that_was_never_verified_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "specrej_eval"):
        for _ in range(3):
            assert choose.resolve("flash_attn", "cuda").name == "flash_attn"
    [said] = [record.getMessage() for record in caplog.records]
    assert "never found right on this device (a GPU)" in said and "doctor --attention" in said
    verify("flash_attn")
    choose._said.clear()
    caplog.clear()
    choose.resolve("flash_attn", "cuda")
    choose.resolve("sdpa", "cuda")
    assert not caplog.records


# ---- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_auto_takes_the_best_of_those_that_are_verified_and_else_sdpa() -> None:
    assert choose.resolve("auto", "cuda").name == "sdpa"
    verify("sdpa")
    assert choose.resolve("auto", "cuda").name == "sdpa"
    verify("flashinfer")
    assert choose.resolve("auto", "cuda").name == "flashinfer"
    verify("flash_attn")
    assert choose.resolve("auto", "cuda").name == "flash_attn"
    verify("flash_attn", right=False)
    assert choose.resolve("auto", "cuda").name == "flashinfer", "what was found wrong is forgotten"
    assert choose.resolve("auto", "cpu").name == on_a_cpu(), "of the others none is for a CPU"


def test_auto_takes_nothing_that_is_not_installed_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "device_name", lambda device: "a GPU")
    verify("flash_attn")
    assert choose.resolve("auto", "cuda").name == "sdpa"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("changed", ["device", "torch", "flash-attn", "specrej_eval"])
def test_another_device_or_version_is_not_verified(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verify("flash_attn")
    backend = choose.build("flash_attn")
    assert choose.is_verified(backend, GPU)
    if changed == "device":
        monkeypatch.setattr(choose, "device_name", lambda device: "another GPU")
    elif changed == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif changed == "flash-attn":
        monkeypatch.setattr(choose, "_version_of", lambda distribution: "9.9")
    else:
        monkeypatch.setattr(choose, "__version__", "9.9")
    assert not choose.is_verified(backend, GPU)
    assert choose.resolve("auto", "cuda").name == "sdpa"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"verified": 3}', '{"verified": [1, {"stamp": 2}]}', "\x00"])
def test_a_store_that_cannot_be_read_is_an_empty_one(text: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert choose.resolve("auto", "cuda").name == "sdpa"
    verify("triton")
    verify("flash_attn")
    assert choose.resolve("auto", "cuda").name == "flash_attn"
    assert len(json.loads(cache.read_text())["verified"]) == 2 + ("stamp" in text)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name], "nothing half-written is left"


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def verified_graphs(gpu: None) -> None:
    choose.record(choose.graphs(), GPU, right=True)


def plan_on_a_gpu(**arguments: Any) -> EnginePlan:
    """With a model that is there already, so that nobody looks for the device."""
    return resolve_engine(*RunConfig.from_args({"device": "cuda:0", **arguments}), check=False)


@pytest.mark.usefixtures("gpu")
def test_graphs_that_were_never_verified_are_used_only_where_asked_for_and_say_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not plan_on_a_gpu().graphs and not plan_on_a_gpu(compile="off").graphs
    assert not caplog.records
    for _ in range(3):
        assert plan_on_a_gpu(compile="on").graphs
    [said] = [record.getMessage() for record in caplog.records]
    assert "never found right on this device (a GPU)" in said and "doctor --attention" in said


@pytest.mark.usefixtures("verified_graphs")
def test_graphs_that_are_verified_are_used_unless_compile_is_off_or_a_backend_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    verify("flash_attn")
    assert plan_on_a_gpu().graphs and plan_on_a_gpu(compile="on").graphs
    assert plan_on_a_gpu().attention.name == "sdpa", "whose attention they know"
    assert not plan_on_a_gpu(compile="off").graphs
    assert plan_on_a_gpu(compile="off").attention.name == "flash_attn"
    assert not plan_on_a_gpu(attention_backend="flash_attn").graphs
    assert plan_on_a_gpu(attention_backend="sdpa").graphs
    assert not caplog.records
    with pytest.raises(ConfigError, match="attention of sdpa, not of flash_attn"):
        plan_on_a_gpu(attention_backend="flash_attn", compile="on")
    choose.record(choose.graphs(), GPU, right=False)
    assert not plan_on_a_gpu().graphs


@pytest.mark.usefixtures("verified_graphs")
def test_graphs_of_another_version_are_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert not plan_on_a_gpu().graphs


@pytest.mark.usefixtures("verified_graphs")
def test_records_tell_of_graphs_and_a_resumed_run_is_told_of_a_change() -> None:
    found = {each: plan_on_a_gpu(compile=each).environment() for each in ("auto", "off")}
    assert found["auto"] == {"attention_backend": "sdpa", "compile": "on"}
    assert found["off"] == {"attention_backend": "sdpa", "compile": "off"}
    before, now = ({"environment": each} for each in found.values())
    assert fingerprint.compare(before, now).environment == ["compile was 'on', is now 'off'"]


# ---- what records say ------------------------------------------------------------------------------------------------


def test_auto_and_sdpa_are_the_same_run_and_others_are_not() -> None:
    auto, sdpa, other = (RunConfig(attention_backend=name) for name in ("auto", "sdpa", "triton"))
    assert fingerprint.of_run(auto, {}) == fingerprint.of_run(sdpa, {})
    assert auto.of_request == other.of_request, "models are in the journal's head, not in a request's key"
    told = fingerprint.differences(fingerprint.of_run(other, {}), fingerprint.of_run(auto, {}))
    assert "attention_backend was 'triton', is now 'auto'" in told


@pytest.mark.usefixtures("gpu")
def test_what_auto_came_to_is_told_beside_the_device() -> None:
    plan = resolve(*RunConfig.from_args({"device": "cpu"}))
    before = plan.of_models()
    assert before["environment"] == plan.fingerprint()["environment"]
    assert before["environment"]["attention_backend"] == on_a_cpu()
    now = {**before, "environment": {**before["environment"], "attention_backend": "flash_attn"}}
    found = fingerprint.compare(before, now)
    assert not found.changed and found.environment == [f"attention_backend was '{on_a_cpu()}', is now 'flash_attn'"]


def test_results_name_the_backend() -> None:
    generator = specrej_eval.load(device="cpu", n=2, max_gen_toks=4)
    assert generator.describe()["attention_backend"] == on_a_cpu()


# ---- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interpreter is slow, and the contract's own tests run it."""
    monkeypatch.setattr(type(choose.build("triton")), "why_not_on", lambda self, device: "left out here")


@pytest.mark.usefixtures("without_triton")
def test_doctor_tries_every_backend_and_keeps_what_is_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_cpu(choose.build("flash_attn"), monkeypatch)
    on_the_cpu(choose.build("flashinfer"), monkeypatch)
    monkeypatch.setitem(graphs.RECORDERS, "cpu", record)
    monkeypatch.setattr(graphs.RecordedAttention, "devices", ("cpu",))
    from specrej_eval.cli import main

    assert main(["doctor", "--attention", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in ("flash_attn", "flashinfer", "sdpa"):
        assert choose.is_verified(choose.build(name), torch.device("cpu")), name
        assert name in said
    assert choose.is_verified(choose.graphs(), torch.device("cpu")) and "cuda_graphs" in said
    assert "it computes float16 and bfloat16 only, not float32" in said and "not tried: left out here" in said
    assert "auto is sdpa, replayed as CUDA graphs here" in said and str(choose.store()) in said
    choose.record(choose.graphs(), torch.device("cpu"), right=False)
    assert choose.resolve("auto", "cpu").name == "flash_attn", "the first of those that were found right"


@pytest.mark.usefixtures("without_triton")
def test_doctor_says_what_is_wrong_and_forgets_that_it_was_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from specrej_eval.cli import main

    backend: Any = choose.build("flash_attn")
    on_the_cpu(backend, monkeypatch)
    verify("flash_attn", torch.device("cpu"))
    whole = type(backend)._decode
    monkeypatch.setattr(type(backend), "_decode", lambda self, query, *given: whole(self, query.flip(0), *given))
    assert main(["doctor", "--attention", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "BROKEN  flash_attn" in said and "plain, float16: off by" in said and "more cases that are wrong" in said
    assert not choose.is_verified(choose.build("flash_attn"), torch.device("cpu"))


@pytest.mark.usefixtures("without_triton")
def test_what_doctor_found_is_plain_json() -> None:
    reports = [report.to_dict() for report in doctor.examine(torch.device("cpu"))]
    assert {report["backend"] for report in reports} == {*OTHERS, "sdpa", "cuda_graphs"}
    assert json.loads(json.dumps(reports, allow_nan=False)) == reports
    assert next(report for report in reports if report["backend"] == "sdpa")["right"]


@pytest.mark.usefixtures("without_triton")
def test_a_folder_that_cannot_be_written_does_not_stop_doctor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    cache.parent.parent.mkdir(parents=True, exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    assert any(report.right for report in doctor.examine(torch.device("cpu")))
    assert "cannot be kept" in caplog.text


@pytest.mark.skipif(build.why_not() is not None, reason="there are no C++ kernels")
def test_memory_that_runs_out_while_a_backend_is_tried_out_is_no_verdict_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    attended = contract._attended
    failures = [True, True, True]

    def failing(*given: Any) -> Any:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError
        return attended(*given)

    monkeypatch.setattr(contract, "_attended", failing)
    with pytest.raises(OutOfMemoryError, match="cpp was tried out"):
        choose.resolve("auto", "cpu")
    assert not choose.is_verified(choose.build("cpp"), torch.device("cpu"))
    assert len(failures) == 1
    assert choose.resolve("auto", "cpu").name == "cpp"
    assert choose.is_verified(choose.build("cpp"), torch.device("cpu"))

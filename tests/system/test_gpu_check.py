"""`make gpu-check` where there is no GPU: it says so, does what can be done, and writes its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import FULL, ROOT
from support.caches import own_cache


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for an hour on the GPU that is here")
def test_gpu_check_without_a_gpu_says_so_and_writes_its_file(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    environment = {**os.environ, "XDG_CACHE_HOME": own_cache(tmp_path), "TRITON_INTERPRET": "0"}
    if not FULL:  # its step of tests collects those of one file alone
        others = ("engines", "kv/native", "kv/test_*", "kv/attention/test_[!c]*")
        environment["PYTEST_ADDOPTS"] = " ".join(f"--ignore-glob={ROOT}/tests/{other}" for other in others)
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--output", str(file)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "There is no GPU that torch can use here" in done.stdout and "Failed: nothing." in done.stdout
    found = json.loads(file.read_text())
    assert found["device"] == "cpu" and found["about"]["gpus"] == []
    assert {told["backend"]: told["right"] for told in found["attention"]}["sdpa"]
    tests = found["steps"].pop("tests")
    # not always in the last line: a library may say something when the process ends
    assert tests["exit_code"] == 0 and any("skipped" in line for line in tests["end_of_output"])
    assert found["steps"].keys() >= {"attention_backends", "decode_throughput"}
    assert all(step == {"left_out": "there is no GPU"} for step in found["steps"].values())
    assert "-m gpu" in file.with_suffix(".log").read_text()

"""Our Triton kernel compiles for GPUs that are not here, and fits into what they have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import inspect, torch, triton
from triton.backends.compiler import GPUTarget
from specrej_eval.kv.attention import triton as ours

kernel = triton.jit(ours._attend, do_not_specialize=ours._CHANGING)
names = [parameter.name for parameter in kernel.params]
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}

def signature(dtype, constants):
    kinds = dict.fromkeys(names, "i64")
    kinds |= dict.fromkeys(("query", "key", "value", "merged", "sinks"), POINTERS[dtype])
    kinds |= dict.fromkeys(("out_parts", "lse_parts"), "*fp32")
    kinds |= dict.fromkeys(("scale", "softcap"), "fp32")
    kinds |= dict.fromkeys(ours._CHANGING, "i32")
    return kinds | dict.fromkeys(constants, "constexpr")

for capability in (80, 90):
    for dtype, width in ((torch.bfloat16, 128), (torch.float16, 80), (torch.bfloat16, 256), (torch.float32, 256)):
        for merges in (False, True):
            query = torch.empty(1 if merges else 64, 8, 4, width, dtype=dtype, device="meta")
            constants = ours._shape_constants(query, width) | {
                "KV_HEADS": 8, "GROUPS": 4, "SOFTCAP": True, "SINKS": merges, "MERGES": merges,
            }
            # Triton 3.2 (torch 2.6) wants the constants by name; from 3.3 on they are named by their places
            if "constants" in inspect.signature(triton.compiler.ASTSource).parameters:
                known = {"constants": constants}
            else:
                known = {"constexprs": {(names.index(name),): value for name, value in constants.items()}}
            source = triton.compiler.ASTSource(fn=kernel, signature=signature(dtype, constants), **known)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(ours._OPTIONS))
            print(capability, dtype, width, merges, built.metadata.shared)
"""
SHARED_MEMORY = 99 * 1024
"""Bytes a block may have on the smallest GPUs that compute bfloat16 (compute capability 8.6)."""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 16 and all(0 < size <= SHARED_MEMORY for size in sizes), done.stdout

"""Thousands of small requests in one process: what stays in memory for each of them, and what stays open."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import FULL

from specrej_eval import load

PROC = Path("/proc/self")
REQUESTS = 10_000 if FULL else 240
FIRST = 4000 if FULL else 80
"""Requests after which libraries have what they keep for good. A tokenizer keeps the last 10,000 short words that it
has taken apart, and to one that splits no words (the demo pair's) a whole text is a word: some 7 KB a request until it
is full, after about 2,200 requests."""
MOST_BYTES = 1024
"""Of Python's own memory that a request may leave behind; what it is recorded by lies on the disk."""
AT_A_TIME = 40


def resident() -> int:
    """Bytes, once what was freed is given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not PROC.is_dir(), reason="this system does not say what a process holds")
@pytest.mark.timeout(7200)
def test_requests_leave_nothing_behind_but_their_records(
    tmp_path: Path,
    counted: Callable[[str, int], None],
    measured: Callable[[str, float], None],
) -> None:
    """New prompts each time, with a journal and a trace, as a process that serves others has them."""
    arguments = {"n": 2, "max_gen_toks": 2, "first_look": 1, "batch_size": 8, "device": "cpu"}
    records = {"journal": str(tmp_path / "run.jsonl"), "trace_path": str(tmp_path / "trace.jsonl")}
    generator = load(**arguments, **records)
    open_files, blocks, bytes_resident = [], [], []
    for start in range(0, REQUESTS, AT_A_TIME):
        asked = [f"Q: {number} + {number * 7 % 1000} = ?\nA:" for number in range(start, start + AT_A_TIME)]
        assert len(generator.generate(asked)) == AT_A_TIME
        if start + AT_A_TIME >= FIRST:
            bytes_resident.append(resident())
            blocks.append(sys.getallocatedblocks())
            open_files.append(len(os.listdir(PROC / "fd")))
    requests = AT_A_TIME * (len(blocks) - 1)
    measured("KB of RSS that a request leaves", (bytes_resident[-1] - bytes_resident[0]) / requests / 1024)
    measured("Python's blocks that a request leaves", (blocks[-1] - blocks[0]) / requests)
    counted("requests in one process", REQUESTS)
    assert len(set(open_files)) == 1, "files stay open"
    # blocks are Python's count, the same on every machine; a result held by somebody would be hundreds
    assert (blocks[-1] - blocks[0]) / requests < 12
    half = len(bytes_resident) // 2
    assert bytes_resident[-1] - bytes_resident[half] <= MOST_BYTES * AT_A_TIME * (len(blocks) - half) + 2**22
    assert len((tmp_path / "run.jsonl").read_bytes().splitlines()) == REQUESTS + 1
    assert json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[-1])["event"] == "request"

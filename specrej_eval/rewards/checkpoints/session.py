"""What a checkpoint reward model remembers of one prompt between looks, so that it reads only what is new.

The prompt is read once and its KV shared by all rows. Each row keeps the KV of its response: at the next look only the
tokens behind the longest common prefix with what is held are read. That is decided by token ids alone, so it covers the
closing tokens of the last look, text that tokenises differently once it goes on, another tokenizer than the
generator's, and forks, which find their parent by what they share with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specrej_eval.core import Message, RowView
from specrej_eval.errors import OutOfMemoryError
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.memory import is_out_of_memory, twice
from specrej_eval.kv.ragged import RaggedPool
from specrej_eval.rewards.base import RewardSession
from specrej_eval.rewards.checkpoints.forward import Forward
from specrej_eval.rewards.checkpoints.memory import in_batches, in_halves
from specrej_eval.rewards.checkpoints.renderer import Input
from specrej_eval.rewards.checkpoints.shared_body import SharedBody

_SEAM = 4
"""The prompt's last tokens may be others before some responses (blank lines); rows share at least all but these."""
_PROBES = ("a", " b", "\n\nc")
"""Responses that begin differently, stripped or not: what their inputs have in common is the prompt."""


@dataclass(eq=False, slots=True)
class _Entry:
    """One input that was scored. Rows that read the same share one."""

    ids: tuple[int, ...]
    score: float
    place: int
    """Of its KV in the pool."""
    hidden: dict[int, Tensor]
    """Hidden states behind the prompt that the head read, by position."""


@dataclass(eq=False, slots=True)
class _Job:
    """One input to score at this look."""

    ids: tuple[int, ...]
    wanted: tuple[int, ...]
    source: _Entry | None
    start: int
    """Position of the first token to read; ``len(ids)`` if nothing is new."""
    place: int = 0
    hidden: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_new(self) -> int:
        return len(self.ids) - self.start

    @property
    def known_score(self) -> float | None:
        """The score of the very same tokens, if they have one."""
        return self.source.score if self.source is not None and self.source.ids == self.ids else None


@dataclass(slots=True)
class _Prompt:
    ids: tuple[int, ...]
    prefix: Prefix
    hidden: Tensor
    """(tokens, hidden size)"""


class CachedSession(RewardSession):
    """One prompt whose KV, and that of its rows, is kept."""

    def __init__(
        self, reward: Forward, body: SharedBody, conversation: Sequence[Message], response_prefix: str
    ) -> None:
        self._reward = reward
        self._body = body
        self._conversation = conversation
        self._response_prefix = response_prefix
        self._prompt: _Prompt | None = None
        self._pool: RaggedPool | None = None
        self._entries: dict[int, _Entry] = {}  # by row id
        self._held = 0

    @torch.inference_mode()
    def score(self, rows: Sequence[RowView]) -> list[float]:
        """As the reward's own ``score``, to rounding."""
        if not rows:
            return []
        inputs = self._reward.renderer.inputs(self._conversation, rows, self._response_prefix)
        row_ids = [row.row for row in rows]
        for keep_rows in dict.fromkeys((self._reward.cache == "full", False)):
            try:
                scores = self._score(inputs, row_ids, keep_rows=keep_rows)
                return [scores[entry] for entry in inputs]
            except (OutOfMemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
            # outside the except block: the traceback would keep the failed pass's tensors alive
            self._forget()
            self._reward.renderer.warn(
                "memory", "memory is running low: it caches less and reads more tokens again (reported once)."
            )
        scores = self._reward.score_inputs(inputs)
        return [scores[entry] for entry in inputs]

    @torch.inference_mode()
    def keep(self, row_ids: Sequence[int]) -> None:
        """Only these rows go on; the KV of others is freed."""
        self._entries = {row: self._entries[row] for row in dict.fromkeys(row_ids) if row in self._entries}
        if self._pool is None:
            return
        staying = list(dict.fromkeys(self._entries.values()))
        if len(staying) == self._pool.rows:
            return
        if not staying:
            self._drop_pool()
            return
        shared = self._prompt.prefix.length if self._prompt is not None else 0
        length = max(len(entry.ids) for entry in staying) - shared
        try:
            self._pool.gather([entry.place for entry in staying], length, 0, self._reward.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._drop_pool()
            return
        for place, entry in enumerate(staying):
            entry.place = place
        self._account()

    def close(self) -> None:
        """Free everything."""
        self._forget()

    # what can be cached

    def _score(self, inputs: Sequence[Input], row_ids: Sequence[int], *, keep_rows: bool) -> dict[Input, float]:
        scores: dict[Input, float] = {}
        unique = dict.fromkeys(inputs)
        with ExitStack() as stack:
            twice(lambda: stack.enter_context(self._body.active()))
            prompt = self._shared_prompt([entry.ids for entry in unique])
            behind = [] if prompt is None else [entry for entry in unique if self._continues(prompt, entry.ids)]
            if prompt is not None and behind:
                held: dict[Input, list[_Entry]] = {}
                for row, entry in zip(row_ids, inputs, strict=True):
                    if row in self._entries:
                        held.setdefault(entry, []).append(self._entries[row])
                jobs = {entry: self._job(prompt, entry.ids, held.get(entry)) for entry in behind}
                self._read(prompt, list(jobs.values()), keep_rows=keep_rows)
                scores = dict(zip(jobs, self._scores(prompt, list(jobs.values())), strict=True))
                found = {entry: _Entry(job.ids, scores[entry], job.place, job.hidden) for entry, job in jobs.items()}
                self._entries = {
                    row: found[entry] for row, entry in zip(row_ids, inputs, strict=True) if entry in found
                }
        scores.update(self._reward.score_inputs([entry for entry in unique if entry not in scores]))
        return scores

    def _shared_prompt(self, inputs: Sequence[tuple[int, ...]]) -> _Prompt | None:
        """The prompt, read at the first look; None where it cannot be held."""
        if self._prompt is not None:
            return self._prompt
        views = [RowView(-1, text, (), "eos") for text in _PROBES]
        probes = self._reward.renderer.inputs(self._conversation, views, self._response_prefix)
        ids = probes[0].ids
        for probe in probes[1:]:
            ids = ids[: common(ids, probe.ids)]
        for entry in inputs:
            same = common(ids, entry)
            if same >= len(ids) - _SEAM:  # else this row was cut on the left, or the template writes it in another way
                ids = ids[:same]
        if not ids:
            return None
        if not self._reward.allowance.grows_by(len(ids)):
            self._reward.renderer.warn(
                "allowance of prompts",
                f"its caches may hold {self._reward.allowance.limit:,} tokens, fewer than the prompts in flight have, "
                "so every look is read in full (reported once). Raise reward_kv_budget_tokens to cache more.",
            )
            return None
        [(prefix, hidden)] = twice(lambda: self._body.prefill([ids]))
        self._reward.count(len(ids))
        self._prompt = _Prompt(ids, prefix, hidden)
        self._reward.allowance.measure(prefix, self._reward.device)
        self._account()
        return self._prompt

    def _continues(self, prompt: _Prompt, ids: tuple[int, ...]) -> bool:
        limit = self._body.limit
        return len(ids) > len(prompt.ids) and ids[: len(prompt.ids)] == prompt.ids and (not limit or len(ids) <= limit)

    def _job(self, prompt: _Prompt, ids: tuple[int, ...], own: Sequence[_Entry] | None) -> _Job:
        """Where reading has to begin: behind what some held row has in common, but not behind a position whose hidden
        state is wanted and not held.

        Args:
            own: what the rows that read this were at the last look; None for rows not seen before.
        """
        candidates = own or self._entries.values()
        source = max(candidates, key=lambda entry: common(entry.ids, ids), default=None)
        wanted = self._reward.positions_of(ids)
        shared = len(prompt.ids)
        if source is None:
            return _Job(ids, wanted, None, shared)
        if source.ids == ids and (self._pool is not None or self._reward.cache != "full"):
            return _Job(ids, wanted, source, len(ids))
        same = common(source.ids, ids) if self._pool is not None else shared
        missing = [position for position in wanted if shared <= position < same and position not in source.hidden]
        return _Job(ids, wanted, source, max(shared, min([same, *missing])))

    # reading

    def _read(self, prompt: _Prompt, jobs: list[_Job], *, keep_rows: bool) -> None:
        """Feed every job's new tokens; afterwards each holds the hidden states that its head wants."""
        shared = prompt.prefix.length
        # shortest first, ids second: least padding, and the order does not hang on which row came first
        jobs.sort(key=lambda job: (job.num_new, job.ids))
        pool = self._arranged(prompt, jobs) if keep_rows else None
        if pool is None:
            self._drop_pool()
            for job in jobs:
                if job.num_new:
                    job.start = shared
        fed = [job for job in jobs if job.num_new]
        for batch in in_batches(fed, lambda job: job.num_new, self._reward.max_padded_tokens):
            in_halves(
                batch,
                lambda part: self._extend(prompt, pool, part),
                lambda job: self._reward.out_of_memory(len(job.ids)),
            )
        for job in jobs:
            if job.source is not None:
                known = job.source.hidden
                job.hidden.update({p: known[p] for p in job.wanted if p in known and shared <= p < job.start})

    def _arranged(self, prompt: _Prompt, jobs: Sequence[_Job]) -> RaggedPool | None:
        """The pool with one row for every job, in their order; None if that is more than the allowance."""
        shared = prompt.prefix.length
        capacity = max(len(job.ids) for job in jobs) - shared
        rounded = max(
            -(-capacity // self._body.align) * self._body.align, self._pool.capacity if self._pool is not None else 0
        )
        if not self._reward.allowance.grows_by(shared + len(jobs) * rounded - self._held):
            self._reward.renderer.warn(
                "allowance",
                f"its caches may hold {self._reward.allowance.limit:,} tokens, too few for every row, so only the "
                "prompt is kept (reported once). Raise reward_kv_budget_tokens to cache more.",
            )
            return None
        if self._pool is None:
            self._pool = RaggedPool(len(jobs), capacity=capacity, align=self._body.align)
            for job in jobs:
                job.start = shared
        else:
            places = [job.source.place if job.source is not None else 0 for job in jobs]
            length = max(job.start for job in jobs) - shared
            self._pool.gather(places, length, capacity, self._reward.device)
        for place, job in enumerate(jobs):
            job.place = place
        self._account()
        return self._pool

    def _extend(self, prompt: _Prompt, pool: RaggedPool | None, batch: list[_Job]) -> list[None]:
        shared = prompt.prefix.length
        new = [job.ids[job.start :] for job in batch]
        starts = [job.start - shared for job in batch]
        fed = self._body.extend(prompt.prefix, starts, new, pool=pool, first=batch[0].place if pool is not None else 0)
        for job, hidden in zip(batch, fed, strict=True):
            # cloned: a view would keep the hidden states of the whole batch alive
            job.hidden = {p: hidden[p - job.start].clone() for p in job.wanted if p >= job.start}
        self._reward.count(sum(map(len, new)))  # nothing can fail behind it: what is done again counts once
        return [None] * len(batch)

    def _scores(self, prompt: _Prompt, jobs: Sequence[_Job]) -> list[float]:
        """The head on what was read; tokens that were scored before keep their score."""
        fresh = [job for job in jobs if job.known_score is None]
        values: list[float] = []
        if fresh:
            shared = len(prompt.ids)

            def head() -> list[float]:
                hidden = [
                    torch.stack([prompt.hidden[p] if p < shared else job.hidden[p] for p in job.wanted])
                    for job in fresh
                ]
                scores: list[float] = self._reward.head_scores(hidden).tolist()
                return scores

            values = twice(head)
        found = dict(zip(map(id, fresh), values, strict=True))
        return [found[id(job)] if job.known_score is None else job.known_score for job in jobs]

    # memory

    def _account(self) -> None:
        """Tell the allowance what this session holds."""
        held = self._prompt.prefix.length if self._prompt is not None else 0
        if self._pool is not None:
            held += self._pool.rows * self._pool.capacity
        self._reward.allowance.held += held - self._held
        self._held = held

    def _drop_pool(self) -> None:
        self._pool = None
        self._account()

    def _forget(self) -> None:
        self._prompt = None
        self._entries = {}
        self._drop_pool()


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low

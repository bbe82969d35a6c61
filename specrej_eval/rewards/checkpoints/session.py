"""What a checkpoint reward model remembers of one prompt between looks, so that it reads only what is new.

The prompt is read once and its KV shared by all rows. Each row keeps the KV of its response: at the next look only the
tokens behind the longest common prefix with what is held are read. That is decided by token ids alone, so it covers the
closing tokens of the last look, text that tokenises differently once it goes on, another tokenizer than the
generator's, and forks, which find their parent by what they share with it.

The looks of several prompts may be read together (``read_together``): their new tokens share forward passes, and each
session keeps what its ``score`` will say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from specrej_eval.core import Message, RowView
from specrej_eval.errors import OutOfMemoryError, RewardError
from specrej_eval.kv.cache import Prefix
from specrej_eval.kv.memory import is_out_of_memory, twice
from specrej_eval.kv.ragged import NewTokens, RaggedPool, common
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
    batch: int = 0
    """Jobs of one prompt and batch are padded together."""
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


@dataclass(eq=False, slots=True)
class _Look:
    """One prompt's rows at one look."""

    session: CachedSession
    rows: Sequence[RowView]
    inputs: list[Input]
    keep_rows: bool
    """Whether the rows' KV is to be kept, not only the prompt's."""
    pool: RaggedPool | None = None
    jobs: dict[Input, _Job] = field(default_factory=dict)
    """Of the inputs that continue the prompt."""
    scores: dict[Input, float] = field(default_factory=dict)
    """Of these, once they were read."""

    def is_of(self, rows: Sequence[RowView]) -> bool:
        return len(rows) == len(self.rows) and all(one is other for one, other in zip(rows, self.rows, strict=True))


class CachedSession(RewardSession):
    """One prompt whose KV, and that of its rows, is kept."""

    def __init__(
        self, reward: Forward, body: SharedBody, conversation: Sequence[Message], response_prefix: str
    ) -> None:
        self.reward = reward
        self.body = body
        self._conversation = conversation
        self._response_prefix = response_prefix
        self._prompt: _Prompt | None = None
        self._prompt_to_come = 0
        """Tokens of the prompt while it is being read."""
        self._pool: RaggedPool | None = None
        self._entries: dict[int, _Entry] = {}  # by row id
        self._held = 0
        self._ahead: _Look | None = None
        """A look that has been read, and that ``score`` has not been asked for yet."""
        self._counts: list[int] = []
        """Tokens of forward passes that the reward has not counted yet: those of a look count when it is scored."""

    @torch.inference_mode()
    def score(self, rows: Sequence[RowView]) -> list[float]:
        """As the reward's own ``score``, to rounding."""
        if not rows:
            return []
        try:
            return self._score(rows)
        finally:
            for num_tokens in self._counts:
                self.reward.count(num_tokens)
            self._counts.clear()

    def _score(self, rows: Sequence[RowView]) -> list[float]:
        look, self._ahead = self._ahead, None
        if look is None or not look.is_of(rows):
            look = None
        inputs = self._inputs(rows) if look is None else look.inputs
        for keep_rows in dict.fromkeys((self.reward.cache == "full", False)):
            try:
                if look is None:
                    look = _Look(self, rows, inputs, keep_rows)
                    _read([look])
                return self._all_scores(look)
            except (OutOfMemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
            # outside the except block: the traceback would keep the failed pass's tensors alive
            look = None
            self.forget()
            self.reward.renderer.warn(
                "memory", "memory is running low: it caches less and reads more tokens again (reported once)."
            )
        scores = self.reward.score_inputs(inputs)
        return [scores[entry] for entry in inputs]

    def _inputs(self, rows: Sequence[RowView]) -> list[Input]:
        return self.reward.renderer.inputs(self._conversation, rows, self._response_prefix)

    def _all_scores(self, look: _Look) -> list[float]:
        """Those of rows that do not continue the prompt as well: they are read in full."""
        missing = [entry for entry in dict.fromkeys(look.inputs) if entry not in look.scores]
        scores = {**look.scores, **self.reward.score_inputs(missing)}
        return [scores[entry] for entry in look.inputs]

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
            self._pool.gather([entry.place for entry in staying], length, 0, self.reward.device)
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
        self.forget()

    # what can be cached

    @property
    def has_begun(self) -> bool:
        """Whether the prompt is held."""
        return self._prompt is not None

    def look(self, rows: Sequence[RowView]) -> _Look:
        """What ``read_together`` is to read. Raises as ``Renderer.inputs``."""
        return _Look(self, rows, self._inputs(rows), self.reward.cache == "full")

    def prompt_to_read(self, look: _Look) -> tuple[int, ...]:
        """The prompt's ids, at the first look, for ``take_prompt``; none where it is there or cannot be held."""
        if self._prompt is not None:
            return ()
        views = [RowView(-1, text, (), "eos") for text in _PROBES]
        probes = self._inputs(views)
        ids = probes[0].ids
        for probe in probes[1:]:
            ids = ids[: common(ids, probe.ids)]
        for entry in dict.fromkeys(look.inputs):
            same = common(ids, entry.ids)
            if same >= len(ids) - _SEAM:  # else this row was cut on the left, or the template writes it in another way
                ids = ids[:same]
        if not self.reward.allowance.grows_by(len(ids)):
            self.reward.renderer.warn(
                "allowance of prompts",
                f"its caches may hold {self.reward.allowance.limit:,} tokens, fewer than the prompts in flight have, "
                "so every look is read in full (reported once). Raise reward_kv_budget_tokens to cache more.",
            )
            return ()
        self._prompt_to_come = len(ids)
        self._account()
        return ids

    def take_prompt(self, ids: tuple[int, ...], prefix: Prefix, hidden: Tensor) -> None:
        """The prompt was read."""
        self._counts.append(len(ids))
        self._prompt = _Prompt(ids, prefix, hidden)
        self._prompt_to_come = 0
        self.reward.allowance.measure(prefix, self.reward.device)
        self._account()

    def arrange(self, look: _Look) -> list[list[_Job]]:
        """Find out what is new, and make room for it: jobs to read, in batches."""
        unique = dict.fromkeys(look.inputs)
        prompt = self._prompt
        behind = [] if prompt is None else [entry for entry in unique if self._continues(prompt, entry.ids)]
        if prompt is None or not behind:
            return []
        held: dict[Input, list[_Entry]] = {}
        for row, entry in zip(look.rows, look.inputs, strict=True):
            if row.row in self._entries:
                held.setdefault(entry, []).append(self._entries[row.row])
        look.jobs = {entry: self._job(prompt, entry.ids, held.get(entry)) for entry in behind}
        # shortest first, ids second: least padding, and the order does not hang on which row came first
        jobs = sorted(look.jobs.values(), key=lambda job: (job.num_new, job.ids))
        look.pool = self._arranged(prompt, jobs) if look.keep_rows else None
        if look.pool is None:
            self._drop_pool()
            for job in jobs:
                if job.num_new:
                    job.start = len(prompt.ids)
        fed = [job for job in jobs if job.num_new]
        batches = list(in_batches(fed, lambda job: job.num_new, self.reward.max_padded_tokens))
        for number, batch in enumerate(batches):
            for job in batch:
                job.batch = number
        return batches

    def _continues(self, prompt: _Prompt, ids: tuple[int, ...]) -> bool:
        limit = self.body.limit
        return len(ids) > len(prompt.ids) and ids[: len(prompt.ids)] == prompt.ids and (not limit or len(ids) <= limit)

    def _job(self, prompt: _Prompt, ids: tuple[int, ...], own: Sequence[_Entry] | None) -> _Job:
        """Where reading has to begin: behind what some held row has in common, but not behind a position whose hidden
        state is wanted and not held.

        Args:
            own: what the rows that read this were at the last look; None for rows not seen before.
        """
        candidates = own or self._entries.values()
        source = max(candidates, key=lambda entry: common(entry.ids, ids), default=None)
        wanted = self.reward.positions_of(ids)
        shared = len(prompt.ids)
        if source is None:
            return _Job(ids, wanted, None, shared)
        if source.ids == ids and (self._pool is not None or self.reward.cache != "full"):
            return _Job(ids, wanted, source, len(ids))
        same = common(source.ids, ids) if self._pool is not None else shared
        missing = [position for position in wanted if shared <= position < same and position not in source.hidden]
        return _Job(ids, wanted, source, max(shared, min([same, *missing])))

    def _arranged(self, prompt: _Prompt, jobs: Sequence[_Job]) -> RaggedPool | None:
        """The pool with one row for every job, in their order; None if that is more than the allowance."""
        shared = prompt.prefix.length
        capacity = max(len(job.ids) for job in jobs) - shared
        rounded = max(
            -(-capacity // self.body.align) * self.body.align, self._pool.capacity if self._pool is not None else 0
        )
        if not self.reward.allowance.grows_by(shared + len(jobs) * rounded - self._held):
            self.reward.renderer.warn(
                "allowance",
                f"its caches may hold {self.reward.allowance.limit:,} tokens, too few for every row, so only the "
                "prompt is kept (reported once). Raise reward_kv_budget_tokens to cache more.",
            )
            return None
        if self._pool is None:
            self._pool = RaggedPool(len(jobs), capacity=capacity, align=self.body.align)
            for job in jobs:
                job.start = shared
        else:
            places = [job.source.place if job.source is not None else 0 for job in jobs]
            length = max(job.start for job in jobs) - shared
            self._pool.gather(places, length, capacity, self.reward.device)
        for place, job in enumerate(jobs):
            job.place = place
        self._account()
        return self._pool

    # reading

    def new_tokens(self, look: _Look, jobs: Sequence[_Job]) -> NewTokens:
        """What some jobs of one batch have to read."""
        assert self._prompt is not None
        shared = len(self._prompt.ids)
        return self.body.new_tokens(
            self._prompt.prefix,
            [job.ids[shared:] for job in jobs],
            [job.start - shared for job in jobs],
            pool=look.pool,
            first=jobs[0].place if look.pool is not None else 0,
        )

    def has_read(self, num_tokens: int) -> None:
        """One more forward pass has read so many tokens of this prompt's rows."""
        self._counts.append(num_tokens)

    def conclude(self, look: _Look) -> None:
        """Everything was read: scores, and what is remembered until the next look."""
        prompt = self._prompt
        if prompt is None or not look.jobs:
            return
        shared = len(prompt.ids)
        for job in look.jobs.values():
            if job.source is not None:
                known = job.source.hidden
                job.hidden.update({p: known[p] for p in job.wanted if p in known and shared <= p < job.start})
        scores = dict(zip(look.jobs, self._scores(prompt, list(look.jobs.values())), strict=True))
        found = {entry: _Entry(job.ids, scores[entry], job.place, job.hidden) for entry, job in look.jobs.items()}
        self._entries = {
            row.row: found[entry] for row, entry in zip(look.rows, look.inputs, strict=True) if entry in found
        }
        look.scores = scores

    def keep_ahead(self, look: _Look) -> None:
        """``score`` will be asked for a look that has been read."""
        self._ahead = look

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
                scores: list[float] = self.reward.head_scores(hidden).tolist()
                return scores

            values = twice(head)
        found = dict(zip(map(id, fresh), values, strict=True))
        return [found[id(job)] if job.known_score is None else job.known_score for job in jobs]

    # memory

    def _account(self) -> None:
        """Tell the allowance what this session holds."""
        held = self._prompt.prefix.length if self._prompt is not None else self._prompt_to_come
        if self._pool is not None:
            held += self._pool.rows * self._pool.capacity
        self.reward.allowance.held += held - self._held
        self._held = held

    def _drop_pool(self) -> None:
        self._pool = None
        self._account()

    def forget(self) -> None:
        """Start anew: nothing has been read."""
        self._prompt, self._prompt_to_come, self._ahead = None, 0, None
        self._entries = {}
        self._drop_pool()


@torch.inference_mode()
def read_together(looks: Sequence[tuple[CachedSession, Sequence[RowView]]]) -> None:
    """Read the looks of several prompts of one reward, so that each session's ``score`` of these rows has its scores.

    What is wrong with a prompt, and memory that does not suffice, is left to ``score``.
    """
    begun = []
    for session, rows in looks:
        with suppress(RewardError):
            begun.append(session.look(rows))
    try:
        _read(begun)
    except (OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        for look in begun:
            look.session.forget()
        return
    for look in begun:
        look.session.keep_ahead(look)


def _read(looks: Sequence[_Look]) -> None:
    """Read looks of one reward to their end.

    Raises:
        OutOfMemoryError, RuntimeError: memory ran out; the sessions must ``forget``.
    """
    if not looks:
        return
    reward, body = looks[0].session.reward, looks[0].session.body
    with ExitStack() as stack:
        begun = all(look.session.has_begun for look in looks)
        twice(lambda: stack.enter_context(body.active(unchanged=begun)))
        prompts = [(look.session, ids) for look in looks if (ids := look.session.prompt_to_read(look))]
        if prompts:
            read = twice(lambda: body.prefill([ids for _, ids in prompts]))
            for (session, ids), (prefix, hidden) in zip(prompts, read, strict=True):
                session.take_prompt(ids, prefix, hidden)
        batches = [[(look, job) for job in batch] for look in looks for batch in look.session.arrange(look)]
        for jobs in _joined(batches, reward.max_padded_tokens):
            in_halves(jobs, lambda part: _extend(body, part), lambda item: reward.out_of_memory(len(item[1].ids)))
        for look in looks:
            look.session.conclude(look)


def _joined(batches: Sequence[list[tuple[_Look, _Job]]], most: int) -> Iterator[list[tuple[_Look, _Job]]]:
    """Batches one behind the other, as far as they have no more than ``most`` padded tokens together."""
    joined: list[tuple[_Look, _Job]] = []
    padded = 0
    for batch in batches:
        tokens = len(batch) * batch[-1][1].num_new
        if joined and padded + tokens > most:
            yield joined
            joined, padded = [], 0
        joined, padded = [*joined, *batch], padded + tokens
    if joined:
        yield joined


def _extend(body: SharedBody, items: Sequence[tuple[_Look, _Job]]) -> list[None]:
    """One forward pass over the new tokens of jobs; each prompt's batch is padded by itself."""
    groups = [
        (look, [job for _, job in group])
        for (look, _), group in groupby(items, key=lambda item: (item[0], item[1].batch))
    ]
    parts = [look.session.new_tokens(look, jobs) for look, jobs in groups]
    for (_, jobs), fed in zip(groups, body.extend(parts), strict=True):
        for job, hidden in zip(jobs, fed, strict=True):
            # cloned: a view would keep the hidden states of the whole batch alive
            job.hidden = {p: hidden[p - job.start].clone() for p in job.wanted if p >= job.start}
    for (look, _), part in zip(groups, parts, strict=True):
        look.session.has_read(len(part.ids))  # nothing can fail behind it: what is done again counts once
    return [None] * len(items)

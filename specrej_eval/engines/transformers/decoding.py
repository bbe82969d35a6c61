"""The decode loop: rows of several prompts in one batch, one token per row and step.

Per step one byte per row comes to the host. A step changes nothing until all of it is there, so one that ran out of
memory is simply taken again; if that does not help, the batch is split into two that take turns. Logical rows, uniforms
and rounds stay as they are; only where tensors live changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from specrej_eval.engines.transformers.groups import Group, as_given, in_strata
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.engines.transformers.sampling import sample, uniform
from specrej_eval.engines.transformers.session import Session
from specrej_eval.engines.transformers.token_stats import stats_of
from specrej_eval.errors import OutOfMemoryError
from specrej_eval.kv.memory import clear_error, or_else, twice

logger = logging.getLogger(__name__)

SMALLER = "use a smaller model or dtype, a shorter prompt, fewer rows (n), or a smaller kv_budget_tokens."
"""What to do about memory that runs out."""

Batch = Sequence[tuple[Session, Group]]
"""Groups that decode together, each with the session it belongs to."""
Drawn = dict[Group, tuple[Tensor, Tensor]]
"""Per group: (rows,) ids, and (rows, numbers) of what its session records."""


class Decoder:
    """Decodes groups to their targets. Inside ``ModelRunner.active`` only."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.oom_splits = 0
        """Times a batch was split because memory ran out."""

    def decode(self, batch: Batch, *, alone: bool = True) -> None:
        """Decode a batch until each group has sampled ``Group.target`` tokens.

        Args:
            alone: return early once a session has no live row left.

        Raises:
            OutOfMemoryError: not even one row at a time could be decoded.
        """

        def together() -> None:
            for _, group in batch:
                group.unpark()
            try:
                self._run(batch, stop_early=alone)
            except RuntimeError:
                for _, group in batch:
                    group.cache = None  # on the replicated path it may hold the failed step already: it is made again
                raise

        or_else(lambda: twice(together), lambda: self._in_turns([member for member in batch if member[1].num_rows]))

    def _in_turns(self, batch: Batch) -> None:
        self.oom_splits += 1
        half = len(batch) // 2
        turns = [batch[:half], batch[half:]]
        if not half:
            [(session, group)] = batch
            if group.num_rows < 2:
                self._give_up(session, group)
                return
            rest = twice(group.split)
            session.groups.append(rest)
            turns = [batch, [(session, rest)]]
        for turn in turns:
            for _, group in turn:
                twice(group.park)
        for turn in turns:
            live = [(session, group) for session, group in turn if group in session.groups]
            if live:
                self.decode(live, alone=False)
            for session, group in live:
                if group in session.groups:
                    twice(group.park)

    @staticmethod
    def _give_up(session: Session, group: Group) -> None:
        """Not even one row fits: the row is given up and the result says ``degraded``.

        Raises:
            OutOfMemoryError: it was the session's last hope.
        """
        finished = any(record.finish_reason not in (None, "rejected") for record in session.records)
        if session.num_live == group.num_rows and not finished:
            raise OutOfMemoryError(
                f"out of memory while decoding a single row at token {group.num_sampled}.",
                hint="use a smaller model or dtype, a shorter prompt, or lower max_gen_toks.",
            )
        logger.warning(
            "out of memory: row %d does not fit even alone, so it is given up and the result is marked as degraded",
            group.row_ids[0],
        )
        session.give_up(group)

    def _run(self, batch: Batch, *, stop_early: bool) -> None:
        while batch := [(session, group) for session, group in batch if group.num_rows and not group.is_done]:
            rows = [group.num_rows for _, group in batch]  # before any ends: those that do were decoded too
            started = time.perf_counter()
            emptied = self._commit(batch, self._draw(batch))
            seconds = time.perf_counter() - started
            for (session, _), mine in zip(batch, rows, strict=True):
                session.decode_seconds += seconds * mine / sum(rows)
            if stop_early and emptied:
                return

    def _draw(self, batch: Batch) -> Drawn:
        """One forward pass, and each row's next token drawn from its own uniform."""
        drawn: Drawn = {}
        for members, logits in self._logits(batch):
            session = members[0][0]
            groups = [group for _, group in members]
            streams = torch.cat([group.rows.streams for group in groups])
            steps = torch.cat([group.steps() for group in groups])
            uniforms = in_strata(groups, uniform(streams, steps))
            tokens = as_given(groups, sample(logits, uniforms, session.sampling))
            stats = stats_of(logits, tokens, session.recorded)
            sizes = [group.num_rows for group in groups]
            for group, mine, told in zip(groups, tokens.split(sizes), stats.split(sizes), strict=True):
                drawn[group] = mine, told
        return drawn

    def _logits(self, batch: Batch) -> Iterator[tuple[Batch, Tensor]]:
        """Logits of every row's next token; those of sessions that sample and record alike come in one piece."""
        fed = [(session, group) for session, group in batch if group.num_sampled]
        if fed:
            last = torch.cat([group.rows.tokens[:, group.num_sampled - 1] for _, group in fed]).to(torch.int64)
            logits = self.runner.step([group for _, group in fed], last)  # (rows, vocab)
            if len({(session.sampling, session.recorded) for session, _ in fed}) == 1:
                yield fed, logits
            else:
                split = logits.split([group.num_rows for _, group in fed])
                yield from (([member], mine) for member, mine in zip(fed, split, strict=True))
        for session, group in batch:
            if not group.num_sampled:  # nothing fed yet: all rows share the prompt's own logits, (1, vocab)
                assert group.prefix.logits is not None
                yield [(session, group)], group.prefix.logits

    def _commit(self, batch: Batch, drawn: Drawn) -> bool:
        """Make a step count, and let finished rows leave. True if a session has no live row left.

        All of it or nothing: what can run out of memory comes first, and leaves nothing that another try would not
        write again.
        """
        codes = torch.cat([session.codes[drawn[group][0]] for session, group in batch])
        host_codes = iter(codes.tolist())  # one byte per row: the only copy to the host in a step
        ended = []
        for session, group in batch:
            group.write(*drawn[group])
            ended.append(session.ended(group, list(islice(host_codes, group.num_rows))))
        for (session, group), records in zip(batch, ended, strict=True):
            session.count(group, records.values())
        emptied = False
        for (session, group), records in zip(batch, ended, strict=True):
            if records:
                let_go(group, list(records))
                if not group.num_rows:
                    session.groups.remove(group)
            emptied |= session.num_live == 0
        return emptied


def let_go(group: Group, places: list[int]) -> None:
    """Close the gaps that finished rows leave; on the host if the device has no room for it."""

    def on_the_host() -> None:
        with clear_error("removing finished rows from the batch", SMALLER):
            twice(group.park)
            twice(lambda: group.drop(places))
            twice(group.unpark)

    or_else(lambda: twice(lambda: group.drop(places)), on_the_host)

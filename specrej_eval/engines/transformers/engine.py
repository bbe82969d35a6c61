"""The engine over a transformers model: sessions of rows, decoded in one batch, one token per row and step.

Nothing is ever re-tokenised or re-prefilled. Device-resident state; per step one byte per row comes to the host.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Message, Plan, Prompt, RowView, TokenStat
from specrej_eval.engines import text
from specrej_eval.engines.base import FinishedRow
from specrej_eval.engines.prompts import encode_prompt
from specrej_eval.engines.transformers import hardware
from specrej_eval.engines.transformers.groups import Group, Selection
from specrej_eval.engines.transformers.model import ModelRunner, Path
from specrej_eval.engines.transformers.sampling import sample, uniform
from specrej_eval.engines.transformers.session import Record, Session
from specrej_eval.engines.transformers.token_stats import stats_of
from specrej_eval.errors import OutOfMemoryError, PromptError
from specrej_eval.kv.cache import bytes_per_token
from specrej_eval.kv.memory import clear_error, free_bytes, is_out_of_memory, release_memory, twice
from specrej_eval.special_tokens import ENCODE_AS_TEXT, Tokeniser

logger = logging.getLogger(__name__)

_EOS, _MAY_STOP = 1, 2
"""What a token id can mean, besides being a token: bits of a lookup table."""
_SMALLER = "use a smaller model or dtype, a shorter prompt, fewer rows (n), or a smaller kv_budget_tokens."
MEMORY_FRACTION = {"cuda": 0.9, "cpu": 0.25}
"""Share of the free memory that ``n=max`` gives to the KV cache; the rest is for what a forward pass allocates. A GPU
says when it is full; a CPU's memory belongs to others too, and its kernel kills without a word."""


class TransformersEngine:
    """Decodes any decoder-only model of transformers.

    Args:
        model: a causal LM in eval mode, on its device.
        tokenizer: its tokenizer.
        max_length: context length in tokens; None = read from the config.
        think_end_token: text or id that ends a reasoning part (see ``text.Detokenizer``).
        add_bos_token: None = the tokenizer's own way.
        chat_template_args: passed to the tokenizer's chat template.
        special_tokens_in_content: what becomes of special tokens that a message spells (see ``special_tokens``).
        path: force one of the runner's paths; None = the best that gives the model's own logits.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        think_end_token: str | int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        special_tokens_in_content: str = ENCODE_AS_TEXT,
        path: Path | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        with clear_error("the model was tried out", _SMALLER):
            self.runner = twice(lambda: ModelRunner(model, path=path))
        self.device = self.runner.device
        self.max_length = max_length or context_length(model, tokenizer)
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self.detokenizer = text.Detokenizer(tokenizer, think_end_token=think_end_token)
        self.tokeniser = Tokeniser(tokenizer, special_tokens_in_content)
        self._add_bos_token = add_bos_token
        self._chat_template_args = chat_template_args
        self.eos_ids = text.stop_ids(model, tokenizer)
        self._codes: dict[tuple[str, ...], Tensor] = {}
        self.oom_splits = 0
        """Times a batch was split because memory ran out."""
        self._open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    # sessions

    def encode(self, prompt: str | Sequence[Message], *, repeat: int = 0) -> Prompt:
        """Tokenise. See ``base.Engine.encode``."""
        return encode_prompt(
            self.tokenizer,
            prompt,
            repeat=repeat,
            add_bos_token=self._add_bos_token,
            chat_template_args=self._chat_template_args,
            tokeniser=self.tokeniser,
        )

    def check(self, prompt: Prompt, config: RunConfig) -> None:
        """See ``base.Engine.check``."""
        if not prompt.num_tokens:
            raise PromptError("the prompt holds no token.", hint="give a non-empty string or at least one message.")
        if prompt.num_tokens + config.max_gen_toks > self.max_length:
            raise PromptError(
                f"a prompt of {prompt.num_tokens} tokens and max_gen_toks={config.max_gen_toks} exceed the context of "
                f"{self.max_length} tokens.",
                hint="shorten the prompt or lower max_gen_toks (inside lm-eval the prompt is cut on the left instead).",
            )

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        with_logprobs: bool = False,
        token_stats: Sequence[TokenStat] = (),
    ) -> Session:
        """Prefill a prompt. See ``base.Engine.open``.

        Raises:
            PromptError: the prompt is empty, or prompt + max_gen_toks exceed the context.
            OutOfMemoryError: the prompt alone does not fit.
        """
        self.check(prompt, config)
        started = time.perf_counter()
        path = self.runner.path_for(prompt.num_tokens, config.max_gen_toks)
        wanted = set(token_stats)
        if with_logprobs or config.logprobs:
            wanted.add("logprob")

        def opened() -> Session:
            with torch.inference_mode(), self._active():
                prefix = self.runner.prefill(prompt.token_ids, path)
            assert prefix.logits is not None
            return Session(
                prompt,
                config,
                budget,
                until=until,
                recorded=tuple(sorted(wanted)),
                prefix=prefix,
                codes=self._token_codes(until, prefix.logits.shape[-1]),
            )

        with clear_error(f"reading a prompt of {prompt.num_tokens} tokens", _SMALLER):
            try:
                session = twice(opened)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                session = None
            if session is None:
                # the other prompts in flight make room; their KV comes back when they decode again
                for other in list(self._open_sessions):
                    for group in other.groups:
                        group.park()
                release_memory()
                session = opened()
        self._open_sessions.add(session)
        hardware.synchronize(self.device)
        session.prefill_seconds = time.perf_counter() - started
        return session

    @contextmanager
    def _active(self) -> Iterator[None]:
        """``ModelRunner.active``, whose entry may meet the end of memory too."""
        with ExitStack() as stack:
            twice(lambda: stack.enter_context(self.runner.active()))
            yield

    def follow(self, session: Session, plan: Plan) -> None:
        """Keep, fork and start rows. See ``base.Engine.follow``.

        Raises:
            OutOfMemoryError: there is no room for the rows that go on, on the device or on the host.
        """
        assert session.prefix is not None
        live = {row: (group, place) for group in session.groups for place, row in enumerate(group.row_ids)}
        wanted: dict[int, list[tuple[int, int]]] = {}  # group -> (place, row id)
        seen: set[int] = set()
        known = len(session.records)
        for row in plan.keep:
            group, place = live[row]
            # a fork gets a row id of its own, else it would draw its parent's uniforms again
            new_row = row if row not in seen else known
            known += row in seen
            seen.add(row)
            wanted.setdefault(id(group), []).append((place, new_row))
        fresh = list(range(known, known + plan.fresh))
        growth = sum((len(wanted.get(id(group), [])) - group.num_rows) * group.num_sampled for group in session.groups)
        session.account.check(growth)
        kept_groups = [group for group in session.groups if id(group) in wanted]

        def prepared() -> tuple[list[Record], list[Selection], list[Group]]:
            """Everything that changes nothing: records of the rows that go, the rows that stay, and the new ones."""
            rejected = [
                record
                for group in session.groups
                for record in self._records_of(
                    session,
                    group,
                    {place: "rejected" for place, row in enumerate(group.row_ids) if row not in seen},
                )
            ]
            selections = []
            for group in kept_groups:
                places, rows = zip(*wanted[id(group)], strict=True)
                selections.append(group.selection(places, list(rows), group.num_sampled + plan.num_tokens))
            return rejected, selections, [self._fresh(session, fresh, plan.num_tokens)] if fresh else []

        with torch.inference_mode(), clear_error("gathering the rows that go on", _SMALLER):
            rejected, selections, started = twice(prepared)
            for group, selection in zip(kept_groups, selections, strict=True):
                group.gather(selection)
        # nothing below can fail
        for record in rejected:
            session.records[record.row] = record
        for row in range(len(session.records), known + plan.fresh):
            session.records.append(Record(row=row))
        session.account.hold(growth)
        for group, selection in zip(kept_groups, selections, strict=True):
            group.take(selection)
        session.groups = [*kept_groups, *started]
        session.in_pool = sorted(row for group in session.groups for row in group.row_ids)
        session.held_at = Counter({0: session.account.held - session.prompt_tokens})
        for group in session.groups:
            group.sampled_at_look = group.num_sampled

    def _fresh(self, session: Session, rows: list[int], capacity: int) -> Group:
        assert session.prefix is not None
        group = Group.start(session.prefix, rows, capacity=capacity, device=self.device, recorded=session.recorded)
        group.use_streams(session.key)
        return group

    def pool(self, session: Session) -> list[RowView]:
        """Rows of the look. See ``base.Engine.pool``."""

        def fetched() -> list[Record]:
            return [
                record
                for group in session.groups
                for record in self._records_of(session, group, dict.fromkeys(range(group.num_rows)))
            ]

        with torch.inference_mode(), clear_error("copying the rows' tokens to the host", _SMALLER):
            for record in twice(fetched):
                session.records[record.row] = record
        return [
            RowView(
                row=row,
                text=session.records[row].text,
                token_ids=session.records[row].token_ids,
                finish_reason=session.records[row].finish_reason,
                mean_logprob=session.records[row].mean_logprob,
                token_stats=session.records[row].token_stats,
            )
            for row in session.in_pool
        ]

    def rows(self, session: Session) -> list[FinishedRow]:
        """All rows. See ``base.Engine.rows``."""
        return [
            FinishedRow(
                row=record.row,
                token_ids=record.token_ids,
                text=record.text,
                finish_reason=record.finish_reason or "rejected",
                logprobs=record.logprobs if session.keep_logprobs else None,
            )
            for record in session.records
        ]

    def close(self, session: Session) -> None:
        """Free KV. See ``base.Engine.close``."""
        session.groups = []
        session.prefix = None

    # decoding

    def decode(self, sessions: Sequence[Session], num_tokens: int) -> None:
        """One batch, ``num_tokens`` steps. See ``base.Engine.decode``."""
        batch = [(session, group) for session in sessions for group in session.groups]
        targets = {id(group): group.num_sampled + num_tokens for _, group in batch}
        with torch.inference_mode(), self._active(), clear_error("decoding", _SMALLER):
            self._decode_turn(batch, targets, alone=True)

    def _decode_turn(self, batch: list[tuple[Session, Group]], targets: dict[int, int], *, alone: bool) -> None:
        """Decode a batch to its targets; out of memory, twice at that, splits it into two that take turns.

        A step changes nothing until all of it is there, so after a failure it is simply taken again. Logical rows,
        uniforms and rounds stay as they are; only where tensors live changes.
        """
        for _ in range(2):
            try:
                for _, group in batch:
                    group.unpark()
                self._decode_batch(batch, targets, stop_early=alone)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                logger.debug("out of memory with %d groups", len(batch), exc_info=True)
            # outside the handler, so that the exception's traceback no longer holds the failed step's tensors
            for _, group in batch:
                group.cache = None  # on the replicated path it may hold the failed step already: it is made again
            release_memory()
        self.oom_splits += 1
        halves = twice(lambda: self._halves(batch, targets))
        if halves is None:
            self._give_up(*batch[0])
            return
        for half in halves:
            for _, group in half:
                twice(group.park)
        for half in halves:
            live = [(session, group) for session, group in half if group in session.groups]
            if live:
                self._decode_turn(live, targets, alone=False)
            for session, group in live:
                if group in session.groups:
                    twice(group.park)

    def _halves(
        self, batch: list[tuple[Session, Group]], targets: dict[int, int]
    ) -> tuple[list[tuple[Session, Group]], list[tuple[Session, Group]]] | None:
        """Two batches that together are this one; None if it is a single row."""
        batch[:] = [(session, group) for session, group in batch if group.num_rows]
        if len(batch) > 1:
            at = len(batch) // 2
            return batch[:at], batch[at:]
        session, group = batch[0]
        if group.num_rows < 2:
            return None
        rest = group.split()
        session.groups.append(rest)
        targets[id(rest)] = targets[id(group)]
        batch.append((session, rest))
        return [(session, group)], [(session, rest)]

    def _give_up(self, session: Session, group: Group) -> None:
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
        logger.warning("out of memory with a single row: row %d is given up", group.row_ids[0])
        session.degraded = True
        [record] = twice(lambda: self._records_of(session, group, {0: "rejected"}))
        session.records[record.row] = record
        session.in_pool = [row for row in session.in_pool if row not in group.row_ids]
        session.account.hold(-group.num_sampled)
        session.groups = [other for other in session.groups if other is not group]

    def _decode_batch(self, batch: list[tuple[Session, Group]], targets: dict[int, int], *, stop_early: bool) -> None:
        while True:
            batch = [(s, g) for s, g in batch if g.num_rows and g.num_sampled < targets[id(g)]]
            if not batch:
                return
            started = time.perf_counter()
            tokens, stats = self._next_tokens(batch)
            emptied = self._commit(batch, tokens, stats)
            seconds = time.perf_counter() - started
            rows = sum(group.num_rows for _, group in batch) or 1
            for session, group in batch:
                session.decode_seconds += seconds * (group.num_rows or 1) / rows
            if stop_early and emptied:
                return

    def _next_tokens(
        self, batch: Sequence[tuple[Session, Group]]
    ) -> tuple[list[Tensor], list[dict[TokenStat, Tensor]]]:
        """One forward pass, and each row's next token drawn from its own uniform.

        Returns:
            Per group: (rows,) ids, and (rows,) numbers for each statistic its session records.
        """
        tokens: dict[int, Tensor] = {}
        stats: dict[int, dict[TokenStat, Tensor]] = {}
        fed = [(session, group) for session, group in batch if group.num_sampled]
        parts: list[tuple[list[tuple[Session, Group]], Tensor]] = []
        if fed:
            last = torch.cat([group.tokens[:, group.num_sampled - 1] for _, group in fed]).to(torch.int64)
            logits = self.runner.step([group for _, group in fed], last)  # (rows, vocab)
            if len({(session.sampling, session.recorded) for session, _ in fed}) == 1:
                parts.append((fed, logits))
            else:
                split = logits.split([group.num_rows for _, group in fed])
                parts += [([member], mine) for member, mine in zip(fed, split, strict=True)]
        for session, group in batch:
            if not group.num_sampled:  # nothing fed yet: all rows share the prompt's own logits, (1, vocab)
                assert group.prefix.logits is not None
                parts.append(([(session, group)], group.prefix.logits))
        for members, logits in parts:
            session = members[0][0]
            streams = torch.cat([group.streams for _, group in members])
            steps = torch.cat([group.steps for _, group in members])
            drawn = sample(logits, uniform(streams, steps), session.sampling)
            sizes = [group.num_rows for _, group in members]
            told = {name: values.split(sizes) for name, values in stats_of(logits, drawn, session.recorded).items()}
            for place, ((_, group), mine) in enumerate(zip(members, drawn.split(sizes), strict=True)):
                tokens[id(group)] = mine
                stats[id(group)] = {name: parts[place] for name, parts in told.items()}
        return [tokens[id(group)] for _, group in batch], [stats[id(group)] for _, group in batch]

    def _commit(
        self, batch: Sequence[tuple[Session, Group]], tokens: list[Tensor], stats: list[dict[TokenStat, Tensor]]
    ) -> bool:
        """Make a step count, and let finished rows leave. True if a session has no live row left.

        All of it or nothing: what can run out of memory comes first, and leaves nothing that another try would not
        write again.
        """
        codes = torch.cat([session.codes[mine] for (session, _), mine in zip(batch, tokens, strict=True)])
        host_codes = codes.tolist()  # one byte per row: the only copy to the host in a step
        steps = []
        first = 0
        for (session, group), mine, told in zip(batch, tokens, stats, strict=True):
            group.write(mine, told)
            ended = self._ended(session, group, host_codes[first : first + group.num_rows])
            steps.append((session, group, ended, group.next_counters(fed=group.num_sampled > 0)))
            first += group.num_rows
        emptied = False
        for session, group, ended, counters in steps:  # cannot fail, but for the budget, which is a defect
            rows = group.num_rows
            session.account.hold(rows)
            session.decode_tokens += rows
            group.count(*counters, fed=group.num_sampled > 0)
            session.held_at[group.num_sampled - group.sampled_at_look] += rows * group.num_sampled
            for record in ended.values():
                session.records[record.row] = record
            session.account.hold(-len(ended) * group.num_sampled)
        for session, group, ended, _ in steps:
            if ended:
                self._let_go(group, list(ended))
                if not group.num_rows:
                    session.groups = [other for other in session.groups if other is not group]
            emptied |= session.num_live == 0
        return emptied

    def _ended(self, session: Session, group: Group, codes: list[int]) -> dict[int, Record]:
        """Records of the rows that the token just written ends, by place."""
        count = group.num_sampled + 1
        at_cap = count >= session.budget.max_gen_toks
        reasons: dict[int, FinishReason | None] = {}
        for place, code in enumerate(codes):
            if code & _EOS:
                reasons[place] = "eos"
            elif code & _MAY_STOP and self._stops(session, group.tokens[place, :count].tolist()):
                reasons[place] = "stop"
            elif at_cap:
                reasons[place] = "length"
        return dict(zip(reasons, self._records_of(session, group, reasons, count=count), strict=True))

    def _stops(self, session: Session, token_ids: list[int]) -> bool:
        return self.detokenizer.stop_position(token_ids, session.until) is not None

    @staticmethod
    def _let_go(group: Group, places: list[int]) -> None:
        """Close the gaps that finished rows leave; on the host if the device has no room for it."""
        try:
            twice(lambda: group.drop(places))
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        with clear_error("finished rows left a batch", _SMALLER):
            twice(group.park)
            twice(lambda: group.drop(places))
            twice(group.unpark)

    # host side

    def _records_of(
        self,
        session: Session,
        group: Group,
        reasons: Mapping[int, FinishReason | None],
        *,
        count: int | None = None,
    ) -> list[Record]:
        """Copy rows' tokens and their statistics to the host. Once per look and once when a row finishes.

        Args:
            reasons: by place, why the row ends; None while it is live.
            count: tokens of each row; None = those that count.
        """
        if not reasons:
            return []
        count = group.num_sampled if count is None else count
        index = torch.tensor(list(reasons), dtype=torch.int64, device=self.device)
        ids = group.tokens[index, :count].tolist()
        stats = {name: buffer[index, :count].double().tolist() for name, buffer in group.stats.items()}
        records = []
        for offset, (place, reason) in enumerate(reasons.items()):
            record = Record(row=group.row_ids[place], token_ids=ids[offset], finish_reason=reason)
            record.token_stats = {name: values[offset] for name, values in stats.items()}
            if "logprob" in record.token_stats:
                record.logprobs = record.token_stats["logprob"]
                record.mean_logprob = math.fsum(record.logprobs) / len(ids[offset]) if ids[offset] else None
            shown = None if reason == "rejected" else reason
            record.text = self.detokenizer.visible(record.token_ids, shown, session.until)
            records.append(record)
        return records

    def _token_codes(self, until: tuple[str, ...], vocab: int) -> Tensor:
        """(vocab,) uint8 lookup table of what a token id means."""
        if until not in self._codes:
            codes = torch.zeros(vocab, dtype=torch.uint8)
            if until:
                codes |= torch.tensor(self.detokenizer.may_complete(until, vocab), dtype=torch.uint8) * _MAY_STOP
            codes[[token for token in self.eos_ids if token < vocab]] |= _EOS
            self._codes[until] = codes.to(self.device)
        return self._codes[until]

    # memory and description

    def capacity_tokens(self, config: RunConfig, prompt_tokens: int) -> int:
        """Tokens of KV in MEMORY_FRACTION of the memory that is free after a warm-up.

        One factor per line in ``bytes_per_token``: 2 x layers x kv heads x head dim x itemsize.
        """
        length = min(max(prompt_tokens, 1), self.max_length - 1)
        with torch.inference_mode(), self.runner.active():
            prefix = self.runner.prefill([0] * length, "shared_prefix" if self.runner.path == "shared_prefix" else None)
            if not prefix.keys:
                raise OutOfMemoryError(
                    f"n=max needs the KV size of a token, which the {self.runner.path} path does not show.",
                    hint="give n (and kv_budget_tokens) as numbers for this model.",
                )
            per_token = bytes_per_token(prefix)
            del prefix
        release_memory()
        free = free_bytes(self.device)
        share = MEMORY_FRACTION.get(self.device.type, MEMORY_FRACTION["cpu"])
        tokens = int(free * share) // per_token // config.batch_size
        logger.warning("n=max: memory holds %d tokens of KV for each of %d prompts", tokens, config.batch_size)
        return tokens

    def peak_bytes(self) -> int:
        """See ``base.Engine.peak_bytes``."""
        return hardware.peak_bytes(self.device)

    def describe(self) -> dict[str, Any]:
        """See ``base.Engine.describe``."""
        return {
            "engine": "transformers",
            "attention": self.runner.path,
            "batch_invariance": self.runner.batch_invariance,
            "device": str(self.device),
            "device_name": hardware.device_name(self.device),
            "cpu_threads": torch.get_num_threads(),
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "eos_token_ids": list(self.eos_ids),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def context_length(model: Any, tokenizer: Any) -> int:
    """The model's context in tokens, by the names configs use for it; else the tokenizer's; else 2048."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if isinstance(limit, int) and limit < 10**9 else 2048

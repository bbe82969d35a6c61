"""One prompt being decoded, as the engine keeps it: its rows on the device, and what is known of them on the host."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import FinishReason, Plan, Prompt, RowView, TokenStat, stream_key
from specrej_eval.engines.base import EngineSession
from specrej_eval.engines.text import Detokenizer
from specrej_eval.engines.transformers.groups import Group, Selection
from specrej_eval.engines.transformers.sampling import SamplingParams
from specrej_eval.kv.cache import Prefix, TokenAccount
from specrej_eval.kv.memory import twice

EOS, MAY_STOP = 1, 2
"""What a token id can mean, besides being a token: bits of ``Session.codes``."""


class Session(EngineSession):
    """A prompt, prefilled, its groups of rows, and the records of all rows ever started.

    Args:
        until: stop strings.
        recorded: what is kept of every token drawn, besides its id.
        codes: (vocab,), uint8, on the device: what each token id means (EOS, may complete a stop string).
    """

    def __init__(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...],
        recorded: tuple[TokenStat, ...],
        prefix: Prefix,
        codes: Tensor,
        detokenizer: Detokenizer,
    ) -> None:
        super().__init__(prompt_tokens=prompt.num_tokens)
        self.recorded = recorded
        self.codes = codes
        self.sampling = SamplingParams(config.temperature, config.top_k, config.top_p, config.min_p)
        self.account = TokenAccount(limit=budget.kv_budget_tokens, held=prompt.num_tokens)
        self.groups: list[Group] = []
        self.records: list[RowView] = []
        """All rows ever started, each as it was when it ended or at the last look."""
        self.in_pool: list[int] = []
        """Rows live at the last ``follow``."""
        self._prefix: Prefix | None = prefix
        self._until = until
        self._max_gen_toks = budget.max_gen_toks
        self._detokenizer = detokenizer
        self._strata = budget.n if config.variance_reduce else 0
        self._key = torch.tensor(stream_key(config.seed, prompt.task, prompt.prompt_hash, prompt.repeat))
        self._held_at: Counter[int] = Counter()
        """Suffix tokens held, by tokens decoded since the last look. As if all rows decoded together: a batch that is
        split for want of memory takes turns, and must not show in results."""

    @property
    def num_live(self) -> int:
        return sum(group.num_rows for group in self.groups)

    @property
    def tokens_since_look(self) -> int:
        return max((group.num_sampled - group.sampled_at_look for group in self.groups), default=0)

    @property
    def kv_tokens_peak(self) -> int:
        return self.prompt_tokens + max(self._held_at.values(), default=0)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def close(self) -> None:
        self.groups = []
        self._prefix = None

    # looks

    def follow(self, plan: Plan) -> None:
        """Keep, fork and start rows. If memory runs out, nothing has changed but where some KV lies."""
        live = {row: (group, place) for group in self.groups for place, row in enumerate(group.row_ids)}
        kept: dict[Group, list[tuple[int, int]]] = {group: [] for group in self.groups}  # -> (place, row id)
        seen: set[int] = set()
        known = len(self.records)
        for row in plan.keep:
            group, place = live[row]
            # a fork gets a row id of its own, else it would draw its parent's uniforms again
            kept[group].append((place, row if row not in seen else known))
            known += row in seen
            seen.add(row)
        fresh = list(range(known, known + plan.fresh))
        growth = sum((len(rows) - group.num_rows) * group.num_sampled for group, rows in kept.items())
        self.account.check(growth)

        def prepared() -> tuple[list[RowView], dict[Group, Selection], list[Group]]:
            """Everything that changes nothing: records of the rows that go, the rows that stay, and the new ones."""
            rejected: list[RowView] = []
            selections = {}
            for group, rows in kept.items():
                gone = [place for place, row in enumerate(group.row_ids) if row not in seen]
                rejected += self._rejected(group, gone)
                if rows:
                    places, row_ids = zip(*rows, strict=True)
                    selections[group] = group.selection(places, list(row_ids), group.num_sampled + plan.num_tokens)
            return rejected, selections, [self._group(fresh, plan.num_tokens)] if fresh else []

        rejected, selections, started = twice(prepared)
        for group, selection in selections.items():
            group.gather(selection)
        # nothing below can fail
        self.put(rejected)
        self.records += [RowView(row, "", [], None) for row in range(len(self.records), known + plan.fresh)]
        self.account.hold(growth)
        for group, selection in selections.items():
            group.take(selection)
        self.groups = [*selections, *started]
        self.in_pool = sorted(row for group in self.groups for row in group.row_ids)
        self._held_at = Counter({0: self.account.held - self.prompt_tokens})
        for group in self.groups:
            group.sampled_at_look = group.num_sampled

    def _rejected(self, group: Group, places: Sequence[int]) -> list[RowView]:
        """Records of rows that go: as they were looked at, if they have drawn nothing since."""
        seen, drawn = [], []
        for place in places:
            record = self.records[group.row_ids[place]]
            if record.num_tokens == group.num_sampled > 0:
                seen.append(replace(record, finish_reason="rejected"))
            else:
                drawn.append(place)
        return seen + self.records_of(group, dict.fromkeys(drawn, "rejected"))

    def _group(self, row_ids: list[int], capacity: int) -> Group:
        """Rows that start right behind the prompt."""
        assert self._prefix is not None
        group = Group(
            self._prefix,
            row_ids,
            capacity=capacity,
            device=self.device,
            key=self._key,
            recorded=len(self.recorded),
        )
        group.strata = self._strata
        return group

    def again(self, rows: Mapping[int, Sequence[int]]) -> None:
        """Start rows that were rejected again, from their first token; they take the tokens they had."""
        assert not self.groups, "rows that are live go first"
        group = twice(lambda: self._group(list(rows), self._max_gen_toks))
        group.given = rows
        self.groups = [group]
        self.in_pool = sorted(rows)

    def pool(self) -> list[RowView]:
        """Rows of the look, copied to the host."""

        def fetched() -> list[RowView]:
            return [
                record
                for group in self.groups
                for record in self.records_of(group, dict.fromkeys(range(group.num_rows)))
            ]

        self.put(twice(fetched))
        return [self.records[row] for row in self.in_pool]

    def put(self, records: Iterable[RowView]) -> None:
        """Keep what is known of some rows by now."""
        for record in records:
            self.records[record.row] = record

    def records_of(
        self, group: Group, reasons: Mapping[int, FinishReason | None], *, count: int | None = None
    ) -> list[RowView]:
        """Copy rows' tokens and numbers to the host. Once per look and once when a row finishes.

        Args:
            reasons: by place, why the row ends; None while it is live.
            count: tokens of each row; None = those that count.
        """
        if not reasons:
            return []
        count = group.num_sampled if count is None else count
        index = torch.tensor(list(reasons), dtype=torch.int64, device=self.device)
        token_ids = group.rows.tokens[index, :count].tolist()
        numbers = group.rows.stats[index, :count].double().transpose(1, 2).tolist()  # (rows, numbers, count)
        return [
            self._record(group.row_ids[place], ids, reason, dict(zip(self.recorded, of_row, strict=True)))
            for (place, reason), ids, of_row in zip(reasons.items(), token_ids, numbers, strict=True)
        ]

    def _record(
        self, row: int, ids: list[int], reason: FinishReason | None, stats: dict[TokenStat, list[float]]
    ) -> RowView:
        logprobs = stats.get("logprob")
        return RowView(
            row=row,
            text=self._detokenizer.visible(ids, None if reason == "rejected" else reason, self._until),
            token_ids=ids,
            finish_reason=reason,
            mean_logprob=math.fsum(logprobs) / len(ids) if logprobs else None,
            token_stats=stats,
        )

    # steps

    def ended(self, group: Group, codes: Sequence[int]) -> dict[int, RowView]:
        """Records of the rows that the token just written ends, by place.

        Args:
            codes: of each row's new token.
        """
        count = group.num_sampled + 1
        at_cap = count >= self._max_gen_toks
        stops = self._detokenizer.stop_position
        reasons: dict[int, FinishReason | None] = {}
        for place, code in enumerate(codes):
            if code & EOS:
                reasons[place] = "eos"
            elif code & MAY_STOP and stops(group.rows.tokens[place, :count].tolist(), self._until) is not None:
                reasons[place] = "stop"
            elif at_cap:
                reasons[place] = "length"
        return dict(zip(reasons, self.records_of(group, reasons, count=count), strict=True))

    def count(self, group: Group, ended: Iterable[RowView]) -> None:
        """The token just written counts. Touches no tensor: this cannot fail, but for the budget, which is a defect."""
        rows = group.num_rows
        self.account.hold(rows)
        self.decode_tokens += rows
        if group.num_sampled:  # else nothing was fed: the first token is drawn from the prompt's logits
            group.advance()
        group.num_sampled += 1
        self._held_at[group.num_sampled - group.sampled_at_look] += rows * group.num_sampled
        for record in ended:
            self.records[record.row] = record
            self.account.hold(-group.num_sampled)

    def give_up(self, group: Group) -> None:
        """Of a group of one row: it is lost, and the result will say so."""
        [record] = twice(lambda: self.records_of(group, {0: "rejected"}))
        self.degraded = True
        self.put([record])
        self.in_pool.remove(record.row)
        self.account.hold(-group.num_sampled)
        self.groups.remove(group)

"""The engine over vLLM: rows are requests that stay alive across looks.

A look steps vLLM until every live row has come to it. vLLM may not have all rows in step (a prompt is read in pieces, a
row is put off for want of memory), so some have gone on; ``ahead`` keeps what they decoded. Losers are aborted, and
survivors go on with the KV they have. The prompt's KV is shared by vLLM's prefix cache, block by block.

We differ from our own engine in this: a row's tokens come from vLLM's sampler, with a seed that is the row's own, so
they are drawn from the same distribution, but they are not the same tokens.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt, RowView, TokenStat
from specrej_eval.engines.ahead import AheadSession, Row, steps_to_take
from specrej_eval.engines.base import Engine
from specrej_eval.engines.transformers import hardware
from specrej_eval.errors import ConfigError, ModelError
from specrej_eval.kv.memory import clear_error
from specrej_eval.vllm_adapter import TELLS, Requests, check_sampling

logger = logging.getLogger(__name__)

SMALLER = "lower gpu_memory_utilization= or n, or give more GPUs (tensor_parallel_size=)."
IDLE_STEPS = 1000
"""Steps in a row that decode nothing, and read no prompt, before it counts as stuck."""
FAR_AHEAD = 64
"""Tokens that a row is ahead of a look beyond which it was not a moment's delay: others had no place."""
ROWS_SHARE = 0.8
"""Share of the blocks that rows can fill: each takes whole ones, and has the end of the prompt for itself."""
MOST_ROWS_ON_A_CPU = 256
"""As in ``transformers.engine``."""


class VLLMEngine(Engine):
    """Decodes what vLLM decodes, on as many GPUs as it is given.

    Args:
        requests: the engine of vLLM.
        versions: for results.
        text: the arguments of ``Engine`` that say how prompts are made and answers cut.
    """

    promises = "distribution"

    def __init__(self, requests: Requests, tokenizer: Any, *, versions: dict[str, str], **text: Any) -> None:
        super().__init__(tokenizer, max_length=requests.max_model_len, **text)
        self.requests = requests
        self.device = torch.device(requests.device)
        self.most_rows_unasked = MOST_ROWS_ON_A_CPU if self.device.type == "cpu" else None
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos_ids = tuple(sorted(requests.eos_ids() | (set() if own is None else {int(own)})))
        self._versions = versions
        self._numbers = itertools.count()
        self._names: dict[Row, str] = {}
        self._owners: dict[str, tuple[AheadSession, Row]] = {}
        self._begun: set[str] = set()
        """Requests whose first token has come."""
        self._warned = False

    def check(self, prompt: Prompt, config: RunConfig) -> None:
        """Whether a prompt can be decoded at all. See ``base.Engine.check``.

        Raises:
            ConfigError: vLLM's sampler would not draw as these arguments say.
        """
        super().check(prompt, config)
        check_sampling(config)

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> AheadSession:
        """A session. The prompt is read with its first row. See ``base.Engine.open``.

        Raises:
            ConfigError: a statistic is asked for that vLLM does not tell.
        """
        self.check(prompt, config)
        if untold := sorted({*token_stats} - {*TELLS}):
            raise ConfigError(
                f"engine=vllm does not tell {', '.join(untold)} of its tokens.",
                hint="use another reward_model=, or engine=transformers.",
            )
        return AheadSession(
            prompt,
            config,
            budget,
            until=until,
            recorded=token_stats,
            eos_ids=self.eos_ids,
            detokenizer=self.detokenizer,
        )

    def follow(self, session: AheadSession, plan: Plan) -> None:
        """Abort the rows that go, and queue the new ones. See ``base.Engine.follow``."""
        started, rejected = session.follow(plan)
        self._abort(rejected)
        for row in started:
            self._add(session, row)

    def _add(self, session: AheadSession, row: Row) -> None:
        name = f"{next(self._numbers)}"
        self._names[row] = name
        self._owners[name] = session, row
        self.requests.add(
            name,
            [*session.prompt.token_ids, *row.tokens],
            sampling=session.config,
            seed=row.seed,
            max_tokens=session.config.max_gen_toks - len(row.tokens),
            eos_ids=self.eos_ids,
            recorded=session.recorded,
        )

    def _abort(self, rows: Collection[Row]) -> None:
        names = [name for row in rows if (name := self._names.pop(row, None)) is not None]
        for name in names:
            del self._owners[name]
            self._begun.discard(name)
        self.requests.abort(names)

    def decode(self, sessions: Sequence[AheadSession], num_tokens: int) -> None:
        """Step vLLM until all rows have come so far. See ``base.Engine.decode``."""
        started = time.perf_counter()
        lives = [session.num_live for session in sessions]
        idle = 0
        with torch.inference_mode(), clear_error("decoding", SMALLER):
            while not self._is_done(sessions, num_tokens):
                idle = 0 if self._step() else idle + 1
                if idle > IDLE_STEPS or not self.requests.waiting:
                    if self._is_done(sessions, num_tokens):
                        break
                    raise ModelError(
                        "vLLM decodes nothing more, although rows are waiting for their next token.",
                        hint="is the KV cache too small for one row? gpu_memory_utilization= makes it larger, and "
                        "max_model_len= the rows shorter.",
                    )
        steps = steps_to_take(sessions, num_tokens)
        for session in sessions:
            session.advance(steps)
        self._notice_waiting(sessions)
        seconds = time.perf_counter() - started
        for session, live in zip(sessions, lives, strict=True):
            session.decode_seconds += seconds * live / max(1, sum(lives))

    def _notice_waiting(self, sessions: Sequence[AheadSession]) -> None:
        """Say once that rows had to wait until others had gone far, which costs time and changes no result."""
        furthest = max((row.ahead for session in sessions for row in session.live), default=0)
        if furthest > FAR_AHEAD and not self._warned:
            self._warned = True
            logger.warning(
                "vLLM had no place for all rows at a time: while some waited, others went %d tokens beyond the look. "
                "Results are the same, but these tokens may be thrown away (discarded_tokens). Its KV cache holds "
                "%s tokens; a smaller batch_size or n, or more memory (gpu_memory_utilization), helps.",
                furthest,
                f"{self.requests.num_blocks * self.requests.block_size:,}",
            )

    @staticmethod
    def _is_done(sessions: Sequence[AheadSession], num_tokens: int) -> bool:
        steps = steps_to_take(sessions, num_tokens)
        return all(session.is_there(steps) for session in sessions)

    def _step(self) -> int:
        """One step of vLLM; how many tokens came of it."""
        count = 0
        over: list[Row] = []
        for decoded in self.requests.step():
            if (owner := self._owners.get(decoded.request)) is None:
                continue
            session, row = owner
            if decoded.request not in self._begun and decoded.token_ids:
                self._begun.add(decoded.request)
                session.cached_tokens += decoded.cached_tokens
            count += len(decoded.token_ids)
            ended = session.receive(row, decoded.token_ids, decoded.stats)
            if ended:
                over.append(row)
            elif decoded.finished:
                raise ModelError(
                    f"vLLM ended row {row.row} after {len(row.tokens)} tokens without saying why.",
                    hint="is the context too short? max_model_len= makes it longer.",
                )
        self._abort(over)
        return count

    def pool(self, session: AheadSession) -> list[RowView]:
        """Rows of the look. See ``base.Engine.pool``."""
        return session.pool()

    def rows(self, session: AheadSession) -> list[RowView]:
        """All rows. See ``base.Engine.rows``."""
        return session.rows()

    def close(self, session: AheadSession) -> None:
        """Abort what still runs. See ``base.Engine.close``."""
        self._abort([row for row in session.all_rows if row in self._names])

    # memory and description

    def capacity_tokens(self, prompt_tokens: int) -> int:
        """Tokens that rows can put into the blocks of vLLM's KV cache (ROWS_SHARE of them). See ``base.Engine``."""
        del prompt_tokens
        return int(self.requests.num_blocks * self.requests.block_size * ROWS_SHARE)

    def bytes_per_token(self) -> int:
        """See ``base.Engine.bytes_per_token``."""
        return self.requests.bytes_per_token()

    def peak_bytes(self) -> int:
        """Of this process; the GPUs of other processes of vLLM's are not in it. See ``base.Engine.peak_bytes``."""
        return hardware.peak_bytes(self.device)

    def describe(self) -> dict[str, Any]:
        """See ``base.Engine.describe``."""
        return {
            "engine": "vllm",
            "promises": self.promises,
            "device": str(self.device),
            "device_name": hardware.device_name(self.device),
            "dtype": self.requests.dtype,
            "max_length": self.max_length,
            "eos_token_ids": list(self.eos_ids),
            "kv_blocks": self.requests.num_blocks,
            "kv_block_tokens": self.requests.block_size,
            **self._versions,
        }

"""The engine over a transformers model: prompts are opened, looked at and decoded within the memory there is.

Nothing is ever re-tokenised or re-prefilled, and all state of rows stays on the device.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt, RowView, TokenStat
from specrej_eval.engines.base import Engine, Opening
from specrej_eval.engines.transformers import hardware
from specrej_eval.engines.transformers.decoding import SMALLER, Decoder
from specrej_eval.engines.transformers.model import ModelRunner, Path
from specrej_eval.engines.transformers.session import EOS, MAY_STOP, Session
from specrej_eval.kv.attention.base import AttentionBackend
from specrej_eval.kv.cache import Prefix, bytes_per_token
from specrej_eval.kv.memory import clear_error, free_bytes, is_out_of_memory, or_else, release_memory, twice
from specrej_eval.kv.models import attention_size, context_length, parameters_per_token, stop_ids

logger = logging.getLogger(__name__)

MEMORY_FRACTION = {"cuda": 0.9, "cpu": 0.25}
"""Share of the free memory that ``n=max`` gives to the KV cache; the rest is for what a forward pass allocates, and for
what prompts have in common (``prefill.STORE_SHARE``). A GPU says when it is full; a CPU's memory belongs to others too,
and its kernel kills without a word."""

MOST_ROWS_ON_A_CPU = 256
"""Rows of one prompt that ``n=max`` starts there without ``n_max``: a CPU's memory holds thousands of rows of a small
model, and its cores would decode them for minutes."""


class TransformersEngine(Engine):
    """Decodes any decoder-only model of transformers.

    Args:
        model: a causal LM in eval mode, on its device.
        max_length: context length in tokens; None = read from the config.
        path: force one of the runner's paths; None = the best that gives the model's own logits.
        attention: who computes attention behind a shared prefix; None = ``sdpa``.
        graphs: replay decode steps as CUDA graphs, where that can be done and pays.
        text: the arguments of ``Engine`` that say how prompts are made and answers cut.
    """

    finishes_rejected = True
    stratifies = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        path: Path | None = None,
        attention: AttentionBackend | None = None,
        graphs: bool = False,
        **text: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length or context_length(model, tokenizer), **text)
        self.model = model
        with clear_error("trying out the model", SMALLER):
            self.runner = twice(lambda: ModelRunner(model, path=path, attention=attention, graphs=graphs))
        self.promises = self.runner.promises
        self.device = self.runner.device
        self.devices = frozenset(parameter.device for parameter in model.parameters())
        self.most_rows_unasked = MOST_ROWS_ON_A_CPU if self.device.type == "cpu" else None
        self.eos_ids = stop_ids(model, tokenizer)
        self._decoder = Decoder(self.runner)
        self._codes: dict[tuple[str, ...], Tensor] = {}
        self._open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @property
    def oom_splits(self) -> int:
        """Times a batch was split because memory ran out."""
        return self._decoder.oom_splits

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> Session:
        """Prefill a prompt. See ``base.Engine.open``."""
        [session] = self.open_all(
            [Opening(prompt=prompt, config=config, budget=budget, until=until, token_stats=token_stats)]
        )
        return session

    def open_all(self, openings: Sequence[Opening]) -> list[Session]:
        """Prefill prompts, together where memory allows it. See ``base.Engine.open_all``."""
        for each in openings:
            self.check(each.prompt, each.config)
        started = time.perf_counter()

        def with_others_parked() -> list[Session]:
            """The other prompts in flight make room, and each is read alone; their KV comes back when they decode."""
            for other in list(self._open_sessions):
                for group in other.groups:
                    group.park()
            release_memory()
            return [twice(partial(self._opened, [each]))[0] for each in openings]

        longest = max((each.prompt.num_tokens for each in openings), default=0)
        with clear_error(f"reading a prompt of {longest} tokens", SMALLER):
            sessions = or_else(lambda: twice(lambda: self._opened(openings)), with_others_parked)
        hardware.synchronize(self.device)
        return self._registered(sessions, time.perf_counter() - started)

    def open_by_turns(self, openings: Sequence[Opening], *, tokens: int) -> Generator[None, None, list[Session]]:
        """Prefill long prompts chunk by chunk. See ``base.Engine.open_by_turns``.

        Should memory run out, what was read is let go, and ``open_all`` reads all of it by itself.
        """
        if sum(each.prompt.num_tokens for each in openings) <= tokens:
            return self.open_all(openings)
        for each in openings:
            self.check(each.prompt, each.config)
        seconds = 0.0
        sessions: list[Session] | None = None
        try:
            with closing(self.runner.prefill_turns(self._asked(openings))) as turns:
                while sessions is None:
                    started = time.perf_counter()
                    sessions = self._read_on(turns, openings, tokens)
                    hardware.synchronize(self.device)
                    seconds += time.perf_counter() - started
                    if sessions is None:
                        yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if sessions is None:  # outside the except block: the traceback would keep the failed part's tensors alive
            release_memory()
            return self.open_all(openings)
        return self._registered(sessions, seconds)

    def _read_on(
        self, turns: Generator[int, None, list[Prefix]], openings: Sequence[Opening], tokens: int
    ) -> list[Session] | None:
        """Read so many tokens more; the sessions, once all is read."""
        read = 0
        with torch.inference_mode(), self._active():
            while read < tokens:
                try:
                    read += next(turns)
                except StopIteration as done:
                    return self._sessions(openings, done.value)
        return None

    def _registered(self, sessions: list[Session], seconds: float) -> list[Session]:
        """Sessions whose prompts were read in so many seconds."""
        self._open_sessions.update(sessions)
        seconds /= max(1, sum(session.prompt_tokens for session in sessions))
        for session in sessions:
            session.prefill_seconds = seconds * session.prompt_tokens
        return sessions

    def _asked(self, openings: Sequence[Opening]) -> list[tuple[Sequence[int], Path]]:
        """The prompts, and which path each takes."""
        return [
            (each.prompt.token_ids, self.runner.path_for(each.prompt.num_tokens, each.config.max_gen_toks))
            for each in openings
        ]

    def _opened(self, openings: Sequence[Opening]) -> list[Session]:
        with torch.inference_mode(), self._active():
            prefixes = self.runner.prefill_all(self._asked(openings))
        return self._sessions(openings, prefixes)

    def _sessions(self, openings: Sequence[Opening], prefixes: Sequence[Prefix]) -> list[Session]:
        sessions = []
        for each, prefix in zip(openings, prefixes, strict=True):
            assert prefix.logits is not None
            session = Session(
                each.prompt,
                each.config,
                each.budget,
                until=each.until,
                recorded=tuple(sorted(set(each.token_stats))),
                prefix=prefix,
                codes=self._token_codes(each.until, prefix.logits.shape[-1]),
                detokenizer=self.detokenizer,
            )
            sessions.append(session)
        return sessions

    def _token_codes(self, until: tuple[str, ...], vocab: int) -> Tensor:
        """(vocab,) uint8 lookup table of what a token id means."""
        if until not in self._codes:
            codes = torch.zeros(vocab, dtype=torch.uint8)
            if until:
                codes |= torch.tensor(self.detokenizer.may_complete(until, vocab), dtype=torch.uint8) * MAY_STOP
            codes[[token for token in self.eos_ids if token < vocab]] |= EOS
            self._codes[until] = codes.to(self.device)
        return self._codes[until]

    def follow(self, session: Session, plan: Plan) -> None:
        """Keep, fork and start rows. See ``base.Engine.follow``."""
        with torch.inference_mode(), clear_error("copying the KV cache of the rows that go on", SMALLER):
            session.follow(plan)

    def decode(self, sessions: Sequence[Session], num_tokens: int) -> None:
        """One batch, ``num_tokens`` steps. See ``base.Engine.decode``."""
        batch = [(session, group) for session in sessions for group in session.groups]
        for _, group in batch:
            group.target = group.num_sampled + num_tokens
        with torch.inference_mode(), clear_error("decoding", SMALLER), self._active(unchanged=True):
            self._decoder.decode(batch)

    @contextmanager
    def _active(self, *, unchanged: bool = False) -> Iterator[None]:
        """``ModelRunner.active``, whose entry may meet the end of memory too."""
        with ExitStack() as stack:
            twice(lambda: stack.enter_context(self.runner.active(unchanged=unchanged)))
            yield

    def pool(self, session: Session) -> list[RowView]:
        """Rows of the look. See ``base.Engine.pool``."""
        with torch.inference_mode(), clear_error("copying the rows' tokens to the host", SMALLER):
            return session.pool()

    def rows(self, session: Session) -> list[RowView]:
        """All rows. See ``base.Engine.rows``."""
        return session.records

    def again(self, session: Session, rows: Mapping[int, Sequence[int]]) -> None:
        """Start rejected rows again. See ``base.Engine.again``."""
        with torch.inference_mode(), clear_error("decoding rejected rows again", SMALLER):
            session.again(rows)

    def close(self, session: Session) -> None:
        """Free KV. See ``base.Engine.close``."""
        session.close()

    # memory and description

    def capacity_tokens(self, prompt_tokens: int) -> int:
        """Tokens of KV in MEMORY_FRACTION of the memory that is free after a warm-up. See ``base.Engine``."""
        length = min(max(prompt_tokens, 1), self.max_length - 1)
        per_token = self.bytes_per_token(length)
        if not per_token:
            return 0
        release_memory()
        share = MEMORY_FRACTION.get(self.device.type, MEMORY_FRACTION["cpu"])
        return int(free_bytes(self.device) * share) // per_token

    def bytes_per_token(self, prompt_tokens: int = 1) -> int:
        """2 x layers x kv heads x head dim x itemsize, of a prompt that is read. See ``base.Engine``."""
        path: Path | None = "shared_prefix" if self.runner.path == "shared_prefix" else None

        def measured() -> int:
            prefix = self.runner.prefill([0] * prompt_tokens, path)
            return bytes_per_token(prefix) if prefix.keys else 0

        doing = f"reading a prompt of {prompt_tokens} tokens, to find out what its KV cache takes"
        with torch.inference_mode(), clear_error(doing, SMALLER), self._active():
            return twice(measured)

    def parameters_per_token(self) -> int:
        """See ``base.Engine.parameters_per_token``."""
        return parameters_per_token(self.model)

    def attention_size(self) -> tuple[int, int]:
        """See ``base.Engine.attention_size``."""
        return attention_size(self.model)

    def reset_peak(self) -> None:
        """See ``base.Engine.reset_peak``."""
        hardware.reset_peak(self.device)

    def peak_bytes(self) -> int:
        """See ``base.Engine.peak_bytes``."""
        return hardware.peak_bytes(self.device)

    def describe(self) -> dict[str, Any]:
        """See ``base.Engine.describe``."""
        layers, attention_width = self.attention_size()
        return {
            "engine": "transformers",
            "parameters": self.parameters_per_token(),
            "layers": layers,
            "attention_width": attention_width,
            "attention": self.runner.path,
            "attention_backend": self.runner.attention.name if self.runner.path == "shared_prefix" else None,
            "cuda_graphs": self.runner.replays,
            "promises": self.promises,
            "packed_weights": self.runner.packed_bytes > 0,
            "products": self.runner.products,
            "device": str(self.device),
            "device_name": hardware.device_name(self.device),
            "cpu_threads": torch.get_num_threads(),
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "max_length": self.max_length,
            "eos_token_ids": list(self.eos_ids),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

# torch-free
"""The engine over a server: every row is a request, and a look is a moment at which the server stands still.

Two ways to a look at t tokens:

- ``pause``: rows stream until each has t tokens; the server is paused; the first t tokens of each row are scored; the
  requests of rejected rows are aborted; the server goes on, and survivors with it, their KV kept. What was decoded past
  t is kept: it counts later, or is overshoot.
- ``resubmit``: each row is asked for exactly the tokens up to the look, and for the next ones with prompt and tokens so
  far as a new prompt, which the server's prefix cache has read already. Nobody else is stopped, and nothing overshoots.

Rows that are decoded to their end have no look before it: both ways are the same then.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
import uuid
import weakref
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

from specrej_eval import stopping
from specrej_eval.budget import Budget
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt, RowView, TokenStat
from specrej_eval.engines.ahead import Row, steps_to_take
from specrej_eval.engines.base import Engine
from specrej_eval.engines.servers.pause import Pause
from specrej_eval.engines.servers.protocols.base import Asked, EngineProtocol
from specrej_eval.engines.servers.session import Session
from specrej_eval.engines.servers.streams import News, RowStream, cut_all
from specrej_eval.errors import ConfigError
from specrej_eval.http import BadAnswerError, ServerError

logger = logging.getLogger(__name__)

Looks = Literal["pause", "resubmit"]
LONGEST_NAP = 0.2
"""Seconds after which a waiting engine looks around, news or not."""
SETTLED = 0.02
"""Seconds without news after which a paused server has sent all there is."""
AFTER_ABORT = 1.0
"""Seconds that requests have, at most, to send what they decoded before they were aborted or paused."""


class ServerEngine(Engine):
    """Decodes rows on a server that runs already.

    A pause of ours ends in ``decode``, when the last session is closed, when this engine goes, and on signals. Only a
    process that is killed (SIGKILL) can leave it: the next run on that server ends it, and says so.

    Args:
        protocol: connected.
        looks: how a look is come to; ``pause`` only where the server can be paused.
        stop_ids: token ids that end an answer.
        name: the engine's, as the user calls it.
        device: where a reward model lies.
        text: the arguments of ``Engine`` that say how prompts are made and answers cut.
    """

    promises = "distribution"

    def __init__(
        self,
        protocol: EngineProtocol,
        tokenizer: Any,
        *,
        max_length: int,
        looks: Looks,
        stop_ids: Collection[int],
        name: str,
        device: str,
        **text: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length, **text)
        self.name = name
        self.device = device
        self.looks: Looks = looks
        self.eos_ids = tuple(sorted(stop_ids))
        self._protocol = protocol
        self._server = protocol.server
        self._served_model = protocol.served_model
        self._news = News()
        self._pause = Pause(protocol)
        self._rows: dict[RowStream, tuple[Session, Row]] = {}
        """Whose every stream is."""
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._told_paused = False
        self._breaks = self._server.num_breaks
        """``JsonServer.num_breaks`` when it was last asked which model it holds."""
        weakref.finalize(self, self._pause.end_quietly)
        stopping.on_the_way_out(self._pause.end_quietly)

    # the protocol of an engine

    def check(self, prompt: Prompt, config: RunConfig) -> None:
        """See ``base.Engine.check``.

        Raises:
            ConfigError: the server cannot draw rows as these arguments say, or cannot stop for a look.
        """
        super().check(prompt, config)
        wanted: tuple[TokenStat, ...] = ("logprob",) if config.logprobs else ()
        self._check_refusal(config, wanted)
        if config.rejects and not self._protocol.gives_ids:
            raise ConfigError(
                f"engine={self.name}: the server at {self._server.shown_url} gives text and no token ids, so its rows "
                "can only be decoded to their end.",
                hint="strategy=best_of_n works there; Speculative Rejection needs vLLM 0.10.2 or newer, or SGLang.",
            )

    def open(
        self,
        prompt: Prompt,
        config: RunConfig,
        budget: Budget,
        *,
        until: tuple[str, ...] = (),
        token_stats: Collection[TokenStat] = (),
    ) -> Session:
        """No prompt is read yet: the server reads it with its first row. See ``base.Engine.open``.

        Raises:
            ConfigError: as ``check``; a number per token that the server cannot give.
        """
        self.check(prompt, config)
        unknown = sorted(set(token_stats) - (self._protocol.STATS if self._protocol.gives_ids else frozenset()))
        if unknown:
            raise ConfigError(
                f"engine={self.name}: {self._protocol.KIND} at {self._server.shown_url} does not give "
                f"{', '.join(unknown)} of each token.",
                hint="reward_model=self_certainty, deepconf and likelihood, and logprobs=True, need such numbers; "
                "engine=transformers has them all.",
            )
        self._check_refusal(config, token_stats)
        session = Session(
            prompt,
            config,
            budget,
            until=until,
            recorded=token_stats,
            eos_ids=self.eos_ids,
            detokenizer=self.detokenizer,
            gives_ids=self._protocol.gives_ids,
        )
        self._sessions.add(session)
        return session

    def _check_refusal(self, config: RunConfig, token_stats: Collection[TokenStat]) -> None:
        refusal = self._protocol.refuses(config, token_stats)
        if refusal is not None:
            raise ConfigError(f"engine={self.name} ({self._protocol.KIND} at {self._server.shown_url}): {refusal}.")

    def follow(self, session: Session, plan: Plan) -> None:
        """See ``base.Engine.follow``. Nothing is sent but aborts: rows that start do so when they are decoded."""
        with self._going_on_if_it_fails():
            self._take_news(0.0)
            _, rejected = session.follow(plan)
            session.look_in = plan.num_tokens
            streams = [stream for row in rejected if (stream := session.of(row).stream) is not None]
            self._abort(streams, wait=not self._pause.on)  # of a server that stands still, all is here

    def decode(self, sessions: Sequence[Session], num_tokens: int) -> None:
        """See ``base.Engine.decode``.

        Raises:
            ServerError: the server does not answer, after all tries, or has come back with another model.
            ModelError: it ended rows early.
        """
        started = time.perf_counter()
        before = [session.decode_tokens for session in sessions]
        with self._going_on_if_it_fails():
            self._news.awake()
            self._ask(sessions, num_tokens)
            self._go_on()
            while True:
                steps = steps_to_take(sessions, num_tokens)
                if all(session.is_there(steps) for session in sessions):
                    break
                self._take_news(LONGEST_NAP)
                self._ask(sessions, num_tokens)
                self._watch_silence(sessions, num_tokens)
            if self._server.num_breaks != self._breaks:
                self._check_model()
            for session in sessions:
                session.advance(steps)
            if self.looks == "pause" and any(
                session.num_live and session.tokens_since_look >= session.look_in for session in sessions
            ):
                self._stand_still()
        seconds = time.perf_counter() - started
        shares = [session.decode_tokens - tokens for session, tokens in zip(sessions, before, strict=True)]
        for session, share in zip(sessions, shares, strict=True):
            session.decode_seconds += seconds * share / max(1, sum(shares))

    def pool(self, session: Session) -> list[RowView]:
        """See ``base.Engine.pool``."""
        return session.pool()

    def rows(self, session: Session) -> list[RowView]:
        """See ``base.Engine.rows``."""
        return session.rows()

    def close(self, session: Session) -> None:
        """End the session's requests; the server goes on once no session is open. See ``base.Engine.close``."""
        self._sessions.discard(session)
        streams = session.streams
        session.asking.clear()
        for stream in streams:
            self._rows.pop(stream, None)
        try:
            self._tell_abort(streams)
            cut_all(streams)
        finally:
            if not self._sessions:
                self._pause.end_quietly()

    def peak_bytes(self) -> int:
        """Of this process, which holds no model. See ``base.Engine.peak_bytes``."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def describe(self) -> dict[str, Any]:
        """See ``base.Engine.describe``."""
        protocol = self._protocol
        return {
            "engine": self.name,
            "engine_url": self._server.shown_url,
            "engine_looks": self.looks if protocol.gives_ids else "none: rows are decoded to their end",
            "served_model": self._served_model,
            "server_version": protocol.version,
            "token_ids": "the server's" if protocol.gives_ids else "of its text, tokenised here",
            "promises": self.promises,
            "device": "server",
            "max_length": self.max_length,
            "eos_token_ids": list(self.eos_ids),
        }

    def told(self) -> str:
        """What the user reads at the start: who decodes, and how looks are come to."""
        protocol = self._protocol
        version = f" {protocol.version}" if protocol.version else ""
        who = f"engine={self.name}: {protocol.KIND}{version} at {self._server.shown_url} decodes"
        if not protocol.gives_ids:
            return f"{who}. It gives text and no token ids: Best-of-N only, and token_ids are those of the text."
        if self.looks == "pause":
            return f"{who}. Looks pause it (all its clients wait meanwhile); engine_looks=resubmit does not."
        why = f" (to be paused it needs {protocol.HOW_TO_PAUSE})" if not protocol.can_pause else ""
        return f"{who}. For each look rows are asked for anew, with what they have as a prompt{why}."

    # requests

    def _ask(self, sessions: Sequence[Session], num_tokens: int) -> None:
        """Send the requests that live rows need to have so many tokens ahead."""
        now = time.monotonic()
        for session in sessions:
            for row in session.live:
                asking = session.of(row)
                if asking.stream is None and row.end is None and row.ahead < num_tokens and now >= asking.not_before:
                    self._send(session, row)

    def _send(self, session: Session, row: Row) -> None:
        to_the_end = session.max_gen_toks - len(row.tokens)
        to_the_look = row.counted_at_look + session.look_in - len(row.tokens)
        most = to_the_end if self.looks == "pause" or not session.gives_ids else min(to_the_end, to_the_look)
        asked = Asked(
            request_id=f"specrej-{uuid.uuid4().hex}",
            token_ids=[*session.prompt.token_ids, *row.tokens],
            max_tokens=most,
            seed=session.next_seed(row),
            config=session.config,
            stop_ids=self.eos_ids,
            token_stats=session.recorded,
        )
        session.asks(row, most)
        path, body = self._protocol.request(asked)
        stream = RowStream(asked.request_id, self._server.stream(path, body), self._protocol.read, self._news)
        session.of(row).stream = stream
        self._rows[stream] = (session, row)
        stream.start()
        self._news.awake()

    def _take_news(self, seconds: float) -> bool:
        """Give what has come in to its rows, and let go of requests that are over; whether there was something.

        Raises:
            ServerError: a row failed after all tries, or was refused.
            ModelError: as ``Session.take_in``.
        """
        needless = []
        news = self._news.take(seconds)
        for stream, deltas in news:
            if stream not in self._rows:
                continue  # its session is closed
            session, row = self._rows[stream]
            for delta in deltas:
                try:
                    if session.take_in(row, delta):
                        session.of(row).failures = 0
                except BadAnswerError as error:
                    stream.error = ServerError(f"POST {self._server.shown_url}: {error}")
                    stream.spoilt = True
                    stream.cut()
                    break
                stream.finish = delta.finish or stream.finish
            if stream.ended or stream.spoilt:
                del self._rows[stream]
                session.of(row).stream = None
                if row.end is None and not row.rejected and (stream.error is not None or stream.finish != "length"):
                    self._failed(session, row, stream.error or self._broke_off(stream))
            elif row.end is not None and stream.finish is None and not stream.is_cut:
                needless.append(stream)
        self._abort(needless, wait=False)
        return bool(news)

    def _broke_off(self, stream: RowStream) -> ServerError:
        why = "somebody aborted a request of ours" if stream.finish == "abort" else "an answer broke off"
        return ServerError(f"POST {self._server.shown_url}: {why}")

    def _failed(self, session: Session, row: Row, error: ServerError) -> None:
        """A row's request came to nothing: it is asked for again, from where it is, or all is over."""
        self._server.count_break()
        asking = session.of(row)
        asking.failures += 1
        if error.hopeless or asking.failures > self._server.retries:
            raise self._server.gave_up(error, asking.failures) from error
        logger.info("%s; trying again", error)
        asking.not_before = time.monotonic() + self._server.wait_after(error, asking.failures)

    def _check_model(self) -> None:
        """After a failure or a new connection, before any token that came since counts: a server may have been started
        anew.

        Raises:
            ServerError: with another model.
        """
        self._protocol.identify()
        now = self._protocol.served_model
        if now != self._served_model:
            raise ServerError(
                f"{self._server.shown_url} has come back with another model: {now!r}, where the rows so far are of "
                f"{self._served_model!r}.",
                hint="start it with that model again, then the same command: with journal= or --output, answers that "
                "were finished are kept.",
            )
        self._breaks = self._server.num_breaks  # this question's own connection too; no server starts within a moment

    def _watch_silence(self, sessions: Sequence[Session], num_tokens: int) -> None:
        """No row got a token for long: whose pause is it, or is the server gone?

        Raises:
            ServerError: somebody has paused it for too long, or a row failed after all tries.
        """
        silent = time.monotonic() - self._news.last
        if silent < self._server.timeout:
            return
        waiting = [
            (session, row, stream)
            for session in sessions
            for row in session.live
            if row.end is None and row.ahead < num_tokens and (stream := session.of(row).stream) is not None
        ]
        if not waiting:
            return
        try:
            paused = self._protocol.can_pause and self._protocol.paused(once=True)
        except ServerError:
            paused = False
        if paused and silent < self._server.timeout * (self._server.retries + 1):
            if not self._told_paused:
                logger.warning("%s is paused by another client; waiting for it.", self._server.shown_url)
            self._told_paused = True
            return
        what = "it is paused by another client, no token came" if paused else "no token of any row came"
        error = ServerError(f"POST {self._server.shown_url}: {what} within {silent:.0f} s")
        if paused:
            raise self._server.gave_up(error, 1)
        self._news.awake()
        for session, row, stream in waiting:
            self._rows.pop(stream, None)
            stream.cut()
            session.of(row).stream = None
            self._failed(session, row, error)

    # pause and abort

    def _stand_still(self) -> None:
        """Pause the server; one that has forgotten how is asked for rows anew from now on."""
        if not self._pause.begin():
            self.looks = "resubmit"
            return
        until = time.monotonic() + AFTER_ABORT  # who else may let it go on meanwhile
        while self._take_news(SETTLED) and time.monotonic() < until:
            pass  # what was decoded before the pause is still on its way

    def _go_on(self) -> None:
        if not self._pause.end():
            self.looks = "resubmit"

    def _abort(self, streams: Sequence[RowStream], *, wait: bool = True) -> None:
        """End requests; with ``wait``, what they decoded by then is taken in."""
        if not streams:
            return
        self._tell_abort(streams)
        until = time.monotonic() + AFTER_ABORT
        while wait and any(stream in self._rows for stream in streams) and time.monotonic() < until:
            self._take_news(0.05)
        for stream in streams:
            stream.cut()

    def _tell_abort(self, streams: Sequence[RowStream]) -> None:
        if not self._protocol.can_pause:
            return
        going = [stream.request_id for stream in streams if not stream.done]
        with contextlib.suppress(ServerError):  # they are cut all the same
            self._protocol.abort(going)

    @contextlib.contextmanager
    def _going_on_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._pause.end_quietly()
            raise

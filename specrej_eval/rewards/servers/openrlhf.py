"""OpenRLHF's ``serve_rm``, and what follows its form (``{"query": [...]}`` -> ``{"rewards": [...]}``).

It reads texts with no special token added. (From its request and response types, late 2026.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specrej_eval.rewards.http import BadAnswerError, numbers
from specrej_eval.rewards.servers.base import Form, Item, Scored, ServerProtocol, needs_tokenizer


class Protocol(ServerProtocol):
    """See the module's text."""

    ENDPOINTS = ("/get_reward",)
    PATHS = ("/get_reward",)

    def form(self, has_tokenizer: bool, has_template: bool) -> Form:
        if not has_tokenizer:
            raise needs_tokenizer("openrlhf", self._server, None)
        return "text"

    def score(self, items: Sequence[Item]) -> Scored:
        def parse(answer: Any) -> list[float]:
            if not isinstance(answer, dict) or "rewards" not in answer:
                raise BadAnswerError("an object with 'rewards' was expected")
            return numbers(answer["rewards"], len(items))

        # the server reads the query alone; reward functions behind the same form also want to know where it starts
        body = {"query": [item.text for item in items], "prompts": [item.prompt for item in items]}
        return Scored(self._server.post(self.ENDPOINTS[0], body, parse), 0)

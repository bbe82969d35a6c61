"""``reward_model=judge:MODEL@http://host:port/v1``: a chat model grades each answer on its own, from 0 to 9.

Any server of OpenAI's chat completions will do. Where it gives log-probs, the score is the expected grade over the
digits it weighed; else the number it wrote. The first is worth much: written grades are whole numbers, so that most
rows tie.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import ConfigError
from specrej_eval.paths import expanded
from specrej_eval.rewards._http import BadAnswerError, JsonServer, ServerError
from specrej_eval.rewards.base import Pair, Stateless
from specrej_eval.special_tokens import ENCODE_AS_TEXT, ContentGuard

KEY_VARIABLES = ("SPECREJ_REWARD_API_KEY", "OPENAI_API_KEY")
PROMPT = """\
Grade the assistant's response to the conversation below. Judge how well it does what the user asks: whether it is \
correct, complete, clear and to the point. Length alone is no merit.

Answer with a single digit, and nothing else:
0 = useless or wrong, 3 = poor, 5 = acceptable with clear faults, 7 = good, 9 = could hardly be better.

<conversation>
{prompt}
</conversation>

<response>
{response}
</response>

Grade (0 to 9):"""
"""What the judge is asked; ``judge_prompt=`` replaces it."""
UNFINISHED = "\n[The response is not finished yet; grade what there is of it so far.]"
"""Put behind a partial answer, with ``partial_turn=open``."""

_NAME = re.compile(r"judge:(?P<model>.+?)@(?P<url>https?://.+)")
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?")
_TOP = 20
"""Most alternatives per token that servers give."""
_logger = logging.getLogger(__name__)


def claims(name: str) -> bool:
    """Whether a ``reward_model`` is a judge, well written or not."""
    return name.startswith("judge:")


def check(name: str, config: RunConfig, token: str | bool | None = None) -> None:
    """Raises:
    ConfigError: not of the form ``judge:MODEL@URL``, or a prompt without its two places.
    RewardError: the server is not there, or does not grade.
    """
    make(name, config, "", token).check()


def make(name: str, config: RunConfig, device: str, token: str | bool | None = None) -> Judge:
    """The judge a name stands for; asks nothing yet. Raises ConfigError as ``check``."""
    del device, token  # the server's own
    match = _NAME.fullmatch(name)
    if match is None or not urlsplit(match["url"]).hostname:
        raise ConfigError(
            f"reward_model={name!r} does not say which model at which server is the judge.",
            hint="judge:MODEL@http://host:port/v1, for example judge:gpt-4o-mini@https://api.openai.com/v1",
        )
    url = match["url"].rstrip("/").removesuffix("/chat/completions")
    if urlsplit(url).path in ("", "/"):
        url += "/v1"
    server = JsonServer(url, key_variables=KEY_VARIABLES, timeout=config.reward_timeout, retries=config.reward_retries)
    return Judge(
        server,
        match["model"],
        prompt=read_prompt(config.judge_prompt),
        max_tokens=config.judge_max_toks,
        note_unfinished=config.partial_turn == "open",
        special_tokens_in_content=config.special_tokens_in_content or ENCODE_AS_TEXT,
    )


def read_prompt(value: str | None) -> str:
    """``judge_prompt``: a text with both places in it, or the file of one.

    Raises:
        ConfigError: a file that cannot be read, or a place is missing.
    """
    if value is None:
        return PROMPT
    text = value
    if "{response}" not in value:
        try:
            text = expanded(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(
                f"judge_prompt={value!r} has no {{response}} in it, and is no file that can be read ({error}).",
                hint="a text with {prompt} and {response}, or a file that holds one.",
            ) from error
    missing = [place for place in ("{prompt}", "{response}") if place not in text]
    if missing:
        raise ConfigError(f"judge_prompt={value!r} has no {missing[0]} in it.")
    return text


class Grade(NamedTuple):
    score: float
    tokens: int
    """Tokens of the prompt, as the server counts."""


class Judge(Stateless):
    """Grades rows one by one, several requests at a time; see the module's text."""

    needs_logprobs = False

    def __init__(
        self,
        server: JsonServer,
        model: str,
        *,
        prompt: str = PROMPT,
        max_tokens: int = 16,
        note_unfinished: bool = False,
        special_tokens_in_content: str = ENCODE_AS_TEXT,
    ) -> None:
        self.name = f"judge:{model}@{server.shown_url}"
        self._guard = ContentGuard(self.name, special_tokens_in_content)
        self.model = model
        self.tokens_scored = 0
        self._server = server
        self._prompt = prompt
        self._note_unfinished = note_unfinished
        self._options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP,
        }

    @property
    def num_calls(self) -> int:
        """Requests answered."""
        return self._server.num_requests

    def check(self) -> None:
        """Let it grade one answer. Raises RewardError if it does not."""
        self.score([{"role": "user", "content": "What is 2 + 2?"}], [RowView(0, "4", (), "eos")])

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """A grade between 0 and 9 for each row; rows that read the same are graded once.

        Raises:
            RewardError: the server failed, or wrote no grade, after its retries.
        """
        return self._score_texts([self._asked(conversation, row, response_prefix) for row in rows])

    def score_pairs(self, pairs: Sequence[Pair]) -> list[float]:
        """Finished answers of any conversations. Raises as ``score``."""
        return self._score_texts([self._asked(pair.conversation, pair.row) for pair in pairs])

    def _score_texts(self, texts: Sequence[str]) -> list[float]:
        unique = list(dict.fromkeys(texts))
        grades = dict(zip(unique, self._server.each(self._grade, unique), strict=True))
        self.tokens_scored += sum(grade.tokens for grade in grades.values())
        return [grades[text].score for text in texts]

    def _asked(self, conversation: Sequence[Message], row: RowView, response_prefix: str = "") -> str:
        # an unfinished row may end within a character; the bytes so far decode to U+FFFD
        response = response_prefix + (row.text if row.finished else row.text.rstrip("\ufffd"))
        if self._note_unfinished and not row.finished:
            response += UNFINISHED
        guard = self._guard  # what looks like a control token is text to the judge
        places = {
            "{prompt}": guard.text(_as_text(conversation), row.row),
            "{response}": guard.text(response, row.row),
        }
        # not str.format: answers are full of braces
        return "".join(places.get(part, part) for part in re.split(r"(\{prompt\}|\{response\})", self._prompt))

    def _grade(self, text: str) -> Grade:
        while True:
            options = dict(self._options)
            body = {"model": self.model, "messages": [{"role": "user", "content": text}], **options}
            try:
                return self._server.post("/chat/completions", body, _parse)
            except ServerError as error:
                if error.status != 400 or not self._give_up_option(options, error.body):
                    raise

    def _give_up_option(self, sent: dict[str, Any], complaint: str) -> bool:
        """Models differ in what they take. Drop what the server complains about; False if it is nothing of ours."""
        if "max_completion_tokens" in complaint and "max_tokens" in sent:
            self._options = {**sent, "max_completion_tokens": sent["max_tokens"]}
            del self._options["max_tokens"]
            return True
        for name in ("logprobs", "temperature"):
            if name in complaint and name in sent:
                _logger.warning("reward_model=%s: the server takes no %s; graded without.", self.name, name)
                self._options = {key: value for key, value in sent.items() if key not in (name, f"top_{name}")}
                return True
        return False


def _as_text(conversation: Sequence[Message]) -> str:
    """The conversation as a judge reads it; who speaks is said where more than one does."""
    if len(conversation) == 1:
        return conversation[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in conversation)


def _parse(answer: Any) -> Grade:
    """A chat completion -> a grade.

    Raises:
        BadAnswerError: it is no chat completion, or holds no grade.
    """
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"] or ""
    except (KeyError, IndexError, TypeError):
        raise BadAnswerError("a chat completion was expected") from None
    usage = answer.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    expected = _expected_grade(choice.get("logprobs"), content)
    score = _written_grade(content) if expected is None else expected
    if score is None:
        raise BadAnswerError(f"the judge wrote no grade from 0 to 9, but {content[:80]!r}")
    return Grade(score, tokens if isinstance(tokens, int) else 0)


def _expected_grade(logprobs: Any, content: str) -> float | None:
    """Mean of the digits it weighed where it wrote its grade, by probability; None without log-probs."""
    told = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(told, list) or _written_grade(content) is None:
        return None
    after_thinking = not content.count("</think>")
    for token in told:
        text = str(token.get("token", ""))
        after_thinking = after_thinking or "</think>" in text
        if not after_thinking or not _is_grade(text):
            continue
        weights: dict[int, float] = {}
        for other in token.get("top_logprobs") or ():
            digit, value = str(other.get("token", "")), other.get("logprob")
            if _is_grade(digit) and isinstance(value, (int, float)):
                weights[int(digit)] = weights.get(int(digit), 0.0) + math.exp(value)  # "7" and " 7" are two tokens
        total = math.fsum(weights.values())
        if total > 0:
            return math.fsum(digit * weight for digit, weight in weights.items()) / total
        return float(text)
    return None


def _written_grade(content: str) -> float | None:
    """The first number behind any reasoning, if it is from 0 to 9."""
    found = _NUMBER.search(content.rpartition("</think>")[2])
    value = float(found[0]) if found else -1.0
    return value if 0 <= value <= 9 else None


def _is_grade(token: str) -> bool:
    return len(token.strip()) == 1 and token.strip() in "0123456789"

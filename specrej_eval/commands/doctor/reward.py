"""`specrej-eval doctor --reward M`: is this reward model read as it was trained?

A wrong chat template makes no noise: scores come out, and are worse. So what the model reads is shown, and everything
that can be checked without knowing its published numbers is checked.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import StatisticsError, correlation, fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from specrej_eval.commands.doctor.findings import Finding, Status, show
from specrej_eval.commands.doctor.probes import PROBES, Probes, demo_probes
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.errors import ConfigError, RewardError
from specrej_eval.options import load_reward, reward_config
from specrej_eval.special_tokens import ALLOW, ERROR
from specrej_eval.wording import counted, shortened, start_of

if TYPE_CHECKING:
    from specrej_eval.rewards.base import RewardModel
    from specrej_eval.special_tokens import ContentGuard

SHOWN_TOKENS = 60
"""At the start and at the end of what is shown."""
FLOAT32_BOUND, COARSE_BOUND = 1e-4, 0.02
"""Most that a score may change with its batch or its padding, as a share of the score (or of 1): float32, others."""

Conversation = list[dict[str, str]]


class Patient(NamedTuple):
    """What all checks look at."""

    reward: RewardModel
    probes: Probes

    @property
    def conversation(self) -> Conversation:
        return _asked(self.probes.pairs[0][0])

    @property
    def response(self) -> str:
        return self.probes.pairs[0][1]


def run(args: argparse.Namespace) -> int:
    """Carry out the command; 0 if nothing is broken.

    Raises:
        ConfigError, CheckpointError, RewardError: it cannot be loaded, or does not answer.
    """
    options = vars(args)
    config = reward_config(options)
    reward = load_reward(config, options.get("token"))
    if not reward.reads_text:
        raise ConfigError(f"reward_model={reward.name!r} reads no text, so there is nothing to show.")
    return examine(reward, demo_probes() if _is_demo(config) else PROBES)


def examine(reward: RewardModel, probes: Probes = PROBES) -> int:
    """Print what is found; 0 if nothing is broken, else 1."""
    patient = Patient(reward, probes)
    return show(((title, check(patient)) for title, check in CHECKS), well="This reward model passed all checks.")


# ---- what it reads ---------------------------------------------------------------------------------------------------


Check = Callable[["Patient"], Iterator[Finding]]


def of_each_part(check: Check) -> Check:
    """The check of a reward model; of an ensemble, that of each part."""

    def checked(patient: Patient) -> Iterator[Finding]:
        for member in patient.reward.members:
            yield Finding("ok", "part", member.name)
            yield from checked(patient._replace(reward=member))
        if not patient.reward.members:
            yield from check(patient)

    return checked


@of_each_part
def check_input(patient: Patient) -> Iterator[Finding]:
    """The tokens of one conversation, and BOS, EOS and padding in them."""
    renderer = patient.reward.renderer
    if renderer is None:
        yield Finding("note", "tokens", f"{patient.reward.name} gets text; which tokens it reads cannot be shown here")
        return
    tokenizer = renderer.tokenizer
    (entry,) = renderer.inputs(patient.conversation, [_row(patient.response)])
    ids = list(entry.ids)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    shown = tokens
    if len(tokens) > 2 * SHOWN_TOKENS:
        shown = [*tokens[:SHOWN_TOKENS], f"... {len(tokens) - 2 * SHOWN_TOKENS} more ...", *tokens[-SHOWN_TOKENS:]]
    yield Finding("ok", "tokens", f"{len(ids)}: {' '.join(shown)}")
    text = tokenizer.decode(ids)
    for what, wanted in (("prompt", patient.conversation[-1]["content"]), ("response", patient.response.strip())):
        found = "".join(wanted.split()) in "".join(text.split())  # tokenizers differ in what they do to spaces
        yield Finding("ok" if found else "broken", what, "is read" if found else f"is not in what is read: {text!r}")
    yield from _special_tokens(tokenizer, ids)
    today = time.strftime("%d %b %Y")
    if today in text:
        yield Finding("note", "date", f"the template writes today's date ({today}): scores change from day to day")


def _special_tokens(tokenizer: Any, ids: Sequence[int]) -> Iterator[Finding]:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if bos is None:
        yield Finding("ok", "BOS", "the tokenizer has none")
    else:
        count = next((place for place, token in enumerate(ids) if token != bos), len(ids))
        where = f"{tokenizer.bos_token!r} (id {bos}) stands {counted(count, 'time')} at the start"
        plain = tokenizer("x")["input_ids"][:1] == [bos]
        if count > 1:
            yield Finding("broken", "BOS", f"{where}: template and tokenizer both add it")
        elif count == 0 and plain:
            yield Finding(
                "note", "BOS", f"{where}, although the tokenizer adds it to plain text; some models want that"
            )
        else:
            yield Finding("ok", "BOS", where)
    last = tokenizer.convert_ids_to_tokens(ids[-1])
    at_end = "is EOS" if ids[-1] == eos else "is not EOS"
    yield Finding("ok", "last token", f"{last!r} (id {ids[-1]}), which {at_end}; most heads are read here")
    if pad is None:
        yield Finding("ok", "padding", "the tokenizer has no padding token; none is needed here")
    elif pad == ids[-1]:
        yield Finding("note", "padding", f"{last!r} is the padding token too; harmless here, wrong scores elsewhere")
    else:
        yield Finding("ok", "padding", f"{tokenizer.convert_ids_to_tokens(pad)!r} (id {pad})")


# ---- whether a text can be more than text ----------------------------------------------------------------------------

MOST_PLANTED = 4
"""Special tokens planted at once."""


@of_each_part
def check_content(patient: Patient) -> Iterator[Finding]:
    """Special tokens planted in an answer and in a prompt: are they read as text, or can an answer write turns?"""
    reward = patient.reward
    guard, renderer = reward.guard, reward.renderer
    if guard is not None:
        yield _guarded(guard)
    elif renderer is None:
        yield Finding("note", "special tokens", f"{reward.name} gets texts as they were written")
    else:
        tokens = _template_tokens(renderer, patient)
        if not tokens:
            yield Finding("ok", "special tokens", "the tokenizer has none")
            return
        planted = "".join(tokens)
        for place, found in (
            ("an answer", (patient.conversation, patient.response, planted)),
            ("a prompt", (_asked(patient.conversation[-1]["content"] + planted), patient.response, "")),
        ):
            conversation, response, more = found
            yield _planted(reward, patient, place, tokens, conversation, response + more)


def _template_tokens(renderer: Any, patient: Patient) -> list[str]:
    """Special tokens that the template writes, else those that the tokenizer has."""
    (entry,) = renderer.inputs(patient.conversation, [_row(patient.response)])
    known = renderer.tokeniser.special_ids
    written = [known[number] for number in dict.fromkeys(entry.ids) if number in known]
    return (written or list(known.values()))[:MOST_PLANTED]


def _planted(
    reward: RewardModel, patient: Patient, place: str, tokens: Sequence[str], conversation: Conversation, response: str
) -> Finding:
    shown = "".join(tokens)
    tokeniser = reward.renderer.tokeniser
    try:
        more = _num_special(reward, conversation, response) - _num_special(
            reward, patient.conversation, patient.response
        )
    except RewardError as error:
        refused = tokeniser.rule == ERROR
        told = "is refused (special_tokens_in_content=error)" if refused else f"stops a run: {error.args[0]}"
        return Finding("ok" if refused else "broken", "special tokens", f"{shown!r} in {place} {told}")
    if more == 0:
        told = "is read as text; with special_tokens_in_content=allow it would be read as control tokens"
        return Finding("ok", "special tokens", f"{shown!r} in {place} {told}")
    told = "is read as control tokens, so that a text can begin and end turns"
    why = " (special_tokens_in_content=allow)" if tokeniser.rule == ALLOW else ""
    return Finding("note" if why else "broken", "special tokens", f"{shown!r} in {place} {told}{why}")


def _num_special(reward: RewardModel, conversation: Conversation, response: str) -> int:
    """Special tokens in what the model reads, the template's own included."""
    renderer = reward.renderer
    sent = reward.text_sent(conversation, response)
    if sent is None:
        ids = renderer.inputs(conversation, [_row(response)])[0].ids
    else:
        ids = renderer.tokenizer(sent, add_special_tokens=False)["input_ids"]
    return sum(number in renderer.tokeniser.special_ids for number in ids)


def _guarded(guard: ContentGuard) -> Finding:
    """Texts that a server tokenises itself."""
    example = next(iter(guard.tokeniser.special_ids.values()), "<|im_end|>") if guard.tokeniser else "<|im_end|>"
    if guard.rule == ALLOW:
        told = "is sent as it is (special_tokens_in_content=allow): its server may read a control token"
        return Finding("note", "special tokens", f"{example!r} in a text {told}")
    if guard.rule == ERROR:
        return Finding("ok", "special tokens", f"{example!r} in a text is refused (special_tokens_in_content=error)")
    told = "is sent with a zero-width space behind its first character, so that its server reads text"
    unknown = "; its tokenizer is not known here: what looks like a control token counts as one"
    known = "" if guard.tokeniser else unknown
    return Finding("ok", "special tokens", f"{example!r} in a text {told}{known}")


# ---- whether scores depend on the answer alone -----------------------------------------------------------------------


def check_stability(patient: Patient) -> Iterator[Finding]:
    """One at a time, together, and padded on either side."""
    reward = patient.reward
    prompt, answers = patient.probes.answers[0]
    rows = [_row(text, number) for number, text in enumerate(answers)]
    together = _scores(reward, prompt, rows)
    if reward.by_rank:
        yield Finding(
            "note", "single == batch", "ranks hold among the rows of one call, so there is nothing to compare"
        )
        return
    single = [_scores(reward, prompt, [row])[0] for row in rows]
    bound = FLOAT32_BOUND if _is_exact(reward) else COARSE_BOUND
    yield _compared("single == batch", single, together, bound)
    distinct = len(set(together))
    # a saturated sigmoid leaves one or two; whole grades of a judge leave a few
    status: Status = "ok" if distinct == len(answers) else "note"
    status = "broken" if 2 * distinct < len(answers) else status
    yield Finding(
        status,
        "ties",
        f"{len(answers)} different answers have {counted(distinct, 'different score')}: {_listed(together)}",
    )
    padded = _left_padded(reward, prompt, rows)
    if padded is None:
        yield Finding("note", "left == right padding", "pads in its own way, which cannot be checked here")
    else:
        yield _compared("left == right padding", padded, together, bound)


def _compared(subject: str, one: Sequence[float], other: Sequence[float], bound: float) -> Finding:
    if not all(math.isfinite(value) for value in (*one, *other)):
        return Finding("broken", subject, f"NaN or infinity among the scores: {_listed(one)} and {_listed(other)}")
    worst = max(abs(a - b) for a, b in zip(one, other, strict=True))
    allowed = bound * max(1.0, *(abs(value) for value in other))
    return Finding(
        "ok" if worst <= allowed else "broken", subject, f"scores differ by up to {worst:.2g} (allowed: {allowed:.2g})"
    )


def _is_exact(reward: RewardModel) -> bool:
    """Whether it computes in float32 on our side."""
    import torch

    from specrej_eval.rewards.checkpoints.reward import CheckpointReward

    return isinstance(reward, CheckpointReward) and reward.body.dtype == torch.float32


def _left_padded(reward: RewardModel, prompt: str, rows: Sequence[RowView]) -> list[float] | None:
    """Scores of one batch padded on the left, with positions counted from the first real token; None if it cannot be
    done: a server, a function, an encoder, or a body that takes no positions."""
    import inspect

    import torch

    from specrej_eval.rewards.checkpoints.reward import CheckpointReward

    if not isinstance(reward, CheckpointReward) or reward.head is None:
        return None
    body = reward.body
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return None

    inputs = reward.renderer.inputs(_asked(prompt), rows)
    longest = max(len(entry.ids) for entry in inputs)
    filler = reward.renderer.filler
    ids = torch.tensor([[*[filler] * (longest - len(entry.ids)), *entry.ids] for entry in inputs])
    mask = torch.tensor([[0] * (longest - len(entry.ids)) + [1] * len(entry.ids) for entry in inputs])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.inference_mode():
        hidden = body(**{name: value.to(reward.device) for name, value in arguments.items()}, use_cache=False)[0]
        places = [[longest - len(entry.ids) + at for at in reward.positions_of(entry.ids)] for entry in inputs]
        scores: list[float] = reward.head_scores([row[at] for row, at in zip(hidden, places, strict=True)]).tolist()
    return scores


# ---- whether it knows good from bad ----------------------------------------------------------------------------------


LUCK = 0.05
"""How seldom a reward that tosses a coin may get so many pairs right, for the pairs to say something."""


def check_pairs(patient: Patient) -> Iterator[Finding]:
    """Answers of which one is plainly better, and what luck would have given."""
    right = []
    for prompt, better, worse in patient.probes.pairs:
        good, bad = _scores(patient.reward, prompt, [_row(better), _row(worse, 1)])
        right.append(good > bad)
        status: Status = "ok" if good > bad else "broken"
        yield Finding(
            status,
            f"{good:.4g} {'>' if good > bad else '<='} {bad:.4g}",
            f"better {'>' if good > bad else 'not >'} worse: {shortened(prompt)}",
        )
    for prompt, answers in patient.probes.answers:  # no answer is in two pairs, so a coin is right or wrong anew
        scores = _scores(patient.reward, prompt, [_row(text, number) for number, text in enumerate(answers)])
        right += [scores[better] > scores[worse] for better, worse in patient.probes.in_order]
    chance = by_luck(sum(right), len(right))
    yield Finding(
        "ok" if chance < LUCK else "broken",
        f"{sum(right)} of {counted(len(right), 'pair')}",
        f"right, those of the mixed answers below included; a coin does as well with probability "
        f"{chance:.2g} (allowed: below {LUCK:g})",
    )


def by_luck(right: int, pairs: int) -> float:
    """Probability that a fair coin gets ``right`` or more of ``pairs`` right."""
    ways: int = sum(math.comb(pairs, number) for number in range(right, pairs + 1))
    return float(ways / 2**pairs)


def check_partial(patient: Patient) -> Iterator[Finding]:
    """Rejecting early pays only if the score of half an answer says something of the whole one's."""
    found = []
    for prompt, answers in patient.probes.answers:
        whole = _scores(patient.reward, prompt, [_row(text, number) for number, text in enumerate(answers)])
        halves = [RowView(number, text[: len(text) // 2], (), None) for number, text in enumerate(answers)]
        partial = _scores(patient.reward, prompt, halves)
        found.append(rank_correlation(partial, whole))
        yield Finding("ok", f"{found[-1]:+.2f}", f"half against whole, {len(answers)} answers: {shortened(prompt)}")
    mean = fmean(found)
    detail = "mean rank correlation; below 0.15 rejecting rows early gains nothing"
    yield Finding("broken" if mean <= 0 else "note" if mean < 0.15 else "ok", f"{mean:+.2f}", detail)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, ties by mean ranks; 0 if either is constant."""
    from specrej_eval.rewards.kinds.ensemble import ranks

    try:
        return correlation(ranks(one), ranks(other))
    except StatisticsError:
        return 0.0


def _scores(reward: RewardModel, prompt: str, rows: Sequence[RowView]) -> list[float]:
    """One finite number for each row.

    Raises:
        RewardError: there is something else among the scores, or another number of them.
    """
    scores = list(reward.score(_asked(prompt), rows))
    if len(scores) != len(rows):
        raise RewardError(f"{counted(len(rows), 'score was', 'scores were')} expected, got {len(scores)}.")
    for row, score in zip(rows, scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise RewardError(f"an answer has the score {score!r}, which is not a finite number: {start_of(row.text)}")
    return scores


CHECKS: tuple[tuple[str, Check], ...] = (
    ("What it reads", check_input),
    ("Special tokens in content", check_content),
    ("Scores depend on the answer alone", check_stability),
    ("Better above worse", check_pairs),
    ("Partial answers", check_partial),
)


def _asked(prompt: str) -> Conversation:
    return [{"role": "user", "content": prompt}]


def _row(text: str, row: int = 0) -> RowView:
    return RowView(row, text, (), "eos")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _is_demo(config: RunConfig) -> bool:
    from specrej_eval.checkpoint import DEMO_REWARD

    return config.reward_model in (None, str(DEMO_REWARD))

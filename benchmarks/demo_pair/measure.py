"""Sampling from the policy, scoring prefixes with the reward model, and the numbers of the model card.

Shapes: P problems, N samples for each, L looks (fractions of an answer, or numbers of tokens); a token is a character.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from arithmetic import Operands, answer_of, num_correct_chars, prompt, solution
from numpy.typing import NDArray
from reward_model import probe_mask
from tokenizer import EOS_ID, PAD_ID, decode, encode
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Samples:
    """N sampled answers to each of P problems."""

    problems: list[Operands]
    texts: list[list[str]]
    """P lists of N answers, without the end token."""
    num_tokens: Ints
    """(P, N) decoded tokens, the end token included."""

    @property
    def correct(self) -> Bools:
        """(P, N) whether the number after "Answer:" is right; this is what the task's exact_match counts."""
        return np.array(
            [[answer_of(text) == sum(xs) for text in row] for xs, row in zip(self.problems, self.texts, strict=True)]
        )

    @property
    def exact(self) -> Bools:
        """(P, N) whether the whole worked solution is right."""
        return np.array(
            [[text == solution(xs) for text in row] for xs, row in zip(self.problems, self.texts, strict=True)]
        )

    @property
    def first_error(self) -> Ints:
        """(P, N) characters before the first one that differs from the worked solution."""
        return np.array(
            [[num_correct_chars(xs, text) for text in row] for xs, row in zip(self.problems, self.texts, strict=True)]
        )


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM,
    problems: Sequence[Operands],
    num_samples: int,
    *,
    greedy: bool = False,
    batch_rows: int = 256,
) -> Samples:
    """Draws answers at temperature 1 with no truncation of the distribution, from torch's global generator."""
    policy.eval()
    texts: list[list[str]] = [[] for _ in problems]
    lengths: list[list[int]] = [[] for _ in problems]
    jobs = [index for index in range(len(problems)) for _ in range(num_samples)]
    for start in range(0, len(jobs), batch_rows):
        rows = jobs[start : start + batch_rows]
        for index, ids in zip(rows, _decode_rows(policy, [problems[i] for i in rows], greedy), strict=True):
            texts[index].append(decode(ids))
            lengths[index].append(len(ids))
    return Samples(list(problems), texts, np.array(lengths))


def _decode_rows(policy: LlamaForCausalLM, problems: Sequence[Operands], greedy: bool) -> list[list[int]]:
    """One answer to each problem, as token ids up to and including the end token."""
    prompts = [encode(prompt(operands)) for operands in problems]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[PAD_ID] * (width - len(ids)) + ids for ids in prompts])
    generator: Any = policy  # transformers' annotation of generate's self does not fit its own models
    outputs = generator.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != PAD_ID).long(),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    rows: list[list[int]] = outputs[:, width:].tolist()
    return [row[: row.index(EOS_ID) + 1] if EOS_ID in row else row for row in rows]


@torch.no_grad()
def closed_turn_scores(
    reward: LlamaForSequenceClassification,
    problems: Sequence[Operands],
    texts: Sequence[str],
    looks: Sequence[int] = (),
    batch_rows: int = 128,
) -> Floats:
    """(rows, looks + 1) rewards of the answers cut at each look and, last, of the whole answers.

    They are the scores at an end token behind each cut, as the runtime reads them; one pass tries all ends of a row
    (the mask of `reward_model.probe_mask` makes that the same as a pass for each).
    """
    scores = np.zeros((len(texts), len(looks) + 1))
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        questions = [encode(prompt(problems[index])) for index in chosen]
        answers = [encode(texts[index]) for index in chosen]
        width = max(len(q) + len(a) for q, a in zip(questions, answers, strict=True))
        ids, positions, cuts = [], [], []
        for q, a in zip(questions, answers, strict=True):
            ends = [len(q) + min(look, len(a)) for look in looks] + [len(q) + len(a)]
            ids.append(q + a + [PAD_ID] * (width - len(q) - len(a)) + [EOS_ID] * len(ends))
            positions.append([*range(width), *ends])
            cuts.append(ends)
        hidden = reward.model(
            input_ids=torch.tensor(ids),
            attention_mask=probe_mask(width, torch.tensor(cuts)),
            position_ids=torch.tensor(positions),
            use_cache=False,
        ).last_hidden_state[:, width:]
        scores[chosen] = reward.score(hidden)[..., 0].double().numpy()
    return scores


@dataclass(frozen=True)
class ScoredSamples:
    """Samples with their rewards at every look and at the end."""

    samples: Samples
    looks: tuple[int, ...]
    """Tokens decoded at each look."""
    partial: Floats
    """(P, N, L) reward of each answer cut at each look; a finished answer keeps its final reward."""
    final: Floats
    """(P, N)"""

    def at_looks(self, looks: Sequence[int]) -> "ScoredSamples":
        """The same samples, looked at less often."""
        columns = [self.looks.index(look) for look in looks]
        return ScoredSamples(self.samples, tuple(looks), self.partial[..., columns], self.final)


def score_samples(reward: LlamaForSequenceClassification, samples: Samples, looks: Sequence[int]) -> ScoredSamples:
    num_problems, num_samples = samples.num_tokens.shape
    problems = [xs for xs in samples.problems for _ in range(num_samples)]
    texts = [text for row in samples.texts for text in row]
    scores = closed_turn_scores(reward, problems, texts, looks).reshape(num_problems, num_samples, -1)
    return ScoredSamples(samples, tuple(looks), scores[..., :-1], scores[..., -1])


@dataclass(frozen=True)
class Selection:
    """What a strategy would have done with the first n samples of every problem."""

    correct: Bools
    """(P,)"""
    num_tokens: Ints
    """(P,) decoded tokens."""


def best_of_n(scored: ScoredSamples, num_rows: int, first: int = 0) -> Selection:
    """Best of the samples first .. first + num_rows."""
    rows = slice(first, first + num_rows)
    best = first + scored.final[:, rows].argmax(axis=1)
    correct = scored.samples.correct[np.arange(len(best)), best]
    return Selection(correct, scored.samples.num_tokens[:, rows].sum(axis=1))


def speculative_rejection(scored: ScoredSamples, num_rows: int, alpha: float = 0.5) -> Selection:
    """At every look, the best ceil((1 - alpha) * pool) of the pool (live rows) go on; finished rows are kept."""
    num_problems = len(scored.final)
    correct = np.zeros(num_problems, dtype=bool)
    spent = np.zeros(num_problems, dtype=np.int64)
    for index in range(num_problems):
        lengths = scored.samples.num_tokens[index]
        live = list(range(num_rows))
        finished: list[int] = []
        decoded = 0
        for column, look in enumerate(scored.looks):
            spent[index] += sum(min(int(lengths[row]), look) - decoded for row in live)
            decoded = look
            keep = len(live) - math.floor(alpha * len(live))
            ranked = sorted(live, key=lambda row: (-scored.partial[index, row, column], row))
            finished += [row for row in live if lengths[row] <= look]
            live = [row for row in ranked[:keep] if lengths[row] > look]
            if not live:
                break
        spent[index] += sum(int(lengths[row]) - decoded for row in live)
        best = max(finished + live, key=lambda row: (scored.final[index, row], -row))
        correct[index] = scored.samples.correct[index, best]
    return Selection(correct, spent)


def paired_difference(ours: Bools, theirs: Bools, seed: int = 0, resamples: int = 10_000) -> dict[str, float]:
    """Mean difference of two outcomes on the same problems, with its 95 % bootstrap interval."""
    difference = ours.astype(float) - theirs.astype(float)
    rng = np.random.default_rng(seed)
    means = difference[rng.integers(len(difference), size=(resamples, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high)}


def within_prompt_correlation(partial: Floats, final: Floats) -> float:
    """Mean over problems of the Pearson correlation between two (P, N) rewards; constant rows are left out."""
    values = []
    for early, late in zip(partial, final, strict=True):
        if early.std() > 0 and late.std() > 0:
            values.append(np.corrcoef(early, late)[0, 1])
    return float(np.mean(values))


def auc(scores: Floats, labels: Bools) -> float:
    """Probability that a random positive outscores a random negative."""
    ranks = scores.ravel().argsort().argsort()
    positive = labels.ravel()
    hits, misses = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - hits * (hits - 1) / 2) / max(1, hits * misses))


def majority(samples: Samples) -> Bools:
    """(P,) whether the most frequent answer is right; ties go to the one met first."""
    chosen = [Counter(answer_of(text) for text in row).most_common(1)[0][0] for row in samples.texts]
    return np.array([answer == sum(xs) for answer, xs in zip(chosen, samples.problems, strict=True)])


def proportion(values: Bools) -> dict[str, float]:
    """Mean of P outcomes (or of P rows of outcomes) and its standard error over problems."""
    per_problem = values.astype(float).reshape(len(values), -1).mean(axis=1)
    return {"value": float(per_problem.mean()), "se": float(per_problem.std(ddof=1) / math.sqrt(len(per_problem)))}


def summary(scored: ScoredSamples, greedy: Samples) -> dict[str, Any]:
    """The model card's table."""
    samples = scored.samples
    num_problems, num_samples = samples.num_tokens.shape
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= num_samples]
    errors = samples.first_error / np.maximum(1, samples.num_tokens - 1)
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "mean_tokens": float(samples.num_tokens.mean()),
        "pass@1": proportion(samples.correct),
        "exact_chain": proportion(samples.exact),
        "greedy": proportion(greedy.correct),
        f"majority@{num_samples}": proportion(majority(samples)),
        "best_of": {n: proportion(best_of_n(scored, n).correct) for n in sizes},
        "oracle": {n: proportion(np.any(samples.correct[:, :n], axis=1)) for n in sizes},
        "wrong_by": {share: float((errors < share).mean()) for share in (0.25, 0.5, 0.75, 1.0)},
        "auc_final_reward": {"correct": auc(scored.final, samples.correct), "exact": auc(scored.final, samples.exact)},
        "partial_reward": {
            look: {
                "within_prompt_correlation_with_final": within_prompt_correlation(
                    scored.partial[..., column], scored.final
                ),
                "auc_correct": auc(scored.partial[..., column], samples.correct),
                "auc_right_so_far": auc(
                    scored.partial[..., column], samples.first_error >= np.minimum(look, samples.num_tokens - 1)
                ),
            }
            for column, look in enumerate(scored.looks)
        },
    }


def simulated_rejection(scored: ScoredSamples, num_rows: int, alpha: float = 0.5) -> dict[str, Any]:
    """Speculative Rejection against Best-of-N: with the same rows, and with the same number of decoded tokens."""
    ours = speculative_rejection(scored, num_rows, alpha)
    same_rows = best_of_n(scored, num_rows)
    share = float(ours.num_tokens.sum() / same_rows.num_tokens.sum())
    equal = max(1, round(share * num_rows))
    same_tokens = best_of_n(scored, equal)
    return {
        "alpha": alpha,
        "rows": num_rows,
        "looks": list(scored.looks),
        "accuracy": proportion(ours.correct),
        "token_share": share,
        "best_of_same_rows": proportion(same_rows.correct),
        "minus_best_of_same_rows": paired_difference(ours.correct, same_rows.correct),
        "equal_token_rows": equal,
        "equal_token_share": float(same_tokens.num_tokens.sum() / same_rows.num_tokens.sum()),
        "best_of_equal_tokens": proportion(same_tokens.correct),
        "minus_best_of_equal_tokens": paired_difference(ours.correct, same_tokens.correct),
    }

"""Speculative Rejection as published, written fairly on transformers, against ours: same models, prompts, looks, cuts.

    python benchmarks/specrej_vs_reference.py --output specrej_vs_reference.json

64 rows of a prompt of about 311 tokens, looks at 32, 64 and 128 tokens, the better half of the rows kept at each;
SmolLM2-135M-Instruct, and as the reward model the same body with a scalar head of random weights.

The reference does what Algorithm 1 (arXiv 2410.20290) and its code (Zanette-Labs/SpeculativeRejection) do, without the
defects and slow spots of that code that are no part of the method: bfloat16, torch's sdpa, a KV cache within a round,
logits of the last position only, all rows scored in padded batches, no way over text and back between rounds, finished
rows archived once. As published, every round reads prompt and tokens of each row anew, rows that finish are decoded to
the round's end, and every look scores the whole text. The rule that cuts is ours for both, so that rows of both have
the same chance of being kept.

The ablation goes from the reference to ours, one thing at a time; the factors are medians of paired ratios. Each pair
has a prompt and a seed of its own. The rows of the two are drawn by different generators: their work is the same in
distribution, and so should the mean reward of the best row be, which is reported with its standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from bench import alternating, finish, header, load_model, parser, spread, table
from peers import TEMPERATURE, TOP_K
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, TopKLogitsWarper

import specrej_eval
from specrej_eval.engines.transformers.engine import TransformersEngine
from specrej_eval.kv.shared_prefix import cache_argument

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas")
THINGS = ("a lost key", "an old map", "a broken clock", "a letter without a sender", "a dog that speaks")
FACTS = (
    "The village lies between a river and a wood, and has one street with about forty houses. ",
    "In winter the road to the town is often closed for weeks, so people keep what they need in their cellars. ",
    "The miller has two daughters, of whom the younger one can name every bird by its song. ",
    "On the first Sunday of the month there is a market, where a stranger once sold a horse that was not his. ",
)


# the reference


@dataclass(frozen=True)
class Ways:
    """What the reference does otherwise than published, one thing after the other."""

    keeps_cache: bool = False
    """The KV of rows that go on is kept at a cut, not computed again."""
    reads_prompt_once: bool = False
    """The prompt is read once and its KV copied to all rows."""
    drops_finished: bool = False
    """Rows that finish leave the batch, every few steps."""


DROP_EVERY = 8
"""Steps between the checks of ``drops_finished``: each copies the whole cache, so doing it at once would cost more."""


class Reference:
    """Algorithm 1 on a transformers model.

    Args:
        eos_ids: tokens that end a row.
    """

    def __init__(
        self, model: Any, tokenizer: Any, reward: Any, reward_tokenizer: Any, eos_ids: tuple[int, ...], batch_rows: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.reward, self.reward_tokenizer = reward, reward_tokenizer
        self.eos = torch.tensor(eos_ids)
        self.batch_rows = batch_rows
        self.top_k = TopKLogitsWarper(TOP_K)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _clock(self, phase: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    @torch.inference_mode()
    def run(
        self,
        conversation: list[dict[str, str]],
        prompt: list[int],
        ways: Ways,
        *,
        n: int,
        looks: list[int],
        alpha: str,
        seed: int,
    ) -> dict[str, Any]:
        """One prompt; the best row's reward, and what was spent."""
        torch.manual_seed(seed)
        self.seconds = {}
        finished: dict[int, float] = {}
        rows = list(range(n))
        tokens = torch.empty(n, 0, dtype=torch.int64)  # (live rows, tokens so far)
        cache, logits = None, None
        decoded = 0
        for look in looks:
            with self._clock("prefill"):
                if cache is None or not ways.keeps_cache:
                    cache, logits = self._read(prompt, tokens, ways)
                else:  # what the round before sampled last has not been fed yet
                    logits = self._feed(tokens[:, -1:], cache)
            with self._clock("decode"):
                tokens, ended, cached, fed = self._decode(tokens, cache, logits, look, ways)
                decoded += fed
            with self._clock("reward"):
                whole = zip(tokens, ended, strict=True)
                scores = self.score(conversation, [self._text(row[: end + 1 or None]) for row, end in whole])
            # the rule: the best n - floor(alpha * n) of the round's pool stay, ties by row; who finished is archived
            pool = sorted(range(len(rows)), key=lambda place: (-scores[place], rows[place]))
            kept = pool[: len(pool) - math.floor(Fraction(alpha) * len(pool))]
            last = look == looks[-1]
            for place, end in enumerate(ended):
                if end >= 0 or last:
                    finished[rows[place]] = scores[place]
            live = sorted(place for place in kept if ended[place] < 0)
            if last or not live:
                break
            if ways.keeps_cache:
                with self._clock("prefill"):
                    cache.batch_select_indices(torch.tensor([cached.index(place) for place in live]))
            tokens, rows = tokens[torch.tensor(live)], [rows[place] for place in live]
        return {
            "reward": max(finished.values()),
            "tokens": decoded,
            "finished": len(finished),
            "phases": dict(self.seconds),
        }

    def _read(self, prompt: list[int], tokens: Tensor, ways: Ways) -> tuple[Any, Tensor]:
        """KV of prompt and tokens of every row, and the logits of the last, (rows, vocab)."""
        rows, cache = tokens.shape[0], DynamicCache(config=self.model.config)
        if ways.reads_prompt_once and not tokens.shape[1]:
            logits = self._feed(torch.tensor([prompt]), cache)
            cache.batch_repeat_interleave(rows)
            return cache, logits.expand(rows, -1)
        return cache, self._feed(torch.cat([torch.tensor(prompt).expand(rows, -1), tokens], 1), cache)

    def _feed(self, ids: Tensor, cache: Any) -> Tensor:
        out = self.model(ids, use_cache=True, logits_to_keep=1, **{cache_argument(self.model): cache})
        return out.logits[:, -1]

    def _sample(self, logits: Tensor) -> Tensor:
        """(rows, 1), as generate does."""
        scores = logits.float() / TEMPERATURE
        return torch.multinomial(torch.softmax(self.top_k(None, scores), -1), 1)

    def _decode(
        self, tokens: Tensor, cache: Any, logits: Tensor, look: int, ways: Ways
    ) -> tuple[Tensor, list[int], list[int], int]:
        """To the look: tokens (rows, look), where each row ended (-1: it has not), the rows whose KV the cache holds,
        and tokens decoded."""
        rows, start = tokens.shape
        out = torch.zeros(rows, look, dtype=torch.int64)
        out[:, :start] = tokens
        here = torch.arange(rows)  # rows in the batch
        ended = torch.full((rows,), -1)
        decoded = 0
        for step in range(start, look):
            drawn = self._sample(logits)
            decoded += len(here)
            out[here, step] = drawn[:, 0]
            ended[here] = torch.where(
                torch.isin(drawn[:, 0], self.eos) & (ended[here] < 0), torch.tensor(step), ended[here]
            )
            if step == look - 1:
                break
            if ways.drops_finished and step % DROP_EVERY == 0 and bool((ended[here] >= 0).any()):
                stay = (ended[here] < 0).nonzero()[:, 0]
                if not len(stay):
                    break
                cache.batch_select_indices(stay)
                here, drawn = here[stay], drawn[stay]
            elif bool((ended >= 0).all()):
                break
            logits = self._feed(drawn, cache)
        return out, ended.tolist(), here.tolist(), decoded

    def _text(self, ids: Tensor) -> str:
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    @torch.inference_mode()
    def score(self, conversation: list[dict[str, str]], texts: list[str]) -> list[float]:
        """Whole conversations, padded on the right; those of about one length together."""
        ids = [
            self.reward_tokenizer.apply_chat_template(
                [*conversation, {"role": "assistant", "content": text}], return_dict=True
            )["input_ids"]
            for text in texts
        ]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_rows):
            places = order[start : start + self.batch_rows]
            batch = self.reward_tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
            hidden = self.reward.model(**batch, use_cache=False).last_hidden_state
            at = torch.tensor([len(ids[place]) - 1 for place in places])
            for place, value in zip(places, self._head(hidden, at), strict=True):
                scores[place] = value
        return scores

    def _head(self, hidden: Tensor, at: Tensor) -> list[float]:
        """The head in float32 on each row's last token, as our reward models do: bfloat16 scores would tie."""
        last = hidden[torch.arange(len(at)), at].float()
        values: list[float] = (last @ self.reward.score.weight.float().T)[:, 0].tolist()
        return values


# models, prompts


def write_models(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    """Checkpoint folders of the language model and of a reward model on its body."""
    model, tokenizer = load_model(options.model, options.dtype, seed=options.seed)
    if not tokenizer.chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(options.seed)
    config = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1, "architectures": None})
    # an id of its own, so that whoever pools at the last token that is not padding finds the right one
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = "<|endoftext|>"
    config.pad_token_id = tokenizer.pad_token_id
    reward = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, options.dtype))
    reward.model.load_state_dict(model.model.state_dict())
    torch.nn.init.normal_(reward.score.weight, std=1 / math.sqrt(config.hidden_size))
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    return str(folder / "model"), str(folder / "reward")


def conversation_of(tokenizer: Any, pair: int, tokens: int) -> list[dict[str, str]]:
    """A request of about so many tokens, template included; another pair, another request from its first words on."""

    def request(sentences: int) -> list[dict[str, str]]:
        place = "".join(FACTS[(pair + number) % len(FACTS)] for number in range(sentences))
        head = f"Write a story about {NAMES[pair % len(NAMES)]} and {THINGS[pair % len(THINGS)]}. "
        return [{"role": "user", "content": f"{head}What is known: {place}Begin at once."}]

    def length(sentences: int) -> int:
        turns = tokenizer.apply_chat_template(request(sentences), return_dict=True, add_generation_prompt=True)
        return len(turns["input_ids"])

    count = 0
    while length(count + 1) <= tokens:
        count += 1
    return request(count)


# the variants


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rows", type=int, default=64)
    made.add_argument("--prompt_tokens", type=int, default=311)
    made.add_argument("--looks", type=int, nargs="+", default=[32, 64, 128], help="each twice the one before")
    made.add_argument("--batch_rows", type=int, default=64, help="rows that the reference scores at a time")
    made.add_argument("--no_ablation", action="store_true", help="only the reference and ours")
    made.add_argument(
        "--plain_arguments", default="{}",
        help="JSON: our arguments that switch off what else ours has (a compiled step); one more part of the ablation",
    )  # fmt: skip
    measure(made.parse_args())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    looks, alpha = options.looks, "0.5"
    if any(after != 2 * before for before, after in itertools.pairwise(looks)):
        sys.exit("--looks: with half of the rows kept, each look lies at twice the tokens of the one before")
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = header("specrej_vs_reference", options)
    result |= {"rows": options.rows, "looks": looks, "alpha": alpha}
    with tempfile.TemporaryDirectory() as name:
        model_folder, reward_folder = write_models(Path(name), options)
        variants = Variants(model_folder, reward_folder, alpha, options)
        result["largest_score_difference"] = variants.score_difference()
        print(f"largest difference of the two sides' scores of one text: {result['largest_score_difference']:.1e}")
        for name_, run in variants.runs.items():  # allocators, compilers
            print(f"  {name_} warms up: {run(-1)['seconds']:.1f} s", flush=True)
        for pair in range(options.pairs):
            result.setdefault("runs", []).extend(alternating(variants.runs, 1, first=pair))
            result |= compared(result["runs"])
            finish(result, markdown(result), options.output)
    return result


class Variants:
    """The reference, ours, and what lies between; ``runs`` in the order of the ablation."""

    def __init__(self, model_folder: str, reward_folder: str, alpha: str, options: argparse.Namespace) -> None:
        self.options = options
        common = {
            "pretrained": model_folder, "reward_model": reward_folder, "dtype": options.dtype,
            "reward_dtype": options.dtype, "device": "cpu", "strategy": "speculative_rejection", "alpha": float(alpha),
            "n": options.rows, "first_look": options.looks[0], "max_gen_toks": options.looks[-1],
            "temperature": TEMPERATURE, "top_k": TOP_K, "batch_size": 1,
        }  # fmt: skip
        plain = json.loads(options.plain_arguments)
        self.generator = specrej_eval.load(**common)
        engine = self.generator.engine
        dtype = getattr(torch, options.dtype)
        reward = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=dtype).eval()
        model, tokenizer = load_model(model_folder, options.dtype)
        self.reference = Reference(
            model, tokenizer, reward, AutoTokenizer.from_pretrained(reward_folder), engine.eos_ids, options.batch_rows
        )
        ways = {
            "reference": Ways(),
            "KV kept between rounds": Ways(keeps_cache=True),
            "prompt read once": Ways(keeps_cache=True, reads_prompt_once=True),
            "finished rows leave": Ways(keeps_cache=True, reads_prompt_once=True, drops_finished=True),
        }
        self.runs: dict[str, Callable[[int], dict[str, Any]]] = {}
        for name, way in ways.items():
            self.runs[name] = lambda pair, way=way: self._theirs(pair, way)
        # from here on our engine, with what is left switched off
        copied = specrej_eval.load(**common, **plain, reward_cache="off")
        copied.engine = TransformersEngine(copied.engine.model, copied.engine.tokenizer, path="replicated")
        shared = specrej_eval.load(**common, **plain, reward_cache="off")
        self.runs["our engine and sampler"] = lambda pair: self._ours(pair, copied)
        self.runs["attention over a shared prompt"] = lambda pair: self._ours(pair, shared)
        if plain:
            fast = specrej_eval.load(**common, reward_cache="off")
            self.runs[" ".join(["without", *(f"{key}={value}" for key, value in plain.items())])] = lambda pair: (
                self._ours(pair, fast)
            )
        self.runs["ours (scores only what is new)"] = lambda pair: self._ours(pair, self.generator)
        if options.no_ablation:
            self.runs = {name: run for name, run in self.runs.items() if name.startswith(("reference", "ours ("))}

    def _conversation(self, pair: int) -> list[dict[str, str]]:
        return conversation_of(self.reference.tokenizer, pair, self.options.prompt_tokens)

    def _theirs(self, pair: int, ways: Ways) -> dict[str, Any]:
        conversation = self._conversation(pair)
        prompt = self.generator.engine.encode(conversation)
        few = self._sizes(pair)
        started = time.perf_counter()
        found = self.reference.run(
            conversation,
            list(prompt.token_ids),
            ways,
            n=few[0],
            looks=few[1],
            alpha="0.5",
            seed=self.options.seed + pair,
        )
        return {"seconds": time.perf_counter() - started, **found}

    def _sizes(self, pair: int) -> tuple[int, list[int]]:
        """All of it, or a little for warming up."""
        rows, looks = self.options.rows, list(self.options.looks)
        return (rows, looks) if pair >= 0 else (max(4, rows // 8), [2 << place for place in range(len(looks))])

    def _ours(self, pair: int, generator: Any) -> dict[str, Any]:
        conversation = self._conversation(pair)
        rows, looks = self._sizes(pair)
        config = generator.config
        if pair < 0:
            generator.config = config.replace(n=rows, first_look=looks[0], max_gen_toks=looks[-1])
        try:
            started = time.perf_counter()
            result = generator.generate([conversation], seed=max(0, self.options.seed + pair))[0]
            seconds = time.perf_counter() - started
        finally:
            generator.config = config
        return {
            "seconds": seconds,
            "reward": result.best.reward,
            "tokens": result.ledger.decode_tokens,
            "finished": result.ledger.rows_finished,
            "phases": dict(result.ledger.seconds),
        }

    def score_difference(self) -> float:
        """Of the scores that both sides give to the same texts."""
        conversation = self._conversation(0)
        result = self.generator.generate([conversation], max_gen_toks=self.options.looks[-1])[0]
        rows = [row for row in result.trajectories if row.finish_reason != "rejected"][:8]
        theirs = self.reference.score(conversation, [row.text for row in rows])
        return max(abs(row.reward - score) for row, score in zip(rows, theirs, strict=True) if row.reward is not None)


def compared(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Seconds, factors from each variant to the next, their product against the whole, and rewards."""
    names = list(runs[0])
    found: dict[str, Any] = {"variants": {}}
    product = 1.0
    for before, name in zip([None, *names], names, strict=False):
        mine = [pair[name] for pair in runs]
        entry: dict[str, Any] = {
            "seconds": spread(one["seconds"] for one in mine),
            "tokens": statistics.mean(one["tokens"] for one in mine),
            "finished": statistics.mean(one["finished"] for one in mine),
            "reward": statistics.mean(one["reward"] for one in mine),
            "phases": {phase: statistics.median(one["phases"].get(phase, 0.0) for one in mine) for phase in PHASES},
        }
        if before is not None:
            factor = spread(pair[before]["seconds"] / pair[name]["seconds"] for pair in runs)
            entry["factor"] = factor
            product *= factor["median"]
        found["variants"][name] = entry
    first, last = names[0], names[-1]
    total = spread(pair[first]["seconds"] / pair[last]["seconds"] for pair in runs)
    differences = [pair[last]["reward"] - pair[first]["reward"] for pair in runs]
    found |= {
        "ours_over_reference": total,
        "product_of_factors": product,
        "product_over_total": product / total["median"],
        "reward_difference": statistics.mean(differences),
        "reward_difference_se": statistics.stdev(differences) / math.sqrt(len(differences)) if len(runs) > 1 else None,
    }
    return found


PHASES = ("prefill", "decode", "reward")


def markdown(result: dict[str, Any]) -> str:
    lines = []
    for name, found in result["variants"].items():
        factor = found.get("factor")
        told = f"{factor['median']:.2f} ({factor['min']:.2f} to {factor['max']:.2f})" if factor else None
        phases = [found["phases"][phase] for phase in PHASES]
        lines.append(
            [name, found["seconds"]["median"], told, *phases, found["tokens"], found["finished"], found["reward"]]
        )
    headers = [
        "each as the one before, and", "seconds", "times as fast", "prefill, s", "decode, s", "scoring, s", "tokens",
        "rows finished", "best reward",
    ]  # fmt: skip
    total = result["ours_over_reference"]
    told = f"{result['rows']} rows, looks at {result['looks']}. Ours is {total['median']:.2f} times as fast as the "
    told += f"reference ({total['min']:.2f} to {total['max']:.2f}); the factors multiply to "
    told += (
        f"{result['product_of_factors']:.2f}, {100 * (result['product_over_total'] - 1):+.0f} %. Reward of the best "
    )
    se = result["reward_difference_se"]
    told += f"row, ours less the reference's: {result['reward_difference']:+.3f}" + (f" ± {se:.3f}." if se else ".")
    return f"{told}\n\n{table(headers, lines)}"


if __name__ == "__main__":
    main()

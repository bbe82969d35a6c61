"""Trains the reward model: is the answer so far still a prefix of the right worked solution?

It starts from the fully trained language model with fresh layers on top, which begin as the identity. What it learns:

- at every token of an answer, whether everything up to it is right (main task; labels from the rule, not from a model);
- at an end token after any prefix, the same: this is what the runtime reads, since it scores a closed turn. Several
  such ends ("probes") are tried in one pass: they are appended to the row, each with the position of the token it
  replaces and an attention mask under which it sees the prefix only, which is the same as a pass of its own;
- at every token, whether it is right given what was written before it, read out after the second fresh layer. This is
  where slips are found; the last layer only has to remember them. On the way, the first fresh layer learns to hold
  ready the token that the language model had expected here.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from arithmetic import (
    Operands,
    noise,
    num_correct_chars,
    problems,
    prompt,
    right_chars,
    slip,
    solution,
)
from tokenizer import EOS_ID, MAX_LENGTH, PAD_ID, VOCAB_SIZE, encode
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

RESIDUAL_SCALE = 1 / 16
EMBEDDING_RMS, SIDE_RMS = 0.09, 0.3
"""Root mean squares of the embedding's channels, in the language model's units (its residual stream grows to 60)."""
SIDE_GAIN = 200.0
"""Weights of the fresh layers' norms on the side channels, which brings them to the size of the others."""
NUM_PREVIOUS_TOKEN_HEADS = 2
PREVIOUS_TOKEN_SHARPNESS = 6.0
NUM_SLIP_HEADS = 2
SLIP_ATTENTION_GAP = 14.0
"""By how much, before the softmax, a wrong token attracts the slip heads' attention more than a right one."""
SLIP_BALANCE = 64.0
LOCAL_SCALE = 2.0
"""Logit per unit of a token's component along the direction that tells right from wrong."""


@dataclass(frozen=True)
class RewardModelArgs:
    num_fresh_layers: int = 3
    num_side_channels: int = 48
    num_finding_steps: int = 220
    """First phase: the first two fresh layers learn to tell right tokens from wrong ones."""
    num_remembering_steps: int = 200
    """Second phase: the last layer learns to remember, at every later token, that there was a wrong one."""
    shortest_limit: int = 30
    """Characters of every answer that the first step sees; short answers are learnt from sooner and faster."""
    limit_growth: float = 0.6
    """Characters by which that limit grows per step of the first phase."""
    batch_size: int = 48
    num_probes: int = 8
    """End tokens tried per row; one of them is always at the end of the answer."""
    finding_muon_lr: float = 0.01
    finding_adamw_lr: float = 2e-3
    later_share: float = 0.2
    """Share of these learning rates that the first two fresh layers have in the second phase."""
    remembering_lr: float = 1e-3
    score_lr: float = 1e-2
    policy_share: float = 0.5
    """Share of training answers sampled from the policy's snapshots; the others are made up."""
    right_share: float = 0.2
    """Share of right solutions among the made-up answers."""
    noise_share: float = 0.2
    """Share of solutions with many random digits among the made-up answers."""
    local_error_weight: float = 5.0
    """How much more a wrong token counts in the local task (few tokens are wrong)."""


@dataclass(frozen=True)
class RewardBatch:
    """B answers, T tokens wide, with R probes each; W = T + R."""

    input_ids: Tensor
    """(B, W)"""
    position_ids: Tensor
    """(B, W)"""
    attention_mask: Tensor
    """(B, 1, W, W) True where a query (row) may look at a key (column)."""
    labels: Tensor
    """(B, W) 1 = right so far, 0 = not, -1 = no label."""
    local_labels: Tensor
    """(B, W) the same for each token given what was written before it."""
    width: int
    """T"""


def reward_batch(answers: list[tuple[Operands, str]], num_probes: int, rng: random.Random) -> RewardBatch:
    questions = [encode(prompt(operands)) for operands, _ in answers]
    responses = [encode(text) for _, text in answers]
    width = max(len(q) + len(r) for q, r in zip(questions, responses, strict=True))
    ids, positions, labels, local_labels, cuts = [], [], [], [], []
    for (operands, text), q, r in zip(answers, questions, responses, strict=True):
        good = num_correct_chars(operands, text)
        ends = [len(r)] + [rng.randint(1, len(r)) for _ in range(num_probes - 1)]
        padding = width - len(q) - len(r)
        ids.append(q + r + [PAD_ID] * padding + [EOS_ID] * num_probes)
        positions.append([*range(width), *(len(q) + end for end in ends)])
        labels.append(
            [-1] * len(q)
            + [int(place < good) for place in range(len(r))]
            + [-1] * padding
            + [int(end <= good) for end in ends]
        )
        # Question and end tokens count as right: the heads that look for slips see them too.
        marks = [int(right) for right in right_chars(operands, text)]
        local_labels.append([1] * len(q) + marks + [-1] * padding + [1] * num_probes)
        cuts.append([len(q) + end for end in ends])
    return RewardBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        attention_mask=probe_mask(width, torch.tensor(cuts)),
        labels=torch.tensor(labels),
        local_labels=torch.tensor(local_labels),
        width=width,
    )


def probe_mask(width: int, cuts: Tensor) -> Tensor:
    """Causal over the first `width` places; probe r of row b sees the places before cuts[b, r], and itself."""
    batch, num_probes = cuts.shape
    total = width + num_probes
    mask = torch.zeros(batch, total, total, dtype=torch.bool)
    mask[:, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril()
    mask[:, width:, :width] = torch.arange(width) < cuts[:, :, None]
    mask[:, width:, width:] = torch.eye(num_probes, dtype=torch.bool)
    return mask[:, None]


def new_reward_model(language_model: LlamaForCausalLM, args: RewardModelArgs) -> LlamaForSequenceClassification:
    """The language model's layers, then fresh ones whose residual outputs start at zero, then a head at zero.

    Two things make it easy for the fresh layers to hold what the language model expected against what was written:

    - The model is wider than the language model by a few channels that the old layers neither read nor write: the
      embedding puts a random code of the token there, and a constant. Above the language model's layers, hardly
      anything else is left of the token itself. (The fresh layers learn to write there very large numbers, which
      evens out the size of the residual stream: compute the reward model in float32 or bfloat16, not in float16.)
    - Two heads of the first fresh layer start out looking at the previous token, which holds the expectation.

    Up to a per mille or so the old layers compute what they did: the new channels are faint, and scaling the whole
    residual stream (it has grown so large that fresh layers would hardly be heard above it) does not change what
    RMSNorm makes of it.
    """
    old_config = language_model.config
    main, old_layers = int(old_config.hidden_size), int(old_config.num_hidden_layers)
    width = main + args.num_side_channels
    fields = old_config.to_dict()
    for name in ("architectures", "dtype", "id2label", "label2id", "transformers_version"):
        fields.pop(name, None)
    fields.update(
        hidden_size=width,
        num_hidden_layers=old_layers + args.num_fresh_layers,
        num_labels=1,
        rms_norm_eps=old_config.rms_norm_eps * RESIDUAL_SCALE**2 * main / width,
    )
    model = LlamaForSequenceClassification(LlamaConfig.from_dict(fields))
    head_dim = main // int(old_config.num_attention_heads)
    with torch.no_grad():
        for name, new in model.model.named_parameters():
            if name.startswith("layers.") and int(name.split(".")[1]) >= old_layers:
                continue
            old = language_model.model.get_parameter(name)
            if name.endswith("norm.weight"):
                new.zero_()
                new[:main] = old * (main / width) ** 0.5
            elif name == "embed_tokens.weight":
                codes = torch.randn(len(old), args.num_side_channels)
                codes[:, -1] = 1.0
                new[:, :main] = F.rms_norm(old, (main,)) * EMBEDDING_RMS * RESIDUAL_SCALE
                new[:, main:] = F.rms_norm(codes, (args.num_side_channels,)) * SIDE_RMS * RESIDUAL_SCALE
            else:
                new.zero_()
                new[: old.shape[0], : old.shape[1]] = old
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                new *= RESIDUAL_SCALE
        first_norm = model.model.layers[0].input_layernorm.weight
        first_norm *= (1 + (args.num_side_channels / main) * (SIDE_RMS / EMBEDDING_RMS) ** 2) ** 0.5
        model.model.norm.weight[main:] = 0.0
        for layer in model.model.layers[old_layers:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[main:] = SIDE_GAIN
        query, key = _previous_token_head(head_dim)
        attention = model.model.layers[old_layers].self_attn
        for head in range(NUM_PREVIOUS_TOKEN_HEADS):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            attention.q_proj.weight[rows] = 0.0
            attention.k_proj.weight[rows] = 0.0
            attention.q_proj.weight[rows, -1] = query
            attention.k_proj.weight[rows, -1] = key
        model.score.weight.zero_()
    return model


def _previous_token_head(head_dim: int, theta: float = 10_000.0, num_frequencies: int = 6) -> tuple[Tensor, Tensor]:
    """A constant query and key, (head_dim,) each, whose product under rotary embedding peaks one token back."""
    half = head_dim // 2
    angles = theta ** (-torch.arange(num_frequencies) / half)
    query, key = torch.zeros(head_dim), torch.zeros(head_dim)
    query[:num_frequencies] = PREVIOUS_TOKEN_SHARPNESS
    key[:num_frequencies] = PREVIOUS_TOKEN_SHARPNESS * angles.cos()
    key[half : half + num_frequencies] = PREVIOUS_TOKEN_SHARPNESS * angles.sin()
    return query, key


def made_up_answers(rng: random.Random, args: RewardModelArgs) -> Iterator[tuple[Operands, str]]:
    """Training problems with right solutions, with solutions with one slip, or with noisy ones."""
    for operands in problems("train", rng):
        kind = rng.random()
        if kind < args.right_share:
            yield operands, solution(operands)
        elif kind < args.right_share + args.noise_share:
            yield operands, noise(operands, rng)
        else:
            yield operands, slip(operands, rng)


def train_reward_model(
    args: RewardModelArgs, language_model: LlamaForCausalLM, policy_answers: list[tuple[Operands, str]], seed: int
) -> LlamaForSequenceClassification:
    """Two phases, since to remember slips can be learnt only once they are found.

    The language model's own layers stay as they are.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    language_model.requires_grad_(False)
    training = _RewardTraining(new_reward_model(language_model, args), language_model, args)
    made_up = made_up_answers(rng, args)
    num_from_policy = round(args.policy_share * args.batch_size)

    def next_batch(longest: int) -> RewardBatch:
        answers = rng.sample(policy_answers, num_from_policy)
        answers += [next(made_up) for _ in range(args.batch_size - num_from_policy)]
        return reward_batch([(operands, text[:longest]) for operands, text in answers], args.num_probes, rng)

    for step in range(args.num_finding_steps):
        scale = max(args.later_share, _lr_scale(step, args.num_finding_steps))
        longest = round(args.shortest_limit + args.limit_growth * step)
        training.step(next_batch(longest), scale if step >= 15 else (step + 1) / 15, remembering=False)
    training.place_slip_heads(next_batch(MAX_LENGTH))
    for step in range(args.num_remembering_steps):
        training.step(next_batch(MAX_LENGTH), _lr_scale(step, args.num_remembering_steps), remembering=True)
    training.balance_slip_heads()
    training.model.eval()
    return training.model


def _lr_scale(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / 15) * max(0.03, min(1.0, 2 * (num_steps - step) / num_steps))


class _RewardTraining:
    """The reward model with the heads and optimizers that only its training needs."""

    def __init__(
        self, model: LlamaForSequenceClassification, language_model: LlamaForCausalLM, args: RewardModelArgs
    ) -> None:
        self.model, self.language_model, self.args = model, language_model, args
        self.main = int(language_model.config.hidden_size)
        old_layers = int(language_model.config.num_hidden_layers)
        self.fresh = model.model.layers[old_layers:]
        width = self.main + args.num_side_channels
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[:old_layers].requires_grad_(False)
        self.expected_head = torch.nn.Linear(width, VOCAB_SIZE)
        self.direction, self.verdict = torch.zeros(width), torch.zeros(width)
        """Along `direction`, tokens are told right (positive) from wrong; `verdict` is where slip heads write."""
        self.direction[: self.main] = F.normalize(torch.randn(self.main), dim=0)
        self.verdict[: self.main] = F.normalize(torch.randn(self.main), dim=0)
        finding = list(self.fresh[:-1].parameters())
        remembering = [*self.fresh[-1].parameters(), model.model.norm.weight]
        self.muon = torch.optim.Muon(
            [p for p in finding if p.ndim == 2], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        vectors = [p for p in finding if p.ndim < 2]
        self.adamw = _adamw([*vectors, *self.expected_head.parameters()])
        self.remembering = _adamw(remembering)
        self.score = _adamw([model.score.weight])
        self.outputs: dict[int, Tensor] = {}
        for place, layer in enumerate(self.fresh):
            layer.register_forward_hook(lambda _, inputs, output, place=place: self.outputs.update({place: output}))
        self.fresh[0].register_forward_pre_hook(lambda _, inputs: self.outputs.update({-1: inputs[0]}))
        self.num_steps = 0

    def step(self, batch: RewardBatch, lr_scale: float, remembering: bool) -> None:
        args = self.args
        share = args.later_share if remembering else 1.0
        rates = {
            self.muon: args.finding_muon_lr * share,
            self.adamw: args.finding_adamw_lr * share,
            self.remembering: args.remembering_lr * remembering,
            self.score: args.score_lr * remembering,
        }
        scores = self.model.score(self._hidden(batch))[..., 0]
        loss_tokens = _bce(scores[:, : batch.width], batch.labels[:, : batch.width])
        loss_probes = _bce(scores[:, batch.width :], batch.labels[:, batch.width :])
        local_scores = LOCAL_SCALE * _norm(self._found()) @ self.direction
        loss_local = _bce(local_scores, batch.local_labels, args.local_error_weight)
        loss_expected = self._loss_expected(batch)
        loss = loss_local + loss_expected
        if remembering:
            loss = loss + loss_tokens + loss_probes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_scale
            if rate:
                optimizer.step()
            optimizer.zero_grad()
        if self.num_steps % 10 == 0:
            wrong, right = batch.local_labels == 0, batch.local_labels == 1
            probes = (scores > 0)[:, batch.width :] == (batch.labels == 1)[:, batch.width :]
            print(
                f"reward model step {self.num_steps}: tokens {loss_tokens.item():.4f} probes {loss_probes.item():.4f} "
                f"local {loss_local.item():.4f} expected {loss_expected.item():.4f}, wrong tokens found "
                f"{(local_scores < 0)[wrong].float().mean().item():.3f}, right ones kept "
                f"{(local_scores > 0)[right].float().mean().item():.4f}, probes {probes.float().mean().item():.3f}",
                flush=True,
            )
        self.num_steps += 1

    @torch.no_grad()
    def place_slip_heads(self, batch: RewardBatch) -> None:
        """Makes the last layer, until now the identity, and the score attend to wrong tokens.

        From uniform attention, one slip among a hundred tokens would hardly be noticed. The heads use the slowest
        rotary frequency, so that distance does not matter; sharpness and loudness are fitted to the batch.
        """
        self._hidden(batch)
        found = self._found()
        layer = self.fresh[-1]
        attention, head_dim = layer.self_attn, layer.self_attn.head_dim
        read = layer.input_layernorm(found)
        along = read @ self.direction
        in_answer = batch.labels >= 0
        gap = (along[in_answer & (batch.local_labels == 1)].median() - along[batch.local_labels == 0].median()).item()
        constant = read[:, batch.width :, -1].median().item()
        loudness = found[:, batch.width :].pow(2).mean(-1).sqrt().median().item()
        sharpness = (SLIP_ATTENTION_GAP * head_dim**0.5 / (gap * abs(constant))) ** 0.5
        print(f"slip heads: gap {gap:.2f}, constant {constant:.2f}, loudness {loudness:.2f}", flush=True)
        rows = slice(0, NUM_SLIP_HEADS * head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[rows] = 0.0
        for head in range(NUM_SLIP_HEADS):
            slowest = head * head_dim + head_dim // 2 - 1
            attention.q_proj.weight[slowest, -1] = math.copysign(sharpness, constant)
            attention.k_proj.weight[slowest] = -sharpness * self.direction
            attention.v_proj.weight[head * head_dim] = self.direction
            attention.o_proj.weight[:, head * head_dim] = loudness * self.verdict
        self.model.score.weight[0] = 6 / gap * self.verdict

    @torch.no_grad()
    def balance_slip_heads(self) -> None:
        """Moves a power of two from the slip heads' outputs to their values, so that half precision holds both."""
        attention = self.fresh[-1].self_attn
        for head in range(NUM_SLIP_HEADS):
            attention.v_proj.weight[head * attention.head_dim] *= SLIP_BALANCE
            attention.o_proj.weight[:, head * attention.head_dim] /= SLIP_BALANCE

    def _hidden(self, batch: RewardBatch) -> Tensor:
        hidden: Tensor = self.model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return hidden

    def _found(self) -> Tensor:
        """(B, W, hidden) what the last layer reads."""
        return self.outputs[len(self.fresh) - 2]

    def _loss_expected(self, batch: RewardBatch) -> Tensor:
        """Can the token that the language model expected be read where the written one stands?"""
        top = _norm(self.outputs[-1][:, : batch.width - 1, : self.main]) * self.language_model.model.norm.weight
        expected = self.language_model.lm_head(top).argmax(-1)
        where = batch.labels[:, 1 : batch.width] >= 0
        guesses = self.expected_head(_norm(self.outputs[0][:, 1 : batch.width]))[where]
        written = batch.input_ids[:, 1 : batch.width][where]
        weight = torch.where(written == expected[where], 1.0, self.args.local_error_weight)
        return (F.cross_entropy(guesses, expected[where], reduction="none") * weight).mean()


def _adamw(parameters: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)


def _norm(hidden: Tensor) -> Tensor:
    """RMSNorm without a weight."""
    return F.rms_norm(hidden, hidden.shape[-1:])


def _bce(scores: Tensor, labels: Tensor, error_weight: float = 1.0) -> Tensor:
    """Mean binary cross-entropy where there is a label (not -1)."""
    where = labels >= 0
    targets = labels[where].float()
    weight = torch.where(targets == 1, 1.0, error_weight)
    return F.binary_cross_entropy_with_logits(scores[where], targets, weight)

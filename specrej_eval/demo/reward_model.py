"""Trains the reward model: is the answer so far still a prefix of the right worked solution?

It starts from the fully trained language model with fresh layers on top, which begin as the identity. What it learns:

- at every token of an answer, whether everything up to it is right (main task; labels from the rule, not from a model);
- at an end token after any prefix, the same: this is what the runtime reads, since it scores a closed turn. Several
  such ends ("probes") are tried in one pass: they are appended to the row, each with the position of the token it
  replaces and an attention mask under which it sees the prefix only, which is the same as a pass of its own;
- while the language model's own layers are frozen: whether each token is the one that the language model would have
  written (auxiliary task, read out after the first fresh layer).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from specrej_eval.demo.arithmetic import Operands, num_correct_chars, problems, prompt, slip, solution
from specrej_eval.demo.tokenizer import EOS_ID, PAD_ID, encode


@dataclass(frozen=True)
class RewardModelArgs:
    num_fresh_layers: int = 2
    num_steps: int = 500
    num_frozen_steps: int = 300
    """First steps, in which only the fresh layers learn."""
    batch_size: int = 64
    num_probes: int = 8
    """End tokens tried per row; one of them is always at the end of the answer."""
    fresh_muon_lr: float = 0.01
    old_muon_lr: float = 0.002
    adamw_lr: float = 2e-3
    policy_share: float = 0.5
    """Share of training answers sampled from the policy's snapshots; the others are made up."""
    right_share: float = 0.2
    """Share of right solutions among the made-up answers."""
    auxiliary_weight: float = 1.0


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
    width: int
    """T"""


def reward_batch(answers: list[tuple[Operands, str]], num_probes: int, rng: random.Random) -> RewardBatch:
    questions = [encode(prompt(operands)) for operands, _ in answers]
    responses = [encode(text) for _, text in answers]
    width = max(len(q) + len(r) for q, r in zip(questions, responses, strict=True))
    ids, positions, labels, cuts = [], [], [], []
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
        cuts.append([len(q) + end for end in ends])
    return RewardBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        attention_mask=_mask(width, torch.tensor(cuts)),
        labels=torch.tensor(labels),
        width=width,
    )


def _mask(width: int, cuts: Tensor) -> Tensor:
    """Causal over the first `width` places; probe r of row b sees the places before cuts[b, r], and itself."""
    batch, num_probes = cuts.shape
    total = width + num_probes
    mask = torch.zeros(batch, total, total, dtype=torch.bool)
    mask[:, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril()
    mask[:, width:, :width] = torch.arange(width) < cuts[:, :, None]
    mask[:, width:, width:] = torch.eye(num_probes, dtype=torch.bool)
    return mask[:, None]


def new_reward_model(language_model: LlamaForCausalLM, num_fresh_layers: int) -> LlamaForSequenceClassification:
    """The language model's layers, then fresh ones whose residual outputs start at zero, then a head at zero."""
    old_layers = int(language_model.config.num_hidden_layers)
    fields = language_model.config.to_dict()
    fields.update(num_hidden_layers=old_layers + num_fresh_layers, num_labels=1)
    for name in ("architectures", "dtype", "id2label", "label2id", "transformers_version"):
        fields.pop(name, None)
    model = LlamaForSequenceClassification(LlamaConfig.from_dict(fields))
    model.model.load_state_dict(language_model.model.state_dict(), strict=False)
    for layer in model.model.layers[old_layers:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.zeros_(model.score.weight)
    return model


def made_up_answers(rng: random.Random, right_share: float) -> Iterator[tuple[Operands, str]]:
    """Training problems with right solutions, or solutions with one slip."""
    for operands in problems("train", rng):
        right = rng.random() < right_share
        yield operands, solution(operands) if right else slip(operands, rng)


def train_reward_model(
    args: RewardModelArgs, language_model: LlamaForCausalLM, policy_answers: list[tuple[Operands, str]], seed: int
) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_reward_model(language_model, args.num_fresh_layers)
    old_layers = int(language_model.config.num_hidden_layers)
    old, fresh = model.model.layers[:old_layers], model.model.layers[old_layers:]
    auxiliary_head = torch.nn.Linear(model.config.hidden_size, 1)
    small = [p for p in fresh.parameters() if p.ndim < 2] + [model.model.norm.weight, model.score.weight]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (_muon([p for p in fresh.parameters() if p.ndim == 2]), args.fresh_muon_lr),
        (torch.optim.AdamW([*small, *auxiliary_head.parameters()], betas=(0.9, 0.98), weight_decay=0.0), args.adamw_lr),
        (_muon([p for p in old.parameters() if p.ndim == 2]), args.old_muon_lr),
    ]
    for parameter in language_model.parameters():
        parameter.requires_grad_(False)
    made_up = made_up_answers(rng, args.right_share)
    num_from_policy = round(args.policy_share * args.batch_size)
    first_fresh: list[Tensor] = []
    top_old: list[Tensor] = []
    fresh[0].register_forward_pre_hook(lambda _, inputs: top_old.append(inputs[0]))
    fresh[0].register_forward_hook(lambda _, __, output: first_fresh.append(output))
    for step in range(args.num_steps):
        frozen = step < args.num_frozen_steps
        model.model.embed_tokens.weight.requires_grad_(False)
        old.requires_grad_(not frozen)
        scale = min(1.0, (step + 1) / 20) * max(0.03, min(1.0, (args.num_steps - step) / (0.5 * args.num_steps)))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
        answers = rng.sample(policy_answers, num_from_policy)
        answers += [next(made_up) for _ in range(args.batch_size - num_from_policy)]
        batch = reward_batch(answers, args.num_probes, rng)
        first_fresh.clear()
        top_old.clear()
        hidden = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        scores = model.score(hidden)[..., 0]
        labelled = batch.labels >= 0
        probes = labelled.clone()
        probes[:, : batch.width] = False
        tokens = labelled & ~probes
        loss_tokens = _bce(scores[tokens], batch.labels[tokens])
        loss_probes = _bce(scores[probes], batch.labels[probes])
        loss = loss_tokens + loss_probes
        auxiliary = torch.zeros(())
        if frozen:
            with torch.no_grad():
                logits = language_model.lm_head(language_model.model.norm(top_old[0][:, : batch.width - 1]))
                agrees = (logits.argmax(-1) == batch.input_ids[:, 1 : batch.width]).long()
            where = tokens[:, 1 : batch.width]
            read_out = auxiliary_head(first_fresh[0][:, 1 : batch.width])[..., 0]
            auxiliary = _bce(read_out[where], agrees[where])
            loss = loss + args.auxiliary_weight * auxiliary
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == args.num_steps - 1:
            print(
                f"reward model step {step}: tokens {loss_tokens.item():.4f} probes {loss_probes.item():.4f} "
                f"auxiliary {auxiliary.item():.4f}",
                flush=True,
            )
    model.eval()
    return model


def _muon(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


def _bce(scores: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, labels.float())

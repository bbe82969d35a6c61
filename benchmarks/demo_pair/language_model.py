"""Trains the language model on worked sums; the policy is an early snapshot of it, the verifier grows from its end."""

import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from arithmetic import Operands, prompt, solution, training_batches
from measure import sample
from tokenizer import EOS_ID, MAX_LENGTH, PAD_ID, VOCAB_SIZE, encode
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class LanguageModelArgs:
    hidden_size: int = 144
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 432
    num_steps: int = 500
    batch_size: int = 64
    warmup_steps: int = 50
    decay_from: float = 0.7
    """Share of the steps after which the learning rate falls linearly, to `final_lr_share` of its peak."""
    final_lr_share: float = 0.03
    muon_lr: float = 0.01
    adamw_lr: float = 3e-3
    short_share: float = 0.15
    """Share of batches whose problems have fewer operands than the benchmark's."""
    look_every: int = 10
    """Steps between two measurements on the selection problems, once the loss is below `look_below_loss`."""
    look_below_loss: float = 0.08
    num_further_steps: int = 240
    """Steps after the snapshots, with a learning rate that starts anew at `further_lr_share` and falls to nothing."""
    further_lr_share: float = 0.4
    stop_looking_above: float = 0.7
    """pass@1 on the selection problems above which no more snapshots are taken."""


@dataclass(frozen=True)
class Snapshot:
    step: int
    pass_at_1: float
    """On the selection problems."""
    weights: StateDict = field(repr=False)


def new_language_model(args: LanguageModelArgs) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        intermediate_size=args.intermediate_size,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def language_model_batch(batch: list[Operands]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and the targets (B, T) of the response tokens (-100 elsewhere)."""
    rows: list[list[int]] = []
    targets: list[list[int]] = []
    for operands in batch:
        question, answer = encode(prompt(operands)), [*encode(solution(operands)), EOS_ID]
        rows.append(question + answer)
        targets.append([-100] * len(question) + answer)
    width = max(map(len, rows))
    return (
        torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows]),
        torch.tensor([row + [-100] * (width - len(row)) for row in targets]),
    )


def train_language_model(
    args: LanguageModelArgs, selection: list[Operands], samples_per_problem: int, seed: int
) -> tuple[LlamaForCausalLM, list[Snapshot]]:
    """The fully trained model and the snapshots taken on the way."""
    torch.manual_seed(seed)
    model = new_language_model(args)
    optimizers = _optimizers(model, args)
    batches = training_batches(random.Random(seed), args.batch_size, args.short_share)
    snapshots: list[Snapshot] = []
    looking = True
    for step in range(args.num_steps):
        loss = _step(model, optimizers, next(batches), _lr_scale(step, args))
        if step % 20 == 0:
            print(f"language model step {step}: loss {loss:.4f}", flush=True)
        if looking and (step + 1) % args.look_every == 0 and loss < args.look_below_loss:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                pass_at_1 = float(sample(model, selection, samples_per_problem).correct.mean())
            model.train()
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            snapshots.append(Snapshot(step + 1, pass_at_1, weights))
            print(f"  snapshot at step {step + 1}: pass@1 {pass_at_1:.3f}", flush=True)
            looking = pass_at_1 < args.stop_looking_above
    model.eval()
    return model, snapshots


def train_further(args: LanguageModelArgs, model: LlamaForCausalLM, seed: int) -> None:
    """Trains the model, in place, into the strong one that the reward model grows from."""
    model.train()
    optimizers = _optimizers(model, args)
    batches = training_batches(random.Random(seed), args.batch_size, args.short_share)
    for step in range(args.num_further_steps):
        left = (args.num_further_steps - step) / args.num_further_steps
        loss = _step(model, optimizers, next(batches), args.further_lr_share * min((step + 1) / 20, left))
        if step % 20 == 0:
            print(f"language model further step {step}: loss {loss:.4f}", flush=True)
    model.eval()


def _optimizers(model: LlamaForCausalLM, args: LanguageModelArgs) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak learning rates: Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("model.layers")]
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    return [
        (torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), args.muon_lr),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), args.adamw_lr),
    ]


def _step(
    model: LlamaForCausalLM,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    batch: list[Operands],
    lr_scale: float,
) -> float:
    """One optimisation step; returns the loss (nats per response token)."""
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * lr_scale
    input_ids, targets = language_model_batch(batch)
    logits = model(input_ids=input_ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, _ in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _lr_scale(step: int, args: LanguageModelArgs) -> float:
    warm = min(1.0, (step + 1) / args.warmup_steps)
    left = (args.num_steps - step) / (args.num_steps * (1 - args.decay_from))
    return warm * max(args.final_lr_share, min(1.0, left))


def with_weights(args: LanguageModelArgs, weights: StateDict) -> LlamaForCausalLM:
    model = new_language_model(args)
    model.load_state_dict(weights)
    model.eval()
    return model

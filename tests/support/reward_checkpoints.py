"""Reward checkpoints at toy size, saved as their authors save them: original key names, configs and file formats.

Each ``Case`` also knows its original maths: ``score(folder, ids)`` computes it from the saved files, with bodies of
transformers and everything above them written out here, one sequence at a time, no padding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from specrej_eval.kv.models import with_softcap

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[PAD]")
LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>")
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA2 = ("<unk>", "<s>", "</s>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<extra_0>")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QUESTION = "Add 2 and 2."
HELLO = [{"role": "user", "content": QUESTION}]
TEXTS = ["It is 4.", "First, take 2.\n\nThen add 2.\n\nSo it is 4.", "5", "I would say: four\nor 4. 🙂"]


def byte_tokenizer(
    specials: Sequence[str], *, template: str | None, bos: str | None, eos: str, pad: str, adds_bos: bool
) -> PreTrainedTokenizerFast:
    """One token per byte behind the special ones; ``adds_bos``: like a Llama tokenizer, to any text it is given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*specials, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, vocab[bos])]
        )
    rest = [token for token in specials if token not in (bos, eos, pad)]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=rest,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(LLAMA3, template=LLAMA3_TEMPLATE, bos=LLAMA3[0], eos="<|eot_id|>", pad="[PAD]", adds_bos=True)


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(GEMMA, template=GEMMA_TEMPLATE, bos="<bos>", eos="<eos>", pad="<pad>", adds_bos=True)


def llama2_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(LLAMA2, template=None, bos="<s>", eos="</s>", pad="<unk>", adds_bos=True)


def chatml_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        CHATML, template=CHATML_TEMPLATE, bos=None, eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False
    )


def internlm_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_130]"),
        template="{{ bos_token }}" + CHATML_TEMPLATE,
        bos="<s>",
        eos="</s>",
        pad="</s>",
        adds_bos=True,
    )


def sizes(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        **changes,
    }


def random_body(kind: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    return {key: scaled(value) if value.dim() > 1 else value for key, value in model.state_dict().items()}


def scaled(tensor: Tensor) -> Tensor:
    """Random numbers large enough that scores differ from text to text."""
    return torch.randn(tensor.shape) * 0.3


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors by name; ``__`` stands for a dot."""
    return {name.replace("__", "."): torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in [*folder.glob("*.bin"), *folder.glob("*.pt")]:
        tensors |= torch.load(path, weights_only=True)
    return config, tensors


def body_of(folder: Path, *, kind: str | None = None, prefix: str = "model.") -> Any:
    config, tensors = read(folder)
    settings = {key: value for key, value in config.items() if key not in ("architectures", "auto_map", "model_type")}
    model = AutoModel.from_config(AutoConfig.for_model(kind or config["model_type"], **settings), dtype=torch.float32)
    own = {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
    model.load_state_dict(own)
    return with_softcap(model.eval())


@torch.no_grad()
def hidden_states(model: Any, ids: Sequence[int]) -> Tensor:
    """(tokens, hidden size) of one unpadded sequence."""
    states: Tensor = model(torch.tensor([list(ids)])).last_hidden_state[0]
    return states


def causal_lm(folder: Path) -> Any:
    """transformers' own language model of the files: body and head in one."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def all_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """(tokens, vocabulary)"""
    logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A text with its special tokens written out; nothing is added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def llama3_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    turns = [*conversation, {"role": "assistant", "content": answer}]
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n{turn['content'].strip()}<|eot_id|>" for turn in turns
    )


def gemma_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    turns = [(turn["role"], turn["content"]) for turn in conversation] + [("model", answer)]
    return "<bos>" + "".join(f"<start_of_turn>{role}\n{text.strip()}<end_of_turn>\n" for role, text in turns)


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint."""

    family: str
    save: Callable[[Path], None]
    """Writes everything but the tokenizer."""
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    text: Callable[[Sequence[Mapping[str, str]], str], str]
    """What the original reads, special tokens (BOS too) written out."""
    score: Callable[[Path, list[int]], float]
    """The original maths on the ids of that text."""
    folder: str = "toy"
    """A name by which the family knows it, where its config does not tell."""
    head_key: str = ""
    """One of the head's tensors."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the run besides reward_model."""


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, file: str = "model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    whole = {key: value.contiguous().clone() for key, value in tensors.items()}
    if file == "model":
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    elif file == "sharded":
        names = sorted(whole)
        shards = {1: names[::2], 2: names[1::2]}
        for number, part in shards.items():
            save_file({n: whole[n] for n in part}, folder / f"model-{number:05}-of-00002.safetensors", {"format": "pt"})
        weight_map = {n: f"model-{number:05}-of-00002.safetensors" for number, part in shards.items() for n in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(whole, folder / file)


# ArmoRM and QRM


def _gating_config(tokenizer: PreTrainedTokenizerFast, kind: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        **sizes(tokenizer),
        "model_type": kind,
        "architectures": [architecture],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{architecture}"},
        "id2label": {"0": "LABEL_0"},
        "num_objectives": 19,
        "gating_hidden_dim": 24,
        "gating_n_hidden": 3,
        "gating_temperature": 10,
        **more,
    }


def save_armorm(folder: Path) -> None:
    tokenizer = llama3_tokenizer()
    config = _gating_config(tokenizer, "llama", "LlamaForRewardModelWithGating")
    head = weights(
        regression_layer__weight=(19, 32),
        reward_transform_matrix=(19, 19),
        gating__logit_scale=(1,),
        gating__layers__0__weight=(24, 32),
        gating__layers__1__weight=(24, 24),
        gating__layers__2__weight=(24, 24),
        gating__layers__3__weight=(19, 24),
        gating__layers__0__bias=(24,),
        gating__layers__1__bias=(24,),
        gating__layers__2__bias=(24,),
        gating__layers__3__bias=(19,),
    )
    body = prefixed("model.", random_body("llama", sizes(tokenizer)))
    save(folder, config, {**body, **head}, file="sharded")


def _last_turn(ids: list[int], pattern: list[int]) -> int:
    """Where the last occurrence of the assistant's header begins."""
    return max(j for j in range(len(ids) - len(pattern) + 1) if ids[j : j + len(pattern)] == pattern)


def score_armorm(folder: Path, ids: list[int]) -> float:
    config, t = read(folder)
    hidden = hidden_states(body_of(folder), ids)
    start = ids_of(llama3_tokenizer(), "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    x = hidden[_last_turn(ids, start)]
    for i in range(3):
        x = torch.clamp(t[f"gating.layers.{i}.weight"] @ x + t[f"gating.layers.{i}.bias"], min=0)
    x = t["gating.layers.3.weight"] @ x + t["gating.layers.3.bias"]
    gates = torch.exp(x / config["gating_temperature"])
    gates = gates / gates.sum() * t["gating.logit_scale"][0]
    rewards = t["regression_layer.weight"] @ hidden[-1]
    return float(sum(gates[k] * (rewards @ t["reward_transform_matrix"])[k] for k in range(19)))


def _save_qrm(folder: Path, kind: str, architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    config = _gating_config(tokenizer, kind, architecture, num_quantiles=5, gating_temperature=5.0)
    head = weights(
        regression_layer__weight=(19 * 5, 32),
        reward_transform_matrix=(19, 19),
        gating__logit_scale=(1,),
        gating__layers__0__weight=(24, 32),
        gating__layers__3__weight=(24, 24),
        gating__layers__6__weight=(24, 24),
        gating__layers__9__weight=(19, 24),
        gating__layers__9__bias=(19,),
    )
    for i in (2, 5, 8):  # the BatchNorms, with statistics of their own
        head |= {
            f"gating.layers.{i}.weight": torch.rand(24) + 0.5,
            f"gating.layers.{i}.bias": torch.randn(24),
            f"gating.layers.{i}.running_mean": torch.randn(24),
            f"gating.layers.{i}.running_var": torch.rand(24) + 0.5,
            f"gating.layers.{i}.num_batches_tracked": torch.tensor(7),
        }
    save(folder, config, {**prefixed("model.", random_body(kind, sizes(tokenizer))), **head})


def save_qrm(folder: Path) -> None:
    _save_qrm(folder, "llama", "LlamaForRewardModelWithGating", llama3_tokenizer())


def save_qrm_gemma(folder: Path) -> None:
    _save_qrm(folder, "gemma2", "Gemma2ForRewardModelWithGating", gemma_tokenizer())


def _score_qrm(folder: Path, ids: list[int], start: list[int]) -> float:
    config, t = read(folder)
    hidden = hidden_states(body_of(folder), ids)
    x = hidden[_last_turn(ids, start)]
    for i in (0, 3, 6):
        x = torch.clamp(t[f"gating.layers.{i}.weight"] @ x, min=0)
        mean, var = t[f"gating.layers.{i + 2}.running_mean"], t[f"gating.layers.{i + 2}.running_var"]
        x = (x - mean) / torch.sqrt(var + 1e-5)
        x = x * t[f"gating.layers.{i + 2}.weight"] + t[f"gating.layers.{i + 2}.bias"]
    x = t["gating.layers.9.weight"] @ x + t["gating.layers.9.bias"]
    gates = torch.exp(x / config["gating_temperature"])
    gates = gates / gates.sum() * t["gating.logit_scale"][0]
    quantiles = t["regression_layer.weight"] @ hidden[-1]
    expected = torch.stack([quantiles[k * 5 : k * 5 + 5].mean() for k in range(19)])
    return float((gates * (expected @ t["reward_transform_matrix"])).sum())


def score_qrm(folder: Path, ids: list[int]) -> float:
    start = ids_of(llama3_tokenizer(), "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    return _score_qrm(folder, ids, start)


def score_qrm_gemma(folder: Path, ids: list[int]) -> float:
    return _score_qrm(folder, ids, ids_of(gemma_tokenizer(), "<end_of_turn>\n<start_of_turn>model\n"))


# URM


def _urm_config(architecture: str) -> dict[str, Any]:
    labels = {str(i): f"LABEL_{i}" for i in range(10)}
    return {
        **sizes(llama3_tokenizer()),
        "model_type": "llama",
        "architectures": [architecture],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{architecture}"},
        "id2label": labels,
    }


def save_urm(folder: Path) -> None:
    head = weights(
        score__weight=(10, 32),
        weights__fc__0__weight=(32, 32),
        weights__fc__0__bias=(32,),
        weights__fc__2__weight=(32, 32),
        weights__fc__2__bias=(32,),
        weights__fc__4__weight=(5, 32),
        weights__fc__4__bias=(5,),
    )
    body = prefixed("model.", random_body("llama", sizes(llama3_tokenizer())))
    save(folder, _urm_config("LlamaForSequenceClassificationWithNormal_Weights"), {**body, **head})


def _selu(x: Tensor) -> Tensor:
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    return scale * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


def score_urm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    last = hidden_states(body_of(folder), ids)[-1]
    x = _selu(t["weights.fc.0.weight"] @ last + t["weights.fc.0.bias"])
    x = _selu(t["weights.fc.2.weight"] @ x + t["weights.fc.2.bias"])
    attribute_weights = t["weights.fc.4.weight"] @ x + t["weights.fc.4.bias"]
    outputs = t["score.weight"] @ last
    return float(sum(outputs[2 * k] * attribute_weights[k] for k in range(5)))


def save_urm_fixed(folder: Path) -> None:
    body = prefixed("model.", random_body("llama", sizes(llama3_tokenizer())))
    head = weights(score__weight=(10, 32))
    save(folder, _urm_config("LlamaForSequenceClassificationWithNormal"), {**body, **head})


def score_urm_fixed(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    outputs = t["score.weight"] @ hidden_states(body_of(folder), ids)[-1]
    return float(0.3 * outputs[0] + 0.74 * outputs[2] + 0.46 * outputs[4] + 0.47 * outputs[6] - 0.33 * outputs[8])


# GRM


def _grm_config(tokenizer: PreTrainedTokenizerFast, kind: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        **sizes(tokenizer),
        "model_type": kind,
        "architectures": [architecture],
        "auto_map": {"AutoModelForSequenceClassification": "model.AutoModelForCausalLMWithValueHead"},
        "vhead_layer_type": "mlp",
        "vhead_num_layers": 1,
        "vhead_num_neurons": 20,
        **more,
    }


def save_grm(folder: Path) -> None:
    tokenizer = llama3_tokenizer()
    body = prefixed("model.", random_body("llama", sizes(tokenizer)))
    head = weights(
        v_head__summary__0__weight=(20, 32),
        v_head__summary__0__bias=(20,),
        v_head__summary__2__weight=(1, 20),
        v_head__summary__2__bias=(1,),
        lm_head__weight=(len(tokenizer), 32),
    )
    save(folder, _grm_config(tokenizer, "llama", "LlamaForCausalLM"), {**body, **head})


def score_grm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    last = hidden_states(body_of(folder), ids)[-1]
    x = torch.clamp(t["v_head.summary.0.weight"] @ last + t["v_head.summary.0.bias"], min=0)
    return float(t["v_head.summary.2.weight"][0] @ x + t["v_head.summary.2.bias"][0])


def save_grm_linear(folder: Path) -> None:
    tokenizer = gemma_tokenizer()
    body = prefixed("model.", random_body("gemma2", sizes(tokenizer)))
    head = weights(v_head__summary__weight=(1, 32), v_head__summary__bias=(1,))
    save(folder, _grm_config(tokenizer, "gemma2", "Gemma2ForCausalLM", vhead_layer_type="linear"), {**body, **head})


def score_grm_linear(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    last = hidden_states(body_of(folder), ids)[-1]
    return float(t["v_head.summary.weight"][0] @ last + t["v_head.summary.bias"][0])


# INF-ORM


def save_inf_orm(folder: Path) -> None:
    config = {**sizes(llama3_tokenizer()), "model_type": "llama", "architectures": ["INFORMForSequenceClassification"]}
    body = prefixed("model.", random_body("llama", sizes(llama3_tokenizer())))
    head = weights(score__0__weight=(32, 32), score__0__bias=(32,), score__2__weight=(1, 32), score__2__bias=(1,))
    save(folder, config, {**body, **head}, file="sharded")


def score_inf_orm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    last = hidden_states(body_of(folder), ids)[-1]
    x = torch.clamp(t["score.0.weight"] @ last + t["score.0.bias"], min=0)
    return float(t["score.2.weight"][0] @ x + t["score.2.bias"][0])


# Eurus and UltraRM


def save_eurus(folder: Path) -> None:
    tokenizer = llama2_tokenizer()
    settings = sizes(tokenizer, sliding_window=64)
    config = {
        **settings,
        "model_type": "mistral",
        "architectures": ["EurusRewardModel"],
        "auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"},
    }
    body = prefixed("model.", random_body("mistral", settings))
    save(folder, config, {**body, **weights(regression_head__weight=(1, 32))})


def save_ultrarm(folder: Path) -> None:
    tokenizer = llama2_tokenizer()
    config = {**sizes(tokenizer), "model_type": "llama", "architectures": ["LlamaRewardModel"]}
    body = prefixed("model.", random_body("llama", sizes(tokenizer)))
    save(folder, config, {**body, **weights(regression_head__weight=(1, 32))}, file="pytorch_model.bin")


def score_regression_head(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    rewards = hidden_states(body_of(folder), ids) @ t["regression_head.weight"][0]
    mask = torch.ones(len(ids))
    return float(rewards[mask.cumsum(0).argmax()])  # the original's way of naming the last token


# Starling


def _save_starling(folder: Path, vocab_size: int, file: str) -> None:
    tokenizer = llama2_tokenizer() if vocab_size < 64_000 else chatml_tokenizer()
    settings = sizes(tokenizer, vocab_size=vocab_size)
    body = random_body("llama", settings)
    # the 7B model's config is that of Llama-2-chat
    architecture = "LlamaForCausalLM" if file.endswith(".pt") else "LlamaForSequenceClassification"
    config = {**settings, "model_type": "llama", "architectures": [architecture]}
    tensors = {**prefixed("transformer.", body), **weights(v_head__weight=(1, 32))}
    if file.endswith(".pt"):  # as the original module's state: the body twice, its language-model head, old buffers
        tensors |= prefixed("model.model.", body)
        tensors["model.lm_head.weight"] = torch.zeros(vocab_size, 32)
        tensors["transformer.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save(folder, config, tensors, file=file)


def save_starling_7b(folder: Path) -> None:
    _save_starling(folder, len(llama2_tokenizer()), "starling_rm.pt")


def save_starling_34b(folder: Path) -> None:
    _save_starling(folder, 64_000, "model")


def score_starling(folder: Path, ids: list[int]) -> float:
    config, t = read(folder)
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = AutoModel.from_config(AutoConfig.for_model("llama", **settings), dtype=torch.float32).eval()
    own = {key.removeprefix("transformer."): value for key, value in t.items() if key.startswith("transformer.")}
    model.load_state_dict({key: value for key, value in own.items() if "inv_freq" not in key})
    rewards = hidden_states(model, ids) @ t["v_head.weight"][0]
    return float(rewards[-1])


# AlpacaFarm


def save_alpaca_farm(folder: Path) -> None:
    tokenizer = llama2_tokenizer()
    backbone = folder.parent / f"{folder.name}-backbone"
    backbone.mkdir(parents=True, exist_ok=True)
    config = {**sizes(tokenizer), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (backbone / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(backbone)
    body = prefixed("backbone_model.model.", random_body("llama", sizes(tokenizer)))
    head = weights(
        reward_head__weight=(1, 32), reward_head__bias=(1,), backbone_model__lm_head__weight=(len(tokenizer), 32)
    )
    own = {
        "model_type": "reward_model",
        "architectures": ["RewardModel"],
        "backbone_model_name_or_path": str(backbone),
    }
    save(folder, own, {**body, **head}, file="pytorch_model.bin")


def score_alpaca_farm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    config = json.loads((folder.parent / f"{folder.name}-backbone" / "config.json").read_text())
    settings = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = AutoModel.from_config(AutoConfig.for_model("llama", **settings), dtype=torch.float32).eval()
    prefix = "backbone_model.model."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in t.items() if key.startswith(prefix)})
    return float(t["reward_head.weight"][0] @ hidden_states(model, ids)[-1] + t["reward_head.bias"][0])


# InternLM2: the whole model written out, since transformers has none


def save_internlm2(folder: Path) -> None:
    tokenizer = internlm_tokenizer()
    layer = {
        "attention.wqkv.weight": (2 * (2 + 2) * 8, 32),  # 2 key-value heads, each with 2 queries, a key, a value
        "attention.wo.weight": (32, 32),
        "feed_forward.w1.weight": (48, 32),
        "feed_forward.w2.weight": (32, 48),
        "feed_forward.w3.weight": (48, 32),
    }
    tensors = {"model.tok_embeddings.weight": torch.randn(len(tokenizer), 32) * 0.3}
    for i in range(2):
        tensors |= {f"model.layers.{i}.{key}": torch.randn(shape) * 0.3 for key, shape in layer.items()}
        tensors[f"model.layers.{i}.attention_norm.weight"] = torch.rand(32) + 0.5
        tensors[f"model.layers.{i}.ffn_norm.weight"] = torch.rand(32) + 0.5
    tensors |= {"model.norm.weight": torch.rand(32) + 0.5, "v_head.weight": torch.randn(1, 32) * 0.3}
    config = {
        **sizes(tokenizer, rope_theta=1_000_000),
        "model_type": "internlm2",
        "architectures": ["InternLM2ForRewardModel"],
        "auto_map": {"AutoModel": "modeling_internlm2.InternLM2ForRewardModel"},
        "bias": False,
        "hidden_act": "silu",
        "reward_token_id": tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_130]"),
    }
    del config["head_dim"]
    save(folder, config, tensors)


def score_internlm2(folder: Path, ids: list[int]) -> float:
    config, t = read(folder)
    ids = [*ids, config["reward_token_id"]]
    length, heads, groups, size = len(ids), 4, 2, 8
    queries = heads // groups
    inverse = 1.0 / config["rope_theta"] ** (torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)  # (tokens, head size)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight

    def turned(x: Tensor) -> Tensor:  # (tokens, head size)
        half = torch.cat((-x[:, size // 2 :], x[:, : size // 2]), dim=-1)
        return x * angles.cos() + half * angles.sin()

    future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
    x = t["model.tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(2):
        name = f"model.layers.{i}."
        y = norm(x, t[name + "attention_norm.weight"]) @ t[name + "attention.wqkv.weight"].T
        mixed = []
        for g in range(groups):
            part = y[:, g * (queries + 2) * size : (g + 1) * (queries + 2) * size]
            vectors = [part[:, k * size : (k + 1) * size] for k in range(queries + 2)]
            key, value = turned(vectors[-2]), vectors[-1]
            for query in vectors[:queries]:
                scores = (turned(query) @ key.T / math.sqrt(size)).masked_fill(future, float("-inf"))
                mixed.append(torch.softmax(scores, dim=-1) @ value)
        x = x + torch.cat(mixed, dim=-1) @ t[name + "attention.wo.weight"].T
        y = norm(x, t[name + "ffn_norm.weight"])
        gate = y @ t[name + "feed_forward.w1.weight"].T
        y = gate * torch.sigmoid(gate) * (y @ t[name + "feed_forward.w3.weight"].T)
        x = x + y @ t[name + "feed_forward.w2.weight"].T
    return float(t["v_head.weight"][0] @ norm(x, t["model.norm.weight"])[-1])


# Nemotron and the process reward models that are language models


def save_causal_lm(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = sizes(tokenizer)
    architecture = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[kind]
    body = prefixed("model.", random_body(kind, settings))
    head = {"lm_head.weight": torch.randn(len(tokenizer), 32) * 0.3}
    save(folder, {**settings, "model_type": kind, "architectures": [architecture]}, {**body, **head})


def score_nemotron(folder: Path, ids: list[int]) -> float:
    return float(all_logits(causal_lm(folder), ids)[-1, 0])


def rlhflow_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    first, *others = [step.strip() for step in answer.split("\n\n")]
    steps = [f"{conversation[-1]['content']} {first}", *others]
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>user<|end_header_id|>\n\n{step}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n+<|eot_id|>"
        for step in steps
    )


def score_rlhflow(folder: Path, ids: list[int]) -> float:
    """One pass for each step, cut behind it; the third token from the end says + or -."""
    tokenizer, model = llama3_tokenizer(), causal_lm(folder)
    plus, minus, end = (ids_of(tokenizer, text)[0] for text in ("+", "-", "<|eot_id|>"))
    probabilities = []
    for cut in range(1, len(ids) + 1):
        if ids[cut - 2 : cut] == [plus, end]:
            logits = all_logits(model, ids[:cut])[-3, [plus, minus]]
            probabilities.append(float(logits.softmax(dim=-1)[0]))
    return sum(probabilities) / len(probabilities)  # prm_reduce=mean


def shepherd_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    steps = [line for line in answer.split("\n") if line.strip()]
    return f"<s>{conversation[-1]['content']} " + "\n".join(f"{step} ки" for step in steps)


def score_shepherd(folder: Path, ids: list[int]) -> float:
    tokenizer = llama2_tokenizer()
    tag = ids_of(tokenizer, "ки")[-1]
    good, bad = ids_of(tokenizer, "+")[-1], ids_of(tokenizer, "-")[-1]
    scores = all_logits(causal_lm(folder), ids)[:, [good, bad]].softmax(dim=-1)[:, 0]
    return float(scores[torch.tensor(ids) == tag].min())  # prm_reduce=min


# Qwen2.5-Math-PRM and Skywork-o1-PRM


def save_qwen_prm(folder: Path) -> None:
    tokenizer = chatml_tokenizer()
    settings = {key: value for key, value in sizes(tokenizer).items() if key != "head_dim"}
    config = {
        **settings,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForProcessRewardModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
            "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
        },
    }
    head = weights(score__0__weight=(32, 32), score__0__bias=(32,), score__2__weight=(2, 32), score__2__bias=(2,))
    save(folder, config, {**prefixed("model.", random_body("qwen2", settings)), **head})


def qwen_prm_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    turns = [*conversation, {"role": "assistant", "content": answer.replace("\n\n", "<extra_0>") + "<extra_0>"}]
    if turns[0]["role"] != "system":
        asked = "Please reason step by step, and put your final answer within \\boxed{}."
        turns = [{"role": "system", "content": asked}, *turns]
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def score_qwen_prm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    hidden = hidden_states(body_of(folder), ids)
    x = torch.clamp(hidden @ t["score.0.weight"].T + t["score.0.bias"], min=0)
    probabilities = (x @ t["score.2.weight"].T + t["score.2.bias"]).softmax(dim=-1)[:, 1]
    mark = ids_of(chatml_tokenizer(), "<extra_0>")[0]
    return float(probabilities[torch.tensor(ids) == mark].prod())  # prm_reduce=prod


def save_skywork_prm(folder: Path) -> None:
    tokenizer = chatml_tokenizer()
    settings = {key: value for key, value in sizes(tokenizer).items() if key != "head_dim"}
    config = {**settings, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    head = weights(v_head__summary__weight=(1, 32), v_head__summary__bias=(1,), lm_head__weight=(len(tokenizer), 32))
    body = prefixed("model.", random_body("qwen2", settings))
    save(folder, config, {**body, **head}, file="pytorch_model.bin")


def skywork_prm_text(conversation: Sequence[Mapping[str, str]], answer: str) -> str:
    return conversation[-1]["content"] + "\n" + "".join(f"{step}\n" for step in answer.split("\n"))


def score_skywork_prm(folder: Path, ids: list[int]) -> float:
    _, t = read(folder)
    values = hidden_states(body_of(folder), ids) @ t["v_head.summary.weight"][0] + t["v_head.summary.bias"][0]
    return float(torch.sigmoid(values)[-1])  # prm_reduce=last: the line break behind the last line


CASES = {
    "armorm": Case(
        "armorm", save_armorm, llama3_tokenizer, llama3_text, score_armorm, head_key="regression_layer.weight"
    ),
    "qrm": Case("qrm", save_qrm, llama3_tokenizer, llama3_text, score_qrm, head_key="gating.layers.9.weight"),
    "qrm-gemma": Case(
        "qrm", save_qrm_gemma, gemma_tokenizer, gemma_text, score_qrm_gemma, head_key="regression_layer.weight"
    ),
    "urm": Case("urm", save_urm, llama3_tokenizer, llama3_text, score_urm, head_key="weights.fc.2.bias"),
    "urm-fixed": Case("urm", save_urm_fixed, llama3_tokenizer, llama3_text, score_urm_fixed, head_key="score.weight"),
    "grm": Case("grm", save_grm, llama3_tokenizer, llama3_text, score_grm, head_key="v_head.summary.0.weight"),
    "grm-linear": Case(
        "grm", save_grm_linear, gemma_tokenizer, gemma_text, score_grm_linear, head_key="v_head.summary.weight"
    ),
    "inf_orm": Case("inf_orm", save_inf_orm, llama3_tokenizer, llama3_text, score_inf_orm, head_key="score.2.weight"),
    "eurus": Case(
        "eurus",
        save_eurus,
        llama2_tokenizer,
        lambda conversation, answer: f"<s>[INST] {conversation[-1]['content']} [/INST] {answer}",
        score_regression_head,
        head_key="regression_head.weight",
    ),
    "ultrarm": Case(
        "ultrarm",
        save_ultrarm,
        llama2_tokenizer,
        lambda conversation, answer: f"<s>Human: {conversation[-1]['content']}\n\nAssistant: {answer}",
        score_regression_head,
        head_key="regression_head.weight",
    ),
    "starling-7b": Case(
        "starling",
        save_starling_7b,
        llama2_tokenizer,
        lambda conversation, answer: f"<s><s>[INST] {conversation[-1]['content']} </s> [/INST] {answer}</s>",
        score_starling,
        folder="Starling-RM-7B-alpha",
        head_key="v_head.weight",
    ),
    "starling-34b": Case(
        "starling",
        save_starling_34b,
        chatml_tokenizer,
        lambda conversation, answer: (
            f"<|im_start|>user\n{conversation[-1]['content']}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        ),
        score_starling,
        folder="Starling-RM-34B",
        head_key="v_head.weight",
    ),
    "alpaca_farm": Case(
        "alpaca_farm",
        save_alpaca_farm,
        llama2_tokenizer,
        lambda conversation, answer: (
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{conversation[-1]['content']}\n\n### Response:{answer}"
        ),
        score_alpaca_farm,
        head_key="reward_head.bias",
    ),
    "internlm2_reward": Case(
        "internlm2_reward",
        save_internlm2,
        internlm_tokenizer,
        lambda conversation, answer: (
            f"<s><|im_start|>user\n{conversation[-1]['content']}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        ),
        score_internlm2,
        head_key="v_head.weight",
    ),
    "nemotron": Case(
        "nemotron",
        lambda folder: save_causal_lm(folder, "llama", llama3_tokenizer()),
        llama3_tokenizer,
        llama3_text,
        score_nemotron,
        folder="Llama-3.1-Nemotron-70B-Reward-HF",
        head_key="lm_head.weight",
    ),
    "rlhflow_prm": Case(
        "rlhflow_prm",
        lambda folder: save_causal_lm(folder, "llama", llama3_tokenizer()),
        llama3_tokenizer,
        rlhflow_text,
        score_rlhflow,
        folder="Llama3.1-8B-PRM-Deepseek-Data",
        head_key="lm_head.weight",
        options={"prm_reduce": "mean"},
    ),
    "math_shepherd": Case(
        "math_shepherd",
        lambda folder: save_causal_lm(folder, "mistral", llama2_tokenizer()),
        llama2_tokenizer,
        shepherd_text,
        score_shepherd,
        folder="math-shepherd-mistral-7b-prm",
        head_key="lm_head.weight",
        options={"prm_reduce": "min"},
    ),
    "qwen_math_prm": Case(
        "qwen_math_prm",
        save_qwen_prm,
        chatml_tokenizer,
        qwen_prm_text,
        score_qwen_prm,
        head_key="score.2.weight",
        options={"prm_reduce": "prod"},
    ),
    "skywork_o1_prm": Case(
        "skywork_o1_prm",
        save_skywork_prm,
        chatml_tokenizer,
        skywork_prm_text,
        score_skywork_prm,
        folder="Skywork-o1-Open-PRM-Qwen-2.5-7B",
        head_key="v_head.summary.weight",
        options={"prm_reduce": "last"},
    ),
}


def build(case: Case, root: Path, *, seed: int = 0) -> Path:
    """The case's checkpoint with its tokenizer, in a folder of its own name."""
    folder = root / case.folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case.save(folder)
    if case.family != "alpaca_farm":  # its tokenizer lies with its backbone
        case.tokenizer().save_pretrained(folder)
    return folder

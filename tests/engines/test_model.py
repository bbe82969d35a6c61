"""The runner as a guest in somebody's model: attention put back, greedy equal to ``generate``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.engine_models import TOLERANCE, build, prompt_of, shared_model
from support.engine_runs import PROMPTS, generate, make_engine
from support.tiny_models import tiny_causal_lm
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, GenerationConfig

from specrej_eval import budget as budgets
from specrej_eval.config import RunConfig
from specrej_eval.core import Plan, Prompt
from specrej_eval.engines.transformers.model import ModelRunner
from specrej_eval.kv import shared_prefix

IMPLEMENTATIONS = ["eager", "sdpa"]


def settings_of(config: Any) -> dict[str, Any]:
    """The attention of a config and of all configs inside it."""
    found = {"": config._attn_implementation}
    for name in getattr(config, "sub_configs", {}) or {}:
        if getattr(config, name, None) is not None:
            found |= {f"{name}.{key}": value for key, value in settings_of(getattr(config, name)).items()}
    return found


def padded_loglikelihood(model: Any) -> torch.Tensor:
    ids = torch.tensor([[0, 0, 0, *prompt_of(5)], prompt_of(8, salt=1)])
    mask = (ids != 0).long()
    with torch.inference_mode():
        return model(ids, attention_mask=mask).logits[:, -4:].log_softmax(-1)


def greedy(model: Any, **arguments: Any) -> torch.Tensor:
    return model.generate(torch.tensor([prompt_of(9)]), do_sample=False, max_new_tokens=12, **arguments)


# ---- attention is put back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_model_is_the_same_afterwards(name: str, attention: str) -> None:
    model = build(name, attention=attention, vocab_size=261)
    config, loglikelihood, tokens = model.config.to_dict(), padded_loglikelihood(model), greedy(model)
    before = settings_of(model.config)
    engine = make_engine(model)
    assert engine.runner.path == "shared_prefix"
    generate(engine, PROMPTS[:2])
    assert settings_of(model.config) == before
    assert model.config.to_dict() == config
    assert torch.equal(padded_loglikelihood(model), loglikelihood)
    assert torch.equal(greedy(model), tokens)


def test_ours_is_set_inside_only() -> None:
    runner = ModelRunner(shared_model("llama"))
    before = settings_of(runner.model.config)
    with runner.active():
        assert settings_of(runner.model.config)[""] == shared_prefix.NAME
    assert settings_of(runner.model.config) == before
    with pytest.raises(RuntimeError, match="outside a step of ours"), runner.active():
        runner.model(torch.tensor([[5, 6]]))
    assert settings_of(runner.model.config) == before


@pytest.mark.parametrize("place", ["prefill", "step"])
def test_put_back_after_an_exception(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", vocab_size=261)
    before, loglikelihood = settings_of(model.config), padded_loglikelihood(model)
    engine = make_engine(model)

    class Broken(Exception):
        pass

    def fail(module: Any, arguments: Any) -> None:
        # deep inside a forward pass of the kind in question
        if (arguments[0].shape[1] == 1) == (place == "step"):
            raise Broken

    hook = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        generate(engine, PROMPTS[1:3])
    hook.remove()
    assert settings_of(model.config) == before
    assert shared_prefix._here.step is None
    assert torch.equal(padded_loglikelihood(model), loglikelihood)


def test_configs_inside_a_config_get_their_own_attention_back() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 14, "patch_size": 7}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager", "": "sdpa"})
    before = settings_of(model.config)
    assert before["vision_config."] == "eager" and before["text_config."] == "sdpa"
    runner = ModelRunner(model)
    with torch.inference_mode(), runner.active():
        runner.prefill(prompt_of(7))
    assert settings_of(model.config) == before


# ---- greedy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "falcon", "qwen3_next"])
def test_greedy_equals_generate(name: str) -> None:
    model = build(name, vocab_size=261)
    model.generation_config = GenerationConfig(pad_token_id=0)
    lengths = set()
    for salt in range(4):
        prompt = prompt_of(11 + salt, salt)
        free = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :].tolist()
        # a list of end tokens: the second one is met on the way
        late = max(set(free), key=free.index)
        model.generation_config.eos_token_id = [260, late if free.index(late) > 3 else 259]
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, output_logits=True, return_dict_in_generate=True
        )
        want = out.sequences[0, len(prompt) :].tolist()
        gaps = [float(step[0].topk(2).values.diff().abs()) for step in out.logits]
        sure = next((place for place, gap in enumerate(gaps) if gap < 1e-3), len(gaps))
        engine = make_engine(model)
        config = RunConfig(strategy="best_of_n", n=2, max_gen_toks=24, temperature=0.0)
        session = engine.open(
            Prompt(token_ids=tuple(prompt), conversation=()), config, budgets.resolve(config, len(prompt))
        )
        engine.follow(session, Plan(keep=(), fresh=2, num_tokens=24))
        engine.decode([session], 24)
        for row in engine.rows(session):
            got = row.token_ids
            # the tokenizer's own end token (2) ends our rows, too
            assert got[:sure] == want[: min(sure, len(got))]
            if sure == len(gaps) and 2 not in want[:-1]:
                assert got == want
                assert row.finish_reason == ("eos" if want[-1] in model.generation_config.eos_token_id else "length")
        lengths.add(min(sure, len(want)))
        model.generation_config.eos_token_id = None
    assert max(lengths) > 4


def test_greedy_test_would_notice_a_sampled_row() -> None:
    engine = make_engine(tiny_causal_lm("llama"))
    arguments = {"n": 1, "strategy": "best_of_n", "first_look": None}
    [one] = generate(engine, PROMPTS[:1], temperature=0.0, **arguments)
    [other] = generate(engine, PROMPTS[:1], temperature=1.0, **arguments)
    assert one.best.token_ids != other.best.token_ids


# ---- the cache goes in under the model's own name ----------------------------------------------------------------


def takes_cache(ids: Any, cache: Any = None, **kwargs: Any) -> None: ...


def takes_past_key_values(ids: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


def takes_cache_params(ids: Any, cache_params: Any = None, **kwargs: Any) -> None: ...


def takes_anything(ids: Any, **kwargs: Any) -> None: ...


@functools.wraps(takes_cache)
def renames(*args: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("forward", "name"),
    [
        (takes_cache, "cache"),
        (renames, "cache"),
        (takes_past_key_values, "past_key_values"),
        (takes_cache_params, "cache_params"),
        (takes_anything, "past_key_values"),
    ],
)
def test_the_cache_is_handed_over_under_the_name_that_forward_takes(forward: Any, name: str) -> None:
    model = torch.nn.Module()
    model.forward = forward
    assert shared_prefix.cache_argument(model) == name


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_a_model_that_is_handed_a_cache_under_that_name_uses_it(name: str) -> None:
    model = shared_model(name)
    ids = torch.tensor([prompt_of(9)])
    with torch.inference_mode():
        whole = model(ids).logits[:, -1]
        cache = DynamicCache(config=model.config)
        kept = {shared_prefix.cache_argument(model): cache, "use_cache": True}
        model(ids[:, :8], **kept)
        assert torch.allclose(model(ids[:, 8:], **kept).logits[:, -1], whole, atol=TOLERANCE)
        assert not torch.allclose(model(ids[:, 8:]).logits[:, -1], whole, atol=TOLERANCE)  # the past matters

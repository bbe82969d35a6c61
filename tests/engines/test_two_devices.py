"""The language model on one device and the reward model on another: no tensor of the one meets a tensor of the other.

Without a second device, tensors are told apart by where they come from. What is made of a model's weights belongs to
its device, and an operation that mixes two devices fails, as it would there; what the host made belongs to none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine_runs import make_engine, outcome
from support.reward_sessions import make_reward
from support.tiny_models import tiny_causal_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError
from specrej_eval.generator import Generator
from specrej_eval.rewards.kinds.base import Asked
from specrej_eval.rewards.kinds.checkpoint import Kind

ASKED = ["Tell me about rivers.", "x" * 70, "One, two, three: " * 3, "a"]


class Devices(TorchDispatchMode):
    """Each model's weights, and all that is computed with them, lie on a device of its own."""

    def __init__(self, **models: Any) -> None:
        super().__init__()
        self._of = WeakTensorKeyDictionary()
        self.operations = dict.fromkeys(models, 0)
        for name, model in models.items():
            for tensor in (*model.parameters(), *model.buffers()):
                self._of[tensor] = name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        places = {self._of[leaf] for leaf in given if leaf in self._of}
        if len(places) > 1:
            raise AssertionError(f"{function} of tensors on {' and '.join(sorted(places))}")
        found = function(*args, **(kwargs or {}))
        for place in places:
            self.operations[place] += 1
            for leaf in tree_leaves(found):
                if isinstance(leaf, torch.Tensor):
                    self._of[leaf] = place
        return found


def run(engine: Any, reward: Any, **arguments: Any) -> list[Any]:
    config, _ = RunConfig.from_args(
        {"n": 6, "max_gen_toks": 20, "first_look": 4, "alpha": 0.5, "batch_size": 2, "logprobs": True, **arguments}
    )
    return [outcome(result) for result in Generator(engine=engine, reward=reward, config=config).generate(ASKED)]


@pytest.mark.parametrize("cache", ["full", "prompt", "off"])
def test_looks_are_scored_without_a_tensor_of_the_language_model(cache: str) -> None:
    engine, reward = make_engine(tiny_causal_lm()), make_reward(cache=cache)
    with Devices(policy=engine.model, reward=reward.model) as devices:
        found = run(engine, reward)
    assert all(count > 100 for count in devices.operations.values()), devices.operations
    assert found == run(make_engine(tiny_causal_lm()), make_reward(cache=cache))


def test_a_reward_that_takes_a_tensor_of_the_engine_is_found() -> None:
    engine, reward = make_engine(tiny_causal_lm()), make_reward()
    seen: list[torch.Tensor] = []
    forward = engine.runner._forward

    def kept(*given: Any) -> torch.Tensor:
        seen.append(forward(*given))
        return seen[-1]

    engine.runner._forward = kept  # type: ignore[method-assign]
    head = reward.head
    assert head is not None
    reward.head = lambda hidden, mask: head(hidden, mask) + seen[-1].sum()
    with Devices(policy=engine.model, reward=reward.model), pytest.raises(AssertionError, match="policy and reward"):
        run(engine, reward)


@pytest.mark.parametrize(("device", "said"), [("cuda:97", "CUDA device"), ("no device", "must be a torch device")])
def test_a_reward_device_that_is_not_there_is_refused_before_a_model_is_loaded(device: str, said: str) -> None:
    config, _ = RunConfig.from_args({"reward_device": device})
    with pytest.raises(ConfigError, match=f"reward_device.*{said}"):
        Kind().resolve(
            Asked("there is no such model", config, None, lambda _: pytest.fail("nothing is made of others"))
        )

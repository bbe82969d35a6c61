"""A real `vllm serve`: killed in the middle of a run, started again, and nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from support import vllm_serve
from support.engine_runs import HashReward
from support.tiny_models import EOS, save, tiny_causal_lm, tiny_tokenizer

from specrej_eval.config import RunConfig
from specrej_eval.core import GenerationResult, RowView
from specrej_eval.engines.choose import resolve_engine
from specrej_eval.errors import SpecRejError
from specrej_eval.generator import Generator

PROMPTS = [f"Prompt number {number}." for number in range(8)]

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1500),  # a server starts in 20 seconds, or in minutes on a busy machine, up to twice a test
    pytest.mark.skipif(
        vllm_serve.python() is None,
        reason="vLLM is not installed; `make test-vllm` has it, or SPECREJ_VLLM_PYTHON=PYTHON names one that does",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_causal_lm(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    return save(model, tiny_tokenizer(), tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[vllm_serve.Serving]:
    with vllm_serve.Serving(folder, tmp_path_factory.mktemp("log") / "vllm.log") as serving:
        yield serving


def make(server: vllm_serve.Serving, folder: Path, **others: Any) -> Generator:
    given = {"pretrained": str(folder), "engine": "vllm-server", "engine_url": server.url, "n": 8, "max_gen_toks": 64}
    given |= {"first_look": 16, "batch_size": 2, "reward_model": "likelihood", **others}
    config, host = RunConfig.from_args(given)
    engine = resolve_engine(config, host).load(content_rule="encode_as_text")
    return Generator(engine=engine, reward=Slow(), config=config)


class Slow(HashReward):
    """Scores while the server stands still."""

    def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        time.sleep(0.05)
        return super().score(conversation, rows, response_prefix)


def check(results: Sequence[GenerationResult]) -> None:
    for result in results:
        assert result.ledger.decode_tokens == sum(row.num_tokens for row in result.trajectories)
        assert result.rounds[0].tokens == 16 and result.rounds[0].rows == 8
        for row in result.trajectories:
            assert EOS not in row.token_ids[:-1]
            assert (row.finish_reason == "eos") == (row.token_ids[-1:] == [EOS])


@pytest.mark.parametrize("looks", ["pause", "resubmit"])
def test_a_run_on_vllm_serve(
    looks: str, server: vllm_serve.Serving, folder: Path, measured: Callable[[str, float], None]
) -> None:
    generator = make(server, folder, engine_looks=looks)
    results = generator.generate(PROMPTS)
    check(results)
    totals = generator.totals
    assert totals.rows_rejected
    measured(
        f"{looks}: overshoot of vllm serve, tokens in a hundred", 100 * totals.overshoot_tokens / totals.decode_tokens
    )
    assert not requests.get(f"{server.url}/is_paused", timeout=10).json()["is_paused"]


def test_best_of_n_and_alpha_0_differ_in_nothing_but_the_name(server: vllm_serve.Serving, folder: Path) -> None:
    for given in ({"strategy": "best_of_n"}, {"alpha": 0.0}):
        generator = make(server, folder, first_look=None, **given)
        for result in generator.generate(PROMPTS[:2]):
            assert len(result.rounds) == 1
            assert not result.ledger.rows_rejected


def test_a_server_that_is_killed_and_started_again_loses_nothing(
    server: vllm_serve.Serving, folder: Path, tmp_path: Path, measured: Callable[[str, float], None]
) -> None:
    """First with nobody there to start it, so that the run ends; then with a restart that the run lives through."""
    journal = tmp_path / "journal.jsonl"

    def kill_after(answers: int) -> None:
        while not journal.is_file() or len(journal.read_text().splitlines()) < answers + 1:
            time.sleep(0.01)
        server.kill()

    generator = make(server, folder, journal=str(journal), engine_retries=1)
    killer = threading.Thread(target=kill_after, args=(2,), daemon=True)
    killer.start()
    with pytest.raises(SpecRejError, match="engine server") as caught:
        generator.generate(PROMPTS)
    killer.join()
    assert server.url in str(caught.value)
    kept = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert 2 <= len(kept) < len(PROMPTS)

    server.start()

    def restart_after(answers: int) -> None:
        kill_after(answers)
        server.start()

    starter = threading.Thread(target=restart_after, args=(len(kept) + 2,), daemon=True)
    generator = make(server, folder, journal=str(journal), engine_retries=40)
    starter.start()
    results = generator.generate(PROMPTS)
    starter.join()
    check(results)
    assert sum(result.taken for result in results) == len(kept), "what was done is not done again"
    assert [result.taken for result in make(server, folder, journal=str(journal)).generate(PROMPTS)] == [True] * 8
    measured("answers kept over a kill of vllm serve", len(kept))

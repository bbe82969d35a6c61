"""The public API end to end: load, generate, results, trace and journal, on the embedded pair and on tiny models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FULL
from support.tiny_models import save, tiny_causal_lm, tiny_tokenizer

import specrej_eval
from specrej_eval.core import Ledger
from specrej_eval.errors import ConfigError, PromptError, RewardError
from specrej_eval.generator import Generator

LENGTH = 32
PROMPTS = ["Q: 39 + 16 + 60 = ?\nA:", "Q: 15 + 53 + 65 + 91 = ?\nA:", "Q: 27 + 72 = ?\nA:"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    return str(save(tiny_causal_lm("llama"), tiny_tokenizer(), folder))


def load(**args: Any) -> Generator:
    return specrej_eval.load(**{"max_gen_toks": LENGTH, "device": "cpu", **args})


def length_reward(conversation: list[dict[str, str]], responses: list[str]) -> list[float]:
    """A deterministic reward with plenty of order and a few ties."""
    return [sum(map(ord, response)) % 97 + 0.5 for response in responses]


def test_without_arguments_the_demo_pair_answers_and_the_result_is_complete() -> None:
    result = specrej_eval.load(device="cpu").generate(PROMPTS[0], until="\n")[0]
    assert len(result.trajectories) == 16
    assert [row.row for row in result.trajectories] == list(range(16))
    assert result.text == result.best.text
    assert "\n" not in result.text
    finished = [row for row in result.trajectories if row.finish_reason != "rejected"]
    assert result.best.reward == max(row.reward for row in finished if row.reward is not None)
    assert result.rounds[0].rows == 16
    assert all(row.num_tokens == len(row.token_ids) for row in result.trajectories)
    ledger = result.ledger
    assert ledger.decode_tokens == sum(row.num_tokens for row in result.trajectories)
    assert ledger.rows_started == 16 == ledger.rows_finished + ledger.rows_rejected
    assert ledger.rows_rejected == sum(round_.rejected for round_ in result.rounds)
    assert set(ledger.seconds) == {"prefill", "decode", "reward", "other"}
    assert ledger.reward_calls >= len(result.rounds)
    assert ledger.peak_bytes > 0


def test_a_generator_and_a_result_show_themselves_on_one_screen() -> None:
    generator = load(n=8, alpha=0.25, logprobs=True)
    result = generator.generate(PROMPTS[0])[0]
    shown = repr(generator)
    for part in ("alpha=0.25", "n=8", "strategy='speculative_rejection'", "device='cpu'", "promises=", "embedded"):
        assert part in shown
    assert repr(result.text) in repr(result)
    assert f"rejected={result.ledger.rows_rejected}" in repr(result)
    long = result.best
    long.text = "word " * 1000
    for text in (shown, repr(result)):
        assert len(text) < 600 and "\n" not in text
    assert "token_ids" not in repr(long)


def test_to_dict_is_strict_json_and_tells_everything() -> None:
    result = load(n=4, logprobs=True).generate(PROMPTS[0])[0]
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["text"] == result.text
    assert set(data["rounds"][0]) >= {"rows", "tokens", "cut", "kept"}
    row = data["trajectories"][0]
    assert set(row) >= {"text", "token_ids", "reward", "finish_reason", "num_tokens", "rounds_survived", "logprobs"}
    assert len(row["logprobs"]) == row["num_tokens"]
    assert set(data["ledger"]) == set(Ledger().to_dict())
    assert data["resolved"]["kv_budget_tokens"] == data["ledger"]["prompt_tokens"] + 4 * data["resolved"]["first_look"]


@pytest.mark.parametrize(
    "budget", [{}, {"kv_budget_tokens": 5 * LENGTH + 30}], ids=["no budget", "five of sixteen rows fit"]
)
def test_alpha_zero_is_best_of_n_row_by_row(budget: dict[str, int]) -> None:
    zero = load(strategy="speculative_rejection", alpha=0.0, n=16, **budget).generate(PROMPTS, until="\n")
    best = load(strategy="best_of_n", n=16).generate(PROMPTS, until="\n")
    for mine, theirs in zip(zero, best, strict=True):
        assert [row.token_ids for row in mine.trajectories] == [row.token_ids for row in theirs.trajectories]
        assert mine.best.row == theirs.best.row
        assert (len(mine.rounds) > 1) == bool(budget), "a budget for five rows makes waves"


def test_a_rejected_row_is_a_prefix_of_the_row_it_would_have_been() -> None:
    cut = load(alpha=0.5, n=16).generate(PROMPTS)
    full = load(strategy="best_of_n", n=16).generate(PROMPTS)
    rejected = 0
    for mine, theirs in zip(cut, full, strict=True):
        for row, whole in zip(mine.trajectories, theirs.trajectories, strict=True):
            rejected += row.finish_reason == "rejected"
            assert whole.token_ids[: row.num_tokens] == row.token_ids
    assert rejected > 10, "nothing was rejected, so nothing was tested"


def test_a_result_depends_on_no_other_prompt_and_on_no_batch_size() -> None:
    together = load(n=8, batch_size=4).generate(PROMPTS)
    one_by_one = load(n=8, batch_size=1).generate(PROMPTS[::-1])[::-1]
    alone = [load(n=8).generate(prompt)[0] for prompt in PROMPTS]
    for results in (one_by_one, alone):
        for mine, theirs in zip(together, results, strict=True):
            assert mine.trajectories == theirs.trajectories
            assert mine.rounds == theirs.rounds


@pytest.mark.parametrize("args", [{"n": 4}, {"strategy": "best_of_n", "n": 3}], ids=str)
def test_batch_size_auto_gives_the_bits_of_1_and_of_4_prompts_in_flight(
    args: dict[str, Any], counted: Callable[[str, int], None]
) -> None:
    prompts = [f"Q: {a} + {b} + {100 - a} = ?\nA:" for a in (17, 35, 68) for b in (12, 40, 93)]
    numbers = {"logprobs": True, "max_gen_toks": 32, **args}
    auto = load(**numbers)
    assert auto.engine.promises == "bits"
    mine = auto.generate(prompts, until="\n")
    assert auto.prompts_in_flight == min(512 // args["n"], 128) > 9, "all of them at once"
    assert auto.config.batch_size == "auto"
    for batch_size in (1, 4):
        fixed = load(batch_size=batch_size, **numbers)
        for result, theirs in zip(mine, fixed.generate(prompts, until="\n"), strict=True):
            assert result.trajectories == theirs.trajectories  # texts, token ids, log-probs, rewards
            assert result.rounds == theirs.rounds
            assert result.resolved == theirs.resolved
            counted(
                "numbers of batch_size=auto compared bitwise", sum(2 * t.num_tokens + 1 for t in result.trajectories)
            )
        assert fixed.prompts_in_flight == batch_size


def test_batch_size_auto_is_256_rows_where_company_may_change_bits_and_1_with_n_max(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = load(n=2, max_gen_toks=4)
    for promise in ("uniforms", "distribution"):
        monkeypatch.setattr(generator.engine, "promises", promise)
        generator.generate(PROMPTS)
        assert generator.prompts_in_flight == 128
    wide = load(n=100, max_gen_toks=4)
    monkeypatch.setattr(wide.engine, "promises", "uniforms")
    wide.generate(PROMPTS[:1])
    assert wide.prompts_in_flight == 4
    most = load(n="max", n_max=3, max_gen_toks=4)
    most.generate(PROMPTS)
    assert most.prompts_in_flight == 1


def test_batch_size_auto_leaves_room_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load(n=2, max_gen_toks=4)
    needed = max(result.resolved["kv_budget_tokens"] for result in generator.generate(PROMPTS))
    for capacity, prompts in ((100 * needed, 100), (9 * needed + 1, 9), (needed, 4), (0, 4)):
        monkeypatch.setattr(generator.engine, "capacity_tokens", lambda _, tokens=capacity: tokens)
        generator.generate(PROMPTS)
        assert generator.prompts_in_flight == prompts


def test_a_prompt_given_twice_is_drawn_twice_and_the_seed_decides() -> None:
    first, second, third = load(n=4).generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert [first.repeat, second.repeat, third.repeat] == [0, 0, 1]
    assert first.trajectories != third.trajectories
    again = load(n=4).generate([PROMPTS[0]])[0]
    assert again.trajectories == first.trajectories
    other = load(n=4).generate([PROMPTS[0]], seed=1)[0]
    assert other.trajectories != first.trajectories


def test_chat_messages_go_through_the_template_and_a_last_assistant_turn_is_continued(tiny: str) -> None:
    generator = load(pretrained=tiny, reward_model=f"{__name__}:length_reward", n=2, max_gen_toks=8)
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "Hello"}]
    prompt = generator.engine.encode(messages)
    assert list(prompt.token_ids) == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert list(prompt.conversation) == messages
    begun = generator.engine.encode([*messages, {"role": "assistant", "content": "Sure, "}])
    assert begun.response_prefix == "Sure, "
    assert list(begun.conversation) == messages
    assert tokenizer.decode(begun.token_ids).endswith("Sure, ")
    [alone], [listed] = generator.generate(messages), generator.generate([messages])
    assert alone.trajectories == listed.trajectories


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty string"),
        ([], "no messages"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": None}], "message 0"),
        ("x" * 600, "exceeds the model's context"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_decoded(tiny: str, prompt: Any, message: str) -> None:
    generator = load(pretrained=tiny, reward_model=f"{__name__}:length_reward", n=2, max_gen_toks=8)
    with pytest.raises(PromptError, match=message):
        generator.generate(["fine", prompt])
    with pytest.raises(PromptError, match="must be a string, a list of chat messages, or a list of either, got 5"):
        generator.generate(5)  # type: ignore[arg-type]
    assert generator.totals.decode_tokens == 0


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    folder = save(tiny_causal_lm("llama"), tiny_tokenizer(chat_template=None), tmp_path / "plain")
    generator = load(pretrained=str(folder), reward_model="likelihood", n=2, max_gen_toks=8)
    with pytest.raises(PromptError, match="no chat template"):
        generator.generate([[{"role": "user", "content": "Hello"}]])


@pytest.mark.parametrize("until", [[""], [None], ["ok", ""], [3], 7])
def test_a_bad_stop_list_is_refused_before_anything_is_decoded(tiny: str, until: Any) -> None:
    generator = load(pretrained=tiny, reward_model="likelihood", n=2, max_gen_toks=8)
    with pytest.raises(ConfigError, match="until"):
        generator.generate("fine", until=until)
    assert generator.totals.decode_tokens == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"alhpa": 0.5}, "did you mean 'alpha'"),
        ({"alpha": 1.0}, r"alpha must be in \[0, 1\)"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 16, "first_look": 32, "kv_budget_tokens": 100}, "contradict each other"),
        ({"kv_budget_tokens": 100}, "too few for one row of max_gen_toks=256"),
        ({"temperature": 0}, "greedily"),
        ({"strategy": "best_of"}, "best_of_n"),
        ({"reward_model": "likelyhood"}, "likelihood"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(
    args: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_loading(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("specrej_eval.engines.transformers.loading.EnginePlan.load_model", no_loading)
    with pytest.raises(specrej_eval.SpecRejError, match=message):
        specrej_eval.load(**args)


def test_likelihood_is_the_mean_log_prob_of_the_ids_under_the_untempered_model(tiny: str) -> None:
    generator = load(pretrained=tiny, reward_model="likelihood", n=5, max_gen_toks=12, temperature=0.7, top_k=5)
    result = generator.generate("abc")[0]
    assert result.ledger.reward_tokens == 0
    model, prompt = generator.engine.model, generator.engine.encode("abc")  # type: ignore[attr-defined]
    for row in result.trajectories:
        ids = torch.tensor([[*prompt.token_ids, *row.token_ids]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, prompt.num_tokens - 1 : -1].double().log_softmax(-1)
        want = logprobs.gather(-1, ids[0, prompt.num_tokens :, None]).mean().item()
        assert row.reward == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("strategy", ["speculative_rejection", "best_of_n"])
def test_a_run_says_at_its_end_what_answered_and_what_it_cost_and_gained(
    strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = load(n=4, strategy=strategy)
    results = generator.generate(PROMPTS)
    said = capsys.readouterr().err
    assert f"{generator.totals.decode_tokens:,} tokens decoded" in said
    assert f"{sum(result.best.reward or 0 for result in results) / 3:.3f}" in said
    for word in (f"{strategy} (3 at a time)", f"{strategy}: 3 answers", "12 rows", "rejected", "peak memory"):
        assert word in said
    generator.generate(PROMPTS[0])
    assert "answers" not in capsys.readouterr().err, "a single prompt shows no bar and no summary"


# trace and journal


def lines_of(path: Path) -> list[dict[str, Any]]:
    def strict(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=strict) for line in path.read_text().splitlines()]


def test_the_trace_holds_one_event_per_round_and_one_record_per_request(tmp_path: Path) -> None:
    path = tmp_path / "new" / "trace.jsonl"
    results = load(n=8, trace_path=str(path)).generate(PROMPTS)
    events = lines_of(path)
    assert events[0]["event"] == "run"
    assert events[0]["schema_version"] == 1
    assert events[0]["arguments"]["n"] == 8
    for result in results:
        mine = [event for event in events if event.get("prompt_hash") == result.prompt_hash]
        rounds = [event for event in mine if event["event"] == "round"]
        assert [event["round"] for event in rounds] == list(range(1, len(result.rounds) + 1))
        assert [event["rows"] for event in rounds] == [round_.rows for round_ in result.rounds]
        (record,) = [event for event in mine if event["event"] == "request"]
        assert record["text"] == result.text
        assert (record["task"], record["repeat"]) == ("", 0)


def test_an_unwritable_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="trace_path"):
        load(n=2, trace_path=str(tmp_path / "file" / "trace.jsonl")).generate(PROMPTS[0])


def failing_reward(conversation: list[dict[str, str]], responses: list[str]) -> list[float]:
    if "72" in conversation[0]["content"]:
        raise ValueError("no such luck")
    return length_reward(conversation, responses)


def test_what_finished_before_a_failure_is_kept_and_a_rerun_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    args = {"reward_model": f"{__name__}:failing_reward", "n": 4, "batch_size": 1, "journal": str(path)}
    with pytest.raises(RewardError, match="no such luck"):
        load(**args).generate(PROMPTS)
    assert len(lines_of(path)) == 1 + 2, "the fingerprint and the two prompts that were answered"
    fresh = load(**{**args, "journal": None}).generate(PROMPTS[:2])
    again = load(**args)
    resumed = again.generate(PROMPTS[:2])
    assert again.totals.decode_tokens == 0, "finished requests are not decoded again"
    for mine, theirs in zip(resumed, fresh, strict=True):
        assert mine.trajectories == theirs.trajectories
        assert mine.rounds == theirs.rounds
        assert mine.best.row == theirs.best.row


def test_a_journal_cut_short_by_a_kill_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = load(n=4, journal=str(path)).generate(PROMPTS)
    content = path.read_bytes()
    for kept in range(1, len(content), max(1, len(content) // (12 if FULL else 5))):
        path.write_bytes(content[:kept])
        resumed = load(n=4, journal=str(path)).generate(PROMPTS)
        assert [result.trajectories for result in resumed] == [result.trajectories for result in whole]
        assert len(lines_of(path)) == 1 + len(PROMPTS)


def test_a_journal_of_another_configuration_is_refused_or_not_used(tmp_path: Path, tiny: str) -> None:
    path = tmp_path / "journal.jsonl"
    load(n=4, journal=str(path)).generate(PROMPTS[0])
    other = load(n=4, journal=str(path), alpha=0.25)
    other.generate(PROMPTS[0])
    assert other.totals.decode_tokens > 0, "another alpha is another request"
    with pytest.raises(ConfigError, match=r"a different configuration.*reward_model"):
        load(n=4, journal=str(path), reward_model="likelihood").generate(PROMPTS[0])
    (tmp_path / "notes.txt").write_text("hello\nworld\n")
    with pytest.raises(ConfigError, match="is not a journal"):
        load(n=4, journal=str(tmp_path / "notes.txt")).generate(PROMPTS[0])
    assert (tmp_path / "notes.txt").read_text() == "hello\nworld\n"


def test_a_journal_made_with_other_weights_of_the_same_name_is_refused(tmp_path: Path) -> None:
    folder, path = tmp_path / "model", tmp_path / "journal.jsonl"
    args = {"pretrained": str(folder), "reward_model": "likelihood", "n": 2, "max_gen_toks": 8, "journal": str(path)}
    save(tiny_causal_lm("llama"), tiny_tokenizer(), folder)
    load(**args).generate("abc")
    model = tiny_causal_lm("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    save(model, tiny_tokenizer(), folder)
    with pytest.raises(ConfigError, match=r"pretrained: model.safetensors changed"):
        load(**args).generate("abc")


def test_n_max_is_resolved_once_recorded_and_taken_from_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(n="max", batch_size=1)
    real = generator.engine.capacity_tokens(12)
    assert real > 1000, "memory holds far more tokens of a tiny model"
    path = tmp_path / "journal.jsonl"

    def with_capacity(tokens: int) -> Generator:
        made = load(n="max", journal=str(path))
        monkeypatch.setattr(made.engine, "capacity_tokens", lambda *_: tokens, raising=False)
        return made

    first = with_capacity(200).generate(PROMPTS[0])[0]
    assert first.resolved["kv_budget_tokens"] == 200
    assert first.resolved["n"] == (200 - first.ledger.prompt_tokens) // first.resolved["first_look"]
    resumed = with_capacity(400).generate([PROMPTS[0], PROMPTS[1]])
    assert [result.resolved["kv_budget_tokens"] for result in resumed] == [200, 200]


def test_n_max_is_said_and_capped_and_on_a_cpu_many_rows_need_n_max(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load(n="max")  # a tiny model: memory holds thousands of rows
    monkeypatch.setattr(generator.engine, "decode", lambda *_: pytest.fail("refused before anything is decoded"))
    with pytest.raises(ConfigError, match=r"n=max comes to 1,024 rows(.|\n)*more than 256 rows(.|\n)*n_max=1024"):
        generator.generate(PROMPTS[0])
    result = load(n="max", n_max=20).generate(PROMPTS[0], until="\n")[0]
    numbers = result.resolved
    assert (numbers["n"], numbers["n_max"], len(result.trajectories)) == (20, 20, 20)
    assert numbers["kv_budget_tokens"] == result.ledger.prompt_tokens + 20 * numbers["first_look"]
    told = [record.message for record in caplog.records if record.message.startswith("n=max comes to 20 rows")]
    assert len(told) == 1 and "MiB" in told[0] and "a second a prompt" in told[0]
    fixed = load(n=20, first_look=numbers["first_look"]).generate(PROMPTS[0], until="\n")[0]
    assert fixed.trajectories == result.trajectories


def test_a_run_of_n_max_begun_before_n_max_was_capped_goes_on_with_as_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specrej_eval.generator, "N_MAX", 40)
    path = tmp_path / "journal.jsonl"

    def rows(prompt: str) -> int:
        generator = load(n="max", first_look=16, max_gen_toks=16, journal=str(path))
        monkeypatch.setattr(generator.engine, "capacity_tokens", lambda _: 12 + 60 * 16)
        return int(generator.generate(prompt)[0].resolved["n"])

    with monkeypatch.context() as before:
        before.setattr(specrej_eval.generator, "N_MAX", 10**6)
        first = rows(PROMPTS[0])
    assert first > 40
    assert rows(PROMPTS[2]) >= first
    path.unlink()
    assert rows(PROMPTS[2]) == 40


def nan_reward(conversation: list[dict[str, str]], responses: list[str]) -> list[float]:
    return [math.nan if place == 0 and len(responses) > 1 else float(place) for place in range(len(responses))]


def test_rewards_that_are_not_finite_are_an_error_or_rank_last() -> None:
    with pytest.raises(RewardError, match="row 0"):
        load(reward_model=f"{__name__}:nan_reward", n=4).generate(PROMPTS[0])
    result = load(reward_model=f"{__name__}:nan_reward", n=4, on_nan="drop").generate(PROMPTS[0])[0]
    assert result.nan_rewards > 0
    assert result.best.reward is not None
    json.dumps(result.to_dict(), allow_nan=False)

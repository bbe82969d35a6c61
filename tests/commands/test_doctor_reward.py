"""`specrej-eval doctor --reward`: each check passes on a sound reward model and fails on one made wrong in that way."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from support import reward_servers as servers
from support.rewards import make_reward
from support.tiny_models import CHAT_TEMPLATE, save, tiny_reward_model, tiny_tokenizer

from specrej_eval.checkpoint import DEMO_REWARD
from specrej_eval.cli import main
from specrej_eval.commands.doctor import reward as reward_doctor
from specrej_eval.commands.doctor.probes import PROBES, demo_probes
from specrej_eval.commands.doctor.reward import (
    Patient,
    check_content,
    check_input,
    check_pairs,
    check_partial,
    check_stability,
)
from specrej_eval.config import RunConfig
from specrej_eval.core import RowView
from specrej_eval.errors import RewardError
from specrej_eval.rewards.base import RewardModel

BETTER = {better for _, better, _ in PROBES.pairs}
WORTH = {answer: -place for _, answers in PROBES.answers for place, answer in enumerate(answers)}


class Scripted(RewardModel):
    """Whatever a function of the rows says."""

    name = "r"

    def __init__(self, say: Callable[[Sequence[RowView]], list[Any]]) -> None:
        self._say = say

    def score(self, conversation: Any, rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        return self._say(rows)


def knowing(conversation: Sequence[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """Knows all answers by heart, and by their first halves."""
    return [
        next(
            (float(worth) for answer, worth in WORTH.items() if answer.startswith(text) and len(text) > 5),
            float(text in BETTER),
        )
        for text in responses
    ]


def contrary(conversation: Any, responses: Sequence[str]) -> list[float]:
    """Whole answers the wrong way round."""
    return [
        -score if text in WORTH or text in BETTER else score
        for text, score in zip(responses, knowing(conversation, responses), strict=True)
    ]


def saturated(conversation: Any, responses: Sequence[str]) -> list[float]:
    return [1.0 for _ in responses]


def by_place(conversation: Any, responses: Sequence[str]) -> list[float]:
    """A score that depends on where in the batch a text stands."""
    return [len(text) + 5.0 * place for place, text in enumerate(responses)]


def of(check: Any, reward: Any) -> dict[str, str]:
    return {finding.subject: finding.status for finding in check(Patient(reward, PROBES))}


def callable_reward(name: str) -> Any:
    return make_reward(RunConfig(reward_model=f"{__name__}:{name}"), device="cpu")


def checkpoint(folder: Path, template: str = CHAT_TEMPLATE, **options: Any) -> Any:
    model = tiny_reward_model(**options)
    save(model, tiny_tokenizer(chat_template=template), folder / "rm")
    return make_reward(RunConfig(reward_model=str(folder / "rm")), device="cpu")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_embedded_reward_model_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--reward", str(DEMO_REWARD)]) == 0
    said = capsys.readouterr().out
    assert "passed all checks" in said
    assert "BROKEN" not in said
    assert said.count("better > worse") == 6
    assert said.count("half against whole") == 4
    assert "<|eos|>" in said  # the tokens themselves
    for subject in ("BOS", "last token", "padding", "single == batch", "left == right padding"):
        assert subject in said


@pytest.mark.parametrize(("name", "code"), [("knowing", 0), ("contrary", 1), ("saturated", 1), ("by_place", 1)])
def test_the_exit_code_says_whether_all_passed(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--reward", f"{__name__}:{name}"]) == code
    assert ("BROKEN" in capsys.readouterr().out) == bool(code)


def test_a_reward_that_cannot_be_had_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--reward", "likelyhood"]) == 1
    assert "did you mean 'likelihood'" in capsys.readouterr().err
    assert main(["doctor", "--reward", "self_certainty"]) == 1
    assert "reads no text" in capsys.readouterr().err


def test_plain_doctor_still_looks_at_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "Versions" in capsys.readouterr().out


def test_a_failing_check_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--reward", f"{__name__}:breaks_on_half"]) == 1
    said = capsys.readouterr().out
    assert said.count("better > worse") == 6
    assert "failed" in said


def breaks_on_half(conversation: Any, responses: Sequence[str]) -> list[float]:
    if not all(
        text in WORTH or text in BETTER or any(text == worse for *_, worse in PROBES.pairs) for text in responses
    ):
        raise ValueError("half an answer")
    return knowing(conversation, responses)


# ---- each check ------------------------------------------------------------------------------------------------------


def test_what_is_read_is_shown(tmp_path: Path) -> None:
    findings = {finding.subject: finding for finding in check_input(Patient(checkpoint(tmp_path), PROBES))}
    assert {finding.status for finding in findings.values()} == {"ok"}
    tokens = findings["tokens"].detail
    assert tokens.split()[1:3] == ["<bos>", "<|turn|>"]
    assert tokens.endswith("<|end|>")
    assert "stands 1 time" in findings["BOS"].detail
    assert "'<|end|>' (id 4), which is not EOS" in findings["last token"].detail


@pytest.mark.parametrize(
    ("template", "subject", "status"),
    [
        ("{{ bos_token }}" + CHAT_TEMPLATE, "BOS", "broken"),
        (CHAT_TEMPLATE.removeprefix("{{ bos_token }}"), "BOS", "note"),
        (
            CHAT_TEMPLATE.replace("message['content']", "message['content'] if message['role'] == 'user'"),
            "response",
            "broken",
        ),
        (
            CHAT_TEMPLATE.replace("message['content']", "message['content'] if message['role'] != 'user'"),
            "prompt",
            "broken",
        ),
        (CHAT_TEMPLATE + "{{ strftime_now('%d %b %Y') }}", "date", "note"),
        (CHAT_TEMPLATE + "<pad>", "padding", "note"),
    ],
)
def test_a_wrong_template_is_noticed(template: str, subject: str, status: str, tmp_path: Path) -> None:
    found = of(check_input, checkpoint(tmp_path, template))
    assert found[subject] == status


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gpt2"])
def test_a_sound_checkpoint_is_stable(arch: str, tmp_path: Path) -> None:
    found = of(check_stability, checkpoint(tmp_path, arch=arch))
    assert found == {"single == batch": "ok", "ties": "ok", "left == right padding": "ok"}


def test_a_model_that_reads_its_padding_is_noticed(tmp_path: Path) -> None:
    reward = checkpoint(tmp_path)
    forward = reward.body.forward

    def without_mask(input_ids: Any, attention_mask: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(input_ids, torch.ones_like(attention_mask), position_ids, **more)

    reward.body.forward = without_mask
    found = of(check_stability, reward)
    assert found["left == right padding"] == "broken"
    assert found["single == batch"] == "ok"  # our own padding is on the right, where nobody looks


@pytest.mark.parametrize(
    ("name", "subject", "status"),
    [
        ("knowing", "single == batch", "ok"),
        ("by_place", "single == batch", "broken"),
        ("saturated", "ties", "broken"),
        ("knowing", "ties", "ok"),
        ("knowing", "left == right padding", "note"),
    ],
)
def test_scores_depend_on_the_answer_alone(name: str, subject: str, status: str) -> None:
    assert of(check_stability, callable_reward(name))[subject] == status


def test_nan_is_broken() -> None:
    assert reward_doctor._compared("x", [float("nan")], [1.0], 1.0).status == "broken"


def test_known_pairs() -> None:
    for name, status in (("knowing", "ok"), ("contrary", "broken"), ("saturated", "broken")):
        findings = list(check_pairs(Patient(callable_reward(name), PROBES)))
        assert [finding.status for finding in findings] == [status] * 7  # six pairs, and what luck would give


def test_a_coin_seldom_passes() -> None:
    rng = random.Random(0)
    passed = 0
    for _ in range(400):
        coin = Scripted(lambda rows: [rng.random() for _ in rows])
        *_, luck = check_pairs(Patient(coin, PROBES))
        passed += luck.status == "ok"
    assert passed < 0.08 * 400
    assert luck.subject.endswith("of 18 pairs")
    assert reward_doctor.by_luck(5, 6) == pytest.approx(7 / 64)
    assert reward_doctor.by_luck(13, 18) < reward_doctor.LUCK < reward_doctor.by_luck(12, 18)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, None, "1", "short", "long"])
@pytest.mark.parametrize("check", [check_stability, check_pairs, check_partial])
def test_what_is_no_number_is_broken_wherever_it_comes(
    check: Any, wrong: Any, counted: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def score(rows: Sequence[RowView]) -> list[Any]:
        nonlocal calls
        calls += 1
        scores: list[Any] = knowing([], [row.text for row in rows])
        if calls - 1 == at:
            if wrong in ("short", "long"):
                return scores[1:] if wrong == "short" else [*scores, 0.0]
            scores[-1] = wrong
        return scores

    reward = Scripted(score)
    at = -1
    list(check(Patient(reward, PROBES)))
    total = calls
    for at in range(total):  # noqa: B007  read by score
        calls = 0
        with pytest.raises(RewardError, match=r"not a finite number|scores? (was|were) expected"):
            list(check(Patient(reward, PROBES)))
    counted("scores that are no numbers put before the doctor", total)
    at, calls = 3, 0
    assert reward_doctor.examine(reward) == 1
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "status"), [("knowing", "ok"), ("contrary", "broken"), ("saturated", "broken")])
def test_partial_scores_must_say_something(name: str, status: str) -> None:
    *_, mean = check_partial(Patient(callable_reward(name), PROBES))
    assert mean.status == status


LENGTHS_TEMPLATE = "{% for m in messages %}{{ m['content'] | length }}<|end|>{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("rule", "template", "status", "told"),
    [
        (None, CHAT_TEMPLATE, "ok", "read as text"),
        ("encode_as_text", CHAT_TEMPLATE, "ok", "read as text"),
        ("allow", CHAT_TEMPLATE, "note", "read as control tokens, so that a text can begin and end turns"),
        ("error", CHAT_TEMPLATE, "ok", "is refused"),
        (None, LENGTHS_TEMPLATE, "broken", "stops a run"),  # what is planted changes what the template itself writes
    ],
)
def test_doctor_plants_special_tokens_and_says_what_becomes_of_them(
    rule: str | None, template: str, status: str, told: str, tmp_path: Path
) -> None:
    save(tiny_reward_model(), tiny_tokenizer(chat_template=template), tmp_path / "rm")
    reward = make_reward(RunConfig(reward_model=str(tmp_path / "rm"), special_tokens_in_content=rule), device="cpu")
    findings = list(check_content(Patient(reward, PROBES)))
    assert [finding.status for finding in findings] == [status, status]
    assert all(told in finding.detail and "<|end|>" in finding.detail for finding in findings)
    assert "in an answer" in findings[0].detail and "in a prompt" in findings[1].detail


def test_doctor_notices_a_reader_that_lets_content_become_control_tokens(tmp_path: Path) -> None:
    reward = checkpoint(tmp_path)
    reward.renderer.tokeniser.check = lambda contents: False  # the planted defect: nobody looks at content
    assert of(check_content, reward) == {"special tokens": "broken"}


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("sglang", {"reward_tokenizer": True}, "is read as text"),
        ("openrlhf", {"reward_tokenizer": True}, "is read as text"),
        ("tei", {}, "what looks like a control token"),
        ("vllm", {}, "zero-width space"),
        ("judge", {}, "zero-width space"),
    ],
)
@pytest.mark.parametrize("rule", ["encode_as_text", "allow", "error"])
def test_doctor_says_what_a_server_gets(kind: str, options: Any, told: str, rule: str, tmp_path: Path) -> None:
    folder = str(save(None, tiny_tokenizer(), tmp_path / "t"))
    given = {"reward_tokenizer": folder} if options else {}

    def score(read: Any) -> float:
        return float(len(str(read)))

    serve = servers.chat(lambda text: {"5": 1.0}) if kind == "judge" else getattr(servers, kind)(score)
    with serve as server:
        name = f"judge:m@{server.url}/v1" if kind == "judge" else server.url
        reward = make_reward(RunConfig(reward_model=name, special_tokens_in_content=rule, **given), device="cpu")
        findings = list(check_content(Patient(reward, PROBES)))
    assert {finding.status for finding in findings} == {"note" if rule == "allow" else "ok"}
    wanted = {"encode_as_text": told, "allow": "special_tokens_in_content=allow", "error": "is refused"}[rule]
    assert all(wanted in finding.detail for finding in findings)


def test_doctor_takes_the_rule_as_an_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "rm"))
    main(["doctor", "--reward", folder, "--special_tokens_in_content", "allow"])
    assert "so that a text can begin and end turns" in capsys.readouterr().out
    assert main(["doctor", "--reward", folder, "--special_tokens_in_content", "alow"]) == 1
    assert "Did you mean 'allow'" in capsys.readouterr().err


def test_doctor_says_what_a_language_model_promises(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.tiny_models import tiny_causal_lm

    from specrej_eval.engines.transformers import model as engine_model

    folder = str(save(tiny_causal_lm(), tiny_tokenizer(), tmp_path / "policy"))
    assert main(["doctor", "--pretrained", folder, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "shared_prefix" in said and "bits: a row's logits are the same bits" in said
    assert "'<bos>' in a message is read as text" in said
    assert main(["doctor", "--pretrained", folder, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert "uniforms: " in (said := capsys.readouterr().out) and "always so in bfloat16" in said
    monkeypatch.setattr(engine_model, "ROW_ALIGN", 1)  # then rows do differ: what was measured is what is said
    plain = ["--device", "cpu", "--compile", "off"]  # the C++ kernels would keep the promise all the same
    assert main(["doctor", "--pretrained", folder, *plain, "--special_tokens_in_content", "allow"]) == 0
    said = capsys.readouterr().out
    assert "measured when the model was loaded" in said and "is read as a control token" in said
    both = main(["doctor", "--pretrained", folder, "--reward", f"{__name__}:saturated"])
    said = capsys.readouterr().out
    assert both == 1 and "How it is decoded" in said and "What it reads" in said
    assert main(["doctor", "--pretrained", str(tmp_path / "polcy")]) == 1
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(("threads", "status"), [(1, "ok"), (2, "ok"), (3, "note")])
def test_plain_doctor_says_where_the_promise_of_bits_is_told(threads: int, status: str) -> None:
    from specrej_eval.commands.doctor import _same_bits

    found = _same_bits(threads)
    assert (
        found.status == status
        and "doctor --pretrained M" in found.detail
        and "results say which it was" in found.detail
    )


def test_an_ensemble_is_looked_at_part_by_part(tmp_path: Path) -> None:
    folder = str(save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "rm"))
    name = f"{folder}+{__name__}:knowing"
    reward = make_reward(RunConfig(reward_model=name), device="cpu")
    subjects = [finding.subject for finding in check_input(Patient(reward, PROBES))]
    assert [f.status for f in check_content(Patient(reward, PROBES))] == ["ok", "ok", "ok", "ok", "note"]
    assert subjects.count("part") == 2
    assert subjects.count("BOS") == 1
    ranked = make_reward(RunConfig(reward_model=name, reward_ensemble="rank"), device="cpu")
    assert of(check_stability, ranked) == {"single == batch": "note"}


def test_a_server_is_looked_at_through_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save(None, tiny_tokenizer(), tmp_path / "t"))

    def score(ids: tuple[int, ...]) -> float:
        text = tiny_tokenizer().decode(ids, skip_special_tokens=True)
        answer = text.rpartition("assistant\n")[2]
        return knowing([], [answer])[0]

    with servers.sglang(score) as server:
        assert main(["doctor", "--reward", server.url, "--reward_tokenizer", folder]) == 0
    said = capsys.readouterr().out
    assert "<|turn|>" in said
    assert "pads in its own way" in said


def test_the_probes_are_what_they_should_be() -> None:
    for probes in (PROBES, demo_probes()):
        assert len(probes.pairs) == 6
        assert len(probes.answers) == 4
        assert all(better != worse for _, better, worse in probes.pairs)
        assert all(len(set(answers)) == len(answers) >= 6 for _, answers in probes.answers)


numbers = st.lists(st.floats(-10, 10) | st.sampled_from([0.0, 1.0]), min_size=3, max_size=12)


@given(numbers.flatmap(lambda one: st.tuples(st.just(one), st.permutations(one))))
def test_rank_correlation_is_spearmans(both: tuple[list[float], list[float]]) -> None:
    one, other = both
    if len(set(one)) == 1:
        assert reward_doctor.rank_correlation(one, other) == 0
    else:
        assert reward_doctor.rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)

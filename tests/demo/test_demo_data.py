"""The demo pair's problems are kept apart, its task file is right, and its saved models load as any checkpoint does."""

import importlib
import json
import random
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from arithmetic import (
    HIGHEST,
    LOWEST,
    NUM_OPERANDS,
    Operands,
    answer_of,
    noise,
    num_correct_chars,
    problems,
    prompt,
    question,
    right_chars,
    slip,
    solution,
    split_of,
    training_batches,
)
from support import ROOT

from specrej_eval.demo import POLICY_DIR, PROBES, REWARD_DIR

TASK_FILE = ROOT / "tasks" / "specrej_arithmetic" / "test.jsonl"
MAX_BYTES = 12_000_000


def operands_of(text: str) -> Operands:
    return tuple(int(number) for number in text.removesuffix(" = ?").split(" + "))


def task_rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in TASK_FILE.read_text().splitlines()]


def test_task_file_is_right() -> None:
    rows = task_rows()
    assert len(rows) >= 1000
    for row in rows:
        operands = operands_of(row["question"])
        assert len(operands) == NUM_OPERANDS
        assert all(LOWEST <= number <= HIGHEST for number in operands)
        assert row["prompt"] == prompt(operands)
        assert row["answer"] == str(sum(operands)) == str(answer_of(row["solution"]))
        steps = row["solution"].removesuffix(f". Answer: {row['answer']}").split("; ")
        assert len(steps) == NUM_OPERANDS - 1
        for step in steps:
            left, total = step.split("=")
            assert sum(map(int, left.split("+"))) == int(total)


def training_script() -> Any:
    """benchmarks/demo_pair/train.py, imported as it runs: its neighbours by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "demo_pair"))
        return importlib.import_module("train")


def test_problem_sets_are_disjoint_up_to_reordering() -> None:
    """By the rule (a hash of the sorted operands gives one split), and in the streams that the training script uses."""
    train = training_script()
    lm_args = train.LanguageModelArgs()
    test = {tuple(sorted(operands_of(row["question"]))) for row in task_rows()}
    assert len(test) == len(task_rows())
    assert {tuple(sorted(operands)) for operands in train.test_problems()} == test
    select = {tuple(sorted(operands)) for operands in train.selection_problems()}
    first, further = (
        training_batches(random.Random(seed), lm_args.batch_size, lm_args.short_share)
        for seed in (train.SEED, train.SEED + 4)
    )
    trained = chain(
        chain.from_iterable(islice(first, lm_args.num_steps)),
        chain.from_iterable(islice(further, lm_args.num_further_steps)),
        train.reward_training_problems(),
        islice(problems("train", random.Random(train.SEED)), 5_000),
    )
    train_set = {tuple(sorted(operands)) for operands in trained}
    assert {split_of(key) for key in test} == {"test"}
    assert {split_of(key) for key in select} == {"select"}
    assert not test & select
    assert not test & train_set
    assert not select & train_set


def test_split_ignores_the_order_of_operands() -> None:
    rng = random.Random(5)
    for operands in islice(problems("test", rng), 20):
        assert split_of(rng.sample(operands, len(operands))) == "test"


def test_slips_are_mistakes_or_right_solutions_in_the_same_format() -> None:
    rng = random.Random(0)
    wrong = 0
    for operands in islice(problems("train", rng), 500):
        text = slip(operands, rng)
        assert answer_of(text) is not None
        good = num_correct_chars(operands, text)
        assert solution(operands).startswith(text[:good])
        wrong += text != solution(operands)
    assert wrong > 400


def test_right_chars_mark_the_slip_and_not_what_follows_from_it() -> None:
    operands = (12, 34, 56)
    assert solution(operands) == " 12+34=46; 46+56=102. Answer: 102"
    for end in range(len(solution(operands)) + 1):
        assert right_chars(operands, solution(operands)[:end]) == [True] * end
    text = " 12+34=47; 47+56=103. Answer: 103"
    assert [place for place, right in enumerate(right_chars(operands, text)) if not right] == [text.index("7;")]
    for operands in islice(problems("train", random.Random(1)), 200):
        for text in (slip(operands, random.Random(2)), noise(operands, random.Random(3))):
            marks = right_chars(operands, text)
            assert len(marks) == len(text)
            good = num_correct_chars(operands, text)
            assert all(marks[:good])
            if good < len(text):
                assert not all(marks)


@pytest.mark.parametrize("folder", [POLICY_DIR, REWARD_DIR], ids=["policy", "reward"])
def test_saved_tokenizer_and_template(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    operands = (12, 45, 33)
    raw, answer = prompt(operands), solution(operands)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for content in (question(operands), question(operands).replace(" ", ""), raw):
        user = {"role": "user", "content": content}
        rendered = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        assert rendered == raw
        assert tokenizer(rendered).input_ids == tokenizer(raw, add_special_tokens=False).input_ids
        for end in range(1, len(answer) + 1):
            closed = [user, {"role": "assistant", "content": answer[:end]}]
            ids = tokenizer(tokenizer.apply_chat_template(closed, tokenize=False), add_special_tokens=False).input_ids
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
            assert ids[:-1] == tokenizer(raw + answer).input_ids[: len(ids) - 1]
    assert tokenizer.decode(tokenizer(raw + answer).input_ids) == raw + answer


def test_saved_models_load_and_tell_right_from_wrong() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    files = [file for folder in (POLICY_DIR, REWARD_DIR) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    policy = transformers.AutoModelForCausalLM.from_pretrained(POLICY_DIR)
    assert policy.dtype == torch.float16
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id
    assert policy.config.max_position_embeddings >= 512
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(REWARD_DIR, dtype=torch.float32).eval()
    assert reward.config.num_labels == 1
    assert all(tensor.isfinite().all() for model in (policy, reward) for tensor in model.state_dict().values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(REWARD_DIR)
    operands = operands_of(task_rows()[0]["question"])
    right = solution(operands)
    place = right.index("=") + 1
    wrong = right[:place] + str((int(right[place]) + 3) % 9 + 1) + right[place + 1 :]
    scores = []
    for answer in (right, wrong):
        turns = [{"role": "user", "content": prompt(operands)}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True).input_ids
        with torch.no_grad():
            scores.append(reward(input_ids=ids).logits.item())
    assert scores[0] > scores[1]


def test_what_doctor_asks_the_reward_model_is_made_as_said() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks" / "demo_pair"))
        made = importlib.import_module("probes").probes()
    assert json.loads(PROBES.read_text()) == json.loads(json.dumps(made))

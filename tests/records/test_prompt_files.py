"""Files of prompts in every format we read, what is wrong with the others, and the names of generators."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specrej_eval.core import Question
from specrej_eval.errors import ConfigError
from specrej_eval.records.prompt_files import read_prompts
from specrej_eval.records.run_names import default_name, model_name

ROWS = [
    {"instruction": "Say hello, please.", "source": "a"},
    {"instruction": 'Quote "this"\nover two lines;\twith a tab.', "source": "b"},
    {"instruction": "  Grüße an 世界 \u2028 ", "source": ""},
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(folder: Path, rows: list[dict[str, str]], name: str = "prompts.csv", **options: Any) -> Path:
    path = folder / name
    with open(path, "w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        file.write(options.pop("before", ""))
        writer = csv.DictWriter(file, rows[0].keys(), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def refusal(path: Path, **arguments: Any) -> str:
    """The one message for a bad file, which always names it."""
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, **arguments)
    assert path.name in str(caught.value)
    return str(caught.value)


# formats


def asked(instruction: str, index: int, fields: dict[str, Any] | None = None) -> Question:
    return Question(instruction=instruction, index=index, fields=fields or {})


def expected() -> list[Question]:
    return [asked(row["instruction"], index, {"source": row["source"]}) for index, row in enumerate(ROWS)]


def test_json_and_jsonl(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a.json", json.dumps(ROWS))) == expected()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    assert read_prompts(write(tmp_path, "a.jsonl", "".join(lines))) == expected()
    assert read_prompts(write(tmp_path, "b.JSONL", "\ufeff" + "\r\n".join(line.strip("\n") for line in lines))) == (
        expected()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoding": "utf-8-sig"},
        {"lineterminator": "\n"},
        {"quoting": csv.QUOTE_ALL},
        {"before": "sep=;\r\n", "delimiter": ";"},
        {"before": "sep=\t\r\n", "delimiter": "\t"},
        {"name": "prompts.tsv", "delimiter": "\t"},
        {"name": "prompts.tsv", "before": "sep=,\n"},
    ],
)
def test_tables(tmp_path: Path, options: dict[str, Any]) -> None:
    assert read_prompts(table(tmp_path, ROWS, **options)) == expected()


@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip),
        min_size=1,
    )
)
def test_a_table_gives_back_every_text_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        path = table(folder, [{"prompt": text} for text in texts], name, delimiter=delimiter)
        assert [record.instruction for record in read_prompts(path)] == texts


def test_lists_of_strings(tmp_path: Path) -> None:
    for path in (write(tmp_path, "a.json", '["one", "two"]'), write(tmp_path, "a.jsonl", '"one"\n\n"two"\n')):
        assert read_prompts(path) == [asked("one", 0), asked("two", 1)]


def test_a_prompt_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (record,) = read_prompts(table(tmp_path, [{"prompt": "x" * 200_000}]))
    assert len(record.instruction) == 200_000
    assert csv.field_size_limit() == before


def test_nan_from_pandas_can_be_written_into_our_records(tmp_path: Path) -> None:
    (record,) = read_prompts(write(tmp_path, "a.json", '[{"prompt": "a", "score": NaN}]'))
    assert record.fields == {"score": None}


def test_limit_takes_the_first_and_looks_at_no_others(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '"one"\n"two"\nnot json\n')
    assert [record.instruction for record in read_prompts(path, limit=2)] == ["one", "two"]
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        read_prompts(path, limit=0)


# columns


def test_instruction_comes_before_prompt_and_another_column_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path, [{"prompt": "rendered", "instruction": "bare", "question": "asked"}])
    assert read_prompts(path) == [asked("bare", 0, {"prompt": "rendered", "question": "asked"})]
    assert read_prompts(path, prompt_column="question")[0].instruction == "asked"
    assert "did you mean 'question'?" in refusal(path, prompt_column="qestion")


def test_alpacafarms_input_is_part_of_the_instruction(tmp_path: Path) -> None:
    """As AlpacaEval merged them; the reference implementation lost it."""
    rows = [
        {"instruction": "Translate.", "input": "Guten Tag", "dataset": "x"},
        {"instruction": "Hi!", "input": "", "dataset": "x"},
        {"instruction": "Hi!!", "input": None, "dataset": "x"},
        {"instruction": "Hi!!!", "dataset": "x"},
    ]
    records = read_prompts(write(tmp_path, "a.json", json.dumps(rows)))
    assert [record.instruction for record in records] == ["Translate.\n\nGuten Tag", "Hi!", "Hi!!", "Hi!!!"]
    assert all(record.fields == {"dataset": "x"} for record in records)


def test_input_beside_a_prompt_that_is_no_instruction_is_a_column_like_others(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[{"prompt": "Below is ... Guten Tag", "input": "Guten Tag"}]')
    assert read_prompts(path) == [asked("Below is ... Guten Tag", 0, {"input": "Guten Tag"})]
    assert read_prompts(path, prompt_column="input")[0].instruction == "Guten Tag"


# what is wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "Say hello.", "from .json, .jsonl, .csv, .tsv files"),
        ("a", "Say hello.", "not from 'this'"),
        ("a.json", "[]", "holds no prompts"),
        ("a.jsonl", "\n\n", "holds no prompts"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv", "prompt\r\n", "holds no prompts"),
        ("a.json", '{"data": ["a"]}', "must hold a JSON list, got an object"),
        ("a.json", '"a"\n"b"\n', "name such a file .jsonl"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", '"a"\n{"prompt": ', "line 2 is not valid JSON"),
        ("a.json", '[{"question": "a"}]', "no column 'instruction' or 'prompt'"),
        ("a.json", '[{"prompt": "a"}, {"question": "b"}]', "row 2: there is no 'prompt'"),
        ("a.json", '[{"prompt": "a"}, {"prompt": " \\n"}]', "row 2: 'prompt' is empty"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": ""}\n', "line 3: 'prompt' is empty"),
        ("a.json", '["a", ""]', "row 2: the prompt is empty"),
        ("a.json", '[{"prompt": 3}]', "row 1: 'prompt' must be a text, got a number"),
        ("a.json", '[{"prompt": null}]', "got nothing"),
        ("a.json", '[{"prompt": [{"role": "user"}]}]', "got a list"),
        ("a.json", '[{"instruction": "a", "input": 3}]', "'input' must be a text, got a number"),
        ("a.json", '[{"prompt": "a"}, "b"]', "row 2: must be an object, as the rows before it, got a string"),
        ("a.json", '["a", {"prompt": "b"}]', "row 2: must be a string"),
        ("a.json", "[3]", "row 1: must be an object or a string, got a number"),
        ("a.csv", "prompt,x\na,1\n,2\n", "row 2: 'prompt' is empty"),
        ("a.csv", "x,prompt\n1\n", "row 1: 'prompt' is empty"),
        ("a.csv", "prompt,x\nHello, world,1\n", "row 1: 3 cells, but the header has 2"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: not a well-formed table"),
        ("a.csv", 'prompt\n"a\nb\n', "not a well-formed table"),
        ("a.csv", "prompt,prompt\na,b\n", "two columns 'prompt'"),
        ("a.csv", "id;prompt\n1;a\n", "write `sep=;`"),
        ("a.tsv", "id,prompt\n1,a\n", "write `sep=,`"),
        ("a.csv", "id,prompt\n1,é\n".encode("latin-1"), "not text in UTF-8"),
        ("a.csv", "prompt\na\n".encode("utf-16"), "choose `CSV UTF-8`"),
    ],
)
def test_a_bad_file_gets_one_message_with_file_and_row(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    assert message in refusal(write(tmp_path, name, content))


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    """The index that pandas writes, and the comma that ends each line of some exports."""
    path = write(tmp_path, "a.csv", ",prompt,\n0,a,\n1,b,\n")
    assert read_prompts(path) == [
        asked("a", 0, {}),
        asked("b", 1, {}),
    ]


def test_prompt_column_of_a_list_of_strings_names_nothing(tmp_path: Path) -> None:
    assert "names nothing" in refusal(write(tmp_path, "a.json", '["a"]'), prompt_column="prompt")


def test_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, "prompts.csv", "prompt\na\n")
    assert f"did you mean {str(tmp_path / 'prompts.csv')!r}?" in refusal(tmp_path / "promts.csv")
    assert "does not exist either" in refusal(tmp_path / "nowhere" / "prompts.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "but a folder" in refusal(tmp_path / "folder.csv")


def test_equal_prompts_are_kept_and_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.json", '["a", "b", "a", "a"]')
    with caplog.at_level(logging.WARNING):
        assert [record.instruction for record in read_prompts(path)] == ["a", "b", "a", "a"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "2 prompts are repeated (row 3 is row 1 again, ...)" in message


# names

RUN = {
    "strategy": "best_of_n",
    "alpha": None,
    "n": 960,
    "seed": 0,
    "pretrained": "Qwen/Qwen3-1.7B",
    "reward_model": "/models/Skywork Reward/",
}


@pytest.mark.parametrize(
    ("changes", "n", "name"),
    [
        ({}, None, "Bo960_Qwen3-1.7B_Skywork-Reward"),
        ({"seed": [0, 8, 16, 24]}, None, "Bo3840_Qwen3-1.7B_Skywork-Reward"),
        ({"strategy": "speculative_rejection"}, None, "Bo960_Qwen3-1.7B_Skywork-Reward"),
        ({"strategy": "speculative_rejection", "alpha": 0.5}, None, "SpR_alpha0.5_n960_Qwen3-1.7B_Skywork-Reward"),
        (
            {"strategy": "speculative_rejection", "alpha": 0.5, "n": 16, "seed": [0, 1, 2]},
            None,
            "SpR_alpha0.5_n16x3_Qwen3-1.7B_Skywork-Reward",
        ),
        ({"n": "max"}, None, "Bomax_Qwen3-1.7B_Skywork-Reward"),
        ({"n": "max", "seed": [0, 1]}, 250, "Bo250_Qwen3-1.7B_Skywork-Reward"),
        ({"n": None, "kv_budget_tokens": 4000}, None, "Bokv4000_Qwen3-1.7B_Skywork-Reward"),
        ({"reward_model": "embedded"}, None, "DEMO_Bo960_Qwen3-1.7B_demo"),
        ({"pretrained": "embedded", "reward_model": "rewards.mine:brevity"}, None, "DEMO_Bo960_demo_brevity"),
    ],
)
def test_default_names(changes: dict[str, Any], n: int | None, name: str) -> None:
    assert default_name({**RUN, **changes}, n=n) == name


@pytest.mark.parametrize("seeds", [[], [3], [0, 1]])
@pytest.mark.parametrize("strategy", ["best_of_n", "speculative_rejection"])
@pytest.mark.parametrize("n", [None, 0, 6])
def test_runs_of_any_number_of_seeds_have_names(seeds: list[int], strategy: str, n: int | None) -> None:
    assert default_name({**RUN, "strategy": strategy, "alpha": 0.5, "seed": seeds}, n=n)


@given(st.text())
def test_a_name_can_be_a_folders(text: str) -> None:
    name = model_name(text)
    assert name and not set(name) & set('/\\:*?"<>| \n\0') and name not in (".", "..")

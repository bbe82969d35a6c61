"""YAML that stands for more than it says is refused, by all that read YAML of somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrej_eval.errors import MOST, ConfigError, PromptError
from specrej_eval.harness.alpaca_eval import config
from specrej_eval.harness.alpaca_eval.repairs import configs
from specrej_eval.harness.lm_eval.command import options_of
from specrej_eval.yaml_files import MOST_PARTS, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ENDLESS = {
    "a billion by names": BOMB,
    "a list in itself": "mine: &a [*a]",
    "a mapping in itself": "mine: &a {completions_kwargs: *a}",
    "nested": "[" * 5000,
    "a list as a key": "? [1]\n: 2",
    "a mapping as a key": "{{a: 1}: 2}",
    "no date": "mine: 2020-99-99",
    "not UTF-8": "\udcff",
    "control characters": "\x00",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_it_is_one_short_error_for_whoever_reads_it(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(ENDLESS[kind].encode("utf-8", "surrogateescape"))
    for read in (lambda: read_yaml(file, what="it"), lambda: config.read(file), lambda: configs._read(file)):
        with pytest.raises(ConfigError, match="cannot be read as YAML") as refused:
            read()
        assert len(str(refused.value)) < 2 * MOST
    assert options_of(["--config", str(file)]) == {"config": str(file)}, "lm-eval says what is wrong with it"


def test_a_large_file_without_tricks_is_read(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_text("a:\n" + "- x\n" * (MOST_PARTS // 10))
    assert len(read_yaml(file, what="it")["a"]) == MOST_PARTS // 10
    file.write_text("a: &a [1, 2]\nb: *a\n")
    assert read_yaml(file, what="it") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("kind", [ConfigError, PromptError])
def test_a_message_goes_on_for_no_page_whatever_it_quotes(kind: type[ConfigError | PromptError]) -> None:
    told = str(kind(f"the rule is this, got {'x' * 10_000}, which is none.", hint="y" * 10_000 + " do this."))
    assert len(told) < 2 * MOST + 100
    assert told.startswith("the rule is this") and "which is none." in told and told.endswith("do this.")

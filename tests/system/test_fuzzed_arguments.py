"""Arguments as anybody may write them, in Python, --model_args, --gen_kwargs, on the command line and in YAML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from support.fuzzing import TEXTS, WRONG, Surface, altered, command, damaged, examples, scalars, texts, values

from specrej_eval import api, budget
from specrej_eval.cli import COMMANDS, parser_of
from specrej_eval.config import ARGUMENTS, HOST, MAX, RunConfig, checked_until, known_elsewhere
from specrej_eval.core import Prompt
from specrej_eval.engines.transformers.loading import check_host_arguments
from specrej_eval.errors import SpecRejError
from specrej_eval.harness.alpaca_eval import config as alpaca_config
from specrej_eval.harness.alpaca_eval.repairs import configs as repaired
from specrej_eval.harness.lm_eval.options import merge_options
from specrej_eval.harness.lm_eval.requests import KNOBS, translate
from specrej_eval.records.journal import request_key
from specrej_eval.records.run_names import default_name

Counted = Callable[[str, int], None]

NAMES = [*ARGUMENTS, *HOST, *known_elsewhere()]
GIVEN: dict[str, Any] = {
    **{name: made.default for name, made in ARGUMENTS.items()},
    **{"pretrained": "org/model", "reward_model": "org/judge", "alpha": 0.25, "n": 16, "until": ["\n"]},
}
names = st.sampled_from(NAMES) | st.sampled_from(NAMES).flatmap(lambda name: st.sampled_from((name[:-1], name + "s")))


@st.composite
def some(draw: st.DrawFn, keys: st.SearchStrategy[str], inner: st.SearchStrategy[Any] = values) -> dict[str, Any]:
    """A few arguments, of which most have values that can be."""
    found: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 4))):
        name = draw(keys)
        found[name] = draw(inner) if draw(st.integers(0, 2)) else GIVEN.get(name)
    return found


def resolved(config: RunConfig) -> None:
    """What becomes of arguments before a model is loaded."""
    budget.check_arguments(config)
    for tokens in (1, 900):
        found = budget.resolve(config, tokens, capacity_tokens=5000 if config.n == MAX else None)
        assert found.n >= 1 and found.max_gen_toks >= 1
    json.dumps(config.to_dict())
    prompt = Prompt(token_ids=(1,), conversation=(), prompt_hash="0" * 64)
    assert len(request_key(prompt, config.of_request, ())) == 64


def test_arguments_in_python(tmp_path: Path, counted: Counted) -> None:
    surface = Surface("arguments in Python", counted, tmp_path)

    def work(given: dict[str, Any]) -> None:
        config, host = RunConfig.from_args(given)
        check_host_arguments(host)
        resolved(config)

    surface.fuzz(some(names), work, examples(9000))
    surface.done()


def test_values_of_model_args(tmp_path: Path, counted: Counted) -> None:
    """As lm-eval takes ``--model_args a=1,b=2`` apart, brought together with its own options."""
    from lm_eval.utils import simple_parse_args_string

    surface = Surface("--model_args", counted, tmp_path)
    word = st.sampled_from([text for text in TEXTS if "," not in text]) | st.text(st.characters(exclude_characters=","))
    pair = st.tuples(names, word | st.integers().map(str) | st.floats().map(str))

    def work(given: tuple[list[tuple[str, str]], dict[str, Any]]) -> None:
        pairs, options = given
        arguments = simple_parse_args_string(",".join(f"{name}={value}" for name, value in pairs)) or {}
        merge_options(arguments, options)
        config, host = RunConfig.from_args(arguments)
        check_host_arguments(host)
        resolved(config)

    def parsed(given: tuple[list[tuple[str, str]], Any]) -> bool:
        try:
            simple_parse_args_string(",".join(f"{name}={value}" for name, value in given[0]))
        except Exception:  # upstream's own, before we are asked
            return False
        return True

    options = some(st.sampled_from(("batch_size", "max_batch_size", "device")), st.sampled_from((1, "auto", "4", None)))
    surface.fuzz(st.tuples(st.lists(pair, max_size=4), options).filter(parsed), work, examples(7000))
    surface.done()


def test_gen_kwargs(tmp_path: Path, counted: Counted) -> None:
    surface = Surface("--gen_kwargs", counted, tmp_path)
    own = ("do_sample", "until", "max_gen_toks", "max_new_tokens", "temperature", "top_p", "num_beams", "seed", "n")
    keys = st.sampled_from([*KNOBS, *own]) | names
    base, _ = RunConfig.from_args({"n": 4, "alpha": 0.5})

    def work(given: tuple[dict[str, Any], dict[str, Any]]) -> None:
        task, explicit = given
        found = translate({**task, **explicit}, base, explicit=explicit)
        resolved(found.config)
        assert all(isinstance(stop, str) and stop for stop in found.until)

    surface.fuzz(st.tuples(some(keys), some(keys) | st.just({})), work, examples(7000))
    surface.done()


def test_stop_strings(tmp_path: Path, counted: Counted) -> None:
    surface = Surface("stop strings", counted, tmp_path)
    surface.fuzz(values, checked_until, examples(1000, 100))
    surface.done()


class Loaded(SpecRejError):
    """Nothing was wrong with the arguments."""


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    """All commands but those of the harnesses, with any words; models are not loaded."""
    surface = Surface("command lines", counted, tmp_path)
    monkeypatch.chdir(tmp_path)

    def load(*_: Any, **__: Any) -> Any:
        raise Loaded("loaded")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(api.RunPlan, "load", load)
    monkeypatch.setattr("specrej_eval.commands.score.load_reward", load)
    (tmp_path / "prompts.json").write_text(json.dumps(["1 + 2 = ?"]))
    (tmp_path / "pairs.json").write_text(json.dumps([{"prompt": "1 + 2 = ?", "response": "3"}]))
    # doctor looks at installed packages and devices for seconds; --help prints
    known = [name for name in COMMANDS if name not in ("lm-eval", "alpaca-eval", "doctor")]
    begun: dict[str, list[str]] = {
        "run": ["run", "--prompts", "prompts.json", "--output", "out"],
        "score": ["score", "--input", "pairs.json"],
    }
    options = {name: sorted(parser_of(name)._option_string_actions) for name in known}

    @st.composite
    def lines(draw: st.DrawFn) -> list[str]:
        name = draw(st.sampled_from(known) | st.sampled_from(("run", "run", "score", "runn", "")))
        words = list(begun.get(name, [name])) if draw(st.integers(0, 5)) else [name]
        for _ in range(draw(st.integers(0, 4))):
            word = draw(st.sampled_from(options.get(name) or ["--x"])) if draw(st.integers(0, 5)) else draw(texts)
            words.append(word.replace("_", "-") if draw(st.integers(0, 5)) == 0 else word)
            value = (
                draw(texts) if draw(st.booleans()) else str(draw(st.sampled_from([*GIVEN.values(), *TEXTS, 1, 0.5])))
            )
            words += [value] if draw(st.integers(0, 4)) else []
        return words

    def work(words: list[str]) -> None:
        code, _ = command(words)
        if code:
            surface.refused += 1
        assert (tmp_path / "prompts.json").is_file()

    surface.fuzz(lines(), work, examples(8000))
    surface.done()


CONFIG: dict[str, Any] = {
    "mine": {
        "prompt_template": "Q: {instruction}",
        "fn_completions": "specrej_completions",
        "completions_kwargs": {
            **{"pretrained": "org/small", "reward_model": "org/judge", "alpha": 0.5, "n": 8, "max_gen_toks": 64},
            **{"until": ["\n"], "batch_size": 4, "temperature": 0.7, "apply_chat_template": True, "max_tokens": 99},
        },
        "pretty_name": "Mine",
        "link": "https://example.org",
    }
}


def as_yaml(value: Any) -> bytes:
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return repr(value)[:5000].encode("utf-8", "replace")


def test_yaml_of_alpaca_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    surface = Surface("YAML", counted, tmp_path, repaired._folder())
    monkeypatch.chdir(tmp_path)
    whole = as_yaml(CONFIG)
    (tmp_path / "template.txt").write_text("{instruction}")
    file = tmp_path / "mine.yaml"

    def work(content: bytes) -> None:
        file.write_bytes(content)
        found = alpaca_config.read(file)
        alpaca_config.find(str(file), found.generator)
        alpaca_config.local_paths(found)
        default_name(found.fingerprint())
        yaml.safe_load(alpaca_config.render(found, None, []))

    def work_repaired(content: bytes) -> None:
        file.write_bytes(content)
        configs = repaired._with_absolute_templates(repaired._read(file), (tmp_path,), is_model=True, file=file)
        ((_, entry),) = configs.items()
        asked = alpaca_config.arguments_of("specrej_completions", entry["completions_kwargs"])
        resolved(asked[0])

    structured = altered(CONFIG).map(as_yaml)
    surface.fuzz(structured, work, examples(4000))
    surface.fuzz(damaged(whole), work, examples(2500, 100))
    surface.fuzz(structured, work_repaired, examples(2500, 100))
    surface.fuzz(damaged(whole), work_repaired, examples(1500, 50))
    surface.done()


def test_scalars_reach_every_argument(counted: Counted, tmp_path: Path) -> None:
    """Each argument alone, so that none hides behind another's refusal."""
    surface = Surface("arguments, one at a time", counted, tmp_path)
    for name in [*ARGUMENTS, *HOST]:

        def work(value: Any, name: str = name) -> None:
            config, host = RunConfig.from_args({name: value})
            check_host_arguments(host)
            resolved(config)

        for value in WRONG:
            surface.give(value, work)
        surface.fuzz(scalars, work, examples(40, 2))
    surface.done()

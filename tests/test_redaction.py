"""Secrets: what is one, what is none, and that no error and no record of ours shows one."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specrej_eval import errors
from specrej_eval.config import ARGUMENTS, HOST, RunConfig
from specrej_eval.errors import SpecRejError
from specrej_eval.records.answers import RunRecord
from specrej_eval.records.fingerprint import of_run
from specrej_eval.records.run_names import default_name, model_name
from specrej_eval.records.trace import Tracer
from specrej_eval.redaction import (
    KEY_VARIABLES,
    Search,
    is_secret_name,
    opened,
    own_secrets,
    redacted,
    redacted_values,
    sealed,
    secrets_of,
)
from specrej_eval.rewards.kinds import judge, server

PASSWORD = "Tr0ub4dor&3"
HUB = "hf_" + "aB3" * 11
KEY = "sk-proj-" + "x9_Y" * 10
SHOWING = {
    "address": f"http://me:{PASSWORD}@host:8000/v1",
    "https": f"https://{PASSWORD}@host",
    "ensemble": f"likelihood+0.5*http://me:{PASSWORD}@host+judge:m@https://you:{PASSWORD}@other/v1",
    "list": json.dumps([{"reward_model": f"http://me:{PASSWORD}@host", "weight": 2}]),
    "model_args": f"pretrained=a,token={PASSWORD},n=4",
    "option": f"--token={PASSWORD}",
    "python": f"{{'token': '{PASSWORD}', 'n': 4}}",
    "json": json.dumps({"hf_token": PASSWORD, "api_key": PASSWORD}),
    "sentence": f"token={PASSWORD} is wrong",
    "hub": f"Cannot use {HUB}.",
    "key": f"Incorrect API key provided: {KEY}.",
    "header": f"Authorization: Bearer {KEY}",
    "query": f"http://host/x?api_key={PASSWORD}",
}
HARMLESS = (
    "http://localhost:8000/v1",
    "judge:gpt-4o-mini@https://api.openai.com/v1",
    "http://h:8000+judge:m@http://other",
    "pretrained=a,think_end_token=</think>,prefix_token_id=7,add_bos_token=True,n=4",
    "token=None,token=***,token=True",
    "one token: hello",
    "max_gen_toks=64 tokens; 7 tokens=7",
    "sk-estimator-html-doc-link-and-more-of-the-same",
    "hf_transfer and hf_hub_download",
    "the task-specific-instruction-following0123456789 one",
    "mail me@example.com about http://example.com",
    "{{ messages[0]['content'] }} <|token|> eos_token=</s>",
)
EXTRA = (PASSWORD, HUB, KEY, KEY[-12:])


def shows(text: object) -> bool:
    return any(secret in str(text) for secret in EXTRA)


@pytest.mark.parametrize("text", SHOWING.values(), ids=SHOWING)
def test_a_secret_is_shown_nowhere(text: str, counted: Callable[[str, int], None]) -> None:
    assert shows(text)
    for put in ("", "***@"):
        found = redacted(text, put=put)
        assert not shows(found) and redacted(found, put=put) == found, "said twice it is the same"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, SpecRejError):
            error = kind(text, hint=text)
            assert not shows(f"{error!r} {error} {error.args} {error.hint}")
    assert not shows(redacted_values({"x": [{"y": (text,)}], "n": 4}))
    assert not shows(json.dumps(redacted_values({"token": PASSWORD, "deep": {"api_key": PASSWORD}})))
    counted("forms of secrets redacted", 1)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert str(SpecRejError(text)) == text
    assert sealed(text) is text
    assert Search({})(text) is None


def test_names_of_secrets() -> None:
    ours = {name for name in {**ARGUMENTS, **HOST} if is_secret_name(name)}
    assert ours == {"token"}
    assert all(map(is_secret_name, ("hf_token", "api_key", "--api-key", "apikey", "PASSWORD", "client_secret")))
    assert not any(map(is_secret_name, ("think_end_token", "eos_token", "max_tokens", "tokens", "num_tokens", 3, None)))


def test_every_key_that_is_sent_is_one_that_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {*judge.KEY_VARIABLES, *server.KEY_VARIABLES} <= {*KEY_VARIABLES}
    (tmp_path / "token").write_text(f"{HUB}\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in KEY_VARIABLES:
        monkeypatch.setenv(name, f"{name}-{PASSWORD}")
    assert own_secrets() == {
        **{f"{name}-{PASSWORD}": f"the key in {name}" for name in KEY_VARIABLES},
        HUB: "the hub's token of this machine",
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {"token": PASSWORD, "n": 4},
        {"reward_model": SHOWING["ensemble"], "deep": [{"api_key": PASSWORD, "x": None}]},
        SHOWING["model_args"],
    ],
)
def test_sealed_arguments_pass_through_a_harness_and_are_whole_to_us_alone(arguments: Any) -> None:
    made = sealed(arguments)
    assert opened(made) == arguments and opened(sealed(made)) == arguments
    copies = [copy.copy(made), copy.deepcopy(made), {**made, "more": 1} if isinstance(made, dict) else made]
    assert all(opened(item if isinstance(item, str) else {**item, "more": 1}) for item in copies)
    assert opened(copies[1]) == arguments
    pickled = pickle.dumps(made)
    assert not any(secret.encode() in pickled for secret in EXTRA)
    assert not shows(f"{made} {made!r} {json.dumps(made)} {json.dumps(made, indent=2, ensure_ascii=False)}")
    assert not shows(pickle.loads(pickled))
    assert not shows(opened(pickle.loads(pickled)))


def test_an_object_in_sealed_arguments_stays_that_object() -> None:
    model = object()
    made = sealed({"pretrained": model, "token": "abc"})
    assert made["pretrained"] is model and opened(made)["pretrained"] is model


def test_no_record_of_ours_holds_a_secret(tmp_path: Path) -> None:
    for text in (SHOWING["address"], SHOWING["ensemble"], SHOWING["list"], f"judge:m@{SHOWING['address']}"):
        config, host = RunConfig.from_args(
            {"reward_model": text, "pretrained": "org/small", "token": HUB, "judge_prompt": f"{{response}} {KEY}"}
        )
        found = of_run(config, host)
        record = RunRecord(name="x", fingerprint=found, arguments={"token": HUB}, described={"reward_model": text})
        tracer = Tracer(str(tmp_path / "trace.jsonl"))
        tracer.run({"arguments": config.to_dict(), "reward_model": text})
        tracer.close()
        written = (tmp_path / "trace.jsonl").read_text()
        assert not shows(json.dumps([config.to_dict(), found, record.to_dict(), written]))
        assert not shows(default_name(found))


@pytest.mark.parametrize("name", ["http://[", "http://h:port", "judge:m@http://[", "likelihood+http://[", "http://"])
def test_a_record_that_names_no_address_is_read_all_the_same(name: str) -> None:
    assert model_name(name)


def test_a_search_tells_known_secrets_from_lookalikes_and_shows_neither() -> None:
    quoted = 'pa"ss\\w\u00f6rd-77'
    search = Search({quoted: "the key in X", "EMPTY": "the key in Y", "not-needed": "Z", "dummy key": "W"})
    for line in (quoted, json.dumps({"a": quoted}), json.dumps({"a": quoted}, ensure_ascii=False)):
        assert search(line) == ("the key in X", True)
    assert search("EMPTY not-needed dummy key") is None
    for name, text in SHOWING.items():
        if name == "https":  # a name alone; most are no secret
            continue
        found = search(text, arguments=True)
        assert found is not None and not found[1] and not shows(found[0]), name
    assert search("token: abc", arguments=True) and not search("token: abc")
    assert not search("token: '***'", arguments=True) and not search('"token": null', arguments=True)


def test_secrets_of_arguments() -> None:
    found = secrets_of({"token": HUB, "reward_model": SHOWING["ensemble"], "n": 4, "x": [{"api_key": KEY}]})
    assert {*found} == {HUB, PASSWORD, KEY}

"""A table of every argument and every kind of file: each is changed in turn, and each of the three stores notices."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import GOLDEN, ROOT
from support.fake_hub import add_model_files
from support.other_values import OTHER

from specrej_eval import paths
from specrej_eval.api import RunPlan
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD
from specrej_eval.config import HOST, NEUTRAL, PLACEMENT, Decides, RunConfig, names
from specrej_eval.core import Prompt
from specrej_eval.errors import ConfigError
from specrej_eval.harness.lm_eval.model import SpecRejLM
from specrej_eval.in_flight import Request
from specrej_eval.records import callable_sources, digests, fingerprint
from specrej_eval.records.answers import RunRecord
from specrej_eval.records.journal import Journal
from specrej_eval.records.outputs import OutputsFolder

Counted = Callable[..., None]
Host = Mapping[str, Any]
PACKAGE_ROOT = ROOT

# another value for every argument of the host that decides; one without an entry fails the test below
OTHER_HOST: dict[str, Any] = {
    "add_bos_token": True,
    "autogptq": True,
    "chat_template_args": {"a": 1},
    "delta": "owner/delta",
    "enable_thinking": False,
    "gguf_file": "x.gguf",
    "gptqmodel": True,
    "max_length": 77,
    "mixed_precision_dtype": "bfloat16",
    "peft": "owner/adapter",
    "prefix_token_id": 3,
    "quantization_config": {"quant_method": "bitsandbytes"},
    "revision": "v2",
    "softmax_dtype": "float32",
    "subfolder": "inner",
    "think_end_token": "</think>",
    "tokenizer": "owner/tokenizer",
    "truncation": True,
    "use_fast_tokenizer": False,
}


class Stores:
    """The three stores, each with what makes it: begun with one configuration, gone on with another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.caches: dict[str, dict[Any, Any]] = {}

    def journal(self, config: RunConfig, host: Host) -> tuple[str, ...]:
        journal = Journal(str(self.folder / "journal.jsonl"), fingerprint.of_models(config, host))
        journal.close()
        prompt = Prompt(token_ids=(1,), conversation=({"role": "user", "content": "a"},), prompt_hash="h", task="t")
        return (Request(prompt=prompt, config=config).key,)  # with another key nothing is found in it

    def use_cache(self, config: RunConfig, host: Host) -> tuple[str, ...]:
        lm = SpecRejLM.__new__(SpecRejLM)
        reward: Any = SimpleNamespace(deciding={})  # no model is looked at
        engine: Any = SimpleNamespace(environment=dict, deciding=dict)
        plan = RunPlan(config=config, host=host, engine=engine, reward=reward)
        lm.__dict__.update(run_config=config, plan=plan, _rank=0, _world_size=1)
        lm.__dict__["_warn"] = lambda *_, **__: None
        database = self.caches.setdefault("cache", {})
        lm.set_cache_hook(SimpleNamespace(dbdict=database))
        database.setdefault("an answer", "text")
        return ()

    def folder_of_answers(self, config: RunConfig, host: Host) -> tuple[str, ...]:
        record = RunRecord(name="g", fingerprint=fingerprint.of_run(config, host))
        OutputsFolder(self.folder / "out").begin(record)
        return ()


STORES = ("journal", "use_cache", "folder_of_answers")


def noticed(stores: Stores, store: str, before: tuple[RunConfig, Host], after: tuple[RunConfig, Host]) -> str | None:
    """What the store says of the change; None if it would give out old answers."""
    enter = getattr(stores, store)
    first = enter(*before)
    assert enter(*before) == first, "the same configuration goes on"
    try:
        return None if enter(*after) == first else "another key"
    except ConfigError as error:
        return str(error)


BASE = RunConfig(n=16)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig)])
def test_every_argument_is_noticed(name: str, store: str, tmp_path: Path, counted: Counted) -> None:
    if name in names(Decides.TASKS):  # a journal's keys hold what came of it, a folder knows no tasks
        other: Any = {"on_greedy": "greedy", "force_sampling_args": True}[name]
        deciding = store == "use_cache"
    elif name in NEUTRAL:
        pytest.skip("decides nothing")
    elif name in names(Decides.KEPT):  # more of the same answers is kept; only a journal has room for it
        other, deciding = {"logprobs": True, "audit": 0.5, "score_every": 8}[name], store == "journal"
    else:
        assert name in OTHER, f"say in OTHER what {name} could be, or where it is declared that it is neutral"
        other, deciding = OTHER[name], True
    found = noticed(Stores(tmp_path), store, (BASE, {}), (dataclasses.replace(BASE, **{name: other}), {}))
    assert (found is not None) == deciding, name
    if deciding:
        assert found == "another key" or name in str(found)
        counted(f"arguments changed, noticed by {store}")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", HOST)
def test_every_argument_of_the_host_is_noticed(name: str, store: str, tmp_path: Path, counted: Counted) -> None:
    if name in PLACEMENT:
        assert noticed(Stores(tmp_path), store, (BASE, {}), (BASE, {name: "x"})) is None
        return
    assert name in OTHER_HOST, f"say in OTHER_HOST what {name} could be, or where it is declared that it only places"
    found = noticed(Stores(tmp_path), store, (BASE, {}), (BASE, {name: OTHER_HOST[name]}))
    assert found is not None and name in found
    counted(f"arguments changed, noticed by {store}")
    again = noticed(Stores(tmp_path / "2"), store, (BASE, {name: OTHER_HOST[name]}), (BASE, {}))
    assert again is not None, "taken away is changed, too"


# --- files ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """A folder with files of every kind, and the arguments that name them."""

    root: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def folder(self, name: str) -> str:
        return str(self.root / name)


Names = Callable[[Place], tuple[dict[str, Any], dict[str, Any]]]


def _policy(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    shutil.copytree(DEMO_POLICY, place.root / "policy")
    place.write("policy/code.py", "x = 1\n")
    place.write("policy/deep/code.py", "x = 1\n")
    place.write("policy/inner/model.safetensors", "inner weights")
    place.write("policy/x.gguf", "GGUF and more")
    place.write("policy/other.gguf", "GGUF of another quantisation")
    place.write("policy/additional_chat_templates/tools.jinja", "{{ messages }}")
    place.write("policy/shards/one.safetensors", "shard")
    place.write("policy/model.safetensors.index.json", json.dumps({"weight_map": {"a": "shards/one.safetensors"}}))
    return {"pretrained": place.folder("policy"), "reward_model": "likelihood", "trust_remote_code": True}, {
        "subfolder": "inner",
        "gguf_file": "x.gguf",
    }


def _tokenizers(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    for name in ("own", "ofreward", "adapter"):
        place.write(f"{name}/tokenizer.json", "{}")
    place.write("adapter/adapter_model.safetensors", "low rank")
    place.write("adapter/adapter_config.json", "{}")
    ours = {"reward_model": "http://localhost:1", "reward_tokenizer": place.folder("ofreward")}
    return ours, {"tokenizer": place.folder("own"), "peft": place.folder("adapter")}


def _reward(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    shutil.copytree(DEMO_REWARD, place.root / "reward")
    place.write("template.jinja", "one")
    place.write("judge.txt", "{prompt} {response}")
    return {
        "reward_model": place.folder("reward"),
        "reward_template": place.folder("template.jinja"),
        "judge_prompt": place.folder("judge.txt"),
    }, {}


FUNCTION = "import json\nfrom noticed_pkg import helper\ndef score(conversation, responses): return [0.0]\n"
METHOD = f"{FUNCTION}class Scorer:\n    @staticmethod\n    def rate(conversation, responses): return [0.0]\n"


def _function(place: Place, name: str = "noticed_pkg.rewards:score") -> tuple[dict[str, Any], dict[str, Any]]:
    place.write("noticed_pkg/__init__.py", "")
    place.write("noticed_pkg/rewards.py", METHOD)
    place.write("noticed_pkg/helper.py", "def load():\n    import noticed_beside\n")
    place.write("noticed_beside.py", "from noticed_pkg.deeper import more\n")
    place.write("noticed_pkg/deeper/__init__.py", "")
    place.write("noticed_pkg/deeper/more.py", "x = 1\n")
    return {"reward_model": name}, {}


def _method(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    return _function(place, "noticed_pkg.rewards:Scorer.rate")


def _ensemble(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    _reward(place)
    _function(place)
    return {"reward_model": f"{place.folder('reward')}+0.5*noticed_pkg.rewards:score"}, {}


def _listed(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    _reward(place)
    place.write("ofreward/tokenizer.json", "{}")
    part = {
        "reward_model": "http://localhost:1",
        "reward_tokenizer": place.folder("ofreward"),
        "reward_template": place.folder("template.jinja"),
    }
    return {"reward_model": json.dumps([part, place.folder("reward")])}, {}


READS = "from pathlib import Path\nWORDS = (Path(__file__).parent / 'words.txt').read_text()\n"


def _data(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    ours, host = _function(place)
    place.write("noticed_pkg/deeper/more.py", READS)
    place.write("noticed_pkg/words.txt", "good better best")
    place.write("noticed_pkg/deeper/weights.npz", "numbers")
    return ours, host


def _alpaca_farm(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    backbone = {"model_type": "reward_model", "backbone_model_name_or_path": place.folder("backbone")}
    place.write("farm/config.json", json.dumps(backbone))
    place.write("farm/model.safetensors", "head")
    for name in ("config.json", "tokenizer.json"):
        place.write(f"backbone/{name}", "{}")
    return {"reward_model": place.folder("farm")}, {}


def _code_beside(place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    code = {"auto_map": {"AutoModelForCausalLM": f"{place.folder('code')}--modeling.Model"}}
    place.write("own/config.json", json.dumps(code))
    place.write("code/modeling.py", "x = 1\n")
    return {"pretrained": place.folder("own"), "reward_model": "likelihood", "trust_remote_code": True}, {}


FILES: list[tuple[Names, str]] = [
    *(
        (_policy, f"policy/{name}")
        for name in (
            *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
            *("chat_template.jinja", "code.py", "deep/code.py", "inner/model.safetensors", "x.gguf"),
            *("additional_chat_templates/tools.jinja", "shards/one.safetensors", "model.safetensors.index.json"),
        )
    ),
    *((_tokenizers, f"{name}/tokenizer.json") for name in ("own", "ofreward", "adapter")),
    *((_tokenizers, f"adapter/{name}") for name in ("adapter_model.safetensors", "adapter_config.json")),
    *((_reward, f"reward/{name}") for name in ("model.safetensors", "config.json", "chat_template.jinja")),
    *((_reward, name) for name in ("template.jinja", "judge.txt")),
    *(
        (made, name)
        for made in (_function, _method, _ensemble)
        for name in (
            *("noticed_pkg/rewards.py", "noticed_pkg/helper.py", "noticed_pkg/__init__.py"),
            *("noticed_beside.py", "noticed_pkg/deeper/more.py"),
        )
    ),
    (_ensemble, "reward/model.safetensors"),
    *((_data, f"noticed_pkg/{name}") for name in ("words.txt", "deeper/weights.npz")),
    *((_alpaca_farm, name) for name in ("farm/config.json", "backbone/config.json", "backbone/tokenizer.json")),
    (_code_beside, "code/modeling.py"),
    *((_listed, name) for name in ("reward/model.safetensors", "ofreward/tokenizer.json", "template.jinja")),
]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(("made", "name"), FILES, ids=[f"{made.__name__[1:]}-{name}" for made, name in FILES])
def test_every_kind_of_file_is_noticed(
    made: Names, name: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.setattr(digests, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.syspath_prepend(str(tmp_path / "place"))
    place = Place(tmp_path / "place")
    ours, host = made(place)
    config = RunConfig(n=16, **ours)
    stores = Stores(tmp_path)
    enter = getattr(stores, store)
    enter(config, host)
    enter(config, host)
    edit_the_middle(place.root / name)
    with pytest.raises(ConfigError) as refused:
        enter(config, host)
    named = Path(name).name if "." not in name or "/" in name else name
    assert named in str(refused.value) or "template" in str(refused.value) or "judge_prompt" in str(refused.value)
    counted(f"file kinds changed, noticed by {store}")


def edit_the_middle(path: Path) -> None:
    """One byte in the middle; the same size, and the mtime put back."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    else:
        content += b"#"
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_no_loader_reads_is_no_change(tmp_path: Path) -> None:
    place = Place(tmp_path)
    ours, host = _policy(place)
    config = RunConfig(**{**ours, "trust_remote_code": False})
    before = fingerprint.of_models(config, host)
    for name in ("README.md", "LICENSE", "trainer_state.json", "optimizer.pt", "journal.jsonl", "checkpoint-5/x.json"):
        place.write(f"policy/{name}", "new")
    edit_the_middle(place.root / "policy/other.gguf")
    edit_the_middle(place.root / "policy/code.py")
    assert fingerprint.same(before, fingerprint.of_models(config, host))


def test_a_folder_that_was_moved_is_no_change(tmp_path: Path) -> None:
    place = Place(tmp_path)
    ours, host = _policy(place)
    before = fingerprint.of_models(RunConfig(**ours), host)
    shutil.move(place.folder("policy"), place.folder("elsewhere"))
    moved = RunConfig(**{**ours, "pretrained": place.folder("elsewhere")})
    assert fingerprint.same(before, fingerprint.of_models(moved, host))
    (tmp_path / "elsewhere/config.json").write_text("{}")
    assert "config.json changed" in fingerprint.differences(before, fingerprint.of_models(moved, host))


def test_what_cannot_be_covered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "noticed_network.py").write_text(
        "import requests\nfrom urllib.parse import quote\ndef score(c, r): return [len(open('x').read())]\n"
    )
    names = ("http://me:secret@host:8000", "judge:m@http://host/v1", "noticed_network:score", "owner/nowhere")
    told = [fingerprint.uncovered(fingerprint.of_models(RunConfig(reward_model=name), {})) for name in names]
    assert "http://host:8000" in told[0] and "secret" not in told[0] and "judge:m" in told[1]
    assert "it imports requests" in told[2] and "open()" in told[2] and "urllib" not in told[2]
    assert "commit of owner/nowhere" in told[3]
    assert "weights of the loaded model" in str(fingerprint.of_models(BASE, {}, loaded=["pretrained"])["uncovered"])
    assert fingerprint.uncovered(fingerprint.of_models(RunConfig(), {})) == ""


def test_a_hub_model_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    config = RunConfig(pretrained="own/policy", reward_model="own/reward+likelihood")
    found = []
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / str(number)))
        for name in ("policy", "reward"):
            ref = tmp_path / str(number) / f"models--own--{name}" / "refs" / "main"
            ref.parent.mkdir(parents=True)
            ref.write_text(commit)
        found.append(fingerprint.of_models(config, {"tokenizer": "own/reward"}))
    told = fingerprint.differences(*found)
    assert (
        "the commit of own/policy was aaaaaaaaaaaa, is now bbbbbbbbbbbb" in told and "the commit of own/reward" in told
    )


LLAMA, YI, SFT = "meta-llama/Llama-2-7b-chat-hf", "01-ai/Yi-34B-Chat", "hmomin/sft10k"
CODE = {"auto_map": {"AutoModel": "own/code--modeling.Model", "AutoConfig": "configuration.Config"}}
SLOW_AND_FAST = {"auto_map": {"AutoTokenizer": ["own/code--tokenization.Slow", None]}}
FARM = {"model_type": "reward_model", "backbone_model_name_or_path": "/data/nobody/sft10k"}
# (arguments, the host's, files of hub repositories, the other repository that decides)
COMPANIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], str]] = {
    "Starling's config and tokenizer": (
        {"reward_model": "berkeley-nest/Starling-RM-7B-alpha"},
        {},
        {"berkeley-nest/Starling-RM-7B-alpha": {}},
        LLAMA,
    ),
    "a copy of Starling": ({"reward_model": "someone/Starling-RM-34B"}, {}, {"someone/Starling-RM-34B": {}}, YI),
    "AlpacaFarm's backbone": ({"reward_model": "own/farm"}, {}, {"own/farm": {"config.json": FARM}}, SFT),
    "one part of several": ({"reward_model": "likelihood+own/farm"}, {}, {"own/farm": {"config.json": FARM}}, SFT),
    "the policy's code": (
        {"pretrained": "own/policy", "reward_model": "likelihood", "trust_remote_code": True},
        {},
        {"own/policy": {"config.json": CODE}},
        "own/code",
    ),
    "the code of a revision": (
        {"pretrained": "own/policy", "reward_model": "likelihood", "trust_remote_code": True},
        {"revision": "main"},
        {"own/policy": {"config.json": CODE}},
        "own/code",
    ),
    "code in a subfolder": (
        {"pretrained": "own/policy", "reward_model": "likelihood", "trust_remote_code": True},
        {"subfolder": "inner"},
        {"own/policy": {"inner/config.json": CODE}},
        "own/code",
    ),
    "the code of its tokenizer": (
        {"pretrained": "own/policy", "reward_model": "likelihood", "trust_remote_code": True},
        {},
        {"own/policy": {"tokenizer_config.json": SLOW_AND_FAST}},
        "own/code",
    ),
    "the code of tokenizer=": (
        {"trust_remote_code": True},
        {"tokenizer": "own/tokens"},
        {"own/tokens": {"tokenizer_config.json": SLOW_AND_FAST}},
        "own/code",
    ),
    "the reward's code": (
        {"reward_model": "own/reward", "trust_remote_code": True},
        {},
        {"own/reward": {"config.json": CODE}},
        "own/code",
    ),
    "the code of the backbone": (
        {"reward_model": "own/farm", "trust_remote_code": True},
        {},
        {"own/farm": {"config.json": FARM}, SFT: {"tokenizer_config.json": SLOW_AND_FAST}},
        "own/code",
    ),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("case", COMPANIONS)
def test_another_repository_that_a_checkpoint_is_read_with_is_known_by_its_commit(
    case: str, store: str, hub: Path, tmp_path: Path, counted: Counted
) -> None:
    ours, host, repositories, other = COMPANIONS[case]
    for name, files in repositories.items():
        add_model_files(hub, name, files)
    config = RunConfig(n=16, **ours)
    told = fingerprint.uncovered(fingerprint.of_models(config, host))
    assert told.count(f"the commit of {other} (") == 1, "named where nobody knows it"
    add_model_files(hub, other, {}, commit="b" * 40)
    assert other not in fingerprint.uncovered(fingerprint.of_models(config, host))
    enter = getattr(Stores(tmp_path), store)
    enter(config, host)
    enter(config, host)
    add_model_files(hub, other, {}, commit="c" * 40)
    with pytest.raises(ConfigError, match=f"the commit of {other} was bbbbbbbbbbbb, is now cccccccccccc"):
        enter(config, host)
    counted(f"other repositories changed, noticed by {store}")


def test_code_of_another_repository_counts_only_where_it_may_run(hub: Path, tmp_path: Path) -> None:
    add_model_files(hub, "own/policy", {"config.json": CODE})
    config = RunConfig(pretrained="own/policy", reward_model="likelihood")
    assert "own/code" not in str(fingerprint.of_models(config, {}))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy/config.json").write_text(json.dumps(CODE))
    local = RunConfig(pretrained=str(tmp_path / "policy"), reward_model="likelihood", trust_remote_code=True)
    assert "the commit of own/code (code of" in fingerprint.uncovered(fingerprint.of_models(local, {}))
    for broken in ("{", "[]", '{"auto_map": 1}', '{"auto_map": {"AutoModel": 2}}'):
        (tmp_path / "policy/config.json").write_text(broken)
        fingerprint.of_models(local, {})  # loading will say so


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (READS, "noticed"),
        ("import json\ndef load(): return json.load(open('words.txt'))\n", "noticed"),
        ("from importlib import resources\nWORDS = resources.files(__name__)\n", "noticed"),
        ("import re\n", "no change"),  # reads nothing
        (f"{READS}def log(text): open('log.txt', 'a').write(text)\n", "named"),
        (f"{READS}def log(text): Path('log.txt').open(mode='w').write(text)\n", "named"),
        (f"{READS}def keep(found): Path('kept.json').write_text(found)\n", "named"),
    ],
)
def test_data_beside_a_reward_function_count_if_its_code_only_reads(
    code: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    place = Place(tmp_path)
    ours, _ = _data(place)
    place.write("noticed_pkg/helper.py", code)
    place.write("noticed_pkg/deeper/more.py", "")
    config = RunConfig(**ours)
    before = fingerprint.of_models(config, {})
    edit_the_middle(tmp_path / "noticed_pkg/words.txt")
    now = fingerprint.of_models(config, {})
    told = fingerprint.differences(before, now)
    assert told == ("reward_model: noticed_pkg/words.txt changed" if outcome == "noticed" else "")
    assert ("no code, since its code writes" in fingerprint.uncovered(now)) == (outcome == "named")
    counted("kinds of code beside data files")


def test_what_caches_and_runs_leave_in_a_package_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    place = Place(tmp_path)
    ours, _ = _data(place)
    journal, trace = place.folder("noticed_pkg/run.jsonl"), place.folder("noticed_pkg/trace.jsonl")
    config = RunConfig(**ours, journal=journal, trace_path=trace)
    before = fingerprint.of_models(config, {})
    for name in (
        *(
            "run.jsonl",
            "trace.jsonl",
            "a.log",
            ".hidden",
            "__pycache__/a.pyc",
            "my_cache/x.json",
            "out/specrej_run.json",
        ),
        *("out/more.json", "results/x.json", ".git/index", "plugin.py"),
    ):
        place.write(f"noticed_pkg/{name}", "new")
    assert fingerprint.same(before, fingerprint.of_models(config, {}))
    place.write("noticed_pkg/more.txt", "new")
    assert "noticed_pkg/more.txt is new" in fingerprint.differences(before, fingerprint.of_models(config, {}))


def test_too_much_data_is_named_and_what_is_small_within_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    place = Place(tmp_path)
    _data(place)
    place.write("noticed_pkg/deeper/score.py", f"{READS}def score(conversation, responses): return [0.0]\n")
    config = RunConfig(reward_model="noticed_pkg.deeper.score:score")
    monkeypatch.setattr(callable_sources, "DATA_BYTES", 10)
    found = fingerprint.of_models(config, {})
    assert list(found["reward_data_files"]) == ["noticed_pkg/deeper/weights.npz"]
    assert "noticed_pkg outside noticed_pkg.deeper that are no code" in fingerprint.uncovered(found)
    monkeypatch.setattr(callable_sources, "DATA_FILES", 0)
    found = fingerprint.of_models(config, {})
    assert found["reward_data_files"] == {}
    assert "the files of noticed_pkg that are no code: they are too many" in fingerprint.uncovered(found)


@pytest.mark.parametrize(("made", "name"), [(_data, "reward_data_files"), (_alpaca_farm, "companion_files")])
def test_records_from_before_these_files_counted_stay_readable(
    made: Names, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    ours, host = made(Place(tmp_path))
    now = fingerprint.of_models(RunConfig(**ours), host)
    then = {key: value for key, value in now.items() if key != name}
    for _ in range(2):
        fingerprint.check_same(then, now, what=f"out without {name}", remedy="-")
    told = [r.getMessage() for r in caplog.records if f"does not record {name}" in r.getMessage()]
    assert len(told) == 1
    assert fingerprint.same(now, then) is False, "but what is known now may not be forgotten"


def test_other_versions_and_another_device_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    now = fingerprint.of_run(BASE, {})
    for name in ("torch", "transformers", "device", "attn_implementation"):
        then = {**now, "environment": {**now["environment"], name: "0.0.1"}}
        for _ in range(2):
            fingerprint.check_same(then, now, what=f"out for {name}", remedy="-")
        told = [record.getMessage() for record in caplog.records if f"{name} was '0.0.1'" in record.getMessage()]
        assert len(told) == 1, "a warning, once, and no refusal"


def test_other_numbers_of_ours_are_refused() -> None:
    now = fingerprint.of_run(BASE, {})
    with pytest.raises(ConfigError, match="numbers_version was 0, is now 1"):
        fingerprint.check_same({**now, "numbers_version": 0}, now, what="out", remedy="-")


# --- records from before the fingerprint had a version ------------------------------------------

OLD = json.loads((GOLDEN / "old_records/fingerprints.json").read_text())
OLD_CONFIG = RunConfig(alpha=0.25, n=8, max_gen_toks=16)


def now_for(store: str, config: RunConfig, host: Host) -> dict[str, Any]:
    if store == "journal":
        return fingerprint.of_models(config, host)
    if store == "run":
        return fingerprint.of_run(config, host, until=["\n"], apply_chat_template="auto", max_tokens=None)
    return fingerprint.of_run(config, host, on_greedy=config.on_greedy, force_sampling_args=config.force_sampling_args)


@pytest.mark.parametrize("store", OLD)
def test_old_records_stay_readable_and_say_what_they_lack(store: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        fingerprint.check_same(OLD[store], now_for(store, OLD_CONFIG, {}), what=f"old {store}", remedy="-")
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"old {store} was")]
    assert len(told) == 1 and "numbers_version" in told[0] and "pretrained_files in full" in told[0]


@pytest.mark.parametrize("store", OLD)
@pytest.mark.parametrize("name", ["reward_family", "dtype", "pretrained", "reward_model", "deepconf_window"])
def test_old_records_are_still_held_to_what_they_have(store: str, name: str) -> None:
    changed = dataclasses.replace(OLD_CONFIG, **{name: OTHER[name]})
    assert name in fingerprint.differences(OLD[store], now_for(store, changed, {}))
    then = {**OLD[store], "reward_files": "0" * 64}
    assert "reward_model: other files" in fingerprint.differences(then, now_for(store, OLD_CONFIG, {}))
    assert "peft" in fingerprint.differences(OLD[store], now_for(store, OLD_CONFIG, {"peft": "owner/adapter"}))


# --- digests -------------------------------------------------------------------------------------


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read in full, in order; what was known before is forgotten."""
    read = digests._read
    found: list[Path] = []
    monkeypatch.setattr(digests, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "_read", lambda path, advance: (found.append(path), read(path, advance))[1])
    return found


def big(tmp_path: Path, *, size: int = 3 << 20) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * size)
    return path


def forget() -> None:
    """As in another process."""
    digests._known.clear()


def test_a_digest_is_remembered_and_only_a_changed_file_is_read_again(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "RACY_NS", -1)
    path = big(tmp_path)
    first = digests.of_file(path)
    forget()
    assert digests.of_file(path) == first and len(reads) == 1
    edit_the_middle(path)
    forget()
    second = digests.of_file(path)
    assert second != first and len(reads) == 2, "the same size, mtime restored: the ctime tells"
    shutil.copy2(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    forget()
    assert digests.of_file(path) == second and len(reads) == 3, "another inode"


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    path = big(tmp_path)
    digests.of_file(path)
    digests.of_file(path)
    assert len(reads) == 2 and not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 1, "sha256": "x"}', "\x00"])
def test_a_broken_cache_is_done_without(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(digests, "RACY_NS", -1)
    path = big(tmp_path)
    first = digests.of_file(path)
    (entry,) = (tmp_path / "cache").glob("*.json")
    entry.write_text(content)
    forget()
    assert digests.of_file(path) == first and len(reads) == 2
    forget()
    assert digests.of_file(path) == first and len(reads) == 2, "and mended"
    monkeypatch.setattr(digests, "cache_folder", lambda: path / "no folder")
    forget()
    assert digests.of_file(path) == first and len(reads) == 3, "one that cannot be written"


def test_a_large_file_of_the_hubs_cache_is_never_read(tmp_path: Path, reads: list[Path]) -> None:
    blob = tmp_path / "models--a--b/blobs" / ("c" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"weights")
    link = tmp_path / "models--a--b/snapshots/1/model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert digests.of_folder(link.parent) == {"model.safetensors": "c" * 64} and not reads


def test_a_progress_bar_is_shown_over_gigabytes(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = big(tmp_path, size=9 << 20)
    digests.of_file(path)
    assert not capsys.readouterr().err
    monkeypatch.setattr(digests, "SHOWN_FROM", 8 << 20)
    forget()
    digests.of_files({"model.safetensors": path, "config.json": path}, what="owner/model")
    assert "reading owner/model in full" in capsys.readouterr().err


# --- the real commands ---------------------------------------------------------------------------


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{cwd}", "SPECREJ_PROMPTS": "prompts.jsonl"}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


ARGUMENTS = {"reward_model": "own_reward:score", "n": "2", "max_gen_toks": "4", "device": "cpu"}
TASK = ("--model", "specrej", "--tasks", "specrej_prompts", "--include_path", str(paths.folder("tasks")))
COMMANDS = {
    "use_cache": ("-m", "lm_eval", *TASK, "--use_cache", "answers", "--model_args"),
    "journal": ("-m", "lm_eval", *TASK, "--model_args"),
    "folder_of_answers": ("-m", "specrej_eval", "run", "--prompts", "prompts.jsonl", "--output", "out"),
}


@pytest.mark.parametrize("store", [pytest.param(store, marks=pytest.mark.full) for store in COMMANDS])
def test_an_edited_reward_function_is_refused_by_the_real_command(store: str, tmp_path: Path, counted: Counted) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Q: 1+2=?"}\n')
    (tmp_path / "own_reward.py").write_text(
        "from own_helper import SIGN\n"
        "def score(conversation, responses): return [SIGN * len(text) for text in responses]\n"
    )
    (tmp_path / "own_helper.py").write_text("SIGN = 1\n")
    given = {**ARGUMENTS, **({"journal": "journal.jsonl"} if store == "journal" else {})}
    words = [*COMMANDS[store]]
    if store == "folder_of_answers":
        words += [word for name, value in given.items() for word in (f"--{name}", value)]
    else:
        words.append(",".join(f"{name}={value}" for name, value in given.items()))
    first = command(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "own_helper.py").write_text("SIGN = -1\n")
    refused = command(*words, cwd=tmp_path)
    assert refused.returncode != 0 and "reward_model: own_helper.py changed" in refused.stderr, refused.stderr
    counted(f"commands refused, {store}")

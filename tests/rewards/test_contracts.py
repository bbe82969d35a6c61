"""Kinds, families and protocols keep their contracts, and each of a user's own is one file and no other edit."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support import reward_servers as servers
from support.rewards import check_reward, make_reward
from support.tiny_models import save, tiny_reward_model, tiny_tokenizer

from specrej_eval import registry
from specrej_eval.cli import main
from specrej_eval.config import RunConfig, reward_names
from specrej_eval.core import RowView
from specrej_eval.errors import ConfigError
from specrej_eval.rewards import choose
from specrej_eval.rewards.base import RewardModel, RewardSession
from specrej_eval.rewards.checkpoints.family import RewardFamily, family_names, load_family
from specrej_eval.rewards.kinds.base import RewardKind
from specrej_eval.rewards.servers.base import ServerProtocol, protocol_names, protocols

HELLO = [{"role": "user", "content": "Say hello."}]
EXAMPLES = {
    "ensemble": "likelihood+0.5*deepconf",
    "judge": "judge:m@http://host:8000/v1",
    "server": "http://host:8000",
    "self_scores": "deepconf",
    "function": "pkg.module:function",
    "checkpoint": "owner/name",
}
"""A name of each kind; a kind of one's own is none of these."""


def rows(*texts: str) -> list[RowView]:
    return [RowView(row, text, (5,), "eos") for row, text in enumerate(texts)]


# ---- those that there are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names("specrej_eval.rewards.kinds"))
def test_a_kind_keeps_the_contract_and_claims_no_others_names(name: str) -> None:
    kind = choose.kinds()[name]
    assert isinstance(kind, RewardKind)
    assert all(form and what for form, what in kind.FORMS.items())
    assert kind.FORMS or name == "checkpoint"
    for other, example in EXAMPLES.items():
        first = next(entry for entry, found in choose.kinds().items() if found.claims(example))
        assert first == other


def test_the_names_that_records_know_are_those_of_the_kinds() -> None:
    """The fingerprint tells kinds apart by ``config.reward_names``, which imports no reward."""
    kinds = choose.kinds()
    assert set(reward_names.SELF_SCORES) == set(kinds["self_scores"].FORMS)
    for name, kind in kinds.items():
        for form in kind.FORMS:
            assert reward_names.is_judge(form) == (name == "judge")
            assert reward_names.is_address(form) == (name == "server")
            assert reward_names.is_ensemble(form) == (name == "ensemble")


@pytest.mark.parametrize("name", family_names())
def test_a_family_keeps_the_contract(name: str) -> None:
    family = load_family(name)
    assert isinstance(family, RewardFamily)
    assert family.READS and family.EXAMPLES
    assert family.matches("owner/something-else", {}) is False
    for example in family.EXAMPLES:  # by name or by class, and never by anything else
        found = [other for other in family_names() if load_family(other).matches(example, {})]
        assert found in ([], [name])


@pytest.mark.parametrize("name", protocol_names())
def test_a_protocol_keeps_the_contract(name: str) -> None:
    protocol = protocols()[name]
    assert issubclass(protocol, ServerProtocol)
    assert protocol.PATHS and all(path.startswith("/") for path in (*protocol.PATHS, *protocol.ENDPOINTS))
    for other in set(protocols()) - {name}:
        assert not set(protocol.PATHS) & set(protocols()[other].PATHS), "each is known by paths of its own"


def imports_within(path: Path) -> set[str]:
    """Modules of ``rewards`` that a file imports, inside functions and for types too: ``kinds.base``, ``families``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specrej_eval.rewards"):
            origin = (node.module or "").removeprefix("specrej_eval.rewards").lstrip(".")
            below = {".".join(filter(None, (origin, alias.name))) for alias in node.names}
            found |= {name for name in below if name in FILES} or {origin}
    return found


REWARDS = ROOT / "specrej_eval" / "rewards"
FILES = {
    ".".join(path.relative_to(REWARDS).with_suffix("").parts): path
    for path in sorted(REWARDS.rglob("*.py"))
    if path.name != "__init__.py"
}


def test_choosing_is_above_all_and_siblings_do_not_know_each_other() -> None:
    assert not imports_within(FILES["base"])
    for name, path in FILES.items():
        imported = imports_within(path)
        assert "choose" not in imported
        folder = name.partition(".")[0]
        if folder in ("kinds", "families", "servers"):
            assert {other for other in imported if other.startswith(f"{folder}.")} <= {f"{folder}.base"}, name
            assert folder == "kinds" or not any(other.startswith("kinds") for other in imported), name
    graph = {name: imports_within(path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises where there is a circle


def test_no_capability_is_probed_for() -> None:
    """Rewards and sessions have methods with defaults; only objects of other packages are looked into."""
    ours = {entry for base in (RewardModel, RewardSession) for entry in dir(base) if not entry.startswith("__")}
    ours -= {"score"}  # the head of transformers' classifiers has this name
    wrong = []
    for path in sorted((ROOT / "specrej_eval").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
            ):
                name = node.args[1]
                if isinstance(name, ast.Constant) and name.value in ours:
                    wrong.append(f"{path.name}:{node.lineno} {name.value}")
    assert not wrong


# ---- one's own, one file each ----------------------------------------------------------------------------------------

AddFile = Callable[[str, str], None]


@pytest.fixture
def add_file(tmp_path: Path) -> Iterator[AddFile]:
    """Puts a file into a folder of ``rewards``, as far as Python can tell."""
    added: list[tuple[Any, str, str]] = []

    def forget() -> None:
        registry.names.cache_clear()
        choose.kinds.cache_clear()

    def add(folder: str, text: str) -> None:
        package = importlib.import_module(f"specrej_eval.rewards.{folder}")
        place = tmp_path / folder
        place.mkdir()
        (place / "my_own.py").write_text(text)
        package.__path__.append(str(place))
        added.append((package, str(place), f"{package.__name__}.my_own"))
        forget()

    yield add
    for package, place, module in added:
        package.__path__.remove(place)
        sys.modules.pop(module, None)
        vars(package).pop("my_own", None)
    forget()


def test_a_reward_that_is_no_checkpoint_is_one_file(add_file: AddFile, capsys: pytest.CaptureFixture[str]) -> None:
    add_file(
        "kinds",
        "from specrej_eval.rewards.base import RewardModel, RewardPlan\n"
        "from specrej_eval.rewards.kinds.base import RewardKind\n"
        "class Length(RewardModel):\n"
        "    name = 'length'\n"
        "    def score(self, conversation, rows, response_prefix=''):\n"
        "        return [float(len(row.text)) for row in rows]\n"
        "class Kind(RewardKind):\n"
        "    FORMS = {'length': 'the number of characters'}\n"
        "    def claims(self, name): return name == 'length'\n"
        "    def resolve(self, asked): return RewardPlan(asked.name, lambda device: Length())\n",
    )
    reward = make_reward(RunConfig(reward_model="length"))
    assert reward.open(HELLO).score(rows("a", "bcd")) == [1, 3]
    assert make_reward(RunConfig(reward_model="length+2*length")).score(HELLO, rows("ab")) == [6]
    assert main(["rewards", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["other"]["length"] == "the number of characters"


def test_a_family_is_one_file_and_wins_over_the_general_one(add_file: AddFile, tmp_path: Path) -> None:
    add_file(
        "families",
        "from torch import nn\n"
        "from specrej_eval.rewards.checkpoints.family import RewardFamily\n"
        "from specrej_eval.rewards.checkpoints.native import LastToken, assemble, load_body, load_head\n"
        "class Family(RewardFamily):\n"
        "    READS, EXAMPLES = 'minus the head', ('me/mine',)\n"
        "    ARCHITECTURES = ('MineForSequenceClassification',)\n"
        "    def load(self, source):\n"
        "        body, tokenizer = load_body(source)\n"
        "        head = load_head(source, nn.Linear(body.config.hidden_size, 1, bias=False), 'score.')\n"
        "        head.weight.neg_()\n"
        "        return assemble(source, body, tokenizer, LastToken(head))\n",
    )
    folder = save(tiny_reward_model(), tiny_tokenizer(), tmp_path / "rm")
    (want,) = make_reward(RunConfig(reward_model=str(folder))).score(HELLO, rows("Hello!"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MineForSequenceClassification"]}))
    assert make_reward(RunConfig(reward_model=str(folder))).score(HELLO, rows("Hello!")) == pytest.approx([-want])


def test_a_protocol_is_one_file(add_file: AddFile) -> None:
    with servers.openrlhf(lambda text: 1.0) as server:
        with pytest.raises(ConfigError, match="unknown reward_family 'my_own'"):
            check_reward(RunConfig(reward_model=server.url, reward_family="my_own"))
        add_file(
            "servers",
            "from specrej_eval.rewards.servers.base import Scored, ServerProtocol\n"
            "class Protocol(ServerProtocol):\n"
            "    ENDPOINTS = PATHS = ('/mine',)\n"
            "    def form(self, has_tokenizer, has_template): return 'pair'\n"
            "    def score(self, items): return Scored([float(len(item.response)) for item in items], 0)\n",
        )
        for name, family in ((f"{server.url}/mine", "auto"), (server.url, "my_own")):
            reward = make_reward(RunConfig(reward_model=name, reward_family=family))
            assert reward.score(HELLO, rows("a", "bcd")) == [1, 3]

"""What a reward model is to the rest of the house, and how the one named by the arguments is made.

Writing a checkpoint family: one file in this folder with ``matches``, ``check`` and ``load`` (``RewardFamily``); its
name is the family's name. ``load`` puts together what is common from the files that begin with an underscore:

- ``_loading.load_checkpoint``: tokenizer and weights, every weight accounted for;
- ``_rendering.Renderer``: conversation + response -> token ids. A family gives its own ``template`` (Jinja, BOS
  included) or ``trailing_ids``, or overrides ``encode`` (steps of a process reward model);
  ``**{"template": ..., **renderer_options(config)}`` lets the user's ``reward_template`` win;
- ``_scoring.CheckpointReward(body, head, renderer, positions_of=...)``: batches, padding, memory, caching. ``body`` is
  the model below the head; ``positions_of(ids)`` names the positions whose hidden states the ``head`` gets, in float32:
  ``head(hidden: (rows, positions, hidden size), mask: (rows, positions) bool) -> (rows,)``.

A reward that keeps nothing between looks (a function, a server, an ensemble of such) has ``score`` and inherits
``Stateless``. Files that are no checkpoint family are listed in ``_NOT_CHECKPOINTS``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from specrej_eval import checkpoint, registry
from specrej_eval.companions import CONFIG_ELSEWHERE
from specrej_eval.config import RunConfig
from specrej_eval.core import Message, RowView
from specrej_eval.errors import ConfigError, nearest, suggest
from specrej_eval.paths import expanded, is_folder

LIKELIHOOD = "likelihood"
SELF_SCORES = (LIKELIHOOD, "self_certainty", "deepconf")
"""Rewards made of what the engine records while it decodes."""
AUTO = "auto"

_PACKAGE = "specrej_eval.rewards.families"


class RewardSession(Protocol):
    """One prompt being scored: what a reward model remembers of its rows from look to look.

    What is remembered saves work and changes no score: a row's score depends on its text alone (to rounding).

    A session may have two methods more, which the loop calls when a prompt is done. ``compare(row_ids)``, for scores
    that hold only among the rows of one look: scores of these rows that do compare (or None: they did all along).
    ``parts(row_id)``: what each of several rewards said of a row, by name.
    """

    def score(self, rows: Sequence[RowView]) -> list[float]:
        """As ``RewardModel.score``. Rows never seen before may appear at any look: fresh ones, and forks."""
        ...

    def keep(self, row_ids: Sequence[int]) -> None:
        """Only these rows go on; what is held for others is freed at once.

        A row named twice is a fork: its twin turns up at the next look under a row id of its own, and finds by its
        text what it shares with its parent.
        """
        ...

    def close(self) -> None:
        """Free everything. No other call follows; closing twice is harmless."""
        ...


class RewardModel(Protocol):
    """Scores the rows of one prompt. Higher is better; scores of different prompts are not comparable.

    Rows of different prompts are never scored in one batch, so that a score does not depend on what else is in flight.
    """

    name: str
    """For traces and results: the checkpoint, ``likelihood`` or ``pkg.module:function``."""
    needs_logprobs: bool
    """Whether ``RowView.mean_logprob`` must be filled in by the engine. A reward that needs other per-token numbers
    names them in ``needs_token_stats`` (optional; see ``core.TokenStat``)."""

    @property
    def tokens_scored(self) -> int:
        """Tokens read since the model was made, padding not counted."""
        ...

    @property
    def num_calls(self) -> int:
        """Forward passes (calls of a callable, requests to a server) since the model was made."""
        ...

    def score(self, conversation: Sequence[Message], rows: Sequence[RowView], response_prefix: str = "") -> list[float]:
        """One float per row, in order.

        Args:
            conversation: the messages before the response.
            rows: partial or finished answers; their ``text`` is what the benchmark will see.
            response_prefix: the start of the assistant's turn that the prompt already holds.

        Raises:
            RewardError: the model failed, or did not return one number per row. (NaN is returned as it is; the
                generator applies ``on_nan``.)
        """
        ...

    def open(self, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
        """A session for one prompt: what the loop scores with. Reads no token yet; several may be open at a time."""
        ...


class Stateless:
    """Gives a reward model that only has ``score`` the sessions that the loop wants."""

    def open(self: RewardModel, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
        """A session that remembers nothing: every look is scored in full."""
        return _FullScoring(self, conversation, response_prefix)


class _FullScoring:
    """See ``RewardSession``."""

    def __init__(self, reward: RewardModel, conversation: Sequence[Message], response_prefix: str) -> None:
        self._reward = reward
        self._conversation = conversation
        self._response_prefix = response_prefix

    def score(self, rows: Sequence[RowView]) -> list[float]:
        return self._reward.score(self._conversation, rows, self._response_prefix)

    def keep(self, row_ids: Sequence[int]) -> None: ...

    def close(self) -> None: ...


def open_session(reward: RewardModel, conversation: Sequence[Message], response_prefix: str = "") -> RewardSession:
    """``reward.open``, or for an object that has ``score`` alone what ``Stateless`` would give it."""
    if hasattr(reward, "open"):
        return reward.open(conversation, response_prefix)
    return _FullScoring(reward, conversation, response_prefix)


class Pair(NamedTuple):
    """A finished answer and what was asked."""

    conversation: tuple[Message, ...]
    response: str

    @property
    def row(self) -> RowView:
        """The answer as a row of its own."""
        return RowView(0, self.response, (), "eos")


def score_pairs(reward: RewardModel, pairs: Sequence[Pair]) -> list[float]:
    """Scores of finished answers to any conversations: many at a time, if the reward model has ``score_pairs``.

    Raises:
        RewardError: as ``RewardModel.score``.
    """
    if hasattr(reward, "score_pairs"):
        found: list[float] = reward.score_pairs(pairs)
        return found
    scores = [0.0] * len(pairs)
    for places in by_conversation(pairs):
        rows = [RowView(number, pairs[place].response, (), "eos") for number, place in enumerate(places)]
        mine = reward.score(pairs[places[0]].conversation, rows)
        for place, score in zip(places, mine, strict=True):
            scores[place] = score
    return scores


def by_conversation(pairs: Sequence[Pair]) -> list[list[int]]:
    """Places of the pairs, those of one conversation together."""
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(json.dumps([dict(message) for message in pair.conversation]), []).append(place)
    return list(places.values())


class RewardFamily(Protocol):
    """What the module of a checkpoint family offers (its file name is the family's name).

    ``check_files(folder)`` may come on top, where a checkpoint's folder is not as transformers would have it.
    """

    READS: str
    """One line for `specrej-eval rewards`: what is read where."""
    EXAMPLES: tuple[str, ...]
    """Hub names of checkpoints it was written for."""
    NEEDS: str
    """What a user must bring besides the checkpoint's name; empty if nothing."""

    def matches(self, name: str, checkpoint_config: Mapping[str, Any]) -> bool:
        """Whether this family reads the checkpoint (``reward_family=auto``).

        By the classes that ``config.json`` names; where those say nothing (a reward model saved as a plain language
        model), by its other keys or by the checkpoint's name.
        """
        ...

    def check(self, name: str, checkpoint_config: Mapping[str, Any]) -> None:
        """Raise ConfigError for what ``config.json`` already rules out."""
        ...

    def load(self, name: str, config: RunConfig, *, dtype: str, device: str, token: str | bool | None) -> RewardModel:
        """Load tokenizer and weights."""
        ...


def check_reward(config: RunConfig, *, token: str | bool | None = None) -> None:
    """Everything that can be said of the reward before any weights load.

    Raises:
        ConfigError: no reward named where one is needed, an unknown name or family, several labels, a callable that
            cannot be imported, a template file or a device that is not there, a server that cannot give raw scores.
        CheckpointError: a folder that is missing or broken.
        RewardError: a server that does not answer as it should.
    """
    from specrej_eval.rewards.choose import kind_of

    name = resolve_reward(config)
    _check_family(config)
    kind = kind_of(name)
    if kind is not None:
        kind.check(name, config, token)
        return
    if config.reward_template is not None:
        from specrej_eval.rewards.checkpoints.renderer import read_template

        read_template(config.reward_template)
    if config.reward_device is not None:
        checkpoint.check_device("reward_device", config.reward_device)
    _check_is_checkpoint(name)
    raw = read_checkpoint_config(name, token=token)
    family = _family(name, config, raw)
    folder = checkpoint.check_folder("reward_model", name)
    if folder is not None:
        getattr(family, "check_files", _check_files)(folder)
    family.check(name, raw)


def make_reward(config: RunConfig, *, device: str, token: str | bool | None = None) -> RewardModel:
    """The reward model that the arguments name, loaded.

    Args:
        device: the language model's device; ``reward_device`` wins.
        token: for a gated hub repository.

    Raises:
        ConfigError, CheckpointError, RewardError: as ``check_reward``; a reward that loads no weights checks itself.
    """
    from specrej_eval.rewards.choose import kind_of

    name = resolve_reward(config)
    kind = kind_of(name)
    if kind is not None:
        _check_family(config)
        return kind.make(name, config, device, token)
    check_reward(config, token=token)
    family = _family(name, config, read_checkpoint_config(name, token=token))
    dtype = config.reward_dtype
    if dtype == "auto" and name == str(checkpoint.DEMO_REWARD):
        dtype = "float32"
    reward = family.load(name, config, dtype=dtype, device=config.reward_device or device, token=token)
    if hasattr(reward, "use"):
        reward.use(config)
    return reward


def resolve_reward(config: RunConfig) -> str:
    """``config.reward_model``, or what stands in for it.

    None means the embedded reward model beside the embedded language model. One row alone (``n=1``) is never compared
    with anything, so beside another language model it needs no reward, and gets the one that costs nothing.

    Raises:
        ConfigError: another language model, several rows, and no reward to compare them with.
    """
    if config.reward_model is not None:
        return config.reward_model
    if config.pretrained is None:
        return str(checkpoint.DEMO_REWARD)
    if config.n == 1:
        return LIKELIHOOD
    raise ConfigError(
        f"reward_model must be given with pretrained={config.pretrained!r}: rows are compared by their reward.",
        hint="reward_model= a checkpoint folder, a hub name, likelihood, or pkg.module:function; "
        "n=1 samples plainly and needs none.",
    )


def read_checkpoint_config(name: str, *, token: str | bool | None = None) -> dict[str, Any]:
    """The ``config.json`` that belongs to a reward checkpoint.

    Raises:
        CheckpointError: as ``checkpoint.read_config``.
    """
    elsewhere = CONFIG_ELSEWHERE.get(Path(name).name)
    if elsewhere is not None and not (expanded(name) / "config.json").is_file():
        return checkpoint.read_config("reward_model", elsewhere, token=token)
    return checkpoint.read_config("reward_model", name, token=token)


def load_family(name: str) -> RewardFamily:
    """The module of a checkpoint family.

    Raises:
        ConfigError: there is none of that name.
    """
    module: Any = registry.load_module(_PACKAGE, name, argument="reward_family")
    family: RewardFamily = module
    return family


def families() -> tuple[str, ...]:
    """Names of the checkpoint families; imports none of them."""
    return registry.names(_PACKAGE)


def _check_family(config: RunConfig) -> None:
    """Raises:
    ConfigError: ``reward_family`` is neither a family of checkpoints nor a kind of server.
    """
    from specrej_eval.rewards.servers.protocols import PROTOCOLS

    known = (AUTO, *families(), *PROTOCOLS)
    if config.reward_family not in known:
        raise ConfigError(f"unknown reward_family {config.reward_family!r}.", hint=suggest(config.reward_family, known))


def _check_is_checkpoint(name: str) -> None:
    """Raises:
    ConfigError: neither a folder, nor ``owner/name`` of the hub, nor a path.
    """
    if is_folder(name) or "/" in name:
        return
    best = nearest(name, SELF_SCORES)
    forms = (
        f"a checkpoint folder, a hub name owner/name, {', '.join(SELF_SCORES)}, pkg.module:function, "
        "http://host:port, judge:MODEL@http://host:port/v1, or several: a+0.5*b"
    )
    hint = f"did you mean {best!r}? " if best else ""
    raise ConfigError(f"unknown reward_model {name!r}: there is no such folder.", hint=f"{hint}It can be {forms}.")


def _family(name: str, config: RunConfig, raw: Mapping[str, Any]) -> RewardFamily:
    """The family that reads a checkpoint: the one named, or the only one whose ``matches`` says so.

    Raises:
        ConfigError: none or several match.
    """
    if config.reward_family != AUTO:
        return load_family(config.reward_family)
    all_families = {entry: load_family(entry) for entry in families()}
    found = {entry: family for entry, family in all_families.items() if family.matches(name, raw)}
    if len(found) == 1:
        return next(iter(found.values()))
    listed = ", ".join(checkpoint.architectures(raw)) or "none"
    if found:
        raise ConfigError(
            f"reward_model={name!r} (architectures: {listed}) is claimed by several families: {', '.join(found)}.",
            hint=f"choose one: reward_family={next(iter(found))}.",
        )
    examples = {
        example.rpartition("/")[2]: entry for entry, family in all_families.items() for example in family.EXAMPLES
    }
    best = nearest(Path(name).name, examples)
    raise ConfigError(
        f"reward_model={name!r}: no reward family reads its architectures ({listed}).",
        hint=(f"its name is most like {best}, which reward_family={examples[best]} reads. " if best else "")
        + "A reward model has a trained head; a plain language model has none (reward_model=likelihood uses one "
        f"as its own reward). Families: {', '.join(all_families)}; reward_family= names one, "
        "`specrej-eval rewards` says what each reads.",
    )


def _check_files(folder: Path) -> None:
    """What transformers expects of a checkpoint's folder."""
    checkpoint.check_weights("reward_model", folder)
    checkpoint.check_tokenizer_files("reward_model", folder)

"""What decides an answer, as plain JSON: two runs with equal fingerprints give equal answers.

Kept beside every record that a later run may go on from (a journal, lm-eval's ``--use_cache``, a folder of `run` or of
alpaca_eval), so that a changed argument, checkpoint or reward function is noticed instead of old answers being passed
off as new ones. One function builds it and one compares it, for all of them. What an argument decides is said where it
is declared (``config``).

Beside what decides stand two things that do not: ``environment``, whose change is warned about (other versions or
another device give other last bits, which is rarely another answer), and ``uncovered``, what nobody can hold to account
from here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from specrej_eval import companions
from specrej_eval.checked import object_in
from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD, is_hub_name, stamp
from specrej_eval.config import (
    DEFAULT_N,
    HOST,
    NEUTRAL,
    PLACEMENT,
    Decides,
    RunConfig,
    as_dict,
    names,
    reward_names,
)
from specrej_eval.config.argument import checkpoint, rewards, template
from specrej_eval.config.engines import AUTO_BACKEND, SDPA
from specrej_eval.errors import ConfigError, without_passwords
from specrej_eval.paths import expanded, is_folder, is_there
from specrej_eval.records import callable_sources, digests

NUMBERS_VERSION = 1
"""Of our own arithmetic: what the same arguments, models and versions give. Raised when, and only when, an answer, a
reward or a draw changes, which ``tests/system/test_numbers.py`` notices; records of another version are not gone on
from."""

EMBEDDED = "embedded"
"""The demo pair's name in records: its folder differs from machine to machine."""

_HOST_DEFAULTS = {name: made.default for name, made in HOST.items() if made.default is not None}
"""Left out or written out, it is the same run."""

_BESIDE = ("environment", "uncovered")
_SINCE = ("companion_files", "reward_data_files")
"""What records of this ``NUMBERS_VERSION`` may lack, since earlier ones did not look there."""
_OF_HOST = names(checkpoint, among=HOST)
_LOCAL = (*names(checkpoint, rewards), *_OF_HOST)
"""Arguments that may name a folder; where the folder lies decides nothing."""
_VERSIONS = ("specrej_eval", "torch", "transformers", "tokenizers")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_logger = logging.getLogger(__name__)
_said: set[str] = set()


def of_models(config: RunConfig, host: Mapping[str, Any], *, loaded: Sequence[str] = ()) -> dict[str, Any]:
    """Names, files and dtypes of the two models, and the host's arguments that change what they compute.

    Args:
        loaded: arguments that were given as objects, not by name (``pretrained``); their names say little of them.

    Raises:
        CheckpointError: a file of theirs cannot be read.
    """
    about = _About(config, host)
    policy, reward = config.pretrained, _reward_name(config)
    if "pretrained" in loaded:
        about.uncovered.append(f"pretrained: the weights of the loaded model that was given ({policy})")
        policy_files = None
    else:
        policy_files = about.checkpoint(policy or str(DEMO_POLICY), revision=host.get("revision"), policy=True)
    reward_files = about.reward(reward)
    for name in _OF_HOST:
        value = host.get(name)
        if isinstance(value, str):
            about.files[name] = about.checkpoint(value, weights=name != "tokenizer")
        elif value is not None:
            about.loaded_object(name, value)
    if config.reward_tokenizer is not None:
        about.files["reward_tokenizer"] = about.checkpoint(config.reward_tokenizer, weights=False)
    return {
        "numbers_version": NUMBERS_VERSION,
        "pretrained": policy or EMBEDDED,
        "pretrained_files": policy_files,
        "reward_model": without_passwords(reward),
        "reward_files": reward_files,
        **{f"{name}_files": files for name, files in about.files.items() if files is not None},
        **({"reward_data_files": about.data} if about.data is not None else {}),
        **({"companion_files": dict(sorted(about.companions.items()))} if about.companions else {}),
        **({"hub_commits": dict(sorted(about.commits.items()))} if about.commits else {}),
        **_about_models(config),
        **_of_host(host),
        "environment": _environment(config, about.distributions),
        "uncovered": about.uncovered,
    }


def of_run(
    config: RunConfig,
    host: Mapping[str, Any],
    *,
    until: Sequence[str] = (),
    loaded: Sequence[str] = (),
    **others: Any,
) -> dict[str, Any]:
    """Models, strategy and sampling of a whole run; ``others`` = what else decides its answers (a prompt template)."""
    arguments = {name: getattr(config, name) for name in names(Decides.ANSWERS)}
    if not config.rejects:
        arguments["alpha"] = None  # never used
    if config.n is None and config.kv_budget_tokens is None:
        arguments["n"] = DEFAULT_N  # left out or written out, it is the same run
    return {**of_models(config, host, loaded=loaded), **arguments, "until": list(until), **_plain(others)}


def from_first_rank(compute: Callable[[], dict[str, Any]], *, rank: int, world_size: int) -> dict[str, Any]:
    """Computed by rank 0 (files are read in full) and sent to the others; every rank must call it.

    Raises:
        Exception: on every rank, what ``compute`` raised on the first.
    """
    if world_size < 2:
        return compute()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = compute()
        except Exception as error:  # the others wait for an answer
            found[1] = error
    result, failure = broadcast_object_list(found, from_process=0)
    if failure is not None:
        raise failure
    return dict(result)


# comparing

SINCE = "{name} was {before}, is now {after}"
BETWEEN = "{name}: {before} in one, {after} in another"


@dataclass(slots=True)
class Comparison:
    """What two fingerprints differ in, in words."""

    changed: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    """What only the newer one knows, where the older was written by an older version."""
    environment: list[str] = field(default_factory=list)
    """Other versions, another device: worth a warning."""


def compare(then: Mapping[str, Any], now: Mapping[str, Any], *, told: str = SINCE) -> Comparison:
    """Hold two fingerprints against each other; one from before ``numbers_version`` by what both have.

    Args:
        told: how a difference is told: ``SINCE``, or ``BETWEEN`` where neither is the earlier one.
    """
    found = Comparison()
    now, then = _plain(now), _plain(then)
    environment = then.get("environment") or {}
    found.environment = [
        SINCE.format(name=name, before=_short(environment[name]), after=_short(value))
        for name, value in (now.get("environment") or {}).items()
        if name in environment and environment[name] != value
    ]
    old = "numbers_version" not in then and "numbers_version" in now
    if old:
        then = _as_now(then, now, found)
    for name in sorted(then.keys() | now.keys()):
        if name in _BESIDE or (old and name not in then and _unknown_then(name, then, found)):
            continue
        if name in _SINCE and name not in then:
            if now[name]:
                found.lacking.append(name)
            continue
        before, after = _value(then, name), _value(now, name)
        if before == after or (name in _LOCAL and _same_place(name, then, now)):
            continue
        if name == "hub_commits":
            found.changed += _changed_commits(before or {}, after or {}, told)
        elif name.endswith("_files"):
            found.changed += _changed_files(name, before, after)
        elif (
            isinstance(before, str)
            and isinstance(after, str)
            and _SHA256.fullmatch(before)
            and _SHA256.fullmatch(after)
        ):
            found.changed.append(f"{name}: the text of its file changed")
        else:
            found.changed.append(told.format(name=name, before=_short(before), after=_short(after)))
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, told: str = SINCE) -> str:
    """What two fingerprints differ in, in words; empty if nothing."""
    return "; ".join(compare(then, now, told=told).changed)


def same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of one configuration."""
    return not compare(then, now).changed


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], *, what: str, remedy: str) -> None:
    """Warn, once, of other versions, and of what an old record does not know.

    Raises:
        ConfigError: ``what`` was started with a different configuration; says what differs.
    """
    found = compare(then, now)
    if found.changed:
        raise ConfigError(
            f"{what} was started with a different configuration ({'; '.join(found.changed)}).", hint=remedy
        )
    for warning in warnings_of(found, what=what):
        _warn_once(warning)


def warnings_of(found: Comparison, *, what: str) -> list[str]:
    """What is to be said of a record that may be gone on from."""
    warnings = []
    if found.environment:
        warnings.append(
            f"{what} was started elsewhere ({'; '.join(found.environment)}): the last bits of numbers may differ."
        )
    if found.lacking:
        warnings.append(
            f"{what} was started by an older version and does not record {', '.join(found.lacking)}: "
            "these are assumed to be unchanged."
        )
    return warnings


def warn_of_uncovered(fingerprint: Mapping[str, Any]) -> None:
    """Say once what is not noticed when it changes between two runs."""
    if text := uncovered(fingerprint):
        _warn_once(text)


def uncovered(fingerprint: Mapping[str, Any]) -> str:
    """What is not noticed when it changes, as a sentence; empty if nothing."""
    found = fingerprint.get("uncovered") or []
    return f"Not noticed when it changes between runs: {'; '.join(found)}." if found else ""


def is_demo(fingerprint: Mapping[str, Any]) -> bool:
    """Whether the embedded language model or the embedded reward model had a part in it."""
    return EMBEDDED in (fingerprint.get("pretrained"), fingerprint.get("reward_model"))


def has_files_of(fingerprint: Mapping[str, Any], name: str, folder: str | Path) -> bool:
    """Whether ``fingerprint[name]`` is of the very files in ``folder``; also where an older version wrote it."""
    files = fingerprint.get(name)
    return files is not None and files in (stamp(str(folder)), digests.of_folder(folder))


def same_reward_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether two records are of one reward's files; None where one of them does not say."""
    files = one.get("reward_files"), other.get("reward_files")
    if None in files:
        return None
    if type(files[0]) is type(files[1]):
        return bool(files[0] == files[1])
    new, old = (one, other) if isinstance(files[1], str) else (other, one)  # one was written by an older version
    return bool(_old_stamp("reward_files", new) == old["reward_files"])


def _reward_name(config: RunConfig) -> str:
    if config.reward_model is not None:
        return config.reward_model
    return EMBEDDED if config.pretrained is None else "likelihood"


class _About:
    """Collects what is known of the files behind names."""

    def __init__(self, config: RunConfig, host: Mapping[str, Any]) -> None:
        self.code = config.trust_remote_code
        self.host = host
        self.files: dict[str, dict[str, str] | None] = {}
        self.companions: dict[str, str] = {}
        """Files of folders that a checkpoint is read together with (see ``companions``)."""
        self.data: dict[str, str] | None = None
        """Files beside the modules of a reward function; None where there is no function."""
        self.commits: dict[str, str] = {}
        self.distributions: set[str] = set()
        self.uncovered: list[str] = []
        self._companions_seen: set[companions.Companion] = set()
        self._family = config.reward_family
        self._records = {expanded(name).absolute() for name in (config.journal, config.trace_path) if name is not None}
        """Files that the run itself writes, wherever they lie."""

    def checkpoint(
        self, name: str, *, revision: Any = None, policy: bool = False, weights: bool = True, role: str = ""
    ) -> dict[str, str] | None:
        """Digests of a folder's files; the commit of a hub repository is kept in ``commits``.

        Args:
            role: what another checkpoint reads here, for messages.
        """
        subfolder = str(self.host.get("subfolder") or "") if policy else ""
        if is_folder(name):
            own: dict[str, Any] = {"code": self.code, "weights": weights}
            if policy:
                own |= {"subfolder": subfolder, "gguf_file": self.host.get("gguf_file") or ""}
            found = digests.of_folder(name, **own)
            self._code_elsewhere(name, subfolder)
            return found
        if is_hub_name(name) and not is_there(name):
            wanted = str(revision) if revision else None
            commit = digests.hub_commit(name, wanted, self.host.get("token"))
            if commit is None:
                what = f" ({role})" if role else ""
                self.uncovered.append(f"the commit of {name}{what}, which is not known before it is fetched")
            else:
                self.commits[name if wanted in (None, "main") else f"{name}@{wanted}"] = commit
                self._code_elsewhere(name, subfolder, commit)
        return None

    def _code_elsewhere(self, name: str, subfolder: str = "", commit: str | None = None) -> None:
        """Remote code that a checkpoint takes from other repositories, where remote code may run."""
        if not self.code:
            return
        for folder in dict.fromkeys(("", subfolder)):
            for file in companions.CODE_FILES:
                told = self._json(name, f"{folder}/{file}" if folder else file, commit)
                for companion in companions.of_code(name, told):
                    self._companion(companion, of=name)

    def _companion(self, companion: companions.Companion, *, of: str) -> None:
        if companion in self._companions_seen:
            return
        self._companions_seen.add(companion)
        name, role = companion
        if role == "code" and is_folder(name):
            files = digests.of_folder(name, code=True, weights=False) or {}
            files = {file: digest for file, digest in files.items() if file.endswith(".py")}
        else:
            files = self.checkpoint(name, weights=False, role=f"{role} of {of}") or {}
        self.companions.update({f"{role} of {Path(of).name}: {file}": digest for file, digest in files.items()})

    def _json(self, name: str, file: str, commit: str | None) -> Mapping[str, Any]:
        """A JSON file of a checkpoint; empty where there is none, or none that can be read (loading will say so)."""
        if commit is None:
            return object_in(expanded(name) / file)
        path = digests.hub_file(name, file, commit, self.host.get("token"))
        return {} if path is None else object_in(path)

    def reward(self, name: str) -> dict[str, str] | None:
        """Digests of everything behind a reward's name; the files of an ensemble's parts carry the part's name."""
        if not reward_names.is_ensemble(name):
            return self._one_reward(name)
        found: dict[str, str] = {}
        for number, part in enumerate(reward_names.parts(name), start=1):
            label = f"part {number}"
            found.update(
                {f"{label}: {file}": digest for file, digest in (self._one_reward(part["reward_model"]) or {}).items()}
            )
            if isinstance(part.get("reward_tokenizer"), str):
                files = self.checkpoint(part["reward_tokenizer"], weights=False) or {}
                found.update({f"{label}, tokenizer: {file}": digest for file, digest in files.items()})
            if isinstance(template := part.get("reward_template"), str):
                found[f"{label}, template"] = _template(template)
        return found or None

    def _one_reward(self, name: str) -> dict[str, str] | None:
        if name == EMBEDDED:
            name = str(DEMO_REWARD)
        if name in reward_names.SELF_SCORES:
            return None
        if reward_names.is_server(name):
            self.uncovered.append(f"reward_model: what the server behind {without_passwords(name)} computes")
            return None
        if is_folder(name):
            return self._reward_checkpoint(name)
        if reward_names.is_callable(name):
            sources = callable_sources.of_callable(name)
            self.distributions |= sources.distributions
            self.uncovered += [f"reward_model={name}: {text}" for text in sources.uncovered]
            data = {file: path for file, path in sources.data.items() if path.absolute() not in self._records}
            self.data = {**(self.data or {}), **digests.of_files(data, what=name)}
            return digests.of_files(sources.files, what=name) or None
        return self._reward_checkpoint(name)

    def _reward_checkpoint(self, name: str) -> dict[str, str] | None:
        files = self.checkpoint(name)
        commit = None if is_folder(name) else self.commits.get(name)
        raw = self._json(name, "config.json", commit) if is_folder(name) or commit is not None else {}
        for companion in companions.of_reward(name, raw, family=self._family):
            self._companion(companion, of=name)
        return files

    def loaded_object(self, name: str, value: Any) -> None:
        """A tokenizer given as an object says everything of itself; anything else only what it is called."""
        backend = getattr(value, "backend_tokenizer", None)
        if backend is None:
            self.uncovered.append(f"{name}: what the object that was given does ({type(value).__name__})")
            return
        told = [
            backend.to_str(),
            str(getattr(value, "chat_template", None)),
            str(getattr(value, "special_tokens_map", None)),
        ]
        self.files[name] = {"the object given": hashlib.sha256("\0".join(told).encode()).hexdigest()}


def _about_models(config: RunConfig) -> dict[str, Any]:
    of_file = names(template)
    found = {name: getattr(config, name) for name in names(Decides.MODELS, without=("pretrained", "reward_model"))}
    if config.attention_backend in (AUTO_BACKEND, SDPA):  # what earlier records have; auto's choice is environment
        del found["attention_backend"]
    return {name: _template(value) if value and name in of_file else value for name, value in found.items()}


def _of_host(host: Mapping[str, Any]) -> dict[str, Any]:
    """The host's arguments that decide, in one spelling: JSON text as what it says, defaults as if left out."""
    found = {}
    for name, value in sorted(host.items()):
        if name in PLACEMENT or name in NEUTRAL:
            continue
        if name in names(as_dict, among=HOST) and isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass  # refused, with words, where it is used
        if value is not None and value != _HOST_DEFAULTS.get(name):
            found[name] = _plain(value)
    return found


def _environment(config: RunConfig, distributions: Iterable[str]) -> dict[str, Any]:
    """Versions and hardware; torch is asked for the device only where it is loaded anyway."""
    found = {name: version_of(name) for name in sorted({*_VERSIONS, *distributions})}
    device = config.device or "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and (config.device is None or config.device.startswith("cuda")) and torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    return {
        **found,
        "python": sys.version.partition(" ")[0],
        "device": device,
        "attn_implementation": config.attn_implementation,
    }


def version_of(distribution: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _template(value: str) -> str:
    # an edited template file is another template
    is_file = "{" not in value and is_there(value) and not is_folder(value)
    return hashlib.sha256(expanded(value).read_bytes()).hexdigest() if is_file else value


def _value(fingerprint: Mapping[str, Any], name: str) -> Any:
    """What stands there, or what holds where it is left out."""
    if name in fingerprint:
        return fingerprint[name]
    if name in _CONFIG_DEFAULTS:
        return _CONFIG_DEFAULTS[name]
    return [] if name == "until" else _HOST_DEFAULTS.get(name)


_CONFIG_DEFAULTS = RunConfig().to_dict()


def _same_place(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two names are of one folder's content, moved. Part of a reward's name may decide how it is read."""
    files = "reward_files" if name == "reward_model" else f"{name}_files"
    if not isinstance(then.get(files), dict) or not then[files] or then[files] != now.get(files):
        return False
    one, other = str(then.get(name)), str(now.get(name))
    if EMBEDDED in (one, other):
        return False
    if name != "reward_model":
        return True
    plain = not any(reward_names.is_callable(each) or re.search(r"[+*\[]", each) for each in (one, other))
    return plain and Path(one).name == Path(other).name


def _changed_commits(then: Mapping[str, str], now: Mapping[str, str], told: str) -> list[str]:
    # a name that only one side knows is told by the argument that names it, or was not known yet
    both = [name for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
    return [told.format(name=f"the commit of {name}", before=then[name][:12], after=now[name][:12]) for name in both]


def _changed_files(name: str, then: Any, now: Any) -> list[str]:
    label = "reward_model" if name.startswith("reward_") and name != "reward_tokenizer_files" else name
    label = label.removesuffix("_files")
    if not isinstance(then, dict) or not isinstance(now, dict):
        return [f"{label}: other files"]
    told = [f"{file} changed" for file in sorted(then.keys() & now.keys()) if then[file] != now[file]]
    told += [f"{file} is new" for file in sorted(now.keys() - then.keys())]
    told += [f"{file} is gone" for file in sorted(then.keys() - now.keys())]
    more = f" and {len(told) - 6} more" if len(told) > 6 else ""
    return [f"{label}: {', '.join(told[:6])}{more}"]


# records from before ``numbers_version``

_BETWEEN_PARTS = re.compile(r"""[+*\[\]{}",\s]""")
_KNOWN_THEN = ("revision", "subfolder", "gguf_file", "peft", "tokenizer")
"""Arguments of the host that every old record has if they were given; folders and ``--use_cache`` have them all."""
_NEUTRAL_THEN = ("trust_remote_code",)


def _as_now(then: Mapping[str, Any], now: Mapping[str, Any], found: Comparison) -> dict[str, Any]:
    """An old record in today's words: digests that hold by the old rule become today's."""
    found.lacking.append("numbers_version")
    made = {name: value for name, value in then.items() if name in now or name not in (*NEUTRAL, *PLACEMENT)}
    made["numbers_version"] = now.get("numbers_version")
    if made.get("pretrained") is None:
        made["pretrained"] = EMBEDDED
    if made.get("reward_model") is None:
        made["reward_model"] = EMBEDDED if made["pretrained"] == EMBEDDED else "likelihood"
    elif now.get("reward_model") == EMBEDDED and Path(str(made["reward_model"])).parts[-2:] == DEMO_REWARD.parts[-2:]:
        made["reward_model"] = EMBEDDED  # the first journals named it by its folder; its files tell whether it is
    if "strategy" in made:  # of --use_cache: the arguments as they were given
        made.pop("logprobs", None)
    for name in names(template):
        if isinstance(made.get(name), str) and made[name] != now.get(name) and _template(made[name]) == now.get(name):
            made[name] = now.get(name)
            found.lacking.append(f"the text of {name}")
    for name in ("pretrained_files", "reward_files"):
        before = made.get(name)
        if before is None or before == _old_stamp(name, now):
            if now.get(name) is not None or before is not None:
                found.lacking.append(f"{name} in full")
            made[name] = now.get(name)
    return {name: value for name, value in made.items() if value is not None or name in now}


def _unknown_then(name: str, then: Mapping[str, Any], found: Comparison) -> bool:
    """Whether an old record cannot say what it was; else it was left out, and the default held."""
    whole = "strategy" in then
    of_host = name in HOST and not whole and name not in _KNOWN_THEN
    unknown = of_host or name.endswith("_files") or name == "hub_commits" or name in _NEUTRAL_THEN
    if unknown or name in _CONFIG_DEFAULTS:
        found.lacking.append(name)
    return unknown


def _old_stamp(name: str, now: Mapping[str, Any]) -> str | None:
    """What an older version would have written for today's files."""
    if name == "pretrained_files":
        policy = now.get("pretrained")
        return stamp(str(DEMO_POLICY) if policy == EMBEDDED else policy)
    reward = str(now.get("reward_model"))
    return _old_reward_stamp(str(DEMO_REWARD) if reward == EMBEDDED else reward)


def _old_reward_stamp(name: str) -> str | None:
    pieces = [piece for piece in _BETWEEN_PARTS.split(name) if piece]
    if len(pieces) > 1 and not is_there(name):
        known = [files for files in map(_old_reward_stamp, pieces) if files is not None]
        return hashlib.sha256(" ".join(known).encode()).hexdigest() if known else None
    module, colon, function = name.partition(":")
    if not colon or not function.isidentifier():
        return stamp(name)
    files = callable_sources.of_callable(name).files
    path = next(
        (
            files[file]
            for file in (f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py"))
            if file in files
        ),
        None,
    )
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _logger.warning(text)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_named))


def _named(value: Any) -> str:
    """An object by its checkpoint, or at least by its class: no address of memory."""
    return str(getattr(value, "name_or_path", "") or (value if isinstance(value, Path) else type(value).__name__))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"

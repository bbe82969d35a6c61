"""Two fingerprints held against each other, those of earlier versions too."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specrej_eval.checkpoint import DEMO_POLICY, DEMO_REWARD, stamp
from specrej_eval.config import HOST, NEUTRAL, PLACEMENT, RunConfig, names, reward_names
from specrej_eval.config.argument import checkpoint, rewards, template
from specrej_eval.errors import ConfigError
from specrej_eval.paths import is_there
from specrej_eval.records import callable_sources, digests
from specrej_eval.records.fingerprint.files import EMBEDDED, HOST_DEFAULTS, plain, text_or_digest

_BESIDE = ("environment", "uncovered")
_SINCE = ("companion_files", "reward_data_files", "reward_served_model")
"""What records of this ``NUMBERS_VERSION`` may lack, since earlier ones did not look there."""
_LOCAL = (*names(checkpoint, rewards), *names(checkpoint, among=HOST))
"""Arguments that may name a folder; where the folder lies decides nothing."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_logger = logging.getLogger(__name__)
_said: set[str] = set()

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
    now, then = plain(now), plain(then)
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
            f"{what} was begun under other conditions ({'; '.join(found.environment)}): the last bits of numbers may "
            "differ."
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


def _value(fingerprint: Mapping[str, Any], name: str) -> Any:
    """What stands there, or what holds where it is left out."""
    if name in fingerprint:
        return fingerprint[name]
    if name in _CONFIG_DEFAULTS:
        return _CONFIG_DEFAULTS[name]
    return [] if name == "until" else HOST_DEFAULTS.get(name)


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
    alone = not any(reward_names.is_callable(each) or re.search(r"[+*\[]", each) for each in (one, other))
    return alone and Path(one).name == Path(other).name


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
        if (
            isinstance(made.get(name), str)
            and made[name] != now.get(name)
            and text_or_digest(made[name]) == now.get(name)
        ):
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-12:]}"

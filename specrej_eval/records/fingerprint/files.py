"""What is known of the files behind the names of a run's models: their digests, and what nobody can hold to account."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrej_eval import companions
from specrej_eval.checked import object_in
from specrej_eval.checkpoint import DEMO_REWARD, is_hub_name
from specrej_eval.config import HOST, RunConfig, reward_names
from specrej_eval.paths import expanded, is_folder, is_there
from specrej_eval.records import callable_sources, digests, parts
from specrej_eval.redaction import without_passwords

EMBEDDED = "embedded"
"""The demo pair's name in records: its folder differs from machine to machine."""
HOST_DEFAULTS = {name: made.default for name, made in HOST.items() if made.default is not None}
"""Left out or written out, it is the same run."""


class Behind:
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
        written = (config.journal, config.trace_path)
        self._records = {parts.whole(expanded(name).absolute()) for name in written if name is not None}
        """Files that the run itself writes, wherever they lie; of several processes the name without theirs."""

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
                found[f"{label}, template"] = text_or_digest(template)
        return found or None

    def _one_reward(self, name: str) -> dict[str, str] | None:
        if name == EMBEDDED:
            name = str(DEMO_REWARD)
        if name in reward_names.SELF_SCORES:
            return None
        if reward_names.is_address(name) or reward_names.is_judge(name):
            self.uncovered.append(f"reward_model: what the server behind {without_passwords(name)} computes")
            return None
        if is_folder(name):
            return self._reward_checkpoint(name)
        if reward_names.is_callable(name):
            sources = callable_sources.of_callable(name)
            self.distributions |= sources.distributions
            self.uncovered += [f"reward_model={name}: {text}" for text in sources.uncovered]
            data = {
                file: path for file, path in sources.data.items() if parts.whole(path.absolute()) not in self._records
            }
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


def text_or_digest(value: str) -> str:
    # an edited template file is another template
    is_file = "{" not in value and is_there(value) and not is_folder(value)
    return hashlib.sha256(expanded(value).read_bytes()).hexdigest() if is_file else value


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_named))


def _named(value: Any) -> str:
    """An object by its checkpoint, or at least by its class: no address of memory."""
    return str(getattr(value, "name_or_path", "") or (value if isinstance(value, Path) else type(value).__name__))

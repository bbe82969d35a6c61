"""Puts tasks/ and model_configs/ into the wheel as specrej_eval/_tasks and specrej_eval/_model_configs.

An editable install gets no copies: there `specrej_eval.paths` reads the checkout, and a stale copy could only mislead.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShipFolders(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for folder in ("tasks", "model_configs"):
            source = Path(self.root, folder)
            if source.is_dir():
                build_data["force_include"][str(source)] = f"specrej_eval/_{folder}"

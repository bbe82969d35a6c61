# torch-free
"""A judge of alpaca_eval over pairs of answers, for commands of ours: preferences, and nothing of its leaderboards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specrej_eval.errors import ConfigError, SpecRejError, suggest
from specrej_eval.harness.startup import activate


class Judge:
    """An annotator by its name among alpaca_eval's (ours is ``specrej_reward_judge``), or by the folder of its
    configuration. Every pair is judged in both orders.

    Raises:
        ConfigError: there is no such annotator, or its configuration is wrong. No model is loaded yet.
    """

    def __init__(self, name: str) -> None:
        activate()
        from alpaca_eval import constants

        self.name = name
        bundled = Path(constants.EVALUATORS_CONFIG_DIR)
        ours = Path(__file__).resolve().parent / "annotators_configs"
        if not Path(name).exists() and not any((place / name).is_dir() for place in (bundled, ours)):
            known = sorted(path.name for place in (bundled, ours) for path in place.iterdir() if path.is_dir())
            raise ConfigError(f"alpaca_eval has no annotator {name!r}.", hint=suggest(name, known))
        self._made(None)

    def _made(self, caching_path: Path | None) -> Any:
        from alpaca_eval.annotators import PairwiseAnnotator

        try:
            return PairwiseAnnotator(annotators_config=self.name, caching_path=caching_path, position_swap=True)
        except SpecRejError:
            raise
        except Exception as error:  # whatever a configuration's text leads to
            raise ConfigError(f"the annotator {self.name!r} cannot be used: {error}.") from error

    def preferences(
        self, instructions: Sequence[str], theirs: Sequence[str], ours: Sequence[str], *, caching_path: Path
    ) -> list[float | None]:
        """The chance that our answer is preferred to theirs, 0.5 where both are the same; None where the judge did not
        say.

        Args:
            caching_path: file of what was judged already.

        Raises:
            SpecRejError: as the judge.
        """
        pairs = list(zip(instructions, theirs, ours, strict=True))
        different = list(dict.fromkeys(pair for pair in pairs if pair[1] != pair[2]))
        found: dict[tuple[str, str, str], float | None] = {}
        if different:
            asked = [{"instruction": i, "output_1": first, "output_2": second} for i, first, second in different]
            told: Sequence[Mapping[str, Any]] = self._made(caching_path)(asked)
            for each in told:
                value = each.get("preference")
                place = (each["instruction"], each["output_1"], each["output_2"])
                found[place] = float(value) - 1 if isinstance(value, int | float) and 1 <= value <= 2 else None
        return [0.5 if pair[1] == pair[2] else found.get(pair) for pair in pairs]

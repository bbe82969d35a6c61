# torch-free
"""Arguments of ours with secrets in them, on their way through lm-eval.

lm-eval logs ``model_args``, prints them, and keeps them in results files and in the metadata of tasks, which its cache
of requests pickles. So what it gets of ours is ``Sealed``: it shows, and keeps, the redacted text, and our model gets
the whole one. Other models' arguments are not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from specrej_eval.harness.patching import takes
from specrej_eval.redaction import sealed

KEPT = ("model_args", "metadata")
"""What lm-eval keeps of what it is given."""


def sealed_call(
    args: Sequence[Any], kwargs: Mapping[str, Any], signature: inspect.Signature
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call of ``simple_evaluate``."""
    positional = [
        sealed(value) if name in KEPT else value for name, value in zip(signature.parameters, args, strict=False)
    ]
    return positional, _sealed_in(kwargs)


@contextlib.contextmanager
def sealed_configs() -> Iterator[None]:
    """Within: what lm-eval's command reads from its line and its ``--config`` file. Another lm-eval is left alone."""
    try:
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.utils import simple_parse_args_string
    except ImportError:
        yield
        return
    found = {name: vars(EvaluatorConfig).get(name) for name in ("from_cli", "load_yaml_config")}
    from_cli, load_yaml_config = found["from_cli"], found["load_yaml_config"]
    known = isinstance(from_cli, classmethod) and isinstance(load_yaml_config, staticmethod)
    if not known or not takes(EvaluatorConfig.from_cli, "namespace"):
        yield
        return
    assert isinstance(from_cli, classmethod) and isinstance(load_yaml_config, staticmethod)
    read_line, read_file = from_cli.__func__, load_yaml_config.__func__

    def of_line(cls: type[Any], namespace: argparse.Namespace) -> Any:
        namespace = copy.copy(namespace)
        vars(namespace).update(_sealed_in(vars(namespace)))
        return read_line(cls, namespace)

    def of_file(*args: Any, **kwargs: Any) -> Any:
        content = read_file(*args, **kwargs)
        if not isinstance(content, dict):
            return content
        # as lm-eval reads a text later on, which would lose the seal
        return _sealed_in(
            {
                name: simple_parse_args_string(value) if name in KEPT and isinstance(value, str) else value
                for name, value in content.items()
            }
        )

    for name, made in {"from_cli": classmethod(of_line), "load_yaml_config": staticmethod(of_file)}.items():
        setattr(EvaluatorConfig, name, made)
    try:
        yield
    finally:
        for name, original in found.items():
            setattr(EvaluatorConfig, name, original)


def _sealed_in(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sealed(value) if name in KEPT else value for name, value in given.items()}

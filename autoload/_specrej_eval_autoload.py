"""Announces specrej-eval to the evaluation harnesses at the moment one of them is imported.

`specrej_eval.pth` (on Python 3.15+ `specrej_eval.start`) calls `install()` at interpreter start. It adds one finder to
`sys.meta_path`. It answers only for the modules named in HOOKS, lets the real import happen, and then calls
`specrej_eval.harness.startup`. No harness, no torch, and nothing else of ours is imported before that.

Set SPECREJ_EVAL_AUTOLOAD=0 to switch all of this off. This file imports `sys` and nothing more at start.
"""

import sys

# imported module -> function of specrej_eval.harness.startup that is called with it, once it has been executed
HOOKS = {
    "lm_eval.models": "register_lm_eval_models",
    "lm_eval.evaluator": "wrap_lm_eval",
    "lm_eval.__main__": "wrap_lm_eval_command",
    "alpaca_eval.constants": "repair_alpaca_eval",
    "alpaca_eval.utils": "repair_alpaca_eval",
    "alpaca_eval.decoders": "repair_alpaca_eval",
    "alpaca_eval.annotators.base": "repair_alpaca_eval",
    "alpaca_eval.annotators.pairwise_evaluator": "repair_alpaca_eval",
    "alpaca_eval.metrics": "repair_alpaca_eval",
    "alpaca_eval.main": "repair_alpaca_eval",
}
# the same for functions called before it is executed; what they return is called afterwards, to clean up
BEFORE = {
    "alpaca_eval.constants": "prepare_alpaca_eval",
    "alpaca_eval.utils": "prepare_alpaca_eval",
}
# `python -m NAME` executes a module anew, as __main__, where no hook sees it: this is executed instead
RUN_AS_MAIN = {
    name: f"if __name__ == '__main__':\n    from {name} import {function}\n    {function}()\n"
    for name, function in {"lm_eval.__main__": "cli_evaluate", "alpaca_eval.main": "main"}.items()
}


def install(force=False):
    """Add the finder (once), and serve targets already imported. Never raises. `force` overrides the off switch."""
    try:
        if not (force or enabled()):
            return
        if not installed():
            sys.meta_path.insert(0, HookFinder())
        for name in HOOKS:
            module = sys.modules.get(name)
            # A module that is still being executed is served by nobody: its own import goes on without us.
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                run_hook(HOOKS, module, name)
    except Exception as error:
        warn(f"specrej-eval could not install its startup hook: {error!r}")


def uninstall():
    """Take the finder away again. What a hook has already registered stays."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not is_ours(finder)]


def installed():
    return any(is_ours(finder) for finder in sys.meta_path)


def enabled():
    from os import environ  # `site` has imported os long before; nothing is loaded here

    return environ.get("SPECREJ_EVAL_AUTOLOAD", "1").strip().lower() not in {"0", "false", "no", "off"}


def is_ours(finder):
    # By name: a second copy of this module (an editable install beside a wheel) must recognise the first one's finder.
    return type(finder).__name__ == "HookFinder" and type(finder).__module__ == __name__


def run_hook(hooks, module, name):
    if name not in hooks:
        return None
    try:
        from importlib import import_module

        return getattr(import_module("specrej_eval.harness.startup"), hooks[name])(module)
    except Exception as error:  # whatever is wrong with us, the host must go on working
        warn(f"specrej-eval could not hook into {name} ({error!r}); run `specrej-eval doctor`")


def warn(message):
    from warnings import warn as emit

    try:
        emit(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # python -W error: a warning must not become the crash it warns about
        print(message, file=sys.stderr)


class HookFinder:
    """Finds nothing itself: asks the other finders, then wraps the loader of a target."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in HOOKS:
            return None
        for finder in sys.meta_path:
            find_spec = None if is_ours(finder) else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = HookLoader(spec.loader)
                return spec
        return None


class HookLoader:
    """The real loader, then our hook. The module gets the real loader back before it is executed."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, attribute):
        if attribute == "_loader":  # a copy or unpickling that has not run __init__
            raise AttributeError(attribute)
        return getattr(self._loader, attribute)

    def create_module(self, spec):
        create = getattr(self._loader, "create_module", None)
        return create(spec) if create else None

    def exec_module(self, module):
        name = module.__spec__.name
        module.__loader__ = self._loader
        if name not in RUN_AS_MAIN:  # `python -m` will ask the spec's loader for the code
            module.__spec__.loader = self._loader
        clean_up = run_hook(BEFORE, module, name)
        try:
            self._loader.exec_module(module)
        finally:
            if clean_up is not None:
                clean_up()
        run_hook(HOOKS, module, name)

    def get_code(self, name):
        if name in RUN_AS_MAIN:
            return compile(RUN_AS_MAIN[name], f"<specrej-eval: python -m {name}>", "exec")
        return self._loader.get_code(name)

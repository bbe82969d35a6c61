"""Deterministic everywhere: the same examples and the same Monte Carlo draws on every machine and in every run.

``SPECREJ_TEST_FULL=1`` asks for ten times as many examples and draws (minutes instead of seconds).
"""

import gc
import logging
import os
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Nothing the tests need has to be downloaded; set before any test imports a library that reads these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Tiny matrices gain nothing from threads, and threads that wait for a busy core make a test a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU Triton's kernels run in its interpreter, if it is installed; it looks at this when it is imported.
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support import FULL
from support.lm_eval_package import with_few_tasks

# derandomize: examples depend on the test alone; no deadline: two shared cores are no stop watch
_ALWAYS = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fast", max_examples=100, **_ALWAYS)
settings.register_profile("full", max_examples=1000, **_ALWAYS)
settings.load_profile("full" if FULL else "fast")


LONG = ("test_chat_templates.py", "test_generator.py", "test_repairs.py")
"""Files of ten seconds and more, beside those with tests that are marked slow or full."""


@pytest.hookimpl(tryfirst=True)  # before -m takes tests away
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that with several processes none is left for the end (needs ``--no-loadscope-reorder``:
    xdist would begin with the files of the most tests, which are short ones)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = {item.path for item in items if any(map(item.get_closest_marker, ("slow", "full")))}
        items.sort(key=lambda item: item.path not in long and item.path.name not in LONG)


@pytest.fixture(scope="module", autouse=True)
def what_is_alive_stays() -> None:
    """What was imported and kept by now: no ``gc.collect()``, as after memory ran out, need go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_of_lm_eval() -> Iterator[None]:
    """Its commands set its logger up once in a process, for a screen that is a test's own, and out of others' sight."""
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    utils = sys.modules.get("lm_eval.utils")
    if utils is not None and hasattr(utils, "_LOGGING_CONFIGURED"):
        utils._LOGGING_CONFIGURED = False


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests, the processes they start and those they kill leave for a moment lies in pytest's own folder, of which
    the last three are kept, and not in the system's for good."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None  # it is looked up again
    yield
    os.environ.pop("TMPDIR")
    os.environ.update({} if before is None else {"TMPDIR": before})
    tempfile.tempdir = None


@pytest.fixture(scope="session")
def few_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``PYTHONPATH``: lm-eval finds fewer bundled tasks, which spares each process of it five seconds.
    ``make test-slow`` has them all."""
    folder = tmp_path_factory.mktemp("few_tasks")
    return folder if FULL else with_few_tasks(folder)


@pytest.fixture
def few_tasks_here(few_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for lm-eval in this process."""
    if not FULL:
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(few_tasks / "lm_eval" / "tasks" / "manager.py"))


@pytest.fixture(scope="module")
def ctrl_c_is_not_ignored() -> Iterator[None]:
    """As in a terminal, for the processes that a test starts too: shells let what runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def alpaca_eval_stays_as_installed() -> Iterator[None]:
    """Fails a module whose tests have written into the installed alpaca_eval."""
    from support.alpaca_runs import package_digest

    before = package_digest()
    yield
    assert package_digest() == before, "something was written into the installed alpaca_eval"


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """``counted("arguments changed", 31)``: what a suite tried, added up over all tests and printed at the end."""

    def add(what: str, number: int = 1) -> None:
        request.node.user_properties.append(("counted", (what, number)))

    return add


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """``measured("seconds from SIGTERM to the end", 0.4)``: printed at the end, and never asserted."""

    def add(what: str, value: float) -> None:
        request.node.user_properties.append(("measured", (what, value)))

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What ``counted`` and ``measured`` were told; it comes from the reports, so tests may run in several processes."""
    counts: Counter[str] = Counter()
    values: dict[str, list[float]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    if name == "counted":
                        counts[value[0]] += value[1]
                    if name == "measured":
                        values.setdefault(value[0], []).append(value[1])
    if counts:
        terminalreporter.section("counted")
        for what, number in sorted(counts.items()):
            terminalreporter.write_line(f"{number:>8,}  {what}")
    if values:
        terminalreporter.section("measured")
        for what, found in sorted(values.items()):
            terminalreporter.write_line(
                f"{len(found):>8,}  {what}: median {statistics.median(found):.2f}, most {max(found):.2f}"
            )

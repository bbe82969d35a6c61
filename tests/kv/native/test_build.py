"""The library of CPU kernels: made where it can be, and where not, why; nothing is wrong or an error for want of it."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import specrej_eval
from specrej_eval import temporary
from specrej_eval.api import resolve
from specrej_eval.config import RunConfig
from specrej_eval.errors import ConfigError, MissingDependencyError
from specrej_eval.kv import choose
from specrej_eval.kv.native import build
from specrej_eval.records import journal
from specrej_eval.records.fingerprint.comparing import _said
from specrej_eval.records.jsonl import checked_line

needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=f"no kernels here: {build.why_not()}")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and nothing found yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in build._FLAGS))
    build._found.cache_clear()
    yield tmp_path
    build._found.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program in the place of a C++ compiler."""
    program = folder / "compiler"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


GCC = 'case "$*" in *--version*) echo "g++ 12, Free Software Foundation"; exit 0;; esac\n'


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no C++ compiler"),
        ('echo "clang version 17"', "is not GCC"),
        ("exit 3", "failed (status 3)"),
        (GCC + 'echo "kernels.cpp:1: error: no such instruction" >&2; exit 1', "error: no such instruction"),
        (GCC + "kill -9 $$", "failed (status -9)"),
        (GCC + "sleep 60", "timed out"),
        (GCC + 'for each; do case "$each" in *-partial) echo nonsense > "$each";; esac; done', "cannot be loaded"),
    ],
    ids=["none", "clang", "fails", "refuses the source", "is killed", "hangs", "makes nonsense"],
)  # fmt: skip
def test_a_compiler_that_is_no_use_is_a_reason_and_never_an_error(
    script: str | None, said: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said == "timed out":  # the others may have to wait for a busy machine
        monkeypatch.setattr(build, "_SECONDS", 1)
    monkeypatch.setenv("CXX", compiler(fresh, script) if script else "there-is-no-such-compiler")
    assert said in str(build.why_not())
    assert choose.resolve("auto", "cpu").name == "sdpa"
    with pytest.raises(MissingDependencyError, match="compile=on") as caught:
        choose.resolve("auto", "cpu", "on")
    assert said in str(caught.value) and "apt-get install g++" in str(caught.value)
    with pytest.raises(MissingDependencyError, match="attention_backend=cpp"):
        choose.resolve("cpp", "cpu")


@pytest.mark.parametrize("named", ["", "  ", 'g++ "', "there is 'none"])
def test_a_name_that_is_no_command_is_a_reason(named: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build, "_processor", lambda: "flags: avx512f")
    monkeypatch.setenv("CXX", named)
    assert "C++ compiler (" in str(build.why_not())


ONCE = """#!/bin/sh
case "$*" in *--version*) exec {compiler} "$@";; esac
case "$1" in -shared) kept="$0.so";; *) kept="$0.o";; esac
for each; do [ "$before" = -o ] && made=$each; before=$each; done
if [ -f "$kept" ]; then exec cp "$kept" "$made"; fi
{compiler} "$@" && cp "$made" "$kept"
"""
"""A compiler that compiles once, and afterwards gives what came of it: each time takes two seconds."""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("once") / "compiler"
    program.write_text(ONCE.format(compiler=os.environ.get("CXX", "g++")))
    program.chmod(0o700)
    return program


@pytest.fixture
def quick(fresh: Path, once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``fresh``, where nothing depends on what compiles."""
    monkeypatch.setenv("CXX", str(once))
    return fresh


@needs_compiler
def test_it_is_compiled_once_and_found_afterwards(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.why_not() is None
    [built] = (quick / "cache" / "specrej-eval" / "native").iterdir()
    when = built.stat().st_mtime_ns
    build._found.cache_clear()
    assert build.why_not() is None
    assert built.stat().st_mtime_ns == when
    monkeypatch.setattr(build, "_processor", lambda: "flags: avx512f of another")
    build._found.cache_clear()
    assert build.why_not() is None
    assert len(list(built.parent.iterdir())) == 2, "another processor gets another library"


@needs_compiler
@pytest.mark.parametrize("left", [b"", b"half of it"])
def test_a_library_that_is_broken_is_made_again(left: bytes, quick: Path) -> None:
    *_, built = build._named()
    built.parent.mkdir(parents=True)
    built.write_bytes(left)
    assert build.why_not() is None
    assert built.stat().st_size > 1000


@needs_compiler
def test_what_a_killed_process_left_of_compiling_is_removed(quick: Path) -> None:
    *_, built = build._named()
    built.parent.mkdir(parents=True)
    done = subprocess.Popen(["true"])
    done.wait()
    for place in (built, built.with_suffix(".o")):
        ours = temporary.partial(place)
        ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{done.pid}-")).write_text("half of it")
    assert len(list(built.parent.iterdir())) == 2
    assert build.why_not() is None
    assert list(built.parent.iterdir()) == [built]


@needs_compiler
def test_a_folder_that_others_can_write_is_closed_to_them(quick: Path) -> None:
    *_, built = build._named()
    built.parent.mkdir(parents=True)
    built.parent.chmod(0o777)
    assert build.why_not() is None
    assert stat.S_IMODE(built.parent.stat().st_mode) == 0o700


@needs_compiler
def test_a_library_does_not_depend_on_the_users_language(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = compiler(fresh, 'echo "g++ 12 $LC_ALL, Free Software Foundation"')
    monkeypatch.setenv("CXX", said)
    names = set()
    for language in ("C", "de_DE.UTF-8"):
        monkeypatch.setenv("LC_ALL", language)
        names.add(build._named()[2])
    assert len(names) == 1


@needs_compiler
def test_a_cache_that_is_a_file_is_a_reason(fresh: Path) -> None:
    (fresh / "cache").write_text("")
    assert "nothing can be kept in" in str(build.why_not())


def test_a_processor_without_avx512_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build, "_processor", lambda: "flags: fma avx2 avx512_of_no_kind")
    assert "has no AVX-512" in str(build.why_not())


@needs_compiler
def test_a_library_that_others_can_write_is_not_loaded(quick: Path) -> None:
    assert build.why_not() is None
    [built] = (quick / "cache" / "specrej-eval" / "native").iterdir()
    built.chmod(0o777)
    build._found.cache_clear()
    assert "others may have written" in str(build.why_not())


@needs_compiler
def test_other_threads_than_torchs_are_a_reason(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert build.why_not() == "their threads are not torch's"


@needs_compiler
def test_threads_follow_torch() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert build.library().threads() == threads

            def used() -> int:
                with build.used(build.library()):
                    return int(build.library().threads())

            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(used).result() == threads, "in a thread that is new"
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("told", [build.Attention, build.Decode, build.Weights])
def test_both_sides_mean_the_same_by_a_request(told: Any) -> None:
    """The fields of the two structures, by name and order."""
    source = build.SOURCE.read_text(encoding="utf-8")
    body = source.split(f"struct {told.__name__} {{")[1].split("};")[0]
    fields: list[tuple[str, bool]] = []
    for line in body.splitlines():
        declared = line.split("//")[0].strip().rstrip(";")
        if declared:
            kind, names = declared.rsplit(" ", 1) if "," not in declared else declared.split(" ", 1)
            kind, names = (
                (" ".join(declared.split(" ")[:2]), declared.split("*", 1)[1]) if "*" in declared else (kind, names)
            )
            fields += [(name.strip(" *"), "*" in declared) for name in names.split(",")]
    assert [name for name, _ in fields] == [name for name, _ in told._fields_]
    pointers = [name for name, kind in told._fields_ if kind is ctypes.c_void_p]
    assert [name for name, pointer in fields if pointer] == pointers


# ---- what a run makes of it ------------------------------------------------------------------------------------------


@needs_compiler
def test_auto_takes_it_on_a_cpu_unless_compile_is_off(quick: Path) -> None:
    assert choose.resolve("auto", "cpu").name == choose.resolve("auto", "cpu", "on").name == "cpp"
    assert choose.is_verified(choose.build("cpp"), torch.device("cpu"))
    assert choose.resolve("auto", "cpu", "off").name == "sdpa"
    assert choose.resolve("sdpa", "cpu").name == "sdpa"
    with pytest.raises(ConfigError, match="compile=off forbids"):
        choose.resolve("cpp", "cpu", "off")


@needs_compiler
def test_a_kernel_that_is_wrong_on_this_machine_is_not_used(
    quick: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = type(choose.build("cpp"))
    whole = backend._decode
    monkeypatch.setattr(backend, "_decode", lambda self, *given: whole(self, *given) * 1.2)
    with caplog.at_level(logging.WARNING):
        assert choose.resolve("auto", "cpu").name == "sdpa"
    assert "is wrong on this machine and is not used" in caplog.text


@pytest.mark.parametrize(
    ("given", "read"), [("on", "on"), (True, "on"), ("true", "on"), (False, "off"), ("auto", "auto")]
)
def test_compile_is_read_as_yaml_and_arguments_spell_it(given: Any, read: str) -> None:
    config, _ = RunConfig.from_args({"compile": given})
    assert config.compile == read


def test_a_word_that_compile_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile"):
        RunConfig.from_args({"compile": "always"})


@needs_compiler
def test_results_say_which_kernels_computed_them(quick: Path) -> None:
    compiled = specrej_eval.load(device="cpu", n=2, max_gen_toks=4).describe()["attention_backend"]
    plain = specrej_eval.load(device="cpu", n=2, max_gen_toks=4, compile="off").describe()["attention_backend"]
    assert (compiled, plain) == ("cpp", "sdpa")
    before, now = (
        resolve(*RunConfig.from_args({"device": "cpu", "compile": each})).of_models() for each in ("on", "off")
    )
    assert before["environment"]["attention_backend"] == "cpp"
    assert now["environment"]["attention_backend"] == "sdpa"


GOES_ON = "goes on with it"
STARTED_ELSEWHERE = "was begun under other conditions"


def answered(caplog: pytest.LogCaptureFixture, **args: Any) -> tuple[Any, str]:
    """What a run with a journal says of itself and its arguments, and its log."""
    _said.clear()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        generator = specrej_eval.load(device="cpu", n=2, max_gen_toks=4, **args)
        generator.generate([f"{len(caplog.records)}+1=?"])
    return {**generator.describe(), **generator.config.to_dict()}, caplog.text


@needs_compiler
@pytest.mark.parametrize("argument", [{"compile": "off"}, {"attention_backend": "sdpa"}])
@pytest.mark.parametrize("name", ["run.jsonl", "run_rank0.jsonl"])
def test_auto_goes_on_with_the_kernels_that_a_journal_was_begun_with(
    quick: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, argument: dict[str, str], name: str
) -> None:
    place = str(tmp_path / "run.jsonl")
    began, _ = answered(caplog, journal=place, **argument)
    Path(place).rename(tmp_path / name)
    then, said = answered(caplog, journal=place)
    ((argument_name, value),) = argument.items()
    assert began[argument_name] == then[argument_name] == value
    assert GOES_ON in said and STARTED_ELSEWHERE not in said


@needs_compiler
def test_kernels_that_are_asked_for_are_taken_and_the_change_is_said(
    quick: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = str(tmp_path / "run.jsonl")
    answered(caplog, journal=place, compile="off")
    then, said = answered(caplog, journal=place, compile="on")
    assert then["compile"] == "on"
    assert GOES_ON not in said and STARTED_ELSEWHERE in said


def test_kernels_that_cannot_be_had_any_more_are_missed_aloud(
    quick: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run.jsonl"
    answered(caplog, journal=str(place))
    header = place.read_text().splitlines()[0]
    record = json.loads(header)
    record["fingerprint"]["environment"] |= {"compile": "on", "attention_backend": "cpp"}
    place.write_text(checked_line({name: value for name, value in record.items() if name != "checksum"}))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._found.cache_clear()
    then, said = answered(caplog, journal=str(place))
    assert then["compile"] == "auto"
    assert GOES_ON not in said and STARTED_ELSEWHERE in said


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n", b'{"journal": 2}\n', b"[1]\n", b"x" * 100])
def test_a_journal_that_says_nothing_of_its_kernels_decides_nothing(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "run.jsonl"
    place.write_bytes(content)
    assert journal.environment(place) == {}
    assert journal.environment(tmp_path) == journal.environment(tmp_path / "none") == {}


def test_all_kernels_and_none_for_attention_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="compute attention too"):
        resolve(*RunConfig.from_args({"device": "cpu", "compile": "on", "attention_backend": "sdpa"}))

"""Files that a run has left, changed in any way, given to the run that goes on from them and to all that read them."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands.test_report import arguments, write_results
from commands.test_submission_alpaca import JUDGE, NAME, REFERENCES
from commands.test_submission_alpaca import Run as AlpacaRun
from commands.test_submission_lm_eval import real  # noqa: F401  # a fixture
from hypothesis import strategies as st
from support.fuzzing import Surface, altered, command, damaged, examples, json_of
from support.journals import FINGERPRINT, a_journal, a_prompt, a_result, key_of
from support.run_folders import FINGERPRINT as OF_RUN
from support.run_folders import a_run, an_answer

from specrej_eval.commands.submission import alpaca as alpaca_submission
from specrej_eval.commands.submission import alpaca_checks
from specrej_eval.errors import SpecRejError
from specrej_eval.records import journal, lock
from specrej_eval.records.answers import RunRecord
from specrej_eval.records.journal import Journal
from specrej_eval.records.jsonl import checked_line, parsed
from specrej_eval.records.outputs import OutputsFolder
from specrej_eval.records.trace import Tracer, is_trace

Counted = Callable[[str, int], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory where that is to be had: each input is written to a file, and synced as a run syncs its records."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="specrej_fuzz_", dir=shared if shared.is_dir() else tmp_path))
    monkeypatch.chdir(place)
    yield place
    shutil.rmtree(place)


def emptied(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return folder


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# journals


def whole_journal(folder: Path) -> tuple[bytes, list[Any]]:
    lines = a_journal(folder / "whole.jsonl", 4)
    return b"".join(lines), [json.loads(line) for line in lines]


def lines_of(documents: Any, *, checksums: bool) -> bytes:
    """A file of records; with checksums that are right, as only somebody who means it writes them."""
    if not isinstance(documents, list):
        return json_of(documents)
    found = b""
    for document in documents:
        if checksums and isinstance(document, dict):
            with contextlib.suppress(Exception):
                found += checked_line(document).encode("utf-8", "surrogatepass")
                continue
        found += json_of(document) + b"\n"
    return found


def intact_lines(content: bytes, whole: bytes) -> list[bytes]:
    """Lines of an undisturbed file that are still there."""
    known = {line for line in whole.split(b"\n") if line}
    return [line for line in content.split(b"\n") if line in known]


def test_journals(folder: Path, counted: Counted) -> None:
    surface = Surface("journals", counted, folder)
    whole, documents = whole_journal(folder)
    path = folder / "run.jsonl"

    def work(content: bytes) -> None:
        emptied(folder)
        path.write_bytes(content)
        kept = intact_lines(content, whole)
        try:
            journal.check(str(path), lambda: FINGERPRINT)
            opened = Journal(str(path), FINGERPRINT)
            for number in range(5):
                if opened.get(key_of(number), a_prompt(number)) is None:
                    opened.put(key_of(number), a_result(number))
            opened.close()
        except SpecRejError:
            assert path.read_bytes() == content, "it was refused, and changed all the same"
            raise
        left = all_bytes(folder)
        assert all(line in left for line in kept), "an earlier record is lost"
        again = Journal(str(path), FINGERPRINT)
        assert all(again.get(key_of(number), a_prompt(number)) is not None for number in range(5))
        again.close()

    def show(content: bytes) -> None:
        emptied(folder)
        path.write_bytes(content)
        for words in (["show", "run.jsonl"], ["verify", "run.jsonl"], ["merge", "run.jsonl", "--output", "new.jsonl"]):
            if command(["journal", *words])[0]:
                surface.refused += 1
        assert path.read_bytes() == content

    surface.fuzz(damaged(whole), work, examples(3500))
    for checksums in (False, True):
        surface.fuzz(altered(documents).map(lambda d, c=checksums: lines_of(d, checksums=c)), work, examples(1500, 100))
    surface.fuzz(damaged(whole), show, examples(1500, 50))
    surface.fuzz(altered(documents).map(lambda d: lines_of(d, checksums=True)), show, examples(1500, 50))
    surface.done()


# folders of answers


def a_record() -> RunRecord:
    return RunRecord(name="a run", fingerprint=dict(OF_RUN), arguments={"prompts": "p.csv"})


ANSWERS = [an_answer(text, index=number, reward=number / 2) for number, text in enumerate("abc")]


def test_folders_of_answers(folder: Path, counted: Counted) -> None:
    surface = Surface("folders of answers", counted, folder)
    a_run(folder / "whole", ANSWERS)
    outputs = (folder / "whole" / "specrej_outputs.jsonl").read_bytes()
    record = (folder / "whole" / "specrej_run.json").read_bytes()
    documents = {"lines": [json.loads(line) for line in outputs.splitlines()], "record": json.loads(record)}

    def work(content: tuple[bytes, bytes]) -> None:
        run = emptied(folder) / "run"
        run.mkdir()
        (run / "specrej_outputs.jsonl").write_bytes(content[0])
        (run / "specrej_run.json").write_bytes(content[1])
        kept = intact_lines(content[0], outputs)
        store = OutputsFolder(run)
        try:
            with contextlib.suppress(SpecRejError):
                store.answers()
            store = OutputsFolder(run)
            store.begin(a_record())
            for answer in ANSWERS:
                if store.get(answer.key) is None:
                    store.put(answer)
            store.merge_parts(ANSWERS)
            store.mark_complete(store._record or a_record(), ANSWERS)
        except SpecRejError:
            left = all_bytes(run)
            assert all(line in left for line in kept), "it was refused, and an answer is lost"
            raise
        finally:
            store.close()
            del store
        left = all_bytes(run)
        assert all(parsed(line)["output"].encode() in left for line in kept), "an answer is lost"
        assert len(OutputsFolder(run).answers()) == len(ANSWERS)

    surface.fuzz(st.tuples(damaged(outputs), st.just(record)), work, examples(2200, 100))
    surface.fuzz(st.tuples(st.just(outputs), damaged(record)), work, examples(800, 50))
    for checksums in (False, True):
        given = altered(documents, whole=False).map(
            lambda d, c=checksums: (lines_of(d.get("lines"), checksums=c), json_of(d.get("record")))
        )
        surface.fuzz(given, work, examples(1500, 50))
    surface.done()


# traces


def test_traces(folder: Path, counted: Counted) -> None:
    """Whether a file is a trace is asked of what a results file names; a run appends to whatever its user names."""
    surface = Surface("traces", counted, folder)
    path = folder / "trace.jsonl"
    tracer = Tracer(str(path))
    tracer.run({"arguments": {"n": 2}})
    for number in range(3):
        tracer.round(a_prompt(number), 1, a_result(number).rounds[0])
        tracer.request(a_result(number))
    tracer.close()
    whole = path.read_bytes()
    documents = [json.loads(line) for line in whole.splitlines()]

    def work(content: bytes) -> None:
        path.write_bytes(content)
        known = is_trace(path)
        tracer = Tracer(str(path))
        tracer.request(a_result(1))
        tracer.close()
        assert path.read_bytes().startswith(content), "what stood there is lost"
        if not known:
            raise SpecRejError("no trace of ours")

    surface.fuzz(damaged(whole), work, examples(3500))
    surface.fuzz(altered(documents).map(lambda d: lines_of(d, checksums=False)), work, examples(2000, 100))
    surface.done()


# results


def test_report(folder: Path, counted: Counted) -> None:
    surface = Surface("results given to report", counted, folder)
    made = folder / "made"
    path = write_results(made, date=2.5, resolved=arguments(), samples=[0.0, 1.0, 1.0, 0.0])
    (samples,) = made.glob("samples_*")
    other = write_results(made / "other", date=1.5, resolved=arguments(n=4), samples=[0.0, 1.0, 0.0, 0.0])
    run = a_run(folder / "answers", ANSWERS)
    board = "\n".join([",win_rate,standard_error,n_total,length_controlled_winrate", "a run,60.5,1.5,3,58", ""])
    judged = [{"instruction": "a", "output_1": "x", "generator_2": "a run", "preference": 1.5}]
    files = {
        "r/" + path.name: path.read_bytes(),
        "r/" + samples.name: samples.read_bytes(),
        "r/other/" + other.name: other.read_bytes(),
        "a/specrej_run.json": Path(run, "specrej_run.json").read_bytes(),
        "a/specrej_outputs.jsonl": Path(run, "specrej_outputs.jsonl").read_bytes(),
        "a/judge/leaderboard.csv": board.encode(),
        "a/judge/annotations.json": json.dumps(judged).encode(),
    }
    changed = [name for name in files if "other" not in name]

    def put(names: dict[str, bytes]) -> None:
        emptied(folder)
        for name, content in {**files, **names}.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

    def work(given: tuple[str, bytes, list[str]]) -> None:
        name, content, words = given
        put({name: content})
        code, _ = command(["report", "r", "a", *words])
        if code:
            surface.refused += 1
        assert (folder / name).read_bytes() == content

    words = st.sampled_from(([], [], ["--format", "json"], ["--format", "csv"], ["--format", "markdown"]))

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, bytes, list[str]]:
        name = draw(st.sampled_from(changed))
        content = files[name]
        if name.endswith(".json") and draw(st.integers(0, 2)):
            changed_document = draw(altered(json.loads(content)))
            return name, json_of(changed_document), draw(words)
        return name, draw(damaged(content)), draw(words)

    surface.fuzz(inputs(), work, examples(7000))
    surface.fuzz(
        altered(json.loads(files["r/" + path.name])).map(lambda d: ("r/" + path.name, json_of(d), [])),
        work,
        examples(3000, 100),
    )
    surface.done()


def test_submission_lm_eval(real: Path, folder: Path, counted: Counted) -> None:  # noqa: F811
    surface = Surface("results given to submission lm-eval", counted, folder)
    source = {
        str(path.relative_to(real / "whole")): path.read_bytes()
        for path in sorted((real / "whole").rglob("*"))
        if path.is_file()
    }
    (results,) = [name for name in source if Path(name).name.startswith("results_")]
    content = json.loads(source[results])
    block = content["config"]["specrej"]
    block["embedded_demo_pair"] = False
    block["reward_model"] = "org/judge"
    given = {
        "pretrained": "org/small",
        "reward_model": "org/judge",
        "trace_path": "trace.jsonl",
        "journal": "run.jsonl",
    }
    block["arguments"] |= given
    content["model_name"] = "org/small"
    source[results] = json.dumps(content).encode()
    secret = folder / "secret.txt"

    def work(given: tuple[str, bytes]) -> None:
        name, changed = given
        emptied(folder)
        secret.write_text("nobody's business")
        for each, whole in {**source, name: changed}.items():
            place = folder / "results" / each
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(whole)
        if command(["submission", "lm-eval", "results", "--output", "out"])[0]:
            surface.refused += 1
        assert (folder / "results" / name).read_bytes() == changed
        assert b"nobody's business" not in all_bytes(folder / "out") if (folder / "out").is_dir() else True

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from([results, results, *source]))
        if name == results and draw(st.integers(0, 3)):
            return name, json_of(draw(altered(content)))
        if name.endswith(".jsonl") and draw(st.booleans()):
            rows = [json.loads(line) for line in source[name].splitlines()]
            return name, lines_of(draw(altered(rows)), checksums=False)
        return name, draw(damaged(source[name]))

    surface.fuzz(inputs(), work, examples(5500))
    surface.done()


def test_submission_alpaca(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], counted: Counted
) -> None:
    """Of three instructions in the place of 805."""
    surface = Surface("results given to submission alpaca", counted, folder)
    for module in (alpaca_checks, alpaca_submission):
        monkeypatch.setattr(module, "NUM_INSTRUCTIONS", 3)
    monkeypatch.setattr(alpaca_submission, "_FAILED_JUDGMENTS", 0)
    monkeypatch.setattr("commands.test_submission_alpaca.REFERENCES", REFERENCES[:3])
    run = AlpacaRun(folder, capsys)
    run.write_judged(n_total="3", avg_length=str(sum(len(row["output"]) for row in run.rows) // 3))
    source = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert f"results/{NAME}/{JUDGE}/annotations.json" in source
    run.submit()

    def work(given: tuple[str, bytes]) -> None:
        name, changed = given
        emptied(folder)
        for each, whole in {**source, name: changed}.items():
            place = folder / each
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(whole)
        words = ["submission", "alpaca", "--name", NAME, "--output", "out", "--reference_outputs", "reference.json"]
        if command(words)[0]:
            surface.refused += 1
        assert (folder / name).read_bytes() == changed

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(sorted(source)))
        if name.endswith(".json") and draw(st.integers(0, 2)):
            return name, json_of(draw(altered(json.loads(source[name]))))
        if name.endswith(".jsonl") and draw(st.booleans()):
            rows = [json.loads(line) for line in source[name].splitlines()]
            return name, lines_of(draw(altered(rows)), checksums=True)
        return name, draw(damaged(source[name]))

    surface.fuzz(inputs(), work, examples(5500))
    surface.done()


def test_gather_and_export(folder: Path, counted: Counted) -> None:
    surface = Surface("runs given to gather and export", counted, folder)
    for seed in (0, 1):  # each with a name of its own: export refuses two of one name, whatever else they hold
        answers = [an_answer(text, index=i, seed=seed) for i, text in enumerate("abc")]
        a_run(folder / f"made{seed}", answers, name=f"run {seed}", seed=seed)
    source = {
        f"{run}/{name}": (folder / f"made{run}" / name).read_bytes()
        for run in (0, 1)
        for name in ("specrej_run.json", "specrej_outputs.jsonl")
    }

    def work(given: tuple[str, bytes]) -> None:
        name, changed = given
        emptied(folder)
        for each, whole in {**source, name: changed}.items():
            place = folder / each
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(whole)
        codes = [
            command(["gather", "0", "1", "--output", "whole"])[0],
            command(["gather", "0", "1", "--output", "part", "--incomplete"])[0],
            command(["export", "alpaca", "0", "1", "--output", "exported.json"])[0],
        ]
        surface.refused += bool(sum(codes))
        assert (folder / name).read_bytes() == changed

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(sorted(source)))
        if name.endswith(".json") and draw(st.integers(0, 3)):
            return name, json_of(draw(altered(json.loads(source[name]))))
        if name.endswith(".jsonl") and draw(st.integers(0, 3)):
            rows = [json.loads(line) for line in source[name].splitlines()]
            return name, lines_of(draw(altered(rows)), checksums=True)
        return name, draw(damaged(source[name]))

    surface.fuzz(inputs(), work, examples(5500))
    surface.done()

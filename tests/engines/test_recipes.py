"""The scripts of docs/engines.md for servers and several nodes: they are shell, and name options that are there. What
can be run of them without a cluster is."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from specrej_eval import cli

PAGE = (ROOT / "docs/engines.md").read_text(encoding="utf-8")
SCRIPTS: list[str] = re.findall(r"^```(?:bash|console)\n(.*?)^```$", PAGE, re.M | re.S)
[CONFIG] = re.findall(r"^```yaml\n(# two_nodes\.yaml.*?)^```$", PAGE, re.M | re.S)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command, and of those that a quoted word holds (``bash -c '...'``)."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        yield words
        for word in words:
            if " " in word:
                yield from commands(word)


def of(*beginning: str, within: Sequence[str] = SCRIPTS) -> list[list[str]]:
    """What follows such words, in all commands that hold them."""
    found = []
    for words in (words for script in within for words in commands(script)):
        for at in range(len(words)):
            if tuple(words[at : at + len(beginning)]) == beginning:
                found.append(words[at + len(beginning) :])
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=[f"script{place}" for place, _ in enumerate(SCRIPTS)])
def test_a_script_is_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for line in script.splitlines():
        assert not re.match(r"\s*(?:export|local|readonly) \w+=\$\(", line), f"hides that a command failed: {line}"
        assert not re.search(r'(?<!["\w=])\$[A-Za-z_]\w*(?!")', re.sub(r"'[^']*'", "", line)), f"not quoted: {line}"


def test_our_own_commands_take_the_options_that_are_given() -> None:
    found = [("run", words) for words in of("specrej-eval", "run") + of("--module", "specrej_eval", "run")]
    found += [("memory", words) for words in of("specrej-eval", "memory")]
    assert len(found) >= 4
    for name, words in found:
        options = cli.parse(name, words)
        assert options is not None


def test_accelerate_takes_the_options_and_the_file_that_are_given(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = tmp_path / "two_nodes.yaml"
    file.write_text(CONFIG)
    config = load_config_from_file(str(file))
    [script] = [script for script in SCRIPTS if "accelerate launch" in script]
    nodes, each = (int(re.search(rf"--{name}=(\d+)", script)[1]) for name in ("nodes", "gpus-per-node"))  # type: ignore[index]
    assert config.num_machines == nodes and config.num_processes == nodes * each
    [words] = of("accelerate", "launch")
    options = launch_command_parser().parse_args([word.replace("$SLURM_NODEID", "1") for word in words])
    assert (options.config_file, options.machine_rank, options.main_process_ip) == (file.name, 1, "$HEAD")
    assert options.module and (options.training_script, options.training_script_args[0]) == ("specrej_eval", "run")


def test_vllm_takes_the_options_that_are_given() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")
    from vllm import envs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {word for action in make_arg_parser(FlexibleArgumentParser())._actions for word in action.option_strings}
    served = re.findall(r"vllm serve ([^`\n]*)", PAGE)
    asked = {word for rest in served for word in re.findall(r"--[a-z][a-z-]*", rest)}
    asked |= {"--max-num-seqs", "--no-enable-chunked-prefill"}
    assert len(asked) >= 5 and asked <= known, asked - known
    assert "VLLM_SERVER_DEV_MODE" in envs.environment_variables


@pytest.mark.full
def test_the_recipe_for_several_nodes_runs_as_two_machines_that_are_one(tmp_path: Path) -> None:
    """Each node's very command, with the embedded pair in the place of the models and a process of each node's."""
    [command] = [
        word for script in SCRIPTS for words in commands(script) for word in words if "accelerate launch" in word
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config: dict[str, Any] = {**yaml.safe_load(CONFIG), "num_processes": 2, "main_process_port": port}
    (tmp_path / "two_nodes.yaml").write_text(yaml.safe_dump(config))
    prompts = [f"Q: {number} + 45 = ?" for number in range(12, 17)]
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": text} for text in prompts]))
    command = re.sub(r"--(pretrained|reward_model) \S+", "", command).replace("--n 64", "--n 4 --max_gen_toks 16")
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": places, "HEAD": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            ["bash", "-c", command], env={**env, "SLURM_NODEID": str(node)}, cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for node in range(2)
    ]  # fmt: skip
    told = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in told)
    lines = (tmp_path / "out" / "specrej_outputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == prompts, "the first one has gathered them all"
    journals = sorted((tmp_path / "out").glob("specrej_trajectories_rank*.jsonl"))
    answers = [journal.read_text().count('"trajectories"') for journal in journals]
    assert len(journals) == 2 and min(answers) >= 2, "and each node has answered its share"

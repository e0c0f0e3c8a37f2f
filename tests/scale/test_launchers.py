"""DeepSpeed's launcher and torchrun, as recipes, documents and the Slurm script spell them: the plain run's numbers."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import python
from tiny_models import tiny_pair
from tolerance import close_numbers, transformer

from opsd.config import from_json
from opsd.train import start
from opsd.utils import distributed as ranks
from opsd.utils.distributed import first_to_fail

ROOT = Path(__file__).parents[2]
STEPS = 12
FLAGS = (
    f"--prompt_format raw --steps {STEPS} --prompts_per_step 3 --rollout.samples_per_prompt 2 "
    "--rollout.max_prompt_tokens 8 --rollout.max_new_tokens 6 --optim.lr 1e-2 --select.by soft_or "
    "--select.normalise_over batch --engine.micro_batch_tokens 24 --engine.device cpu --telemetry.every 0"
).split()
SHARDED = ["--engine.kind", "deepspeed", "--engine.zero_stage", "3"]


def spellings() -> list[tuple[str, str]]:
    """Every launcher's command that documents and the Slurm script name: the file, and the command as one line."""
    found = []
    for name in ("README.md", "docs/scaling.md", "scripts/slurm/train.sbatch"):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        lines = re.findall(r"^(?:srun \S+ )?(?:\.venv/bin/)?((?:deepspeed|torchrun) .*)$", text, flags=re.MULTILINE)
        found += [(name, re.split(r" +# ", line)[0].replace(" …", "")) for line in lines]
    return found


def parsed(words: list[str]):
    """As the launcher reads it: is it a module, its name, its arguments, does the launcher add a --local_rank."""
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        read = parse_args(words[1:])
        return read.module, read.user_script, read.user_args, not read.no_local_rank
    from torch.distributed.run import parse_args

    read = parse_args(words[1:])
    return read.module, read.training_script, read.training_script_args, False


def test_the_documents_spell_launchers_as_the_launchers_read_them():
    found = spellings()
    assert {words.split()[0] for _, words in found} == {"deepspeed", "torchrun"}
    assert {name for name, _ in found} == {"docs/scaling.md", "scripts/slurm/train.sbatch"}
    for name, line in found:
        words = [word.replace("$SLURM_JOB_NUM_NODES", "2") for word in shlex.split(line)]
        module, program, arguments, adds = parsed(words)
        assert (module, program, adds) == (True, "opsd", False) and arguments[0] in {"train", "eval"}, (name, line)


def test_what_the_first_rank_said_is_not_said_again_when_it_has_left(monkeypatch):
    # Under DeepSpeed's launcher the first rank keeps the store in which the first to fail is noted.
    class Gone:
        def add(self, *_):
            raise RuntimeError("connection reset")

    monkeypatch.setattr(ranks, "_store", Gone())
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, says in (("1", True), ("2", False)):
        monkeypatch.setenv("RANK", rank)
        assert not first_to_fail(or_left=False)
        assert first_to_fail(or_left=True) == says


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and prompts, under a name with a blank, and the run `plain` of one process without a launcher."""
    folder = tmp_path_factory.mktemp("launched here")
    pair = tiny_pair(folder)
    for name in ("dapo_train", "math500", "aime24", "aime25"):
        (folder / f"{name}.jsonl").write_text(Path(pair["prompts"]).read_text())
    start(
        from_json(
            {
                **pair,
                "out": str(folder / "plain"),
                "steps": STEPS,
                "prompts_per_step": 3,
                "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
                "select": {"by": "soft_or", "normalise_over": "batch"},
                "optim": {"lr": 1e-2},
                "engine": {"device": "cpu", "micro_batch_tokens": 24},
                "telemetry": {"every": 0},
            }
        )
    )
    return folder


def trained(folder: Path, run: Path) -> list[str]:
    """`train` and its flags, for the same run over ranks."""
    models = ["--student", f"{folder}/student", "--teacher", f"{folder}/teacher", "--prompts", f"{folder}/sums.jsonl"]
    return ["train", *models, *FLAGS, *SHARDED, "--out", str(run)]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of a launcher: a port that is free, this environment's programs, then stand-ins from `folder`/bin before them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **threads, "PATH": path, "MASTER_PORT": port, "PYTHONPATH": str(ROOT), **more}


def stand_in(folder: Path, name: str, *lines: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    file.chmod(0o755)


def begin(command: list[str], variables: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own; what it says goes to `log`."""
    with log.open("w") as said:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(command: list[str], variables: dict[str, str], log: Path) -> tuple[int, str]:
    """Exit code and what was said."""
    return begin(command, variables, log).wait(timeout=900), log.read_text()


def assert_plain(folder: Path, run: Path) -> None:
    """The run's numbers are those of one process without a launcher, however many processes and machines there were."""

    def metrics(path):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if not k.startswith(("time/", "mem/", "eval/"))}
            for line in lines
            if line["step"]
        ]

    assert (run / "DONE").exists()
    ours, plain = metrics(run), metrics(folder / "plain")
    assert len(ours) == len(plain) == STEPS
    for one, other in zip(ours, plain, strict=True):
        close_numbers(one, other, *transformer(2, 16, backward=STEPS))


def recipe(folder: Path, **more: str) -> tuple[list[str], dict[str, str]]:
    """Table 5's recipe at paper scale, told by its own variables to make this file's run on two CPU ranks."""
    stand_in(folder, "nvidia-smi", "echo GPU 0", "echo GPU 1")
    own = {
        "QWEN3_STUDENT": f"{folder}/student",
        "QWEN3_TEACHER": f"{folder}/teacher",
        "DATA_DIR": str(folder),
        "NUM_GPUS": "2",
        "PAIRS": "qwen3",
        "CELLS": "soft_or-50",
        "STEPS": str(STEPS),
        "TRAIN_BATCH_SIZE": "3",
        "ROLLOUT_N": "2",
        "MAX_PROMPT_LENGTH": "8",
        "MAX_RESPONSE_LENGTH": "6",
        "OPD_MAX_LENGTH": "24",
        "LEARNING_RATE": "1e-2",
        "VAL_BEFORE_TRAIN": "False",
        "VAL_N": "1",
    }
    flags = "--prompt_format raw --rollout.engine hf --engine.device cpu --engine.dtype float32 --optim.weight_decay 0"
    less = "--eval.limit 1 --eval.teacher False --telemetry.every 0"
    command = ["bash", "recipes/table5_soft_or.sh", *flags.split(), *less.split()]
    return command, environment(folder, **own, **more)


@pytest.mark.e2e
def test_a_port_that_is_taken_is_one_line(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = python("-m", "opsd", *trained(folder, folder / "nowhere"), env=environment(folder, **launched))
    code, said = done.returncode, done.stdout + done.stderr
    lines = [line for line in said.splitlines() if line.startswith("opsd: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said
    assert re.search(rf"port {port}, the rendezvous of .*, is taken, .* \(--master_port\)$", lines[0]), said
    assert not (folder / "nowhere").exists()


@pytest.mark.numeric
@pytest.mark.e2e
def test_a_recipe_of_paper_scale_runs_by_the_deepspeed_launcher(folder):
    code, said = finish(*recipe(folder, RUNS=f"{folder}/recipe"), folder / "recipe.log")
    assert code == 0, said[-4000:]
    (made,) = (folder / "recipe").glob("*.command")
    assert made.read_text().startswith("deepspeed --num_gpus 2 --master_port ")
    assert_plain(folder, made.with_suffix(""))
    assert "soft_or 50 %" in said and (folder / "recipe" / "report" / "report.html").exists()


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.e2e
def test_sigterm_to_a_recipe_and_its_launcher_saves_and_the_same_recipe_goes_on(folder):
    command, variables = recipe(folder, RUNS=f"{folder}/struck")
    process = begin(command, variables, folder / "struck.log")
    while not any(len(file.read_text().splitlines()) > 2 for file in (folder / "struck").glob("*/metrics.jsonl")):
        assert process.poll() is None, (folder / "struck.log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    # Both launchers may be gone before the ranks are; the recipe waits for all.
    assert process.wait(timeout=600) == 143
    (run,) = (path.parent for path in (folder / "struck").glob("*/config.json"))
    assert (folder / "struck.log").read_text().splitlines()[-1].endswith("the same command goes on")
    log = run.with_name(f"{run.name}.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("opsd: ")]
    assert len(said) == 2 and "SIGTERM: saving and stopping" in said[0] and "is saved; continue with" in said[1]
    assert list((run / "checkpoints").glob("step_*")) and not (run / "DONE").exists()
    code, said = finish(command, variables, folder / "again.log")
    assert code == 0 and "resuming" in said, said[-4000:]
    assert_plain(folder, run)


@pytest.mark.slow
@pytest.mark.e2e
def test_bad_input_is_one_line_and_exit_2_through_both_launchers(folder):
    for launch in ("deepspeed --num_gpus 2 --no_local_rank --module", "torchrun --nproc_per_node 2 -m"):
        variables = environment(folder)
        port = ["--master_port", variables["MASTER_PORT"]]
        program, *rest = launch.split()
        words = [program, *port, *rest, "opsd", *trained(folder, folder / "none"), "--select.by", "softer"]
        code, said = finish(words, variables, folder / "bad.log")
        # torchrun exits with 1 whatever its ranks do.
        assert code == (2 if program == "deepspeed" else 1)
        assert len(re.findall(r"^opsd: ", said, flags=re.MULTILINE)) == 1, said
        assert "unknown selector 'softer'" in said and not (folder / "none").exists()


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.e2e
def test_a_hostfile_of_two_machines_makes_the_same_run(folder):
    # One machine stands for both. ssh is asked for an address only; pdsh hands its words to a shell for each machine.
    stand_in(folder, "ssh", "echo 127.0.0.1")
    stand_in(
        folder,
        "pdsh",
        "while [[ $1 == -* ]]; do [[ $1 == -w ]] && hosts=$2; if [[ $1 == -S ]]; then shift; else shift 2; fi; done",
        "text=$*; number=0",
        'for host in ${hosts//,/ }; do bash -c "${text//%n/$number}" & pids+=($!); ((++number)); done',
        'for pid in "${pids[@]}"; do wait "$pid" || exit; done',
    )
    (folder / "hosts").write_text("one slots=1\ntwo slots=1\n")
    variables = environment(folder)
    launch = ["deepspeed", "--hostfile", f"{folder}/hosts", "--master_port", variables["MASTER_PORT"]]
    run = folder / "hosts run"
    words = [*launch, "--no_local_rank", "--module", "opsd", *trained(folder, run)]
    code, said = finish(words, variables, folder / "hosts.log")
    assert code == 0, said[-4000:]
    assert "nnodes=2, num_local_procs=1, node_rank=1" in said
    assert_plain(folder, run)


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.e2e
def test_the_slurm_script_makes_the_same_run_on_two_nodes(folder):
    # One machine stands for both nodes: srun starts its command once on each, and fails where one fails.
    stand_in(folder, "scontrol", '[[ "$*" == "show hostnames node[1-2]" ]] && printf "localhost\\nlocalhost\\n"')
    stand_in(
        folder,
        "srun",
        "[[ $1 == --kill-on-bad-exit=1 ]] || exit 9",
        'shift; "$@" & one=$!; "$@" & two=$!; wait $one && wait $two',
    )
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "7"}
    run = folder / "slurm run"
    command = ["bash", "scripts/slurm/train.sbatch", *trained(folder, run)[1:]]
    code, said = finish(command, environment(folder, **job), folder / "slurm.log")
    assert code == 0, said[-4000:]
    assert_plain(folder, run)

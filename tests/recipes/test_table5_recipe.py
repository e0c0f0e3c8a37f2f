"""The Table 5 recipe: which commands, under which settings, started or not."""

import shlex
from pathlib import Path

import pytest

from opsd.config.cli import parse
from opsd.eval.command import EvalCommand

ROOT = Path(__file__).parents[2]
CELLS = ["all", "entropy_sample-50", "entropy_sample-20", "soft_or-50", "soft_or-20"]


def commands(output: str) -> list[list[str]]:
    """The printed training commands, as words."""
    return [shlex.split(line) for line in output.splitlines() if " train " in line]


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_pocket_dry_run_prints_the_five_cells_and_the_report_and_starts_nothing(project):
    done = project.run(SCALE="pocket", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    printed = commands(done.stdout)
    assert [Path(value(c, "--out")).name for c in printed] == [f"pocket-{cell}-seed0" for cell in CELLS]
    assert [value(c, "--select.by") for c in printed] == [
        "all",
        "entropy_sample",
        "entropy_sample",
        "soft_or",
        "soft_or",
    ]
    assert [value(c, "--select.retention") for c in printed[1:]] == ["0.5", "0.2", "0.5", "0.2"]
    assert done.stdout.splitlines()[-1].startswith("python scripts/report.py runs/table5 --table table5")
    assert project.calls() == [] and not (project.root / "runs").exists()


def test_pocket_cells_differ_in_selection_and_folder_only(project):
    def protocol(command):
        stop = command.index("--select.by")
        out = command.index("--out")
        return command[:out] + command[out + 2 : stop]

    printed = commands(project.run(SCALE="pocket", DRY_RUN="1").stdout)
    assert all(protocol(command) == protocol(printed[0]) for command in printed)


def test_paper_dry_run_needs_no_gpu_no_model_and_no_data(project):
    done = project.run(DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    printed = commands(done.stdout)
    assert len(printed) == 15  # 3 pairs × 5 cells
    assert printed[0][:6] == ["deepspeed", "--num_gpus", "8", "--no_local_rank", "--module", "opsd"]
    assert value(printed[0], "--student") == "$QWEN3_STUDENT"
    assert value(printed[0], "--prompts") == "$DATA_DIR/dapo_train.jsonl"
    assert "# run make setup to see the plan of memory and time here" in done.stdout.splitlines()
    assert project.calls() == []


@pytest.mark.e2e
@pytest.mark.parametrize("code", [0, 1, 2])
def test_paper_dry_run_prints_a_plan_of_each_pair_as_comments_whatever_it_says(project, code):
    opsd = project.root / ".venv" / "bin" / "opsd"
    opsd.parent.mkdir(parents=True)
    opsd.write_text(f'#!/bin/bash\necho "$*" >>calls\necho the verdict\nexit {code}\n')
    opsd.chmod(0o755)
    done = project.run(DRY_RUN="1", CELLS="all", LLAMA_STUDENT="/m/s")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("#")] == [
        "# plan of qwen3: qwen3-4b <- qwen3-8b on 8 GPUs",
        "#   the verdict",
        "# plan of llama: /m/s <- llama-3.3-70b on 8 GPUs",
        "#   the verdict",
        "# plan of qwen25: qwen2.5-1.5b <- qwen2.5-14b on 4 GPUs",
        "#   the verdict",
    ]
    shapes = "plan --student qwen3-4b --teacher qwen3-8b --gpus 8 --hardware h200 --brief True --steps 1740 "
    assert project.calls()[0].startswith(shapes) and "--engine.zero_stage 3" in project.calls()[0]


def test_paper_values_are_those_of_table_9(project):
    pairs = {Path(value(c, "--out")).name.split("-")[0]: c for c in commands(project.run(DRY_RUN="1").stdout)}
    assert {pair: value(c, "--optim.lr") for pair, c in pairs.items()} == {
        "qwen3": "1e-6",
        "llama": "3e-7",
        "qwen25": "1e-6",
    }
    assert {pair: value(c, "--num_gpus") for pair, c in pairs.items()} == {"qwen3": "8", "llama": "8", "qwen25": "4"}
    table_9 = {
        "--prompts_per_step": "8",
        "--rollout.samples_per_prompt": "16",
        "--rollout.max_prompt_tokens": "2048",
        "--rollout.max_new_tokens": "8192",
        "--rollout.temperature": "1.0",
        "--rollout.top_p": "1.0",
        "--loss.divergence": "reverse_kl",
        # Table 9 has 512: how many logits exist at once, which changes no number.
        "--loss.chunk_tokens": "auto",
        "--engine.micro_batch_tokens": "16384",
        "--optim.schedule": "cosine",
        "--eval.samples": "16",
        "--eval.temperature": "1.0",
        "--engine.kind": "deepspeed",
        "--engine.zero_stage": "3",
        "--engine.gradient_checkpointing": "True",
        "--rollout.engine": "vllm",
    }
    for command in pairs.values():
        assert {flag: value(command, flag) for flag in table_9} == table_9


def test_the_base_repositorys_variables_reach_their_flags_and_the_runs_name(project):
    env = {
        "TRAIN_BATCH_SIZE": ("16", "--prompts_per_step", "16"),
        "LEARNING_RATE": ("5e-6", "--optim.lr", "5e-6"),
        "MAX_PROMPT_LENGTH": ("1024", "--rollout.max_prompt_tokens", "1024"),
        "MAX_RESPONSE_LENGTH": ("4096", "--rollout.max_new_tokens", "4096"),
        "ROLLOUT_N": ("4", "--rollout.samples_per_prompt", "4"),
        "TEMPERATURE": ("0.9", "--rollout.temperature", "0.9"),
        "TOP_P": ("0.95", "--rollout.top_p", "0.95"),
        "TOP_K": ("-1", "--rollout.top_k", "0"),
        "OPD_LOSS_TYPE": ("jsd", "--loss.divergence", "jsd"),
        "OPD_REWARD_BETA": ("0.5", "--loss.reward_beta", "0.5"),
        "OPD_CHUNK_SIZE": ("256", "--loss.chunk_tokens", "256"),
        "OPD_MAX_LENGTH": ("10240", "--engine.micro_batch_tokens", "10240"),
        "ENABLE_THINKING": ("True", "--thinking", "on"),
        "SAVE_FREQ": ("20", "--checkpoint.every", "20"),
        "TEST_FREQ": ("5", "--eval.every", "5"),
        "VAL_TEMPERATURE": ("0.6", "--eval.temperature", "0.6"),
        "VAL_TOP_P": ("0.8", "--eval.top_p", "0.8"),
        "VAL_TOP_K": ("20", "--eval.top_k", "20"),
        "VAL_N": ("8", "--eval.samples", "8"),
        "VAL_BEFORE_TRAIN": ("False", "--eval.at_start", "False"),
        "NUM_GPUS": ("2", "--num_gpus", "2"),
        "MODEL_PATH": ("/m/s", "--student", "/m/s"),
        "TEACHER_MODEL_PATH": ("/m/t", "--teacher", "/m/t"),
        "DATA_DIR": ("/d", "--prompts", "/d/dapo_train.jsonl"),
    }
    settings = {name: given for name, (given, _, _) in env.items()}
    narrow = {"DRY_RUN": "1", "PAIRS": "qwen3", "CELLS": "all"}
    (command,) = commands(project.run(**narrow, TOTAL_EPOCHS="2", **settings).stdout)
    assert {flag: value(command, flag) for _, flag, _ in env.values()} == {flag: want for _, flag, want in env.values()}
    assert value(command, "--steps") == "1740"  # 2 epochs · 13,918 prompts / 16 a step = 1739.75
    # All of them at once made a name of more than the 255 bytes that a file's may have.
    others = [project.run(**narrow, **{**settings, "ROLLOUT_N": count}).stdout for count in ("4", "5", "4")]
    names = [Path(value(commands(other)[0], "--out")).name for other in others]
    assert names[0] == names[2] != names[1] and all(len(name) < 240 for name in names)
    some = {name: settings[name] for name in ("LEARNING_RATE", "OPD_LOSS_TYPE", "ENABLE_THINKING", "TRAIN_BATCH_SIZE")}
    name = Path(value(commands(project.run(**narrow, STEPS="1740", **some).stdout)[0], "--out")).name
    assert name == "qwen3-all-prompts_per_step_16-thinking_on-divergence_jsd-lr_5e-6-seed0"


def test_pairs_cells_and_seeds_narrow_the_runs(project):
    done = project.run(DRY_RUN="1", PAIRS="llama", CELLS="soft_or-20,all", SEEDS="1 2")
    names = [Path(value(c, "--out")).name for c in commands(done.stdout)]
    assert names == ["llama-soft_or-20-seed1", "llama-all-seed1", "llama-soft_or-20-seed2", "llama-all-seed2"]


def test_further_flags_pass_through_and_change_the_name(project):
    done = project.run("--optim.beta2", "0.95", SCALE="pocket", DRY_RUN="1", CELLS="all")
    (command,) = commands(done.stdout)
    assert command[-2:] == ["--optim.beta2", "0.95"]
    assert Path(value(command, "--out")).name == "pocket-all-optim.beta2_0.95-seed0"


def test_a_printed_command_reads_back_as_it_was(project):
    done = project.run("--prompt_field", "the question's text", SCALE="pocket", DRY_RUN="1", CELLS="all")
    (command,) = commands(done.stdout)
    assert command[-2:] == ["--prompt_field", "the question's text"]


def test_what_was_printed_is_what_runs(project):
    printed = project.run(SCALE="pocket", DRY_RUN="1").stdout.splitlines()
    done = project.run(SCALE="pocket", LANES="1")
    assert done.returncode == 0, done.stderr
    assert project.calls() == printed
    assert "[5/5] pocket-soft_or-20-seed0" in done.stdout


def test_finished_cells_are_skipped_and_the_report_made_again(project):
    project.run(SCALE="pocket")
    (project.root / "calls").unlink()
    done = project.run(SCALE="pocket")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already") == 5
    assert [call.split()[:2] for call in project.calls()] == [["python", "scripts/report.py"]]


@pytest.mark.e2e
def test_an_interrupted_cell_is_resumed_then_the_rest_runs(project):
    (project.root / "fail").touch()
    stopped = project.run(SCALE="pocket", LANES="1")
    assert stopped.returncode == 3
    assert len(project.calls()) == 1  # the first cell broke: nothing after it, no report
    (project.root / "fail").unlink()
    (project.root / "calls").unlink()
    done = project.run(SCALE="pocket", LANES="1")
    assert done.returncode == 0, done.stderr
    assert project.calls()[0] == "opsd train --resume runs/table5/pocket-all-seed0"
    assert len(project.calls()) == 6  # a resume, four new cells, the report


@pytest.mark.e2e
def test_a_folder_made_by_another_command_is_not_taken_for_finished(project):
    project.run(SCALE="pocket", CELLS="all")
    recipe = project.root / "recipes" / "common.sh"
    recipe.write_text(recipe.read_text().replace("local warmup=4", "local warmup=5"))
    done = project.run(SCALE="pocket", CELLS="all")
    assert done.returncode == 2
    assert "was made by another command" in done.stderr and done.stderr.count("\n") == 1


def test_paper_scale_says_in_one_line_what_is_missing(project):
    done = project.run()
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for missing in ("8 GPUs (found 0", "QWEN3_STUDENT", "LLAMA_TEACHER", "QWEN25_TEACHER", "DATA_DIR"):
        assert missing in done.stderr
    assert project.calls() == []


def test_paper_scale_launches_deepspeed_where_nothing_is_missing(project):
    project.program("nvidia-smi", "#!/bin/bash\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    project.program("deepspeed", (project.bin / "opsd").read_text())
    done = project.run(PAIRS="qwen3", CELLS="all", QWEN3_STUDENT="/m/s", QWEN3_TEACHER="/m/t", DATA_DIR="/d")
    assert done.returncode == 0, done.stderr
    launch = "deepspeed --num_gpus 8 --no_local_rank --module opsd"
    teacher, cell, report = project.calls()
    assert cell.startswith(f"{launch} train --student /m/s ") and report.startswith("python scripts/report.py")
    assert teacher.startswith(f"{launch} eval --model /m/t --out runs/table5/teachers/qwen3-")


@pytest.mark.e2e
def test_at_paper_scale_the_teacher_is_evaluated_by_vllm_once_under_the_settings_of_the_cells(project):
    printed = project.run(DRY_RUN="1", CELLS="all,soft_or-50", SEEDS="0 1").stdout.splitlines()
    evaluations = [shlex.split(line) for line in printed if " opsd eval " in line]
    assert [value(c, "--model") for c in evaluations] == ["$QWEN3_TEACHER", "$LLAMA_TEACHER", "$QWEN25_TEACHER"]
    trained = commands("\n".join(printed))
    assert len(trained) == 12 and all(value(c, "--eval.teacher") == "False" for c in trained)
    for name in ("samples", "temperature", "top_p", "top_k"):
        assert {value(c, f"--{name}") for c in evaluations} == {value(c, f"--eval.{name}") for c in trained}
    for name in ("max_new_tokens", "max_prompt_tokens"):
        assert {value(c, f"--{name}") for c in evaluations} == {value(c, f"--rollout.{name}") for c in trained}
    assert ["--tensor_parallel" in c for c in evaluations] == [False, True, False]
    for command in evaluations:
        parse(EvalCommand, command[command.index("eval") + 1 :], "opsd eval")

    def files(*flags):
        lines = project.run(*flags, DRY_RUN="1", CELLS="all").stdout.splitlines()
        return [value(shlex.split(line), "--out") for line in lines if " opsd eval " in line]

    # Other settings of an evaluation are another one; the training's are not.
    assert files("--optim.lr", "1e-5") == files() != files("--eval.samples", "4")
    assert "--limit 3" in project.run("--eval.limit", "3", DRY_RUN="1", CELLS="all").stdout


def test_a_teacher_that_was_evaluated_is_not_evaluated_again(project):
    project.program("nvidia-smi", "#!/bin/bash\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i; done\n")
    project.program("deepspeed", (project.bin / "opsd").read_text())
    models = {"QWEN3_STUDENT": "/m/s", "QWEN3_TEACHER": "/m/t", "DATA_DIR": "/d"}
    for calls in (3, 4):  # teacher, cell and report; the report again
        assert project.run(PAIRS="qwen3", CELLS="all", **models).returncode == 0
        assert len(project.calls()) == calls
    # One that fails stops the recipe.
    (project.root / "fail").touch()
    done = project.run("--eval.samples", "4", PAIRS="qwen3", CELLS="all", **models)
    assert done.returncode == 3 and len(project.calls()) == 5


def test_two_recipes_share_a_machine_by_their_gpus_and_ports(project):
    dry = {"DRY_RUN": "1", "PAIRS": "qwen25", "CELLS": "all"}
    (command,) = commands(project.run(**dry, CUDA_VISIBLE_DEVICES="4,5,6,7", MASTER_PORT="29501").stdout)
    assert command[:4] == ["deepspeed", "--include", "localhost:4,5,6,7", "--master_port"]
    assert command[4:8] == ["29501", "--no_local_rank", "--module", "opsd"]


@pytest.mark.e2e
def test_a_launcher_that_exits_with_0_before_the_run_has_finished_stops_the_recipe(project):
    # DeepSpeed's launcher does where the process between it and the ranks is killed.
    project.program("opsd", (project.bin / "opsd").read_text().replace('touch "$run/DONE"', "exit 0"))
    done = project.run(SCALE="pocket", CELLS="all,soft_or-50", LANES="1")
    assert done.returncode == 2 and "pocket-all-seed0 has not finished" in done.stderr
    assert len(project.calls()) == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SCALE": "huge"}, "SCALE=huge is unknown; give paper or pocket"),
        ({"PAIRS": "qwen4"}, "PAIRS has qwen4; at SCALE=paper it can hold: qwen3 llama qwen25"),
        ({"CELLS": "soft_or"}, "CELLS has soft_or; at SCALE=paper it can hold: all entropy_sample-50"),
        ({"SEEDS": "one"}, "SEEDS has one; give whole numbers"),
        ({"LANES": "two"}, "LANES=two: give a whole number above 0"),
        ({"LANES": "0"}, "LANES=0: give a whole number above 0"),
        ({"LANES": "2"}, "LANES=2: at SCALE=paper a cell has all of its GPUs, so give 1"),
        ({"ENABLE_THINKING": "maybe"}, "ENABLE_THINKING=maybe: give True or False"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(project, env, message):
    done = project.run(DRY_RUN="1", **env)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1

"""DeepSpeed on two CPU ranks does what plain torch does on one: `worker.py` trains, this file compares.

Two steps in fp32: all tokens, entropy and Soft-OR over the batch, with even, with uneven and with no micro-batches on
the second rank (its rollouts are empty), under ZeRO 0 to 3, checkpointed or not, with tied and untied heads: every two
of these meet. Plain torch: other micro-batches, checkpointed, and against a loop over padded rows. Beside them SGD,
adapters, offloading, bfloat16, and whole runs.
"""

import itertools
import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from forked import python
from safetensors.torch import load_file
from tiny_models import tiny_model, tiny_pair
from tolerance import close, close_numbers, rounding, transformer
from transformers import AutoModelForCausalLM
from two_ranks import run_ranks

from opsd.config import from_json
from opsd.engine import learning_rate
from opsd.train import resume, start
from opsd.utils.distributed import leave

pytestmark = pytest.mark.e2e
WORKER = Path(__file__).with_name("worker.py")
HELPERS = runpy.run_path(str(WORKER))
NAMES = [case.name for case in HELPERS["cases"]() if case.engine is not None]
# Three steps of the two-layer model, as whole runs make; cases make two.
TRAINED = transformer(2, 16, backward=3)
EXACT = [name for name in NAMES if "bfloat16" not in name]


def settings(folder: Path) -> dict:
    """Settings of a three-step run of the trainer; `out` is where run folders go."""
    pair = tiny_pair(folder)
    (folder / "context.txt").write_text("{answer}{prompt}")
    return {
        **pair,
        "out": f"{folder}/",
        "steps": 3,
        "prompts_per_step": 3,
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
        "select": {"by": "soft_or", "normalise_over": "batch"},
        "optim": {"lr": 1e-2},
        "engine": {"kind": "deepspeed", "zero_stage": 3, "device": "cpu", "micro_batch_tokens": 24},
        "eval": {"suite": [f"sums={pair['prompts']}"], "samples": 2, "grader": "suffix", "limit": 5, "every": 2},
        "checkpoint": {"every": 1, "keep": 3},
        "telemetry": {"every": 2, "save_tokens": True, "save_rollouts_every": 1, "top_tokens": 2},
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where two ranks put what they made, and the plain run beside it."""
    folder = tmp_path_factory.mktemp("scale")
    values = settings(folder)
    (folder / "settings.json").write_text(json.dumps(values))
    done = run_ranks(WORKER, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    one = {**values, "engine": {"device": "cpu", "micro_batch_tokens": 24}}
    start(from_json({**one, "out": f"{folder}/plain"}))
    start(from_json({**one, "out": f"{folder}/lora plain", "lora": {"rank": 4}, "eval": {}}))
    saving = {**values["teacher"], "offload": True, "cache": "host"}
    start(from_json({**one, "out": f"{folder}/saving", "teacher": saving}))
    return folder


@pytest.fixture(scope="module")
def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def tensors_of(out: Path, name: str, moments: bool) -> torch.Tensor:
    """All weights of a case, or all moments (SGD has none), as one vector."""
    found = load_file(out / f"{name.replace('/', '+')}.safetensors")
    return torch.cat([torch.zeros(0), *(found[key].flatten() for key in sorted(found) if ("/" in key) == moments)])


def reference(name: str) -> str:
    return name.split("/")[1]


@pytest.mark.numeric
@pytest.mark.parametrize("name", EXACT)
def test_two_steps_give_plain_torchs_losses_and_weights(out, results, name):
    ours, plain = results["cases"][name], results["cases"][reference(name)]
    for number in ("loss_nats", "reverse_kl_nats", "grad_norm"):
        close(ours[number], plain[number], *TRAINED, said=number)
    assert (ours["kept"], ours["tokens"]) == (plain["kept"], plain["tokens"])
    for moments in (False, True):
        one, other = (tensors_of(out, which, moments) for which in (name, reference(name)))
        assert one.numel() == other.numel() and (one.numel() == 0) == (moments and "sgd" in name)
        assert float((one - other).norm()) <= rounding(*TRAINED) * float(other.norm())


def test_the_grid_covers_what_it_says():
    # What a case is: stage, selector, layout, checkpointing, head.
    found = [
        (stage, case.by, case.hand, case.engine.gradient_checkpointing, case.tied)
        for stage in range(4)
        for case in HELPERS["grid"](stage)
    ]
    choices = range(4), HELPERS["SELECTORS"], HELPERS["LAYOUTS"].values(), (False, True), (False, True)
    for one, other in itertools.combinations(range(5), 2):
        assert {(case[one], case[other]) for case in found} == set(itertools.product(choices[one], choices[other]))
    assert {case[2] for case in found if case[:2] == (3, "soft_or")} == set(HELPERS["LAYOUTS"].values())


def kept_of(by: str, entropy_N: torch.Tensor, kl_N: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The paper's rules in a few lines: the best half of each rollout's tokens; Soft-OR on the whole batch's scales."""
    if by == "all":
        return torch.ones_like(kl_N, dtype=torch.bool)
    score_N = entropy_N.double()
    if by == "soft_or":
        high, low = torch.quantile(score_N, 0.98), score_N.min()
        h_N = ((score_N - low) / (high - low)).clamp(max=1)
        d_N = (kl_N.double() - kl_N.min()) / (kl_N.max() - kl_N.min())
        score_N = 1 - (1 - h_N) * (1 - d_N)
    kept = []
    for score in score_N.split(lengths):
        best = score.argsort(descending=True, stable=True)[: max(1, len(score) // 2)]
        kept.append(torch.zeros(len(score), dtype=torch.bool).index_fill(0, best, True))
    return torch.cat(kept)


def padded_steps(by: str, tied: bool) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same steps on one padded batch, with transformers and torch alone: losses, norms, the last weights."""
    student, teacher = tiny_model(tied, 0), tiny_model(True, 1)
    written = [rollout for rollout in HELPERS["rollouts"]() if rollout.response_ids]
    rows = [rollout.prompt.ids + rollout.response_ids for rollout in written]
    lengths = [len(rollout.response_ids) for rollout in written]
    ids = torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (ids.shape[1] - len(row)) for row in rows])
    optim, losses, norms = HELPERS["OPTIM"], [], []
    matrices = [p for p in student.parameters() if p.dim() > 1]
    gains = [{"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": optim.weight_decay}, *gains], eps=optim.eps)

    def log_p_NV(model):
        logits = model(input_ids=ids, attention_mask=mask).logits[..., : HELPERS["VOCABULARY"]]
        # The state in front of a token predicts it.
        answers = [
            row[len(r.prompt.ids) - 1 : len(full) - 1] for row, r, full in zip(logits, written, rows, strict=True)
        ]
        return torch.cat(answers).log_softmax(-1)

    for step in range(1, HELPERS["STEPS"] + 1):
        log_s_NV = log_p_NV(student)
        with torch.no_grad():
            log_t_NV = log_p_NV(teacher)
        kl_N = (log_s_NV.exp() * (log_s_NV - log_t_NV)).sum(-1)
        entropy_N = -(log_s_NV.exp() * log_s_NV).sum(-1).detach()
        loss = kl_N[kept_of(by, entropy_N, kl_N.detach(), lengths)].mean()
        loss.backward()
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), optim.max_grad_norm)))
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, HELPERS["STEPS"], optim)
        adamw.step()
        adamw.zero_grad()
    return losses, norms, dict(student.named_parameters())


@pytest.mark.numeric
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("by", ["all", "entropy", "soft_or"])
def test_packed_micro_batches_are_one_padded_batch(out, results, by, head):
    losses, norms, parameters = padded_steps(by, head == "tied")
    ours = results["cases"][f"{by}-{head}"]
    close(ours["loss_nats"], losses, *TRAINED)
    close(ours["grad_norm"], norms, *TRAINED)
    padded = torch.cat([parameters[name].detach().flatten() for name in sorted(parameters)])
    packed = tensors_of(out, f"{by}-{head}", moments=False)
    assert float((packed - padded).norm()) <= rounding(*TRAINED) * float(padded.norm())


def test_the_steps_were_large_enough_to_tell_runs_apart(out, results):
    # Otherwise weights that never moved would agree as well. Every selector ends elsewhere, and clipping was at work.
    plain = [name for name in results["cases"] if "/" not in name]
    ends = {name: tensors_of(out, name, False) for name in plain if name.endswith("-tied") and "lora" not in name}
    begin = torch.cat([p.detach().flatten() for _, p in sorted(tiny_model(True, 0).named_parameters())])
    assert all(float((end - begin).norm()) > 0.01 * float(begin.norm()) for end in ends.values())
    adapters = load_file(out / "lora-tied.safetensors")
    # B begins at 0.
    assert all(
        float(tensor.abs().max()) > 0.01 for name, tensor in adapters.items() if name.endswith("lora_B.default.weight")
    )
    assert float((ends["all-tied"] - ends["soft_or-tied"]).norm()) > 1e-3 * float(begin.norm())
    assert all(min(results["cases"][name]["grad_norm"]) > HELPERS["OPTIM"].max_grad_norm for name in plain)


@pytest.mark.numeric
@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXACT])
def test_bfloat16_stays_near_and_its_master_weights_are_finer_than_bfloat16(out, results, name):
    ours, plain = results["cases"][name], results["cases"][reference(name)]
    # A rounding to bfloat16 is off by 2^-8, and some fifty lie on the way: √50·2^-8 = 3 %.
    assert ours["loss_nats"] == pytest.approx(plain["loss_nats"], rel=0.03)
    weights = tensors_of(out, name, False)
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float())


@pytest.mark.numeric
@pytest.mark.parametrize("name", [name for name in NAMES if "lora" in name])
def test_checkpoints_and_samplers_get_frozen_weights_with_adapters_merged_in(results, name):
    plain = results["cases"][name]["plain model"]
    assert plain.pop("names as they were")
    # Weights of about 1, and the products of an adapter of rank 4.
    assert plain == {"saved": pytest.approx(0, abs=rounding(4, 1)), "streamed": 0.0, "frozen": 0.0}


@pytest.mark.numeric
@pytest.mark.parametrize("way", ["3 to 1", "1 to 0", "0 to 2", "2 to 3"])
def test_optimiser_state_goes_on_under_another_stage(results, way):
    plain = results["cases"]["all-tied"]["loss_nats"][-1:]
    close(results["carried over"][way]["loss_nats"], plain, *TRAINED)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_a_gradient_that_is_no_number_on_one_rank_moves_no_weight_on_any(results, stage):
    norm, moved = results["not finite"][stage]
    assert norm != norm or norm == float("inf")
    assert not moved


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_gradients_of_adapters_that_are_dropped_leave_no_trace(results, stage):
    assert results["discarded"][stage] == []


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "mem/"))} for line in lines]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step_3").state_dict()


@pytest.mark.numeric
def test_two_ranks_write_the_run_folder_that_one_process_writes(out):
    names = [sorted(str(p.relative_to(out / run)) for p in (out / run).rglob("*")) for run in ("whole", "plain")]
    assert names[0] == names[1]
    for ours, plain in zip(metrics_of(out / "whole"), metrics_of(out / "plain"), strict=True):
        close_numbers(ours, plain, *TRAINED)


def test_a_teacher_that_makes_room_between_its_turns_changes_no_number(out):
    assert metrics_of(out / "saving") == metrics_of(out / "plain")
    plain = (out / "plain" / "eval" / "teacher.json").read_text()
    assert (out / "saving" / "eval" / "teacher.json").read_text() == plain


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["sharded teacher", "sharded teacher, offloaded"])
def test_a_teacher_in_shards_gives_the_same_run(out, name):
    # It makes no evaluation: neither a line before the first step, nor the numbers of one.
    steps = [line for line in metrics_of(out / "whole") if line["step"]]
    for ours, whole in zip(metrics_of(out / name), steps, strict=True):
        close_numbers(ours, {key: whole[key] for key in ours}, *TRAINED)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_rollouts_do_not_depend_on_the_number_of_ranks(out, step):
    ours, plain = ((out / run / "rollouts" / f"step_{step}.jsonl").read_text() for run in ("whole", "plain"))
    assert ours == plain
    assert [json.loads(line)["id"] for line in ours.splitlines()] == list(range(6))


@pytest.mark.numeric
def test_a_checkpoint_of_two_ranks_is_a_whole_model_folder(out):
    ours, plain = weights_of(out / "whole"), weights_of(out / "plain")
    assert ours.keys() == plain.keys()
    for name in plain:
        close(ours[name], plain[name], *TRAINED, said=name)


def test_a_resumed_run_of_two_ranks_ends_like_one_that_nothing_stopped(out):
    assert metrics_of(out / "resumed") == metrics_of(out / "whole")
    ours, whole = weights_of(out / "resumed"), weights_of(out / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["lora", "lora bfloat16"])
def test_a_resumed_run_with_adapters_ends_on_the_same_bits(out, kind):
    assert metrics_of(out / f"{kind} resumed") == metrics_of(out / f"{kind} whole")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "trainer/optimizer.safetensors"):
        ours, whole = (load_file(out / f"{kind} {run}" / "checkpoints/step_3" / file) for run in ("resumed", "whole"))
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_resumed_run_under_an_average_of_the_students_weights_ends_on_the_same_bits(out):
    held = Path("checkpoints", "step_3", "trainer", "teacher.safetensors")
    whole, resumed = (load_file(out / f"self {name}" / held) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics_of(out / "self whole") == metrics_of(out / "self resumed")


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_the_average_of_the_students_weights_is_plain_torchs_however_it_is_shared_out(out, results, stage):
    close(results["self taught"][stage], results["self taught"]["plain"], *TRAINED)
    one, other = (tensors_of(out, f"self taught {name}", False) for name in (stage, "plain"))
    assert one.numel() == other.numel() > 0
    assert float((one - other).norm()) <= rounding(*TRAINED) * float(other.norm())


@pytest.mark.numeric
def test_two_ranks_train_the_adapters_that_one_process_trains(out):
    for ours, plain in zip(metrics_of(out / "lora whole"), metrics_of(out / "lora plain"), strict=True):
        close_numbers(ours, plain, *TRAINED)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, plain = (load_file(out / f"lora {run}" / "checkpoints/step_3" / file) for run in ("whole", "plain"))
        assert ours.keys() == plain.keys()
        for name in plain:
            close(ours[name], plain[name], *TRAINED, said=name)


@pytest.mark.numeric
def test_one_process_goes_on_where_two_stopped(out):
    resume(out / "half")
    leave()
    for ours, whole in zip(metrics_of(out / "half"), metrics_of(out / "whole"), strict=True):
        close_numbers(ours, whole, *TRAINED)
    texts = [(out / run / "rollouts" / "step_3.jsonl").read_text() for run in ("half", "whole")]
    assert texts[0] == texts[1]


def test_a_bfloat16_runs_checkpoint_holds_the_master_weights(out):
    assert {weight.dtype for weight in load_file(out / "bfloat16/checkpoints/step_3/model.safetensors").values()} == {
        torch.float32
    }


# torchrun, but that its ranks are forks: all is imported by then.
FAILING = """
import sys
import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args
import opsd.train
from opsd.__main__ import main
from opsd.engine.deepspeed_engine import import_deepspeed
from opsd.utils.errors import RunStopped
from opsd.utils.distributed import Ranks
def update(self, *args):
    if self.ranks.rank == 1:
        raise RunStopped("only the second rank sees this")
    return whole(self, *args)
whole, opsd.train.Trainer.update = opsd.train.Trainer.update, update
import_deepspeed(torch.device("cpu"))
alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node=2"]
config, *_ = config_from_args(parse_args([*alone, "main"]))
config.start_method = "fork"
elastic_launch(config, main)()
"""


def test_an_error_on_one_rank_takes_all_down_with_one_line(tmp_path):
    values = settings(tmp_path)
    flags = ["--student", values["student"], "--teacher", values["teacher"]["model"], "--prompts", values["prompts"]]
    flags += ["--out", str(tmp_path / "run"), "--prompt_format", "raw", "--rollout.max_new_tokens", "4"]
    flags += ["--engine.kind", "deepspeed", "--engine.device", "cpu"]
    done = python("-c", FAILING, "train", *flags, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "ChildFailedError" not in line]
    said = [line for line in lines if "opsd:" in line or "Error" in line]
    assert len(said) == 1 and "only the second rank sees this" in said[0]

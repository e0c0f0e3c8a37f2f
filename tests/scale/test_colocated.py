"""ZeRO-3 on two ranks and vLLM: one sampler over both, one on each, or processes of their own make the same run."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_pair, vllm_model
from tolerance import close, transformer
from two_ranks import run_ranks

from opsd.config import from_json
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.rollout import HFRollout
from opsd.train import start
from opsd.types import Prompt, Sampling

# Three steps of the two-layer model of `vllm_worker.py`.
TRAINED = transformer(2, 64, backward=3)

pytestmark = [pytest.mark.e2e, pytest.mark.vllm]


def train(folder: Path, run: str) -> None:
    """What `vllm_worker.py` does with these arguments, on two ranks."""
    done = run_ranks(Path(__file__).with_name("vllm_worker.py"), folder, run)
    assert done.returncode == 0, done.stderr[-12000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """What two ranks wrote, with 2 and with 1 ranks to a sampler, and with samplers in processes of their own."""
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    folder = tmp_path_factory.mktemp("colocated")
    values = {
        **tiny_pair(folder, vllm_model, answers=False),
        "steps": 3,
        "prompts_per_step": 3,
        "rollout": {
            "engine": "vllm",
            "samples_per_prompt": 2,
            "max_prompt_tokens": 8,
            "max_new_tokens": 6,
            "generate_batch": 4,
        },
        "optim": {"lr": 1e-2},
        "engine": {"kind": "deepspeed", "zero_stage": 3, "device": "cpu", "micro_batch_tokens": 24},
        "telemetry": {"every": 0, "save_rollouts_every": 1},
    }
    (folder / "settings.json").write_text(json.dumps(values))
    # A run that was killed can leave what its ranks shared, under the name that vLLM gives it: no run may trip on it.
    left = [Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}") for rank in (0, 1)]
    ours = [path for path in left if not path.exists()]
    for path in ours:
        path.touch()
    try:
        train(folder, "run")
    finally:
        for path in ours:
            path.unlink()
    return folder


def test_no_run_leaves_shared_memory(out):
    left = {f"-tp:0-[0-1]-cpushm_{rank}" for rank in (0, 1)}
    # Other runs on this machine may share some at any moment; three moments in a row, only what lay there before.
    named = [set(json.loads((out / f"shared run{width}.json").read_text())) for width in (0, 1, 2)]
    assert set.intersection(*named) == left


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/nats"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_sampler_over_two_ranks_follows_zero_3_for_three_steps(out):
    assert json.loads((out / "said run2.json").read_text()) == [None, None]
    assert (out / "run2" / "DONE").exists()
    first, *_, last = losses(out / "run2")
    assert len(losses(out / "run2")) == 3 and last < first


@pytest.mark.numeric
def test_samplers_in_processes_of_their_own_follow_zero_3_and_write_the_same(out):
    assert json.loads((out / "said run0.json").read_text()) == [None, None]
    assert (out / "run0" / "DONE").exists()
    for step in (1, 2, 3):
        ours, theirs = ((out / run / "rollouts" / f"step_{step}.jsonl").read_text() for run in ("run0", "run2"))
        assert ours == theirs
    close(losses(out / "run0"), losses(out / "run2"), *TRAINED)


@pytest.mark.parametrize("run", ["run0", "run1", "run2"])
def test_rows_without_a_token_are_never_sampled(out, run):
    # The model has 64 rows, the tokenizer 49 tokens: of about a hundred draws from all rows, a quarter would have none.
    lines = [line for file in (out / run / "rollouts").glob("*.jsonl") for line in file.read_text().splitlines()]
    ids = [token for line in lines for token in json.loads(line)["response_ids"]]
    assert len(ids) > 60 and max(ids) < 49


@pytest.mark.numeric
@pytest.mark.parametrize("step", [1, 2])
def test_who_samples_a_rollout_does_not_change_it(out, step):
    ours, theirs = ((out / run / "rollouts" / f"step_{step}.jsonl").read_text() for run in ("run1", "run2"))
    assert ours == theirs
    close(losses(out / "run1")[step - 1], losses(out / "run2")[step - 1], *TRAINED)


def test_one_stale_sampler_stops_every_rank_with_the_same_line(out):
    # The second rank alone kept its old weights at the third sync.
    said = json.loads((out / "said run1.json").read_text())
    assert said[0] == said[1] and "its weights are not the trained ones" in said[0]
    assert len(losses(out / "run1")) == 2


@pytest.fixture(scope="module")
def adapters(out) -> Path:
    """The same three samplers while adapters are trained, and a run of one process that samples by transformers."""
    train(out, "lora")
    values = json.loads((out / "settings.json").read_text())
    rollout = {**values["rollout"], "engine": "hf", "temperature": 0.0}
    alone = {"engine": {"device": "cpu", "micro_batch_tokens": 24}, "lora": {"rank": 4}, "rollout": rollout}
    start(from_json({**values, **alone, "out": str(out / "lora plain")}))
    return out


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize("run", ["lora0", "lora2"])
def test_samplers_follow_adapters_under_zero_3_as_transformers_follows_plain_torch(adapters, run):
    assert json.loads((adapters / f"said {run}.json").read_text()) == [None, None]
    for step in (1, 2, 3):
        ours, plain = (
            (adapters / name / "rollouts" / f"step_{step}.jsonl").read_text() for name in (run, "lora plain")
        )
        assert ours == plain
    close(losses(adapters / run), losses(adapters / "lora plain"), *TRAINED)
    # The student's answers change with its adapters: a sampler that had never got them would not have written these.
    ids = [json.loads(line)["response_ids"] for line in (adapters / run / "rollouts/step_3.jsonl").open()]
    assert ids != untrained_answers(adapters)


def untrained_answers(adapters: Path) -> list[list[int]]:
    """What the student without adapters answers to the prompts of the last step."""
    lines = [json.loads(line) for line in (adapters / "lora plain" / "rollouts" / "step_3.jsonl").open()]
    student = load_scorer(str(adapters / "student"), "--student", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(str(adapters / "student"), "--student")
    prompts = [Prompt(str(k), "", line["prompt_ids"], None) for k, line in enumerate(lines)]
    greedy = Sampling(temperature=0.0, max_new_tokens=6)
    return [r.response_ids for r in HFRollout(student.model, tokenizer, 8).generate(prompts, 1, greedy, seed=0)]


@pytest.mark.numeric
@pytest.mark.slow
def test_one_sampler_that_missed_the_adapters_last_step_stops_every_rank(adapters):
    said = json.loads((adapters / "said lora1.json").read_text())
    assert said[0] == said[1] and "its weights are not the trained ones" in said[0]
    close(losses(adapters / "lora1"), losses(adapters / "lora plain")[:2], *TRAINED)

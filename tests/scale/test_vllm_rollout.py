"""vLLM as the sampler: it says what transformers says, takes new weights, and is caught where it does not."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_pair, vllm_model
from vllm_settings import vllm_settings

from opsd.config import EngineConfig, LoraConfig, OptimConfig, RolloutConfig, from_json
from opsd.engine import TorchEngine
from opsd.eval.command import EvalCommand, evaluate
from opsd.model.loading import load_scorer, load_tokenizer
from opsd.model.lora import add_adapters, trained
from opsd.rollout import HFRollout
from opsd.train import start
from opsd.types import Prompt, Sampling
from opsd.utils.distributed import leave
from opsd.utils.errors import RunStopped

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.own_process]
CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tokenizer(thin_smollm2):
    return load_tokenizer(str(thin_smollm2.folder), "--student")


@pytest.fixture(scope="module")
def engine(thin_smollm2):
    student = load_scorer(str(thin_smollm2.folder), "--student", torch.float32, CPU)
    return TorchEngine(student, EngineConfig(), OptimConfig(lr=1e-3), CPU)


@pytest.fixture(scope="module")
def vllm(thin_smollm2, tokenizer, engine):
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    from opsd.rollout.vllm import VLLMRollout

    rollout, folder = RolloutConfig(engine="vllm", generate_batch=8), str(thin_smollm2.folder)
    yield VLLMRollout(engine, rollout, vllm_settings(folder, tokenizer, engine, rollout))
    leave()  # ends the engine: its cache alone is a GiB


@pytest.fixture(scope="module")
def prompts(tokenizer):
    texts = ["The capital of France is", "1, 2, 3, 4,", "Once upon a time"]
    return [Prompt(str(place), text, tokenizer(text).input_ids, None) for place, text in enumerate(texts)]


def hf(engine, tokenizer):
    return HFRollout(engine.student.model, tokenizer, 8)


def disturb(engine, seed):
    """Move all weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in engine.student.model.parameters():
            parameter.mul_(1 + 0.03 * torch.randn(parameter.shape, generator=generator))


def ids_of(rollouts):
    return [(rollout.id, rollout.prompt.id, rollout.response_ids, rollout.truncated) for rollout in rollouts]


def test_both_of_vllms_model_runners_take_the_class_that_cuts_the_vocabulary():
    # Runner V2 is taken on a GPU alone: here only its own loader can be asked.
    pytest.importorskip("vllm", reason="needs vLLM: run `make setup`")
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    from opsd.rollout.vllm import _only_tokens

    only = _only_tokens(3)
    state = {field.name: None for field in dataclasses.fields(loader.LogitsProcRequestState)}
    (second,) = loader.build_custom_logits_processors(None, SimpleNamespace(**state), False, [only])
    loader.build_custom_logits_processors_params_validator([only])(None)
    assert _load_logitsprocs_by_fqcns([only]) == [only]
    first = only(None, CPU, False)
    cut = [0.0, 1.0, 2.0, -torch.inf, -torch.inf]
    assert second.add_request(0, None) and second.apply(torch.arange(5.0)[None], None).tolist() == [cut]
    assert not first.is_argmax_invariant() and first.apply(torch.arange(5.0)[None]).tolist() == [cut]


def test_greedy_answers_are_transformers(engine, tokenizer, vllm, prompts):
    ours = vllm.generate(prompts, 2, GREEDY, seed=0)
    assert ids_of(ours) == ids_of(hf(engine, tokenizer).generate(prompts, 2, GREEDY, seed=0))
    assert [rollout.id for rollout in ours] == list(range(6))


def test_greedy_answers_are_transformers_on_new_weights(engine, tokenizer, vllm, prompts):
    before = vllm.generate(prompts, 1, GREEDY, seed=0)
    disturb(engine, 1)
    vllm.sync()
    ours = vllm.generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(ours) == ids_of(hf(engine, tokenizer).generate(prompts, 1, GREEDY, seed=0))
    assert ids_of(ours) != ids_of(before)  # the weights did change what is said


def test_a_stale_sampler_is_caught(engine, vllm, prompts, monkeypatch):
    vllm.generate(prompts, 1, GREEDY, seed=0)
    vllm.sync()
    disturb(engine, 2)
    monkeypatch.setattr(vllm, "_load_weights", lambda: None)
    with pytest.raises(RunStopped, match=r"differ from the trainer's by .* nats per token on a probe") as stop:
        vllm.sync()
    assert "\n" not in str(stop.value)
    monkeypatch.undo()
    vllm.sync()


def test_adapters_reach_the_sampler_merged_and_a_sampler_without_them_is_caught(
    thin_smollm2, engine, tokenizer, vllm, prompts, monkeypatch
):
    student = load_scorer(str(thin_smollm2.folder), "--student", torch.float32, CPU)
    add_adapters(student.model, LoraConfig(rank=8), 0, str(thin_smollm2.folder))
    adapted = TorchEngine(student, EngineConfig(), OptimConfig(), CPU)
    monkeypatch.setattr(vllm, "_engine", adapted)
    monkeypatch.setattr(vllm._probe, "_engine", adapted)
    vllm.sync()
    before = vllm.generate(prompts, 1, GREEDY, seed=0)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trained(student.model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    with monkeypatch.context() as stale:
        stale.setattr(vllm, "_load_weights", lambda: None)
        with pytest.raises(RunStopped, match="differ from the trainer's"):
            vllm.sync()
    vllm.sync()
    ours = vllm.generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(ours) == ids_of(hf(adapted, tokenizer).generate(prompts, 1, GREEDY, seed=0))
    assert ids_of(ours) != ids_of(before)
    monkeypatch.undo()
    vllm.sync()


def test_a_rollout_is_drawn_by_its_own_seed_whatever_is_beside_it(vllm, prompts):
    random = Sampling(max_new_tokens=8)
    whole = vllm.generate(prompts, 2, random, seed=5)
    assert ids_of(whole) == ids_of(vllm.generate(prompts, 2, random, seed=5))
    assert ids_of(whole)[:2] == ids_of(vllm.generate(prompts[:1], 2, random, seed=5))
    assert ids_of(whole) != ids_of(vllm.generate(prompts, 2, random, seed=6))
    assert whole[0].response_ids != whole[1].response_ids  # two samples of one prompt


def test_every_stop_token_ends_an_answer_with_itself_and_the_limit_is_flagged(engine, tokenizer, vllm, prompts):
    free = vllm.generate(prompts, 1, GREEDY, seed=0)
    assert all(rollout.truncated and len(rollout.response_ids) == 12 for rollout in free)
    stop = free[0].response_ids[4]
    vllm._eos_ids.append(stop)
    ended = vllm.generate(prompts, 1, GREEDY, seed=0)[0]
    vllm._eos_ids.remove(stop)
    place = free[0].response_ids.index(stop)
    assert (ended.response_ids, ended.truncated) == (free[0].response_ids[: place + 1], False)


@pytest.fixture(scope="module", params=["all weights", "adapters"])
def run(request, tmp_path_factory):
    """Three steps of a small random model towards another one, rollouts by vLLM, on the command line's defaults."""
    folder = tmp_path_factory.mktemp("vllm")
    values = {
        **tiny_pair(folder, vllm_model, answers=False),
        "out": str(folder / "run"),
        "steps": 3,
        "prompts_per_step": 2,
        "rollout": {"engine": "vllm", "samples_per_prompt": 2, "max_prompt_tokens": 48, "max_new_tokens": 8},
        "select": {"by": "soft_or", "normalise_over": "batch"},
        "optim": {"lr": 1e-2},
        "lora": {"rank": 8} if request.param == "adapters" else {},
        "engine": {"device": "cpu", "micro_batch_tokens": 256},
        "telemetry": {"every": 0, "save_rollouts_every": 1},
    }
    start(from_json(values))
    leave()
    return folder / "run"


def test_three_steps_with_vllm_rollouts(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (run / "DONE").exists()
    assert all(line["rollout/tokens"] > 0 and line["loss/nats"] > 0 for line in lines)
    assert all(line["time/sync_s"] > 0 for line in lines)
    adapted = bool(json.loads((run / "config.json").read_text())["lora"]["rank"])
    assert (run / "checkpoints/step_3/adapter/adapter_model.safetensors").exists() == adapted


def test_a_checkpoint_loads_in_vllm_and_says_what_transformers_says(run):
    from opsd.rollout.vllm import VLLMRollout

    path = str(run / "checkpoints" / "step_3")
    tokenizer = load_tokenizer(path, "--student")
    prompts = [Prompt(str(place), "", [5 + place, 6, 7], None) for place in range(3)]
    engine = TorchEngine(load_scorer(path, "--student", torch.float32, CPU), EngineConfig(), OptimConfig(), CPU)
    rollout = RolloutConfig(engine="vllm")
    vllm = VLLMRollout(engine, rollout, vllm_settings(path, tokenizer, engine, rollout))
    ours = vllm.generate(prompts, 1, GREEDY, seed=0)
    leave()
    assert ids_of(ours) == ids_of(hf(engine, tokenizer).generate(prompts, 1, GREEDY, seed=0))
    untrained = load_scorer(str(run.parent / "student"), "--student", torch.float32, CPU)
    before = HFRollout(untrained.model, tokenizer, 8).generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(ours) != ids_of(before)  # the steps did change what is said


def test_an_evaluation_by_vllm_is_transformers_evaluation(thin_smollm2, questions, tmp_path):
    records = [{"prompt": json.loads(line)["prompt"], "answer": "4"} for line in questions.read_text().splitlines()]
    suite = tmp_path / "questions.jsonl"
    suite.write_text("".join(json.dumps(record) + "\n" for record in records))
    said = {}
    for sampler in ("hf", "vllm"):
        out = tmp_path / f"{sampler}.json"
        evaluate(
            EvalCommand(
                model=str(thin_smollm2.folder),
                suite=(f"questions={suite}",),
                out=str(out),
                samples=1,
                temperature=0.0,
                max_new_tokens=12,
                engine=sampler,
                dtype="float32",
                device="cpu",
                save_responses=True,
                progress=False,
            )
        )
        assert json.loads(out.read_text())["settings"]["engine"] == sampler
        lines = (tmp_path / f"{sampler}.records.jsonl").read_text().splitlines()
        said[sampler] = [json.loads(line)["responses"] for line in lines]
    assert len(said["hf"]) == len(records) and said["vllm"] == said["hf"]

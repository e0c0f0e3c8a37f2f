"""LoRA: adapters alone are trained, as peft alone would; checkpoints hold the plain model, the adapter beside it."""

import importlib.util
import json

import pytest
import torch
from tolerance import close, transformer
from transformers import AutoModelForCausalLM

from bench.updates import trainer_of
from opsd.build.models import check_adapters
from opsd.config import EngineConfig, LoraConfig, OptimConfig, from_json
from opsd.data.packing import pack
from opsd.engine import TorchEngine
from opsd.model.lora import add_adapters, load_adapters
from opsd.model.scorer import Scorer
from opsd.rollout import HFRollout
from opsd.run import checkpoint
from opsd.run.checkpoint import TrainerState
from opsd.teacher import LocalTeacher
from opsd.train import resume, start
from opsd.types import Sampling
from opsd.utils.errors import UserError

pytestmark = pytest.mark.e2e
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8.0)
OPTIM = OptimConfig(lr=2e-2, weight_decay=0.1, max_grad_norm=0.25)
STEPS, VOCABULARY = 4, 49
# Four steps of the tests' two-layer model.
TRAINED = transformer(2, 16, backward=STEPS)


@pytest.fixture
def rollouts(make_rollout):
    lengths = [(3, 7), (4, 1), (3, 12), (5, 4)]
    generator = torch.Generator().manual_seed(3)

    def ids(count):
        return torch.randint(6, VOCABULARY, (count,), generator=generator).tolist()

    return [make_rollout(number, ids(prompt), ids(response)) for number, (prompt, response) in enumerate(lengths)]


def engine_of(model, lora=LORA, **engine):
    """The torch engine around a model of the tests, with adapters."""
    student = Scorer(model)
    add_adapters(student.model, lora, 7, "base")
    return TorchEngine(student, EngineConfig(**engine), OPTIM, CPU)


def train(engine, teacher, rollouts, steps=STEPS, tokens=16):
    """Losses of so many steps on fixed rollouts, in several micro-batches."""
    local = LocalTeacher(Scorer(teacher), CPU)
    trainer = trainer_of(engine, local, vocab_size=VOCABULARY, optim=OPTIM)
    batches = pack(rollouts, tokens)
    assert len(batches) > 1
    return [trainer.update(batches, local.hidden(batches), 1).loss_nats for _ in range(steps)]


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def train_with_peft_alone(model, begin, teacher, rollouts):
    """The plainest loop: whole logits, one rollout at a time, autograd. begin: the adapters to start from."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.base_model.model.named_parameters():
            if name in begin:
                parameter.copy_(begin[name])
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    count = sum(len(rollout.response_ids) for rollout in rollouts)
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for rollout in rollouts:
            ids = torch.tensor([rollout.prompt.ids + rollout.response_ids])
            rows = slice(len(rollout.prompt.ids) - 1, ids.shape[1] - 1)
            ours = peft_model(ids).logits[0, rows, :VOCABULARY].log_softmax(-1)
            with torch.no_grad():
                theirs = teacher(ids).logits[0, rows, :VOCABULARY].log_softmax(-1)
            loss = (ours.exp() * (ours - theirs)).sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, adapters(peft_model.base_model.model)


@pytest.mark.numeric
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_losses_and_adapters_are_those_of_a_plain_loop_with_peft_alone(
    make_model, rollouts, family, tied, checkpointing
):
    # With checkpointing no gradient would arrive if a frozen embedding's output cut the graph.
    engine = engine_of(make_model(family, tied), gradient_checkpointing=checkpointing)
    begin, teacher = adapters(engine.student.model), make_model(seed=1)
    losses = train(engine, teacher, rollouts)
    naive_losses, naive_adapters = train_with_peft_alone(make_model(family, tied), begin, make_model(seed=1), rollouts)
    close(losses, naive_losses, *TRAINED)
    assert losses[-1] < 0.9 * losses[0]
    for name, ours in adapters(engine.student.model).items():
        close(ours, naive_adapters[name], *TRAINED, said=name)
        assert not torch.equal(ours, begin[name])


def test_frozen_weights_keep_every_bit_and_only_adapters_have_gradients_and_moments(make_model, rollouts, monkeypatch):
    engine = engine_of(make_model())
    with_gradient = set()
    step = engine.step

    def look(lr):
        with_gradient.update(name for name, p in engine.student.model.named_parameters() if p.grad is not None)
        return step(lr)

    monkeypatch.setattr(engine, "step", look)
    train(engine, make_model(seed=1), rollouts)
    base = dict(make_model().named_parameters())
    frozen = {
        n.replace(".base_layer.", "."): p for n, p in engine.student.model.named_parameters() if ".lora_" not in n
    }
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    names = set(adapters(engine.student.model))
    assert with_gradient == names
    assert {name.rpartition("/")[0] for name in engine.optimizer_state()} == names
    # Two layers of seven projections [out, in], of the tests' tiny model: rank·(in + out) numbers each.
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (32, 16), (32, 16), (16, 32)] * 2
    assert sum(tensor.numel() for tensor in adapters(engine.student.model).values()) == sum(
        4 * (rows + columns) for rows, columns in shapes
    )


def save(engine, tokenizer, folder, step=1):
    state = TrainerState(step, engine.optimizer_state(), {})
    return checkpoint.save(
        folder, engine.student.model, tokenizer, state, 9, weights=engine.weights(), adapters=engine.adapters()
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(6, 26)[None]).logits


@pytest.mark.numeric
@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=3, use_rslora=True, target_modules=("q_proj", "down_proj"))])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_a_checkpoint_is_the_plain_model_with_the_adapter_beside_it(
    make_model, tokenizer, rollouts, tmp_path, family, tied, lora
):
    from peft import PeftModel

    engine = engine_of(make_model(family, tied), lora)
    train(engine, make_model(seed=1), rollouts)
    folder = save(engine, tokenizer, tmp_path)
    trained = logits(engine.student.model)
    assert float((trained - logits(make_model(family, tied))).abs().max()) > 0.1  # the adapters do say something

    merged, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    close(logits(merged), trained, *transformer(2, 16))

    with_adapter = PeftModel.from_pretrained(make_model(family, tied), folder / "adapter")
    close(logits(with_adapter), trained, *transformer(2, 16))
    # peft's own merge, a third way to the same weights.
    by_peft = dict(with_adapter.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        close(parameter, by_peft[name], lora.rank, 1, said=name)


def test_saving_and_streaming_leave_the_trained_weights_as_they_are(make_model, tokenizer, rollouts, tmp_path):
    engine = engine_of(make_model(tied=False))
    train(engine, make_model(seed=1), rollouts)
    before = {name: tensor.clone() for name, tensor in engine.student.model.state_dict().items()}
    for step in (1, 2, 3):
        save(engine, tokenizer, tmp_path, step)
        list(engine.gathered())
    after = engine.student.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.numeric
@pytest.mark.parametrize("tied", [True, False])
def test_samplers_are_streamed_the_plain_models_names_with_the_adapters_merged_in(make_model, rollouts, tied):
    engine = engine_of(make_model(tied=tied))
    train(engine, make_model(seed=1), rollouts)
    streamed = dict(engine.gathered())
    plain = make_model(tied=tied)
    assert list(streamed) == [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    plain.load_state_dict(streamed)
    close(logits(plain), logits(engine.student.model), *transformer(2, 16))


def test_generating_with_adapters_in_place_says_what_the_merged_model_says(make_model, tokenizer, rollouts, tmp_path):
    engine = engine_of(make_model())
    train(engine, make_model(seed=1), rollouts)
    merged = AutoModelForCausalLM.from_pretrained(save(engine, tokenizer, tmp_path))
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    prompts = [rollout.prompt for rollout in rollouts]
    said = [
        [rollout.response_ids for rollout in HFRollout(model, tokenizer, 4).generate(prompts, 1, greedy, seed=0)]
        for model in (engine.student.model, merged, make_model())
    ]
    assert said[0] == said[1] != said[2]


@pytest.mark.numeric
def test_under_bfloat16_frozen_weights_are_held_in_it_and_adapters_in_fp32(make_model, tokenizer, rollouts, tmp_path):
    engine = engine_of(make_model(), dtype="bfloat16")
    losses = train(engine, make_model(seed=1), rollouts)
    # A rounding to bfloat16 is off by 2^-8, and some fifty lie on the way: √50·2^-8 = 3 %.
    assert losses == pytest.approx(train(engine_of(make_model()), make_model(seed=1), rollouts), rel=0.03)
    types = {name: p.dtype for name, p in engine.student.model.named_parameters()}
    assert all(dtype == (torch.float32 if ".lora_" in name else torch.bfloat16) for name, dtype in types.items())
    folder = save(engine, tokenizer, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not torch.equal(
        merged.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight.bfloat16().float()
    )


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "mlp", "proj"])
def test_layers_that_are_not_there_or_not_linear_are_named_in_one_line(make_model, name):
    lora = LoraConfig(rank=2, target_modules=("q_proj", name))
    with pytest.raises(
        UserError, match=rf"^--lora.target_modules {name}: no such linear layer; give [^\n]*down_proj[^\n]*$"
    ):
        add_adapters(Scorer(make_model()).model, lora, 0, "base")


def test_adapters_of_another_rank_or_cut_off_give_one_line(make_model, tokenizer, tmp_path):
    folder = save(engine_of(make_model()), tokenizer, tmp_path)
    other = engine_of(make_model(), LoraConfig(rank=2))
    with pytest.raises(UserError, match=rf"^checkpoint {folder} cannot be read \([^\n]*another shape\)[^\n]*$"):
        load_adapters(other.student.model, folder / "adapter")
    file = folder / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"^checkpoint {folder} cannot be read [^\n]*$"):
        load_adapters(engine_of(make_model()).student.model, folder / "adapter")


@pytest.fixture(scope="module")
def settings(make_folder, make_model, tmp_path_factory):
    """Settings of a three-step run with adapters, without its folder."""
    data = tmp_path_factory.mktemp("data") / "sums.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in (1, 2) for b in (3, 4))
    )
    values = {
        "student": str(make_folder(make_model(seed=0))),
        "teacher": {"model": str(make_folder(make_model(seed=1)))},
        "prompts": str(data),
        "steps": 3,
        "prompts_per_step": 2,
        "prompt_format": "raw",
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
        "optim": {"lr": 1e-2},
        "lora": {"rank": 4},
        "engine": {"device": "cpu", "micro_batch_tokens": 24},
        "checkpoint": {"every": 1, "keep": 3},
        "telemetry": {"every": 0, "save_rollouts_every": 1},
        "track": {"progress": False},
    }
    return lambda out, **more: from_json({**values, "out": str(out), **more})


def files_of(run):
    """Every file of a checkpoint and of rollouts, as bytes; but for those with the run's name or the clock's times."""
    folders = [run / "checkpoints" / "step_3", run / "rollouts"]
    files = [
        p for f in folders for p in sorted(f.rglob("*")) if p.name not in ("state.json", "checksums.json", "README.md")
    ]
    return {str(p.relative_to(run)): p.read_bytes() for p in files if p.is_file()}


def test_a_stopped_run_resumes_from_base_and_adapter_to_the_same_bits(settings, tmp_path, monkeypatch):
    start(settings(tmp_path / "whole"))
    save, steps = checkpoint.save, []

    def stop_at_3(folder, model, tokenizer, state, *rest):
        steps.append(state.step)
        if state.step == 3:
            raise KeyboardInterrupt
        return save(folder, model, tokenizer, state, *rest)

    monkeypatch.setattr(checkpoint, "save", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        start(settings(tmp_path / "stopped"))
    monkeypatch.undo()
    resume(tmp_path / "stopped")
    ours, whole = files_of(tmp_path / "stopped"), files_of(tmp_path / "whole")
    assert "checkpoints/step_3/adapter/adapter_model.safetensors" in whole
    assert ours == whole
    config = json.loads((tmp_path / "whole/checkpoints/step_3/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == settings("x").student


def test_the_seed_draws_the_adapters(settings, tmp_path):
    saved = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        start(settings(tmp_path / name, seed=seed, steps=1, optim={"lr": 1e-12}))
        saved.append((tmp_path / name / "checkpoints/step_1/adapter/adapter_model.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


def test_adapters_without_peft_are_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_adapters(LoraConfig())
    with pytest.raises(UserError, match=r"^--lora.rank 4: peft is not installed; run `make setup`, or give 0$"):
        check_adapters(LoraConfig(rank=4))

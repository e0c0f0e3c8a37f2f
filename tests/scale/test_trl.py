"""Selection inside TRL's DistillationTrainer, in one process: against TRL itself and against a naive fp64 loss."""

import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
from itertools import compress
from pathlib import Path

import pandas as pd
import pytest
import torch
from tolerance import close, transformer
from two_ranks import place

import opsd
from opsd.selection import Selection, load_selector
from opsd.utils.errors import RunStopped, UserError
from opsd.utils.seeding import derive_seed
from opsd.viewer.command import InspectConfig, inspect
from tip_patch.adapters import trl_checks
from tip_patch.adapters.trl_checks import KNOWN, check_context, check_installed, check_parameters
from tip_patch.selector import Selector

pytestmark = [pytest.mark.e2e, pytest.mark.own_process]
ROOT = Path(opsd.__file__).parents[1]
ENGINES = ("kernel", "fused")
# Two scopes; a rule that draws; weights set with the choice and after it; a count that is not known beforehand.
RULES = {
    "soft_or": {"normalise_over": "batch"},
    "q3": {"normalise_over": "rollout"},
    "entropy_sample": {},
    "adaptive_kl": {},
    "position_weighted": {"retention": 0.6},
    "verify": {"top_k": 20},
}
# One step through the two-layer model and back.
ONE_STEP = transformer(2, 16, backward=1)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """An engine of an earlier test may have set what launchers set; accelerate would take this process for a rank."""
    for name in place(0, 1, 0):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def pair():
    """tests/trl_pair.py, which takes TRL along."""
    pytest.importorskip("trl")
    return importlib.import_module("trl_pair")


@pytest.fixture(scope="session")
def adapter(pair):
    return importlib.import_module("tip_patch.adapters.trl")


@pytest.fixture(scope="session")
def tip(pair, adapter):
    return adapter.tip(pair.DistillationTrainer)


def same(one, other) -> bool:
    """Whether two runs gave the same losses, gradients and weights, to the last bit."""
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (one, other)]
    gradients = [torch.equal(a, b) for a, b in zip(one.gradients, other.gradients, strict=True)]
    return losses[0] == losses[1] and all(gradients) and torch.equal(*(values(run) for run in (one, other)))


def values(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in trainer.model.parameters()])


WAYS = {
    "plain": {},
    "tools": {"tools": True},
    "beta": {"settings": {"beta": 0.3, "temperature": 0.7}},
    "bf16, checkpointed": {"settings": {"bf16": True, "gradient_checkpointing": True}},
    "one micro-batch": {"settings": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}},
}


@pytest.mark.parametrize("way", WAYS)
def test_all_tokens_are_trls_own_run_to_the_last_bit(pair, tip, tmp_path, way):
    plain = pair.run(pair.DistillationTrainer, tmp_path, **WAYS[way])
    assert float(plain.gradients[0].norm()) > 0.1
    choices = [("all", {})]
    choices += [(rule, {**RULES.get(rule, {}), "retention": 1.0}) for rule in ("random", "soft_or", "q3")]
    for rule, options in choices if way == "plain" else choices[2:3]:
        ours = pair.run(tip, tmp_path, selector=rule, selector_options=options, **WAYS[way])
        assert same(ours, plain), rule
        assert [line["entropy"] for line in pair.logs(ours)] == [line["entropy"] for line in pair.logs(plain)]


def test_adapters_train_as_in_trl(pair, tip, tmp_path):
    from peft import LoraConfig

    def lora(trainer, **more):
        return pair.run(trainer, tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"), **more)

    plain, all_kept = lora(pair.DistillationTrainer), lora(tip, selector_options={"retention": 1.0})
    assert same(all_kept, plain)
    kernel, fused = (lora(tip, engine=engine) for engine in ENGINES)
    close(fused.gradients[0], kernel.gradients[0], *ONE_STEP)
    assert not torch.equal(kernel.gradients[0], plain.gradients[0])


def naive(pair, rule, options, beta, temperature, tools, heads=None):
    """The first step's loss, gradient and kept count: whole logits in fp64, differentiated by autograd.

    heads: what is applied to a model's logits (None: nothing).
    """
    tokenizer = pair.plain_tokenizer()
    student, teacher = (model.double() for model in (heads or default_pair)(pair))
    prompts = [tokenizer(one["prompt"])["input_ids"] for one in pair.PROMPTS[:4]]
    answers = [pair.answer(ids) for ids in prompts]
    rows = [(n, p, a) for n, (p, a) in enumerate(zip(prompts, answers, strict=True)) if a]

    def log_p_NV(model):
        parts = []
        for _, prompt, ids in rows:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            wrote = torch.tensor(pair.tool_mask(ids) if tools else [1] * len(ids)).bool()
            parts.append((logits / temperature).log_softmax(-1)[wrote])
        return torch.cat(parts), torch.tensor([n for part, (n, *_) in zip(parts, rows, strict=True) for _ in part])

    log_s_NV, rollout_N = log_p_NV(student)
    with torch.no_grad():
        log_t_NV, _ = log_p_NV(teacher)
    wrote = [pair.tool_mask(ids) if tools else [1] * len(ids) for _, _, ids in rows]
    ids_N = torch.tensor([i for (*_, ids), mask in zip(rows, wrote, strict=True) for i in compress(ids, mask)])
    p_s, p_t = log_s_NV.exp(), log_t_NV.exp()
    reverse_N, forward_N = (p_s * (log_s_NV - log_t_NV)).sum(-1), (p_t * (log_t_NV - log_s_NV)).sum(-1)
    stats = opsd.selection.TokenStats(
        rollout_N=rollout_N,
        entropy_N=-(p_s * log_s_NV).sum(-1).detach(),
        reverse_kl_N=reverse_N.detach(),
        forward_kl_N=forward_N.detach(),
        teacher_entropy_N=-(p_t * log_t_NV).sum(-1),
        top1_agree_N=None,
        teacher_rank_N=(log_t_NV > log_t_NV.gather(1, ids_N[:, None])).sum(-1),
        token_ids_N=ids_N,
        vocab_size=log_s_NV.shape[1],
    )
    selector = load_selector(rule, **options)
    selector.prepare(stats)
    chosen = selector.weigh(stats, selector(stats, derive_seed(3, "select", 1)))
    if beta in (0.0, 1.0):
        each_N = reverse_N if beta else forward_N
    else:
        log_m = torch.logaddexp(log_s_NV + math.log(1 - beta), log_t_NV + math.log(beta))
        each_N = (beta * p_t * (log_t_NV - log_m) + (1 - beta) * p_s * (log_s_NV - log_m)).sum(-1)
    weight_N = torch.ones_like(each_N) if chosen.weight_N is None else chosen.weight_N.double()
    loss = (each_N * weight_N)[chosen.kept_N].sum() / int(chosen.kept_N.sum())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()])
    return loss.detach(), gradient, int(chosen.kept_N.sum()), len(rollout_N)


def default_pair(pair):
    return pair.tiny_model(True, 0), pair.tiny_model(True, 1)


CASES = [(rule, 1.0, 1.0, False) for rule in RULES]
CASES += [("soft_or", 0.0, 0.7, True), ("q3", 0.4, 1.3, True), ("adaptive_kl", 0.0, 1.0, True)]


@pytest.mark.numeric
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("rule", "beta", "temperature", "tools"), CASES)
def test_a_steps_loss_and_gradient_are_those_of_whole_fp64_logits(
    pair, tip, tmp_path, engine, rule, beta, temperature, tools
):
    # Two micro-batches of uneven answers, the third one empty; the divisor is the kept count of both.
    loss, gradient, kept, tokens = naive(pair, rule, RULES[rule], beta, temperature, tools)
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "beta": beta, "temperature": temperature}
    how = {"selector": rule, "selector_options": RULES[rule], "engine": engine, "tools": tools}
    ours = pair.run(tip, tmp_path, settings=settings, **how)
    line = pair.logs(ours)[0]
    assert line["select/kept_frac"] == kept / tokens
    close(line["loss"], loss, *ONE_STEP)
    close(ours.gradients[0], gradient, *ONE_STEP)


@pytest.mark.numeric
def test_one_micro_batch_is_scored_and_trained_in_one_pass(pair, tip, tmp_path, monkeypatch):
    # Scope "batch" and an open count need no pass of their own where the step is one call.
    monkeypatch.setattr(tip, "_score", None)
    for rule in ("soft_or", "verify"):
        loss, gradient, *_ = naive(pair, rule, RULES[rule], 1.0, 1.0, False)
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        settings = {"max_steps": 1, "max_grad_norm": 0.0, **sizes}
        ours = pair.run(tip, tmp_path, selector=rule, selector_options=RULES[rule], settings=settings)
        close(pair.logs(ours)[0]["loss"], loss, *ONE_STEP)
        close(ours.gradients[0], gradient, *ONE_STEP)


def test_the_kernels_backward_reads_kept_rows_alone(adapter):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    from tip_patch.adapters.trl_loss import KeptRowsDivergence

    generator = torch.Generator().manual_seed(0)
    student_ND, teacher_NE = (torch.randn(6, 8, generator=generator) for _ in range(2))
    head_VD, head_VE = (torch.randn(30, 8, generator=generator) for _ in range(2))
    bias_V, kept_N = torch.randn(30, generator=generator), torch.tensor([True, False, True, False, False, True])
    found = []
    for function in (KeptRowsDivergence, ChunkedDivergenceFunction):
        inputs = [part.clone().requires_grad_() for part in (student_ND, head_VD, bias_V)]
        spoilt_NE = teacher_NE.clone()
        if function is not ChunkedDivergenceFunction:
            spoilt_NE[1] = torch.nan  # of a row that is left out: it must not come through
        divergence_N, _ = function.apply(*inputs, spoilt_NE, head_VE, None, 1.0, 0.9, 1.5, 5.0, 1.0, None)
        divergence_N[kept_N].sum().backward()
        found.append([part.grad for part in inputs])
    ours, theirs = found
    assert torch.equal(ours[0][kept_N], theirs[0][kept_N]) and not ours[0][~kept_N].any()
    for mine, whole in zip(ours[1:], theirs[1:], strict=True):
        close(mine, whole, 30, 6)


def test_evaluation_is_trls_own(pair, tip, tmp_path):
    from datasets import Dataset

    found = []
    for trainer in (pair.DistillationTrainer, tip):
        made = pair.make(pair.fixed(trainer), tmp_path, eval_dataset=Dataset.from_list(pair.PROMPTS[5:9]))
        found.append({k: v for k, v in made.evaluate().items() if "loss" in k or "entropy" in k})
    assert found[0] == found[1] and found[0]["eval_loss"] > 0


def test_a_step_that_ends_early_is_divided_by_what_it_trained_on(pair, tip, tmp_path):
    # Three micro-batches of an epoch, two to a step: the second step has the first half of its answers alone.
    class Short(tip):
        def get_train_dataloader(self):
            whole = super().get_train_dataloader()

            class Loader:
                def __iter__(self):
                    return iter([batch for batch, _ in zip(whole, range(3), strict=False)])

                def __len__(self):
                    return 3

            return Loader()

    settings = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    how = {"selector": "first_fraction", "selector_options": {"retention": 1.0}}
    ours = pair.run(Short, tmp_path, settings=settings, **how)
    second = pair.LENGTHS[4:6]
    assert ours.tip.kept == sum(second) and len(ours.gradients) == 2
    alone = pair.run(
        pair.DistillationTrainer,
        tmp_path,
        prompts=pair.PROMPTS[4:6],
        settings={**settings, "gradient_accumulation_steps": 1},
    )
    # The rows are padded otherwise.
    close(ours.gradients[1], alone.gradients[0], *ONE_STEP)


@pytest.mark.parametrize("rule", [("soft_or", {"normalise_over": "running"}), ("entropy_sample", {})])
def test_a_resumed_run_ends_on_the_same_bits(pair, tip, tmp_path, rule):
    def begin(name, record, **settings):
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        how = {"selector": rule[0], "selector_options": rule[1], "token_record": tmp_path / record}
        return pair.make(pair.fixed(tip), tmp_path / name, settings={**saving, **settings}, **how)

    whole = begin("whole", "whole record")
    whole.train()
    half = begin("half", "half record", max_steps=3)
    half.train()
    resumed = begin("half", "half record")
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert torch.equal(values(resumed), values(whole))
    assert resumed.tip.selector.state_dict() == whole.tip.selector.state_dict()
    saved = json.loads((tmp_path / "half/checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]
    assert bool(saved["token_selection"]) == (rule[0] == "soft_or")
    # The third step, which was done twice, stands in the record once.
    lines = [(tmp_path / record / "metrics.jsonl").read_text() for record in ("whole record", "half record")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 4


def masks(pair, first: int) -> list[list[int]]:
    """Which tokens of a step's four answers the student wrote."""
    prompts = [one["prompt"] for one in pair.PROMPTS[first : first + 4]]
    return [pair.tool_mask(pair.answer(ids)) for ids in pair.plain_tokenizer()(prompts)["input_ids"]]


def test_metrics_and_the_token_record_say_what_was_kept(pair, tip, tmp_path):
    run = tmp_path / "record"
    student, teacher = pair.tiny_model(True, 0), pair.tiny_model(True, 1)
    # Two of the second step's answers begin with one of these.
    student.generation_config.eos_token_id = [10, 15]
    more = {"pair": (student, teacher), "token_record": run, "settings": {"logging_steps": 2}}
    ours = pair.run(tip, tmp_path / "out", tools=True, **more)
    (line,) = pair.logs(ours)
    table, (first, second) = pd.read_parquet(run / "tokens" / "step_2.parquet"), (masks(pair, 0), masks(pair, 4))
    positions = [place for mask in second for place, own in enumerate(mask) if own]
    assert table["position"].tolist() == positions
    kept = [table.loc[table["rollout"] == n, "kept"].sum() for n in range(4)]
    assert kept == [max(1, sum(mask) // 2) for mask in second]
    unsure = table["entropy"] > line["quadrant/entropy_split_nats"]
    disputed = table["reverse_kl"] > line["quadrant/divergence_split_nats"]
    assert line["quadrant/q1_frac"] == pytest.approx((unsure & disputed).mean())
    for number, of in enumerate((unsure & disputed, unsure & ~disputed, ~unsure & disputed, ~unsure & ~disputed), 1):
        kept_frac = table.loc[of, "kept"].mean() if of.any() else None
        assert line.get(f"quadrant/q{number}_kept_frac") == (
            kept_frac if kept_frac is None else pytest.approx(kept_frac)
        )
    # Of both steps: TRL averages what was added since it logged last.
    shares = [sum(max(1, sum(m) // 2) for m in step if m) / sum(map(sum, step)) for step in (first, second)]
    assert line["select/kept_frac"] == pytest.approx(sum(shares) / 2)
    assert 0 <= line["select/jaccard_entropy"] <= 1
    ends = table.loc[table["stop"]]
    assert line["stop/count"] == len(ends) > 0
    assert line["stop/kept_frac"] == pytest.approx(ends["kept"].mean())
    delta = ends["teacher_stop_log_prob"] - ends["stop_log_prob"]
    assert line["stop/delta_nats"] == pytest.approx(delta.sort_values().iloc[(len(delta) - 1) // 2])
    assert "soft_or, 50 % kept" in inspect(InspectConfig(run=run)).read_text()
    # What TRL was told, and no default of ours.
    known = json.loads((run / "config.json").read_text())
    assert (known["prompts_per_step"], known["rollout"]["max_new_tokens"], known["optim"]) == (4, 10, {"lr": 0.01})
    assert not {"eval", "engine", "checkpoint", "health"} & set(known) and (run / "DONE").exists()


def test_whatever_is_made_within_selecting_selects(pair, adapter, tmp_path):
    before = pair.DistillationTrainer.__init__

    class Mine(pair.DistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.after = type(self).__name__

    with adapter.selecting("entropy", retention=0.25, telemetry_every=0):
        made = pair.make(pair.fixed(Mine), tmp_path)
        own = pair.make(pair.fixed(adapter.tip(Mine)), tmp_path, selector="random")
    assert pair.DistillationTrainer.__init__ is before
    assert isinstance(made, Mine) and isinstance(made, adapter.Selecting) and made.after == "TipFixed"
    assert made.tip.selector.name == "entropy" and own.tip.selector.name == "random"
    made.train()
    kept = [sum(max(1, n // 4) for n in pair.LENGTHS[i : i + 4] if n) for i in (0, 4)]
    tokens = [sum(pair.LENGTHS[i : i + 4]) for i in (0, 4)]
    assert [line["select/kept_frac"] for line in pair.logs(made)] == [k / t for k, t in zip(kept, tokens, strict=True)]
    assert not any("quadrant" in key for line in pair.logs(made) for key in line)
    outside = pair.make(pair.fixed(Mine), tmp_path)
    assert not isinstance(outside, adapter.Selecting)


def test_a_class_is_made_once(pair, adapter):
    assert adapter.tip(pair.DistillationTrainer) is adapter.tip(pair.DistillationTrainer)
    assert adapter.tip(adapter.tip(pair.DistillationTrainer)) is adapter.tip(pair.DistillationTrainer)


def test_trls_own_script_selects(pair, adapter, tmp_path, monkeypatch):
    main = importlib.import_module("tip_patch.trl").main
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pair.PROMPTS))
    for name, model in zip(("student", "teacher"), default_pair(pair), strict=True):
        model.save_pretrained(tmp_path / name)
        pair.plain_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = (
        f"--selector entropy --retention 0.5 --token_record {tmp_path}/record --output_dir {tmp_path}/out "
        f"--model_name_or_path {tmp_path}/student --teacher_model_name_or_path {tmp_path}/teacher "
        f"--dataset_name {tmp_path}/data --max_steps 1 --per_device_train_batch_size 2 --max_completion_length 6 "
        "--gradient_accumulation_steps 1 --bf16 False --use_cpu --report_to none --save_strategy no --logging_steps 1 "
        "--disable_tqdm True"
    )
    main(words.split())
    table = pd.read_parquet(tmp_path / "record" / "tokens" / "step_1.parquet")
    assert 0 < table["kept"].mean() <= 0.5
    for bad in ("--no_such_flag 1", "--selector_option k", "--retention 2"):
        with pytest.raises(UserError):
            main([*words.split(), *bad.split()])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"selector": "soft_o"}, "did you mean"),
        ({"selector_options": {"retentoin": 1}}, "takes no option"),
        ({"engine": "quick"}, "give kernel or fused"),
        ({"selector": load_selector("random"), "selector_options": {"retention": 1}}, "belong to a selector's name"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_loaded(tip, more, says):
    with pytest.raises(UserError, match=says):
        tip("no such model", **more)


def test_a_record_never_goes_into_a_folder_that_holds_something(pair, tip, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not a new or empty folder"):
        pair.run(tip, tmp_path / "out", token_record=tmp_path / "full")


class Greedy(Selector):
    """Keeps everything, and says that it keeps half."""

    name = "greedy"

    def __call__(self, stats, seed=0):
        return Selection(torch.ones_like(stats.rollout_N, dtype=torch.bool))


def test_a_rule_that_keeps_another_count_than_it_said_stops_the_run(pair, tip, tmp_path):
    with pytest.raises(RunStopped, match="budget"):
        pair.run(tip, tmp_path, selector=Greedy())


def test_a_trainer_with_a_loss_of_its_own_is_told_apart(pair, tip, tmp_path):
    class Own(tip):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs["completion_ids"]).logits.sum()

    with pytest.raises(UserError, match="computes its own loss"):
        pair.run(Own, tmp_path)


OTHERS = [
    "gkd:GKDTrainer",
    "gold:GOLDTrainer",
    "sdft:SDFTTrainer",
    "sdpo:SDPOTrainer",
    "iw_opd:IWOPDTrainer",
    "server_distillation:ServerDistillationTrainer",
    "async_distillation:AsyncDistillationTrainer",
]


@pytest.mark.parametrize("other", OTHERS)
def test_trainers_in_which_selection_would_be_wrong_are_refused(pair, adapter, other):
    module, name = other.split(":")
    trainer = getattr(importlib.import_module(f"trl.experimental.{module}"), name)
    assert name in trl_checks.REFUSED
    with pytest.raises(UserError, match=f"{name}: it"):
        adapter.tip(trainer)


def test_what_is_no_distillation_trainer_is_refused(adapter):
    with pytest.raises(UserError, match="not one of TRL's distillation trainers"):
        adapter.tip(dict)


def test_setup_installs_the_version_that_the_adapter_knows():
    setup = (ROOT / "setup.py").read_text()
    assert f'TRL = ["trl{",".join(sorted(str(KNOWN).split(","), reverse=True))}"]' in setup


@pytest.mark.parametrize("found", ["1.15.3", "1.17.0", None])
def test_another_trl_is_one_line(monkeypatch, found):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(trl_checks.importlib.metadata, "version", version)
    with pytest.raises(UserError, match="pip install opsd-tip"):
        check_installed()


def test_without_trl_the_command_says_one_line(tmp_path):
    program = (
        "import importlib.metadata as m, runpy, sys\n"
        "def gone(name): raise m.PackageNotFoundError(name)\n"
        "m.version = gone\n"
        "sys.argv = ['trl', '--selector', 'entropy']\n"
        "runpy.run_module('tip_patch.trl', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "tip_patch.trl: selection inside TRL needs trl<1.17,>=1.16: pip install opsd-tip[trl]\n"


def test_a_changed_trl_is_told_at_import(adapter):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    with pytest.raises(UserError, match="instead of"):
        check_parameters({ChunkedDivergenceFunction.backward: "ctx grad"})
    with pytest.raises(UserError, match="saves other tensors"):
        check_context(ChunkedDivergenceFunction, ("dtypes", "grad_buffer"), 9)
    with pytest.raises(UserError, match="saves other tensors"):
        check_context(ChunkedDivergenceFunction, ("dtypes",), 8)


def biased_phi(pair, seed):
    """A head with a bias that is not zero."""
    from transformers import AutoModelForCausalLM, PhiConfig

    sizes = {"vocab_size": 52, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = PhiConfig(**sizes, num_attention_heads=2, initializer_range=0.35, eos_token_id=1, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        model.lm_head.bias.data.normal_()
    return model.eval()


def capped_gemma(pair, seed):
    """Logits within ±5, which bend there."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    sizes = {"vocab_size": 52, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.35,
        final_logit_softcapping=5.0,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


@pytest.mark.numeric
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", [biased_phi, capped_gemma])
def test_heads_with_a_bias_or_a_soft_cap_are_trained_through(pair, tip, tmp_path, engine, family):
    def models(pair):
        return family(pair, 0), family(pair, 1)

    loss, gradient, *_ = naive(pair, "q3", RULES["q3"], 1.0, 1.0, False, models)
    how = {"selector": "q3", "selector_options": RULES["q3"], "engine": engine, "pair": models(pair)}
    ours = pair.run(tip, tmp_path, settings={"max_steps": 1, "max_grad_norm": 0.0}, **how)
    close(pair.logs(ours)[0]["loss"], loss, *ONE_STEP)
    close(ours.gradients[0], gradient, *ONE_STEP)

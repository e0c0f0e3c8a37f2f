"""The planner: its counts against transformers, autograd, DeepSpeed's estimator and hand calculations."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from opsd.__main__ import main
from opsd.config.cli import parse
from opsd.estimate.command import PlanConfig, planned
from opsd.estimate.hardware import Hardware
from opsd.estimate.memory import GIB, MemoryEstimate
from opsd.estimate.shapes import BUILT_IN, find_shape, shape_of

FAMILIES = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}
# At the paper's sizes, where what is counted is large, on its hardware.
PAIR = (
    *("--student", "qwen3-4b", "--teacher", "qwen3-8b", "--hardware", "h200", "--engine.dtype", "float32"),
    *("--rollout.samples_per_prompt", "16", "--rollout.max_prompt_tokens", "2048", "--rollout.max_new_tokens", "8192"),
    *("--engine.micro_batch_tokens", "16384", "--eval.generate_batch", "256"),
)
SHARDED = ("--engine.kind", "deepspeed", "--engine.dtype", "bfloat16", "--gpus", "8", "--rollout.engine", "vllm")


def estimate(*flags: str, student=None, flash: bool = False, kind: str = "cuda") -> MemoryEstimate:
    config = parse(PlanConfig, [*PAIR, *flags], "opsd plan")
    hardware = Hardware(config.gpus, 131.3, 400.0, 2900.0, flash=flash, kind=kind)
    return MemoryEstimate(config.run, student or BUILT_IN["qwen3-4b"], BUILT_IN["qwen3-8b"], hardware)


def stated(name: str):
    """The transformers config that a built-in shape describes."""
    s = BUILT_IN[name]
    sizes = {
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "intermediate_size": s.ffn,
        "tie_word_embeddings": s.tied,
    }
    return FAMILIES[s.family](**sizes, **({} if s.family == "qwen2" else {"head_dim": s.head_dim}))


@pytest.mark.parametrize("name", ["qwen3-1.7b", "qwen2.5-14b", "llama-3.1-8b"])
def test_a_shapes_parameters_are_those_that_transformers_builds(name):
    config = stated(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert BUILT_IN[name].parameters == sum(p.numel() for p in model.parameters())
    assert shape_of(json.loads(config.to_json_string()), name, "--student") == BUILT_IN[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("llama-3.1-8b", 8.03),
        ("llama-3.3-70b", 70.55),
        ("qwen2.5-1.5b", 1.54),
        ("qwen2.5-14b", 14.77),
    ],
)
def test_published_totals(name, billions):
    assert BUILT_IN[name].parameters / 1e9 == pytest.approx(billions, abs=0.006)  # two decimals are published


def test_a_hub_name_finds_its_shape():
    assert find_shape("meta-llama/Llama-3.3-70B-Instruct", "--teacher") is BUILT_IN["llama-3.3-70b"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "autocast", "packed"),
    [
        ("float32", False, True),
        ("bfloat16", False, True),
        ("float32", False, False),
        ("bfloat16", False, False),
        ("bfloat16", True, False),  # packed is ZeRO-3, whose weights are bf16 themselves
    ],
)
def test_a_layers_activations_are_the_bytes_that_autograd_keeps(family, dtype, autocast, packed):
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 160}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    L = 64
    kept = {}
    for layers in (1, 2):
        config = FAMILIES[family](**sizes, num_hidden_layers=layers)
        wanted = torch.float32 if autocast else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, attn_implementation="sdpa").train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def keep(t, own=own, found=found):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage  # held, so that no address comes twice
            return t

        cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with cast, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            # Two sequences, in one row or each in a row of its own.
            ids = torch.zeros(1, L, dtype=torch.int64) if packed else torch.zeros(2, L // 2, dtype=torch.int64)
            more = {"position_ids": torch.arange(L // 2).repeat(2)[None]} if packed else {}
            model.base_model(input_ids=ids, **more, use_cache=False)
        kept[layers] = sum(storage.nbytes() for storage in found.values())
    shape = shape_of(config.to_dict(), family, "--student")
    stage = "3" if packed else "2"
    engine = () if autocast else ("--engine.kind", "deepspeed", "--engine.zero_stage", stage)
    plans = estimate(*engine, "--engine.dtype", dtype, student=shape, kind="cpu")
    casts = 2 * shape.layer_matrices if autocast else 0
    mask = L * L * plans.itemsize if plans.masked else 0
    assert kept[2] - kept[1] == L * plans.layer_bytes() + mask + casts
    assert casts == plans.autocast_copies(1)["autocast's copies"]


@pytest.mark.parametrize(("stage", "a_parameter"), [(0, 16.0), (1, 2 + 4 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)])
def test_model_states_of_a_zero_stage_by_hand(stage, a_parameter):
    states = estimate(*SHARDED, "--engine.zero_stage", str(stage)).states()
    assert sum(states.values()) == pytest.approx(a_parameter * BUILT_IN["qwen3-4b"].parameters)


def test_plain_torch_holds_sixteen_bytes_a_parameter_and_sgd_eight():
    million = BUILT_IN["qwen3-4b"].parameters
    assert sum(estimate().states().values()) == 16 * million
    assert sum(estimate("--optim.kind", "sgd").states().values()) == 8 * million


def test_lora_trains_its_adapters_alone():
    plans = estimate("--lora.rank", "8", "--lora.target_modules", "q_proj", "v_proj")
    assert plans.trained == 8 * 36 * ((2560 + 4096) + (2560 + 1024))


def test_deepspeeds_own_estimator_agrees_on_model_states(capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    shape = BUILT_IN["qwen3-4b"]
    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        shape.parameters, shape.largest_matrix, num_gpus_per_node=8, cpu_offload=False, cpu_offload_params=False
    )
    ours = sum(estimate(*SHARDED).states().values())
    assert ours == theirs - largest


def test_the_fused_loss_does_not_grow_with_tokens_but_by_their_own_gradients():
    small, large = (estimate("--engine.micro_batch_tokens", n, "--loss.chunk_tokens", "64") for n in ("10240", "20480"))
    assert large.loss() - small.loss() == 10240 * 2560 * 4


def test_the_whole_loss_grows_with_kept_tokens_times_vocabulary():
    flags = ("--loss.memory", "whole", "--select.by", "soft_or", "--select.retention")
    half, fifth = estimate(*flags, "0.5"), estimate(*flags, "0.2")
    # Whole rows are kept: one of 16 384 more or less.
    assert half.loss() - fifth.loss() == pytest.approx(5 * 0.3 * half.micro_tokens * 151_936 * 4, rel=1e-4)


WHOLE_ROWS = 151_936  # a multiple of 64: rows of logits have no tail


def test_on_cuda_the_loss_holds_logits_and_their_gradient_in_the_products_type_and_no_scratch():
    chunk, flags = 2048 * WHOLE_ROWS, ("--engine.kind", "deepspeed", "--engine.zero_stage", "2")
    plans = estimate(*flags, "--engine.dtype", "bfloat16")
    assert plans.loss() == chunk * (4 + 4 + 2) + 4 * 2560 * WHOLE_ROWS + plans.micro_tokens * 2560 * 2
    # fp32 gradients lie over the student's logits.
    assert estimate(*flags).loss() == chunk * (4 + 4) + 4 * 2560 * WHOLE_ROWS + plans.micro_tokens * 2560 * 4


def test_a_row_of_logits_is_as_wide_as_the_device_wants_it():
    odd = dataclasses.replace(BUILT_IN["qwen3-4b"], vocab=151_669)
    flags = ("--loss.memory", "whole")
    wide, narrow = (estimate(*flags, student=odd, kind=kind) for kind in ("cuda", "cpu"))
    rows = 5 * wide.micro_tokens + 2 * 2048
    assert wide.loss() == rows * 151_680 * 4 + odd.head_parameters * 4
    assert narrow.loss() == (5 * narrow.micro_tokens + 2 * 256) * 151_669 * 4 + odd.head_parameters * 4


def test_autocast_holds_copies_of_all_layers_until_the_loss_and_of_the_head_too_while_sampling():
    s, flags = BUILT_IN["qwen3-4b"], ("--engine.dtype", "bfloat16", "--engine.micro_batch_tokens", "64")
    short = ("--rollout.max_prompt_tokens", "32", "--rollout.max_new_tokens", "32", "--loss.chunk_tokens", "16")
    checkpointed = estimate(*flags, *short, "--engine.gradient_checkpointing", "True").phases()
    copies = "autocast's copies"
    assert checkpointed["rollout"][copies] * GIB == 2 * (36 * s.layer_matrices + s.head_parameters)
    # A short micro-batch's loss is less than they are: then the end of the layers is the peak.
    assert checkpointed["student"][copies] * GIB == 2 * 36 * s.layer_matrices
    assert "loss stage" not in checkpointed["student"]
    long = estimate("--engine.dtype", "bfloat16", "--engine.gradient_checkpointing", "True", "--loss.memory", "whole")
    assert long.phases()["student"][copies] * GIB == 2 * s.layer_matrices and "loss stage" in long.phases()["student"]
    for none in (("--engine.dtype", "float32"), ("--engine.dtype", "bfloat16", *SHARDED)):
        assert not any(copies in parts for parts in estimate(*none).phases().values())


def test_under_a_mask_every_token_meets_the_whole_row():
    masked, apart = (estimate(*SHARDED, "--engine.micro_batch_tokens", "16384", flash=flash) for flash in (False, True))
    s, each = BUILT_IN["qwen3-4b"], 3 * masked.rank_tokens / 400e12
    # Per token 2 operations per parameter, and 4 a query entry and layer for every token that it meets.
    for plans, met in ((masked, 16_384), (apart, 10_240 / 2)):
        attention = 4 * met * s.query_width * 36
        assert plans.seconds()["student"] == pytest.approx(each * (2 * s.parameters + attention))


def test_the_peak_is_the_largest_phase_and_decides_whether_it_fits():
    config = parse(PlanConfig, [*PAIR, *SHARDED, "--gpu_gib", "120"], "opsd plan")
    found = planned(config)
    sums = [sum(parts.values()) for parts in found["phases_gib"].values()]
    assert found["peak_gib"] == max(sums) and not found["fits"] and found["decides"] == "activations"
    assert planned(dataclasses.replace(config, gpu_gib=max(sums)))["fits"]


def test_a_packed_row_has_masks_where_attention_is_not_of_variable_length():
    flags = [*PAIR, *SHARDED, "--engine.dtype"]
    for more, masked in ((["bfloat16"], False), (["float32"], True), (["bfloat16", "--attention", "sdpa"], True)):
        phases = planned(parse(PlanConfig, [*flags, *more], "opsd plan"))["phases_gib"]
        assert ("attention masks" in phases["student"]) == masked


def test_a_sharded_teacher_is_spread_and_its_head_whole():
    plans = estimate(*SHARDED, "--teacher.shard", "True")
    teacher = BUILT_IN["qwen3-8b"]
    assert plans.teacher_weights(working=False) == 2 * (teacher.parameters / 8 + teacher.head_parameters)


def test_sleep_leaves_the_samplers_share_to_the_rollout_phase():
    share = "sampler (vLLM's share)"
    asleep, awake = (estimate(*SHARDED, "--rollout.sleep", sleep).phases() for sleep in ("True", "False"))
    assert [share in parts for parts in asleep.values()] == [True, False, False, False]
    assert awake["student"][share] == pytest.approx(0.4 * 131.3) and GIB == 2**30


def test_samplers_in_processes_of_their_own_take_the_trainers_gpu_unless_they_have_others():
    share, two = "sampler (vLLM's share)", ("--rollout.engine", "vllm_process", "--rollout.samplers", "2")
    sharded = [flag for flag in SHARDED if flag not in ("--rollout.engine", "vllm")]
    beside = estimate(*sharded, *two).phases()
    assert [parts[share] for parts in beside.values()] == pytest.approx([2 * 0.4 * 131.3] * len(beside))
    for elsewhere in (
        estimate(*sharded, *two, "--rollout.sampler_gpus", "6,7"),
        estimate(*sharded, *two, kind="cpu"),
    ):
        assert not any(share in parts for parts in elsewhere.phases().values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--student", "nothing-9b", "--teacher", "qwen3-8b"), "no such folder and no built-in shape"),
        ((*PAIR, "--gpus", "2"), "needs --engine.kind deepspeed"),
        ((*PAIR, "--gpu_gib", "0"), "give a number above 0"),
        ((*PAIR, "--select.retention", "2"), "give a fraction"),
        (("--student", "qwen3-4b"), "missing: --teacher"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["opsd", "plan", *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1


def test_what_does_not_fit_exits_1_with_the_knob_and_what_fits_returns(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["opsd", "plan", *PAIR, *SHARDED, "--gpu_gib", "120"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"does not fit on an H200 per rank, 8 ranks: peak [\d.]+ of 120.0 GiB, in the student phase, mostly "
        r"activations \(--engine.gradient_checkpointing",
        last,
    )
    monkeypatch.setattr("sys.argv", ["opsd", "plan", *PAIR, *SHARDED, "--engine.gradient_checkpointing", "True"])
    main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits on an H200")


@pytest.mark.parametrize("words", [["--json"], ["--json", "True"]])
def test_json_is_asked_for_with_or_without_a_value(words, monkeypatch, capsys):
    from opsd import __main__ as cli

    flags = [*PAIR, *words, "--thinking", "off"]
    monkeypatch.setattr("sys.argv", ["opsd", "plan", *flags])
    with pytest.raises(SystemExit) as stop:  # one GPU does not hold this
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and not found["fits"]


def test_a_teacher_that_transformers_lets_answer_holds_the_cache_of_its_batch():
    evaluated = (*SHARDED, "--eval.suite", "a=file", "--eval.generate_batch", "32")
    phases = estimate(*evaluated).phases()
    # Qwen3-8B: 36 layers × 8 heads × 128 × (keys, values) × 2 bytes per token; 2048 + 8192 tokens an answer
    cache = 32 * 10240 * 36 * 8 * 128 * 2 * 2 / GIB
    assert phases["teacher's evaluation"]["evaluation's key-value cache"] == pytest.approx(cache)
    assert "evaluation" not in phases  # the student answers by vLLM, within its share
    assert "evaluation" in estimate(*evaluated, "--rollout.engine", "hf").phases()
    for none in (("--eval.teacher", "False"), ("--teacher.shard", "True", "--eval.teacher", "False")):
        assert "teacher's evaluation" not in estimate(*evaluated, *none).phases()


def test_the_recipes_old_batch_of_256_answers_would_not_fit():
    config = parse(PlanConfig, [*PAIR, *SHARDED, "--eval.suite", "a=file"], "opsd plan")
    found = planned(config)
    assert (found["fits"], found["decides"]) == (False, "evaluation's key-value cache")

"""Models of every kind: what a run computes is what transformers' own logits say, or the run does not start.

Own KL: of both models' `model(ids).logits`, each rollout alone, fp32. Matrices have a standard deviation of 0.35.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import close, transformer
from transformers import AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3Model

from families import FAMILIES, TOKENIZER_IDS, own_kl, tokenizer, write
from opsd.build.models import check_student, load_student
from opsd.config import from_json
from opsd.model.checks import Reach, check_steady, length_switches
from opsd.model.files import as_saved, check_sampled, copy_rest, make_savable
from opsd.model.loading import load_ends, load_model, load_scorer, load_tokenizer
from opsd.model.positions import Span, check_positions
from opsd.model.vocabulary import usable_rows
from opsd.rollout import HFRollout
from opsd.teacher.vllm import read_head
from opsd.train import resume, start
from opsd.types import Prompt, Sampling
from opsd.utils.errors import UserError

CPU, FP32 = torch.device("cpu"), torch.float32
# One that gives another answer than a copy, but not a refusal.
TAKEN = [name for name in FAMILIES if name != "MiniCPM 3"]


def rewrite(file: Path, **changes):
    """Change a JSON file; None takes a key away."""
    values = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_tensors(folder: Path, change):
    """Rewrite a folder's weights: change(tensors) gives the new ones."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def settings(folder: Path, student: Path, teacher: Path, new_tokens: int = 12, **more) -> dict:
    """A run of one step on two prompts."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("1+2=", "abcdefghijklmnop")))
    rollout = {"samples_per_prompt": 2, "max_prompt_tokens": 16, "max_new_tokens": new_tokens}
    return {
        "student": str(student),
        "teacher": {"model": str(teacher)},
        "prompts": str(prompts),
        "out": str(folder / "run"),
        "prompt_format": "raw",
        "steps": 1,
        "prompts_per_step": 2,
        "engine": {"device": "cpu"},
        "rollout": rollout | more.pop("rollout", {}),
        "telemetry": {"save_rollouts_every": 1, "every": 0},
        "track": {"progress": False},
        **more,
    }


def loss(run: Path, step: int = 1) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["loss/nats"] for line in lines if line["step"] == step)


def agrees(folder: Path, student: Path, teacher: Path, **more):
    """Train a step; its loss is the models' own."""
    start(from_json(settings(folder, student, teacher, **more)))
    expected = own_kl(folder / "run", student, teacher)
    # A KL is a difference of log-probabilities, which have the size of log V.
    found, expected = (torch.tensor(value + math.log(TOKENIZER_IDS)) for value in (loss(folder / "run"), expected))
    close(found, expected, *transformer(2, 64), TOKENIZER_IDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a family by name and seed, made once; not to be changed."""
    made = {}

    def give(family: str, seed: int = 0) -> Path:
        if (family, seed) not in made:
            made[family, seed] = write(tmp_path_factory.mktemp("models") / f"{seed}", family, seed)
        return made[family, seed]

    return give


@pytest.fixture
def student(tmp_path):
    return write(tmp_path / "student", "Qwen3")


def load(folder: Path, **options):
    return load_scorer(str(folder), "--student", FP32, CPU, **options)


# ---- families


@pytest.mark.e2e
@pytest.mark.numeric
@pytest.mark.parametrize("family", TAKEN)
def test_a_runs_loss_is_the_kl_of_the_models_own_logits(family, folders, tmp_path):
    agrees(tmp_path, folders(family), folders(family, 1))


def test_a_model_whose_logits_are_made_in_another_way_is_refused_locally_and_served(folders):
    for refuse in (load, lambda folder: read_head(str(folder), FP32)):
        with pytest.raises(UserError, match="its logits are not hidden·head"):
            refuse(folders("MiniCPM 3"))


# ---- a checkpoint that is not the model


def quantise(tensors: dict, names: str, block: int = 64) -> dict:
    """Matrices whose name holds `names` in float8, by blocks, with their scales."""
    found = {}
    for name, tensor in tensors.items():
        if names not in name or tensor.dim() != 2:
            found[name] = tensor
            continue
        rows, columns = (-(-size // block) for size in tensor.shape)
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = tensor[i * block : (i + 1) * block, j * block : (j + 1) * block]
                scale[i, j] = part.abs().max() / 448
                part /= scale[i, j]
        found[name], found[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), scale
    return found


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64], "fmt": "e4m3"}


@pytest.mark.e2e
@pytest.mark.numeric
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3-MoE"])
def test_a_quantised_student_is_trained_and_saved_in_plain_numbers(family, folders, tmp_path):
    # Blocks must divide what they quantise.
    sizes = {"intermediate_size": 128, "head_dim": 64, "moe_intermediate_size": 64}
    student = write(
        tmp_path / "student", family, **{k: v for k, v in sizes.items() if "moe" not in k or "MoE" in family}
    )
    change_tensors(student, lambda tensors: quantise(tensors, "_proj.weight"))
    rewrite(student / "config.json", quantization_config=FP8)
    agrees(tmp_path, student, folders("Qwen3"), optim={"lr": 1e-9})
    saved = tmp_path / "run" / "checkpoints" / "step_1"
    assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {FP32}
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    # The checkpoint is the model: it was trained with hardly a step.
    ids = torch.arange(6, 20)[None]
    own, again = (load_model(str(path), "--student", FP32, CPU)(ids).logits for path in (student, saved))
    assert torch.allclose(own, again, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "hqq"},
        {"quant_method": "nobody knows"},
        {"bits": 4},
    ],
    ids=str,
)
def test_weights_of_other_kinds_of_quantisation_are_refused(config, student):
    rewrite(student / "config.json", quantization_config=config)
    with pytest.raises(UserError, match=r"its weights are quantised \([^\n]+give a folder with unquantised weights$"):
        load(student)


# ---- tensors that the model does not take


def add(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)), "hold model.layers.0.self_attn.q_proj.bias"),
        (add("lm_head.bias", torch.zeros(52)), "hold lm_head.bias"),
        (add("model.layers.2.mlp.up_proj.weight", torch.zeros(96, 64)), "hold model.layers.2.mlp.up_proj.weight"),
        (add("v_head.weight", torch.zeros(1, 64)), "hold v_head.weight"),
        (lambda tensors: quantise(tensors, "q_proj"), "hold model.layers.0.self_attn.q_proj.weight_scale_inv"),
        (
            lambda tensors: {k: v.to(torch.float8_e4m3fn) if "up_proj" in k else v for k, v in tensors.items()},
            "its model.layers.0.mlp.up_proj.weight is of type F8_E4M3",
        ),
        (
            lambda tensors: {k: v.to(torch.int8) if "up_proj" in k else v for k, v in tensors.items()},
            "its model.layers.0.mlp.up_proj.weight is of type I8",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_the_model_does_not_take_is_named_on_every_path(change, said, student):
    change_tensors(student, change)
    for refuse in (load, lambda folder: read_head(str(folder), FP32)):
        with pytest.raises(UserError, match=said):
            refuse(student)


def test_buffers_that_older_versions_saved_are_no_tensors_of_another_model(student):
    change_tensors(student, add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(16)))
    load(student)


# ---- saving


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1},
        {"do_sample": False, "top_k": 5, "eos_token_id": [1, 4]},
        {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "eos_token_id": 1},
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_saved_is_mended_before_anything_is_trained(generation, student, tmp_path):
    (student / "generation_config.json").write_text(json.dumps(generation))
    model, tokens = load(student).model, load_tokenizer(str(student), "--student")
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "before")
    (note,) = make_savable(model, tokens, str(student), "--student")
    assert "its generation_config.json cannot be saved as it is" in note and "\n" not in note
    model.save_pretrained(tmp_path / "after")
    again = json.loads((tmp_path / "after" / "generation_config.json").read_text())
    assert again["eos_token_id"] == generation["eos_token_id"]
    assert make_savable(model, tokens, str(student), "--student") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"num_return_sequences": 3, "eos_token_id": 1}', "num_return_sequences"),
        ('{"max_new_tokens": 0}', "max_new_tokens"),
        ("{", "not a valid JSON file"),
        ("[]", "mapping"),
    ],
)
def test_a_generation_config_that_cannot_even_be_read_is_said(student, text, says):
    (student / "generation_config.json").write_text(text)
    for act in (load, lambda folder: load_tokenizer(str(folder), "--student")):
        with pytest.raises(UserError, match=rf"its generation_config.json cannot be read \([^\n]*{says}[^\n]*\); fix "):
            act(student)


@pytest.mark.parametrize(
    "settings", [{"quantization_config": []}, {"quantization_config": "fp8"}, {"dtype": "float7"}, None], ids=str
)
def test_a_config_that_cannot_be_read_is_not_taken_for_the_tokenizers_fault(student, settings):
    config = student / "config.json"
    config.write_text(json.dumps((settings and {**json.loads(config.read_text()), **settings}) or []))
    with pytest.raises(UserError, match=r"its config.json cannot be read \([^\n]+\); fix that file$"):
        load_tokenizer(str(student), "--student")


def test_what_belongs_to_a_model_is_copied_beside_its_weights(student, tmp_path):
    for name in (
        *("preprocessor_config.json", "processor_config.json", "chat_template.json", "spiece.model", "merges.txt"),
        *("additional_chat_templates/rag.jinja", "own.py"),
    ):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text(name)
    left = (
        *(
            "pytorch_model.bin",
            "model.safetensors.index.json",
            "adapter_model.safetensors",
            "README.md",
            ".hidden.json",
        ),
        *("training_args.bin", "trainer_state.json", "trainer/state.json", "original/params.json"),
    )
    for name in left:
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text(name)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "config.json").write_text("new")
    copy_rest(student, saved)
    assert (saved / "config.json").read_text() == "new"
    assert (saved / "preprocessor_config.json").read_text() == "preprocessor_config.json"
    assert (saved / "additional_chat_templates" / "rag.jinja").exists() and (saved / "spiece.model").exists()
    assert not any((saved / name).exists() for name in left)


@pytest.mark.e2e
def test_a_checkpoint_has_the_files_of_the_students_folder_also_after_a_resume(student, tmp_path):
    (student / "preprocessor_config.json").write_text("{}")
    (student / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "eos_token_id": 1}))
    config = settings(tmp_path, student, student, checkpoint={"every": 1, "keep": 9})
    start(from_json(config))
    (tmp_path / "run" / "DONE").unlink()
    rewrite(tmp_path / "run" / "config.json", steps=2)
    resume(tmp_path / "run")
    for step in (1, 2):
        assert (tmp_path / "run" / "checkpoints" / f"step_{step}" / "preprocessor_config.json").exists()


@pytest.mark.e2e
def test_a_checkpoint_of_merged_weights_has_what_a_model_holds_beside_its_parameters(folders, tmp_path):
    student = write(tmp_path / "student", "Gemma 4 (text)")
    change_tensors(student, lambda tensors: {k: v * 1.5 if "layer_scalar" in k else v for k, v in tensors.items()})
    start(from_json(settings(tmp_path, student, folders("Qwen3", 1), lora={"rank": 2})))
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_1" / "model.safetensors")
    assert saved.keys() == load_file(student / "model.safetensors").keys()
    assert saved["model.layers.1.layer_scalar"] == 1.5


# ---- the head of a served teacher


def test_the_head_of_a_served_teacher_is_the_one_that_vllm_takes(folders, tmp_path):
    tied = write(tmp_path / "tied", "Qwen2.5")
    embeddings = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    # Left over in the file: transformers would take it for the head.
    change_tensors(tied, add("lm_head.weight", torch.ones(52, 64)))
    assert torch.equal(read_head(str(tied), FP32).weight_VD, embeddings)
    untied = folders("Qwen3")
    weight = load_file(untied / "model.safetensors")["lm_head.weight"]
    assert torch.equal(read_head(str(untied), FP32).weight_VD, weight)
    quantised = write(tmp_path / "fp8", "Qwen3", vocab_size=64)
    plain = load_file(quantised / "model.safetensors")["lm_head.weight"]
    change_tensors(quantised, lambda tensors: quantise(tensors, "lm_head"))
    rewrite(quantised / "config.json", quantization_config={**FP8, "modules_to_not_convert": []})
    head = read_head(str(quantised), FP32).weight_VD
    assert float((head - plain).norm() / plain.norm()) < 0.05  # e4m3 has three bits after the point


def test_a_head_in_packed_integers_is_refused(student):
    def packed(tensors):
        del tensors["lm_head.weight"]
        return {
            **tensors,
            "lm_head.qweight": torch.zeros(8, 52, dtype=torch.int32),
            "lm_head.scales": torch.ones(1, 52),
        }

    change_tensors(student, packed)
    with pytest.raises(UserError, match=r"hold no lm_head\.weight"):
        read_head(str(student), FP32)


@pytest.mark.e2e
def test_the_ends_of_every_family_are_read_without_its_layers(folders):
    for family in FAMILIES:
        ends = load_ends(str(folders(family)), "--teacher", FP32)
        assert sum(p.numel() for p in ends.parameters()) < 4 * 52 * 64 + 256 * 64 + 1000, family


# ---- positions


@pytest.mark.parametrize("family", ["Qwen3", "GPT-2"])
@pytest.mark.parametrize("flag", ["--rollout.max_new_tokens", "--eval.max_new_tokens"])
def test_more_tokens_than_a_model_has_positions_are_refused(family, flag, tmp_path):
    name = "n_positions" if family == "GPT-2" else "max_position_embeddings"
    folder = write(tmp_path / "model", family, **{name: 32})
    spans = (Span(4, 28), Span(5, 60, flag))
    said = rf"^{flag} 60 and a prompt of 5 tokens exceed the 32 positions of --teacher {folder}; give at most 27$"
    with pytest.raises(UserError, match=said):
        load_scorer(str(folder), "--teacher", FP32, CPU, reach=Reach(spans))
    with pytest.raises(UserError, match=said):
        read_head(str(folder), FP32, reach=Reach(spans))
    load_scorer(str(folder), "--teacher", FP32, CPU, reach=Reach(spans[:1]))


def test_rope_scaling_stretches_the_positions(folders):
    config = load_model(str(folders("Qwen3")), "--student", FP32, CPU).config
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    check_positions(config, (Span(24, 1000),), "M")
    with pytest.raises(UserError, match="exceed the 1024 positions of M"):
        check_positions(config, (Span(25, 1000),), "M")


# ---- sequences beside each other


def longrope(folder: Path, seed: int, long_factor=(1.0, 2.0, 8.0, 30.0)) -> Path:
    """A Phi-3 whose rotary frequencies are others from 33 tokens on."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": list(long_factor), "rope_theta": 1e4}
    small = {"hidden_size": 16, "head_dim": 8, "original_max_position_embeddings": 32, "rope_parameters": rope}
    return write(folder, "Phi-3", seed, **small)


@pytest.mark.e2e
@pytest.mark.numeric
def test_a_model_that_changes_with_its_sequences_length_gets_them_one_by_one(tmp_path):
    student, teacher = longrope(tmp_path / "student", 0), longrope(tmp_path / "teacher", 1)
    agrees(tmp_path, student, teacher, new_tokens=40)


def test_answers_are_sampled_from_what_the_model_says_of_the_whole_sequence(tmp_path):
    folder = longrope(tmp_path / "student", 0)
    model = load(folder).model
    assert length_switches(model, 33) == {32} and length_switches(model, 32) == set()
    prompts = [Prompt(str(n), "", list(range(5, 5 + n)), None) for n in (20, 28, 32, 35)]
    sampler = HFRollout(model, tokenizer(), 4, vocab_size=TOKENIZER_IDS, switches=length_switches(model, 60))
    for rollout in sampler.generate(prompts, 1, Sampling(temperature=0.0, max_new_tokens=16), seed=0):
        for place in range(len(rollout.response_ids)):
            ids = torch.tensor([rollout.prompt.ids + rollout.response_ids[:place]])
            logits = model(ids, use_cache=False).logits[0, -1, :TOKENIZER_IDS]
            assert int(logits.argmax()) == rollout.response_ids[place]


def test_the_layout_is_measured_on_both_sides_of_every_switch_that_a_run_can_reach(tmp_path):
    student = longrope(tmp_path / "student", 0)
    assert load(student, reach=Reach((Span(16, 16),), 64)).layout == "padded"  # never past 32 tokens
    assert load(student, reach=Reach((Span(16, 40),), 64)).layout == "alone"
    with pytest.raises(UserError, match=r"packed into one row see each other \(lengths of 48, 40, 32, 5 tokens\)"):
        load(student, reach=Reach((Span(16, 40),), 64), packed=True)


def test_a_model_that_remembers_the_longest_sequence_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
    student = write(tmp_path / "student", "Llama 3", max_position_embeddings=32, rope_parameters=rope)
    load(student, reach=Reach((Span(16, 16),)))
    with pytest.raises(UserError, match="depend on the longest sequence that the model has seen"):
        load(student, reach=Reach((Span(16, 40),)))


@pytest.mark.parametrize("family", ["Mistral", "Gemma 3 (text)", "Llama 4 (text)"])
def test_windows_and_chunks_are_passed_by_the_probe(family, folders, tmp_path):
    chunks = family == "Llama 4 (text)"
    folder = write(tmp_path / "model", family, attention_chunk_size=16) if chunks else folders(family)
    reach = Reach((Span(8, 24),), 128)
    assert load(folder, reach=reach).layout == "padded"
    if not chunks:
        assert load(folder, reach=reach, packed=True).layout == "packed"
        return
    # Chunks of a packed row begin where they would in a single sequence; that shows only past the first one.
    load(folder, reach=Reach((Span(2, 3),), 15), packed=True)
    for far in (reach, Reach((Span(2, 3),), 128)):
        with pytest.raises(UserError, match="packed into one row see each other"):
            load(folder, reach=far, packed=True)


# ---- training mode


@pytest.mark.e2e
@pytest.mark.numeric
def test_a_routers_noise_is_off_in_training(tmp_path):
    student = write(tmp_path / "student", "Mixtral", router_jitter_noise=0.1)
    config = settings(tmp_path, student, student)
    for checkpointing in (False, True):
        out = str(tmp_path / f"run{checkpointing}")
        engine = {"device": "cpu", "gradient_checkpointing": checkpointing}
        start(from_json({**config, "out": out, "engine": engine}))
        assert abs(loss(Path(out))) < 1e-6


def test_layers_that_are_to_be_computed_again_still_are_after_answers_were_sampled(student):
    scorer, seen = load(student), []
    scorer.model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer.train()
    scorer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(True))
    sampler = HFRollout(scorer.model, tokenizer(), 4)
    for _ in range(2):
        seen.clear()
        scorer.hidden_alone(torch.arange(5, 15)).sum().backward()
        assert len(seen) == 2  # in the forward pass, and again in backward
        sampler.generate([Prompt("", "", [5, 6], None)], 1, Sampling(max_new_tokens=2), seed=0)


def test_a_model_that_gives_other_values_each_time_is_refused(student, monkeypatch):
    scorer = load(student)
    whole = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: whole(self, x + 0.1 * torch.randn_like(x)))
    with pytest.raises(UserError, match="different hidden states each time"):
        check_steady(scorer, "M")


# ---- names


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_sent_under_the_names_and_in_the_pieces_of_the_folder(family, folders):
    folder = folders(family)
    model = load_model(str(folder), "--student", FP32, CPU)
    check_sampled(model, str(folder), "--student")
    sent = {}
    for name, weight in model.named_parameters():
        sent.update(as_saved(model, name, weight.detach()))
    files = load_file(folder / "model.safetensors")
    # Buffers are not trained: a sampler has them from the folder.
    assert sent.keys() == files.keys() - dict(model.named_buffers()).keys()
    assert all(torch.equal(sent[name], files[name]) for name in sent)


def test_vllm_is_not_given_a_student_that_it_would_read_otherwise(student, tmp_path):
    tied = write(tmp_path / "tied", "Qwen2.5")
    change_tensors(tied, add("lm_head.weight", torch.ones(52, 64)))
    with pytest.raises(UserError, match="ties head and embeddings"):
        check_sampled(load_model(str(tied), "--student", FP32, CPU), str(tied), "--student")
    change_tensors(student, lambda tensors: quantise(tensors, "q_proj"))
    rewrite(student / "config.json", quantization_config=FP8)
    with pytest.raises(UserError, match="quantised"):
        check_sampled(load_model(str(student), "--student", FP32, CPU), str(student), "--student")


# ---- vocabulary


def with_special(folder: Path, special: bool = True) -> Path:
    """The folder's tokenizer with one token more: id 48."""
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens(["<image_soft_token>"], special_tokens=special)
    tokens.save_pretrained(folder)
    return folder


@pytest.mark.e2e
@pytest.mark.numeric
def test_an_id_that_a_model_lacks_and_no_text_has_is_never_sampled_nor_scored(tmp_path):
    student = with_special(write(tmp_path / "student", "Qwen3"))  # 52 rows: it could sample 48
    teacher = with_special(write(tmp_path / "teacher", "Qwen3", 1, vocab_size=TOKENIZER_IDS))
    agrees(tmp_path, student, teacher, new_tokens=30)


def test_a_token_that_a_text_holds_needs_a_row(tmp_path):
    tokens = AutoTokenizer.from_pretrained(with_special(write(tmp_path / "a", "Qwen3")))
    assert usable_rows(tokens, 48, "--student") == 48 and usable_rows(tokens, 52, "--student") == 49
    with pytest.raises(UserError, match=r"has 47 vocabulary rows, its tokenizer 49 \(';' has id 47\)"):
        usable_rows(tokens, 47, "--student")
    written = AutoTokenizer.from_pretrained(with_special(write(tmp_path / "b", "Qwen3"), special=False))
    with pytest.raises(UserError, match="image_soft_token"):
        usable_rows(written, 48, "--student")


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused(tmp_path):
    student = with_special(write(tmp_path / "student", "Qwen3", vocab_size=TOKENIZER_IDS))
    config = settings(tmp_path, student, student)
    Path(config["prompts"]).write_text(json.dumps({"prompt": "1<image_soft_token>"}) + "\n")
    with pytest.raises(UserError, match="holds token 48, the models know 0 to 47"):
        start(from_json(config))


# ---- one line


def test_an_adapter_beside_the_model_is_said(student):
    (student / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--student [^\n]+ holds an adapter next to the model[^\n]+$"):
        load(student)


def test_a_model_that_does_not_run_is_said_in_a_line(student, monkeypatch):
    def forward(*_, **__):
        raise KeyError("mask\nmore")

    monkeypatch.setattr(Qwen3Model, "forward", forward)
    with pytest.raises(UserError, match=r"^--student [^\n]+: the model cannot be run \([^\n]+$"):
        load(student)


# ---- adapters


def test_it_is_said_how_much_of_a_student_adapters_leave_out(folders, tmp_path):
    for family, said in (("Qwen3", "every matrix of the student's layers"), ("Qwen3-MoE", "such as .*experts")):
        folder = folders(family)
        config = from_json(settings(tmp_path, folder, folder, lora={"rank": 2}))
        student = load_student(config, str(folder), CPU)
        (note,) = check_student(config, student, tokenizer(), str(folder))
        assert re.search(said, note), note

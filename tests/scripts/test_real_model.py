"""A real tokenizer, real prompts and a real pair: SmolLM2-135M-Instruct teaches its own every second layer."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd import __main__ as cli
from opsd.data.packing import pack
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.rollout import HFRollout
from opsd.types import Sampling
from opsd.utils.errors import UserError
from smollm2 import thin

pytestmark = pytest.mark.e2e

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def tokenizer(thin_smollm2):
    return AutoTokenizer.from_pretrained(thin_smollm2.folder)


@pytest.fixture(scope="module")
def data(math_files, tmp_path_factory):
    """DATA_DIR, as the script makes it from the real files."""
    import prepare_data

    out = tmp_path_factory.mktemp("data")
    sets = tuple(f"{name}={math_files[name]}" for name in ("dapo", "math500"))
    options = prepare_data.Options(out=out, sets=sets, decontaminate=True)
    prepare_data.write(prepare_data.contents(prepare_data.prepare(options), options))
    return out


def first_lines(path, count, to):
    to.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return to


# ---- the chat template


def test_a_prompt_is_what_the_model_s_own_template_makes_of_it(tokenizer, data, tmp_path):
    path = first_lines(data / "math500.jsonl", 20, tmp_path / "some.jsonl")
    prompts, _ = load_prompts(path, tokenizer, PromptFormat())
    assert len(prompts) == 20
    for prompt, line in zip(prompts, path.read_text().splitlines(), strict=True):
        text = json.loads(line)["prompt"]
        whole = f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt.ids == tokenizer(whole, add_special_tokens=False).input_ids
        assert prompt.text == text


def test_overlong_prompts_are_dropped_and_counted_and_never_cut(tokenizer, data, tmp_path):
    path, limit = first_lines(data / "dapo_train.jsonl", 300, tmp_path / "some.jsonl"), 150
    everything, none = load_prompts(path, tokenizer, PromptFormat())
    too_long = [prompt for prompt in everything if len(prompt.ids) > limit]
    assert none == 0 and 30 < len(too_long) < 270
    kept, dropped = load_prompts(path, tokenizer, PromptFormat(max_tokens=limit, overlong="drop"))
    assert dropped == len(too_long)
    assert kept == [prompt for prompt in everything if len(prompt.ids) <= limit]
    assert all(f"user\n{prompt.text}<|im_end|>" in tokenizer.decode(prompt.ids) for prompt in kept)
    with pytest.raises(UserError, match=rf"record \d+ has \d+ tokens, over --rollout.max_prompt_tokens {limit}"):
        load_prompts(path, tokenizer, PromptFormat(max_tokens=limit))


def test_thinking_that_the_template_does_not_know_is_refused(tokenizer, data, tmp_path):
    path = first_lines(data / "math500.jsonl", 1, tmp_path / "some.jsonl")
    with pytest.raises(UserError, match=r"^--thinking on: the chat template has no thinking mode"):
        load_prompts(path, tokenizer, PromptFormat(thinking="on"))


def test_ids_are_passed_on_and_no_text_is_tokenised_again(thin_smollm2, tokenizer, data, tmp_path, monkeypatch):
    prompts, _ = load_prompts(
        first_lines(data / "math500.jsonl", 3, tmp_path / "some.jsonl"), tokenizer, PromptFormat()
    )
    model = AutoModelForCausalLM.from_pretrained(thin_smollm2.folder, dtype=torch.float32)

    def refuse(*_args, **_options):
        raise AssertionError("text was tokenised")

    for name in ("__call__", "encode", "_encode_plus", "apply_chat_template"):
        monkeypatch.setattr(type(tokenizer), name, refuse)
    with pytest.raises(AssertionError):
        tokenizer("x")
    rollouts = HFRollout(model, tokenizer, 6).generate(prompts, 2, Sampling(max_new_tokens=12), seed=0)
    rows = [row for micro in pack(rollouts, 4096) for row in micro.input_ids_1L[0].tolist()]
    # a rollout's last token predicts nothing and may be left out of the row
    for rollout in rollouts:
        whole = [*rollout.prompt.ids, *rollout.response_ids]
        assert any(rows[at : at + len(whole) - 1] == whole[:-1] for at in range(len(rows)))


# ---- a pair


@pytest.fixture(scope="module")
def student(smollm2, tmp_path_factory) -> Path:
    """The teacher's embedding, head and every second of its 30 layers."""
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    thin(model, 2)
    folder = tmp_path_factory.mktemp("student")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2.folder).save_pretrained(folder)
    return folder


def opsd(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["opsd", *map(str, words)])
    cli.main()


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: value for name, value in line.items() if not name.startswith(("time/", "mem/"))}
        for line in lines
    }


@pytest.mark.slow
def test_three_steps_an_evaluation_a_checkpoint_that_loads_and_one_more_step(
    smollm2, student, data, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    opsd(
        monkeypatch, "train", "--student", student, "--teacher", smollm2.folder, "--prompts", data / "dapo_train.jsonl",
        "--out", run, "--steps", 4, "--prompts_per_step", 4, "--rollout.samples_per_prompt", 1,
        "--rollout.max_new_tokens", 32, "--rollout.max_prompt_tokens", 160, "--rollout.overlong_prompts", "drop",
        "--select.by", "soft_or", "--select.retention", 0.5, "--select.normalise_over", "batch", "--optim.lr", 1e-4,
        "--optim.schedule", "constant", "--engine.micro_batch_tokens", 1024, "--telemetry.every", 1,
        "--checkpoint.every", 1, "--checkpoint.keep", 9, "--track.progress", False,
    )  # fmt: skip
    whole = metrics_of(run)
    assert list(whole) == [1, 2, 3, 4]
    for line in whole.values():
        assert math.isfinite(line["loss/nats"]) and line["loss/nats"] > 0 and line["optim/grad_norm"] > 0
        # ⌊0.5 m⌋ of each of 4 rollouts: at most half a token per rollout is lost
        assert 0.5 - 2 / line["rollout/tokens"] <= line["select/kept_frac"] <= 0.5
        assert sum(line[f"quadrant/q{n}_frac"] for n in range(1, 5)) == pytest.approx(1)
    # 15 layers taken out leave a student far from its teacher; a rate of 1e-4 brings it nearer at once.
    assert whole[4]["student/reverse_kl_nats"] < whole[1]["student/reverse_kl_nats"]

    # As a kill in step 4 leaves it: the checkpoint of step 3 is the newest.
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints" / "step_4")
    third = run / "checkpoints" / "step_3"

    loaded, loading = AutoModelForCausalLM.from_pretrained(third, output_loading_info=True, use_safetensors=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = AutoModelForCausalLM.from_pretrained(student)
    moved = [
        name
        for (name, new), old in zip(loaded.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(moved) == len(list(before.parameters()))
    words = AutoTokenizer.from_pretrained(third)("The sum of 2 and 3 is", return_tensors="pt")
    assert loaded.generate(**words, max_new_tokens=3, do_sample=False).shape[1] > words.input_ids.shape[1]

    scores = tmp_path / "scores.json"
    opsd(
        monkeypatch, "eval", "--model", third, "--suite", f"math500={data / 'math500.jsonl'}", "--limit", 8,
        "--samples", 2, "--max_new_tokens", 64, "--out", scores, "--progress", False,
    )  # fmt: skip
    suite = json.loads(scores.read_text())["suites"]["math500"]
    assert (suite["problems"], suite["k"], len(suite["scores"])) == (8, 2, 8)
    assert 0 <= suite["mean@k"] <= suite["best@k"] <= 1 and 0 < suite["mean_tokens"] <= 64

    opsd(monkeypatch, "train", "--resume", run)
    assert (run / "DONE").exists() and (run / "checkpoints" / "step_4" / "config.json").exists()
    assert metrics_of(run) == whole

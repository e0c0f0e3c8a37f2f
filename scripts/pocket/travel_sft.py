"""Tokenizer and supervised training of the two pocket planners.

Fixed here where the experiment's description is silent: loss on the model's words alone, fresh tasks in every batch,
batch 32, AdamW without weight decay, 50 steps of warm-up, cosine to zero, gradients clipped at norm 1.0, fp32. The
student is the teacher of an early step, trained on with the planted habits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opsd.environments.travel import TravelTask, pocket_tasks
from opsd.environments.travel.words import CONSTRAINTS, END_CALL, VALUES, vocabulary
from opsd.utils.seeding import derive_seed
from pocket.travel_task import STUDENT as STUDENT_HABITS
from pocket.travel_task import TEACHER as TEACHER_HABITS
from pocket.travel_task import Habits, write_episode

EOS, PAD = "<eos>", "<pad>"
BATCH = 32
WARMUP_STEPS = 50
MAX_GRAD_NORM = 1.0
NO_LOSS = -100
CONTEXT_TOKENS = 192


@dataclass(frozen=True)
class Recipe:
    """One model's training. steps: length of the cosine; stop: step after which training ends."""

    name: str
    habits: Habits
    steps: int
    stop: int
    peak_lr: float


TEACHER = Recipe("teacher", TEACHER_HABITS, steps=4000, stop=1500, peak_lr=3e-3)
STUDENT = Recipe("student", STUDENT_HABITS, steps=150, stop=75, peak_lr=1e-3)
STUDENT_FROM_STEP = 1000
"""The teacher's step that the student starts from: it plans by then, not yet well."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, words stand between blanks. An unknown word is an error."""
    words = {word: place for place, word in enumerate([*vocabulary(), EOS, PAD])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: Any, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of 456 thousand parameters; its folder says that a turn ends behind </call> too.

    Value words start as type + rank · direction + noise, so that comparing them need not be learnt word by word.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(derive_seed(seed, "planning", "weights"))
    model = Qwen3ForCausalLM(config)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_CALL)]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    embeddings: Any = model.get_input_embeddings()
    rows_VD: torch.Tensor = embeddings.weight.data
    direction_D = torch.randn(rows_VD.shape[1]) * 0.02
    for kind in CONSTRAINTS.values():
        type_D = torch.randn(rows_VD.shape[1]) * 0.02
        for value in range(1, VALUES + 1):
            rank = (value - (VALUES + 1) / 2) / (VALUES / 2)
            noise_D = torch.randn(rows_VD.shape[1]) * 0.005
            rows_VD[tokenizer.convert_tokens_to_ids(f"{kind}{value}")] = type_D + rank * direction_D + noise_D
    return model


def make_batch(
    tasks: list[TravelTask], habits: Habits, rng: Random, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, L], labels [B, L] (NO_LOSS wherever nothing is taught) and attention mask [B, L]."""
    rows = []
    for task in tasks:
        episode = write_episode(task, rng, habits)
        query = tokenizer.convert_tokens_to_ids(task.query.split())
        ids = [*query, *tokenizer.convert_tokens_to_ids(episode.words), tokenizer.eos_token_id]
        rows.append((ids, [False] * len(query) + episode.taught + [True]))
    width = max(len(ids) for ids, _ in rows)
    ids_BL = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    taught_BL = torch.tensor([taught + [False] * (width - len(taught)) for _, taught in rows])
    mask_BL = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids_BL, ids_BL.masked_fill(~taught_BL, NO_LOSS), mask_BL


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rate of 1-based `step`: linear warm-up, then a cosine that reaches zero behind the last of `steps`."""
    if step <= WARMUP_STEPS:
        return recipe.peak_lr * step / WARMUP_STEPS
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (recipe.steps - WARMUP_STEPS)))


def train(model: Qwen3ForCausalLM, recipe: Recipe, tokenizer: Any, seed: int) -> Iterator[float]:
    """Train in place; yields each step's loss (nats per taught word). Its tasks are never those of an evaluation."""
    rng = Random(derive_seed(seed, "planning", recipe.name, "hand"))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model.train()
    for step in range(1, recipe.stop + 1):
        tasks = pocket_tasks(BATCH, derive_seed(seed, recipe.name, step), "sft")
        ids_BL, labels_BL, mask_BL = make_batch(tasks, recipe.habits, rng, tokenizer)
        logits_BLV = model(input_ids=ids_BL[:, :-1], attention_mask=mask_BL[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=NO_LOSS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        optimizer.step()
        yield loss.item()
    model.eval()

"""A lower bound on a step's time on this machine: its matrix products at the best rate that any of them reaches."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from opsd.estimate.rates import product_rate, read_rate


@dataclass(frozen=True)
class Shape:
    """A model's weights: those of its linear layers, and its head [V, D]."""

    linear: int
    vocab: int
    width: int
    layers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rates:
    """Of one thread, per second of processor time: GFLOP of a matrix product, GB read from memory."""

    gflop_s: float
    gb_s: float


def shape_of(folder: str) -> Shape:
    """The shape, from a model folder's config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    vocab, width = model.get_output_embeddings().weight.shape
    head = model.get_output_embeddings()
    linear = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    layers = tuple(sorted({(rows, columns) for rows, columns in linear}))
    return Shape(sum(rows * columns for rows, columns in linear), vocab, width, layers)


def measure(student: Shape, tokens: int, seconds: float) -> Rates:
    """The best product rate at the student's shapes, and the memory read rate; each is measured for `seconds`."""
    shapes = (*student.layers, (student.vocab, student.width))
    return Rates(product_rate(shapes, tokens, seconds, time.process_time), read_rate(seconds, time.process_time))


def floor(student: Shape, teacher: Shape, prompt_tokens: int, rows: int, new_tokens: int, rates: Rates) -> dict:
    """Processor seconds by part. prompt_tokens: of all rows together.

    rollout: prompts at the product rate, then for each token the longer of computing its products and of reading the
    weights once. Attention, norms, softmaxes and optimiser are not counted.
    """
    flop, trained = 1e9 * rates.gflop_s, rows * new_tokens
    read_tokens = prompt_tokens + rows * (new_tokens - 1)
    weights = student.linear + student.vocab * student.width
    step_s = max(2 * rows * weights / flop, 4 * weights / (1e9 * rates.gb_s))
    return {
        "rollout": 2 * prompt_tokens * student.linear / flop + new_tokens * step_s,
        "teacher": 2 * read_tokens * teacher.linear / flop,
        "student": 6 * read_tokens * student.linear / flop,
        # Projections of both models, and both of the student's gradients.
        "loss": 2 * trained * (3 * student.vocab * student.width + teacher.vocab * teacher.width) / flop,
    }

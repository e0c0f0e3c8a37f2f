"""Model shapes: built-in ones for the paper's pairs, and any folder's from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.config.settings import MOST
from opsd.utils.errors import DAMAGED, UserError, said

# Families whose layers are known here; another one's parameters or activations could be anything.
FAMILIES = ("qwen3", "qwen2", "llama")


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions. tied: head and embedding are one matrix. positions: the longest sequence that
    the model was made for, in tokens; None if it is not known. family: decides biases and per-head norms."""

    name: str
    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool
    positions: int | None = field(default=None, compare=False)

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return self.family == "qwen3"

    @property
    def layer_matrices(self) -> int:
        """Parameters of one layer's linear projections, without biases."""
        attention = self.hidden * (2 * self.query_width + 2 * self.kv_width)
        return attention + 3 * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> int:
        gains = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = self.query_width + 2 * self.kv_width if self.family == "qwen2" else 0
        return self.layer_matrices + gains + biases

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        ends = self.head_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + ends

    @property
    def largest_matrix(self) -> int:
        """Parameters of the largest single tensor."""
        return max(self.head_parameters, self.hidden * self.ffn)

    def kv_bytes(self, itemsize: int) -> int:
        """Key-value cache of one token over all layers."""
        return 2 * self.layers * self.kv_width * itemsize


# From the models' config.json. vocab, hidden, layers, heads, kv_heads, head_dim, ffn, tied.
BUILT_IN = {
    row[0]: ModelShape(*row)
    for row in (
        ("qwen3-1.7b", "qwen3", 151_936, 2048, 28, 16, 8, 128, 6144, True),
        ("qwen3-4b", "qwen3", 151_936, 2560, 36, 32, 8, 128, 9728, True),
        ("qwen3-8b", "qwen3", 151_936, 4096, 36, 32, 8, 128, 12_288, False),
        ("qwen3-14b", "qwen3", 151_936, 5120, 40, 40, 8, 128, 17_408, False),
        ("qwen3-32b", "qwen3", 151_936, 5120, 64, 64, 8, 128, 25_600, False),
        ("qwen2.5-1.5b", "qwen2", 151_936, 1536, 28, 12, 2, 128, 8960, True),
        ("qwen2.5-14b", "qwen2", 152_064, 5120, 48, 40, 8, 128, 13_824, False),
        ("llama-3.1-8b", "llama", 128_256, 4096, 32, 32, 8, 128, 14_336, False),
        ("llama-3.3-70b", "llama", 128_256, 8192, 80, 64, 8, 128, 28_672, False),
    )
}


def find_shape(name: str, flag: str) -> ModelShape:
    """A folder's shape from its config.json, else a built-in one by its short or hub name, ignoring case.

    Raises UserError if there is neither, or if the family is not one of FAMILIES.
    """
    folder = Path(name)
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"{flag} {name}: no config.json there; give a model folder or one of {', '.join(BUILT_IN)}")
        with said(f"{flag} {name}: its config.json lacks a size", "give a complete model folder", *DAMAGED):
            return shape_of(json.loads(file.read_text()), name, flag)
    short = name.lower().rsplit("/", 1)[-1].removesuffix("-instruct").removeprefix("meta-")
    if short in BUILT_IN:
        return BUILT_IN[short]
    raise UserError(f"{flag} {name}: no such folder and no built-in shape; give one of {', '.join(BUILT_IN)}")


def shape_of(config: dict[str, Any], name: str, flag: str) -> ModelShape:
    """The shape that a config.json describes.

    Raises UserError for an unknown family, KeyError for a missing size, ValueError for one that is not a count.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise UserError(
            f"{flag} {name}: models of type {family!r} cannot be planned; supported are {', '.join(FAMILIES)}"
        )
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    return ModelShape(
        name=name,
        family=family,
        vocab=_size(config, "vocab_size"),
        hidden=hidden,
        layers=_size(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads"),
        head_dim=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim"),
        ffn=_size(config, "intermediate_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        positions=_positions(config),
    )


def _positions(config: dict[str, Any]) -> int | None:
    """Like `opsd.model.positions.positions`: more, if rotary positions are scaled."""
    known = config.get("max_position_embeddings")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    original, factor = scaling.get("original_max_position_embeddings") or known, scaling.get("factor")
    stretched = [int(original * factor)] if original and isinstance(factor, int | float) else []
    return max([known, *stretched]) if type(known) is int and known > 0 else None


def _size(config: dict[str, Any], key: str) -> int:
    size = config[key]
    if type(size) is not int or not 0 < size <= MOST:
        raise ValueError(f"{key} is {size!r}"[:80])
    return size

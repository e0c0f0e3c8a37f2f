"""LoRA: low-rank adapters (peft) on a frozen student, and the plain model that results from merging them.

Legend: W a layer's frozen weight [out, in], A [rank, in] and B [out, rank] its adapter. The plain model, the one that
checkpoints hold and samplers get, has W + scale·B·A in W's place. It is always computed separately: adapters are never
merged into W and taken out again, so nothing drifts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opsd.config import LoraConfig
from opsd.model.scorer import Scorer
from opsd.utils.errors import DAMAGED, UserError, said
from opsd.utils.seeding import derive_seed, seeded

ALL_LINEAR = "all-linear"
ADAPTER_FOLDER = "adapter"
# peft's names: the adapter's own, and the parts that peft adds within and in front of tensor names.
_ADAPTER, _BASE, _PREFIX = "default", ".base_layer.", "base_model.model."
_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class PlainWeight:
    """A parameter of the plain model: `weight` alone, or with its adapter."""

    name: str
    weight: nn.Parameter
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scale: float = 0.0

    @torch.no_grad()
    def formed(self, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        """W + scale·B·A in fp32, from the three whole tensors; the weight itself if there is no adapter."""
        if a is None or b is None:
            return weight
        here = weight.device
        return torch.addmm(weight.float(), b.to(here, torch.float32), a.to(here, torch.float32), alpha=self.scale)


def add_adapters(model: PreTrainedModel, lora: LoraConfig, seed: int, base: str) -> None:
    """Freeze `model` and put adapters on its linear layers, in place; B is 0, so its outputs do not change.

    seed: the run's; A is drawn from it. base: the folder that `model` came from, for adapter_config.json.
    Raises UserError for layers that do not exist, or are not linear.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    config = PeftConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyrefly: ignore[bad-argument-type] (any number does)
        lora_dropout=0.0,
        use_rslora=lora.use_rslora,
        target_modules=_targets(model, lora.target_modules),
    )
    with seeded(derive_seed(seed, "lora"), model.device):
        inject_adapter_in_model(config, model, _ADAPTER)


def coverage(model: nn.Module) -> str:
    """How much of the model's layers the adapters cover, and the largest parameter without one, in one line.

    Embeddings and head are not counted: they get no adapters by design.
    """
    ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}  # pyrefly: ignore
    layers = {name: p for name, p in model.named_parameters() if ".lora_" not in name and id(p) not in ends}
    bare = {name: p.numel() for name, p in layers.items() if not name.endswith(f"{_BASE}weight") and p.dim() >= 2}
    every = sum(p.numel() for p in layers.values())
    if not bare:
        return f"adapters cover every matrix of the student's layers ({every:,} weights)"
    largest = max(bare, key=lambda name: bare[name])
    return (
        f"adapters cover {1 - sum(bare.values()) / every:.0%} of the weights in the student's layers; matrices "
        f"without an adapter stay frozen, such as {largest}"
    )


def coverage_of(path: str, lora: LoraConfig, trust: bool = False) -> str:
    """`coverage` for a model folder, without loading its weights. trust: as for `load_model`."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    add_adapters(Scorer(model).model, lora, 0, path)
    return coverage(model)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters from `add_adapters`."""
    return hasattr(model, "peft_config")


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context in which the adapters are off: the model is its base."""
    scalings: list[dict[str, float]] = [part.scaling for part in model.modules() if hasattr(part, "lora_B")]  # pyrefly: ignore
    own = [scaling[_ADAPTER] for scaling in scalings]
    for scaling in scalings:
        scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for scaling, value in zip(scalings, own, strict=True):
            scaling[_ADAPTER] = value


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def hold_frozen_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Convert frozen weights to the compute type: they get no updates that rounding could lose."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def plain_weights(model: nn.Module, remove_duplicate: bool = True) -> Iterator[PlainWeight]:
    """Every parameter of the plain model, under the plain model's name.

    remove_duplicate: whether a tied weight comes once, or under each of its names.
    """
    for name, weight in model.named_parameters(remove_duplicate=remove_duplicate):
        if ".lora_" in name:
            continue
        plain_name = name.replace(_BASE, ".")
        if not name.endswith(f"{_BASE}weight"):
            yield PlainWeight(plain_name, weight)
            continue
        layer: Any = model.get_submodule(name.removesuffix(f"{_BASE}weight"))
        a, b = (getattr(layer, part)[_ADAPTER].weight for part in ("lora_A", "lora_B"))
        yield PlainWeight(plain_name, weight, a, b, layer.scaling[_ADAPTER])


def save_adapters(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write adapters as peft does; `PeftModel.from_pretrained(base, folder)` loads them.

    tensors: their whole values under the names that `trained` gives.
    """
    folder.mkdir()
    known: Any = model.peft_config
    config = copy.copy(known[_ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file({_saved_name(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / _FILE)


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Load adapters that `save_adapters` wrote, bit for bit. Raises UserError if they cannot be read."""
    give = f"its {folder.name} is damaged, remove it to resume from the one before"
    with said(f"checkpoint {folder.parent} cannot be read", give, SafetensorError, *DAMAGED):
        tensors = load_file(folder / _FILE)
        for name, parameter in trained(model).items():
            if tensors[_saved_name(name)].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
            parameter.copy_(tensors[_saved_name(name)])


def _targets(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Last names of the layers that get an adapter. The head is not among them: it is a `DistillHead`."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if not known:
        raise UserError("--lora.rank: the student has no linear layers (torch.nn.Linear); train all weights (rank 0)")
    if names == (ALL_LINEAR,):
        return known
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in layers):
            raise UserError(
                f"--lora.target_modules {wanted}: no such linear layer; give {ALL_LINEAR}, or some of {known}"
            )
    return list(names)


def _saved_name(name: str) -> str:
    return _PREFIX + name.replace(f".{_ADAPTER}.", ".")

"""Checks of a folder's weights: they match the model's one to one, and are plain numbers (not quantised)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.quantizers import AutoQuantizationConfig

from opsd.utils.errors import UserError

# Keys in the configuration of a model with quantised weights.
QUANTISED = ("quantization_config", "compression_config")
# Types of plain weights, as safetensors names them.
PLAIN = ("F64", "F32", "F16", "BF16")
# Buffers of older versions that nothing reads any more.
LEFT_OVER = (".rotary_emb.inv_freq", ".masked_bias")


def dequantised(config: PretrainedConfig, name: str) -> bool:
    """Whether a folder's weights are quantised; if so, `config` is set to load them dequantised.

    Raises UserError for a kind that transformers cannot dequantise while it loads the weights.
    """
    found = {key for part in (config, config.get_text_config()) for key in vars(part) if key in QUANTISED}
    settings = getattr(config, "quantization_config", None)
    if not found:
        return False
    try:
        known: Any = AutoQuantizationConfig.from_dict(dict(settings or {}))
    except Exception:  # a kind that transformers does not know, or whose library is not installed
        known = None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if found != {"quantization_config"} or not hasattr(known, "dequantize"):
        raise UserError(
            f"{name}: its weights are quantised ({method or min(found)}), which cannot be dequantised "
            "here; give a folder with unquantised weights"
        )
    config.quantization_config = {**dict(settings or {}), "dequantize": True}
    return True


def check_tensors(loading: dict[str, Any], path: str, flag: str, ours: Callable[[str], bool] = lambda _: True) -> None:
    """Make sure that a folder's weights match the model's one to one. Raises UserError.

    loading: transformers' report on loading it. ours: whether a weight that the model did not use is an error.
    """
    lacking = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if lacking:
        raise UserError(
            f"{flag} {path}: its weights hold no {min(lacking)} of the shape in config.json; "
            "give a complete Hugging Face model folder"
        )
    foreign = [key for key in loading["unexpected_keys"] if ours(key) and not key.endswith(LEFT_OVER)]
    if foreign or loading.get("error_msgs"):
        what = f"hold {min(foreign)}, which is not in" if foreign else f"({loading['error_msgs'][0]}) do not fit"
        raise UserError(
            f"{flag} {path}: its weights {what} the model of its config.json; give weights and config.json of one model"
        )


def check_types(path: str, flag: str) -> None:
    """Raises UserError for weights of a quantised type, which transformers would take for plain numbers."""
    folder = Path(path)
    index = json_object(folder / "model.safetensors.index.json").get("weight_map")
    single = folder / "model.safetensors"
    for file in [single] if single.is_file() else sorted({folder / str(name) for name in (index or {}).values()}):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                kind = tensors.get_slice(name).get_dtype()
                if kind not in PLAIN and (name.endswith((".weight", ".bias")) or kind.startswith("F")):
                    raise UserError(
                        f"{flag} {path}: its {name} is of type {kind}, and config.json does not say how it is "
                        "quantised; give a folder with unquantised weights"
                    )


def check_shards(path: str, flag: str) -> None:
    """Raises UserError for an index that names files other than safetensors, which transformers would load."""
    shards = json_object(Path(path) / "model.safetensors.index.json").get("weight_map")
    names = [str(name) for name in shards.values()] if isinstance(shards, dict) else []
    others = [name for name in names if not name.endswith(".safetensors")]
    if others:
        raise UserError(
            f"{flag} {path}: its model.safetensors.index.json names {min(others)}, which was not loaded; "
            "give a complete Hugging Face model folder, in safetensors"
        )


def json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is none: missing or damaged files are reported when they are loaded."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}

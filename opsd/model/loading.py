"""Model folders to tokenizers and models: safetensors only, whole, without code of their own unless it is trusted."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opsd.model.attention import attention_for
from opsd.model.checks import check_packing, check_plain_head
from opsd.model.scorer import Scorer
from opsd.utils.errors import UserError, first_line
from opsd.utils.oom import is_out_of_memory
from opsd.utils.paths import check_model_path


def load_tokenizer(path: str, flag: str, trust: bool = False) -> Any:
    """The tokenizer of a model folder. flag: the option that named it, for the error message.

    trust: the folder may bring code of its own, which then runs (--trust_remote_code).
    """
    check_folder(path, flag, trust)
    give = "give a folder that holds one"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # whatever a damaged folder makes transformers raise
        raise _unloadable(error, f"{flag} {path}: its tokenizer cannot be loaded", give) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        # What transformers makes of a folder without a tokenizer's files: special tokens alone.
        raise UserError(f"{flag} {path}: its tokenizer cannot be loaded (it has no token but special ones); {give}")
    return tokenizer


def load_scorer(
    path: str,
    flag: str,
    dtype: torch.dtype,
    device: torch.device,
    trust: bool = False,
    packed: bool = False,
    compute: torch.dtype | None = None,
) -> Scorer:
    """A model folder as a `Scorer`, dropout off, safetensors only. Raises UserError where it cannot serve.

    dtype: the weights'. compute: what the run takes products in, under autocast where it is another; None: dtype.
    """
    model = load_model(path, flag, dtype, device, trust, compute)
    disable_dropout(model)
    autocast = compute not in (None, dtype)
    with torch.autocast(device.type, compute) if autocast else contextlib.nullcontext():
        check_plain_head(model, f"{flag} {path}")
        scorer = Scorer(model, packed)
        check_packing(scorer, f"{flag} {path}")
    return scorer


def load_model(
    path: str,
    flag: str,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    trust: bool = False,
    compute: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model folder on `device`, safetensors only. dtype "auto": as the folder's config.json says.

    trust: as for `load_tokenizer`. compute: as for `load_scorer`; attention is chosen by it.
    Raises UserError where it cannot be loaded whole.
    """
    check_folder(path, flag, trust)
    _check_shards(path, flag)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust,
            # Other formats are pickles, which run what they hold.
            use_safetensors=True,
            # Left alone, transformers fills what is missing with random numbers; what does not fit is named below.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a damaged folder makes transformers raise
        what = f"{flag} {path}: the model cannot be loaded"
        raise _unloadable(error, what, "give a whole Hugging Face model folder, in safetensors") from error
    model, loading = loaded
    lacking = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if lacking:
        raise UserError(
            f"{flag} {path}: its weights hold no {min(lacking)} of the shape that config.json says; "
            "give a whole Hugging Face model folder"
        )
    model = model.to(device)
    attention = attention_for(model, compute or model.dtype, device)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    return model


def _unloadable(error: Exception, what: str, give: str) -> Exception:
    """What to raise in place of `error`: itself where memory ran out."""
    return error if is_out_of_memory(error) else UserError(f"{what} ({first_line(error)}); {give}")


def disable_dropout(model: nn.Module) -> None:
    """Scores and gradients must speak of one distribution: no dropout anywhere, in training mode neither."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that modules hand to functional.dropout: dropout, attention_dropout, activation_dropout, layerdrop, …
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def check_folder(path: str, flag: str, trust: bool = False) -> None:
    """A path must be a model folder, without code of its own unless that is trusted. Raises UserError.

    A hub name (owner/name) is left to transformers, which is told the same about its code.
    """
    check_model_path(path, flag)
    folder = Path(path)
    if folder.is_dir():
        code = own_code(folder)
        if code is not None and not trust:
            raise UserError(
                f"{flag} {path}: it brings code of its own ({code}), which was not run; "
                "give --trust_remote_code True if you trust it, or another model"
            )


def own_code(folder: Path) -> str | None:
    """Where a folder names code of its own, or a kernel on the hub; None where it does not."""
    for name in ("config.json", "tokenizer_config.json"):
        named = _json_object(folder / name)
        if named.get("auto_map"):
            return f"auto_map in its {name}"
        if "/" in str(named.get("_attn_implementation", "")):
            return f"_attn_implementation in its {name}"
    return None


def _check_shards(path: str, flag: str) -> None:
    """Raises UserError for an index that names other files than safetensors, which transformers would load."""
    shards = _json_object(Path(path) / "model.safetensors.index.json").get("weight_map")
    names = [str(name) for name in shards.values()] if isinstance(shards, dict) else []
    others = [name for name in names if not name.endswith(".safetensors")]
    if others:
        raise UserError(
            f"{flag} {path}: its model.safetensors.index.json names {min(others)}, which was not loaded; "
            "give a whole Hugging Face model folder, in safetensors"
        )


def _json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none: what is missing or damaged is named where it is loaded."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}

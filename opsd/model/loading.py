"""Load tokenizers and models: complete folders, safetensors only, without code of their own unless it is trusted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from opsd.model.attention import attention_for
from opsd.model.checks import Reach, check_causal, check_packing, check_steady
from opsd.model.positions import check_positions
from opsd.model.scorer import Scorer
from opsd.model.tensors import check_shards, check_tensors, check_types, dequantised, json_object
from opsd.model.transform import find_transform
from opsd.utils.errors import UserError, said
from opsd.utils.paths import check_model_path


def load_tokenizer(path: str, flag: str, trust: bool = False) -> Any:
    """The tokenizer of a model folder. flag: the option that named it, for the error message.

    trust: the folder may bring code of its own, which then runs (--trust_remote_code).
    """
    check_folder(path, flag, trust)
    give = "give a folder that holds one"
    try:
        with said(f"{flag} {path}: its tokenizer cannot be loaded", give):
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
            known = len(tokenizer.get_vocab())
    except UserError:
        if (Path(path) / "config.json").is_file():
            # Loading the tokenizer reads this file too, and may have failed because of it.
            with said(f"{flag} {path}: its config.json cannot be read", "fix that file"):
                AutoConfig.from_pretrained(path, trust_remote_code=trust)
        raise
    if known <= len(tokenizer.all_special_ids):
        # For a folder without tokenizer files, transformers returns one with special tokens only.
        raise UserError(f"{flag} {path}: its tokenizer cannot be loaded (it has only special tokens); {give}")
    return tokenizer


def load_scorer(
    path: str,
    flag: str,
    dtype: torch.dtype,
    device: torch.device,
    trust: bool = False,
    packed: bool = False,
    compute: torch.dtype | None = None,
    reach: Reach | None = None,
) -> Scorer:
    """A model folder as a `Scorer`, dropout off, safetensors only. Raises UserError if it cannot be used.

    dtype: the weights'. compute: the type that the run computes products in, by autocast if it differs; None: dtype.
    packed: no other layout is allowed. reach: the lengths that the run reaches.
    """
    model, name, reach = load_model(path, flag, dtype, device, trust, compute), f"{flag} {path}", reach or Reach()
    disable_dropout(model)
    autocast = compute not in (None, dtype)
    with torch.autocast(device.type, compute) if autocast else contextlib.nullcontext(), running(name):
        scorer = Scorer(model, packed, find_transform(model, name))
        check_causal(scorer, name)
        settle_layout(scorer, name, reach, packed)
        check_steady(scorer, name)
    check_positions(model.config, reach.spans, name)
    return scorer


def running(name: str) -> contextlib.AbstractContextManager[None]:
    """`said` for the first run of a model."""
    return said(f"{name}: the model cannot be run", "give a model that transformers can run")


def reading(path: str, flag: str) -> contextlib.AbstractContextManager[None]:
    """`said` for loading a model."""
    return said(
        f"{flag} {path}: the model cannot be loaded", "give a complete Hugging Face model folder, in safetensors"
    )


def settle_layout(scorer: Scorer, name: str, reach: Reach, packed: bool = False) -> None:
    """Choose a layout in which a micro-batch's sequences stay separate: as it is, padded, or each alone.

    packed: no other layout is allowed. Raises UserError if none works.
    """
    for _ in range(2):
        try:
            return check_packing(scorer, name, reach)
        except UserError:
            if packed:
                raise
            # If packed fails, padded may work; if padded fails, each alone may.
            scorer.packed, scorer.alone = False, not scorer.packed
    check_packing(scorer, name, reach)


def load_model(
    path: str,
    flag: str,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    trust: bool = False,
    compute: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model folder on `device`, safetensors only. dtype "auto": as the folder's config.json says.

    trust: as for `load_tokenizer`. compute: as for `load_scorer`; it decides the attention.
    Raises UserError if it cannot be loaded completely.
    """
    check_folder(path, flag, trust)
    check_shards(path, flag)
    with reading(path, flag):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        quantised = dequantised(config, f"{flag} {path}")
        model, found = _load(path, trust, config=config, dtype=dtype)
        check_tensors(found, path, flag)
        if quantised:
            # These conversions would turn the plain weights back into quantised ones in every checkpoint.
            model._weight_conversions = None
        else:
            check_types(path, flag)
        model = model.to(device)
        attention = attention_for(model, compute or model.dtype, device)
        if attention != "sdpa":
            model.set_attn_implementation(attention)
    return model


def load_ends(path: str, flag: str, dtype: torch.dtype, trust: bool = False) -> PreTrainedModel:
    """A model folder without its layers, on the CPU: embeddings, last norm, head, and what is applied to the logits.

    Its head is the one that vLLM uses for the folder. Raises UserError if the folder is incomplete.
    """
    plain = check_whole(path, flag, trust)
    with reading(path, flag):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        dequantised(config, f"{flag} {path}")
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == text.num_hidden_layers:
                setattr(text, name, [])
        text.num_hidden_layers = 0
        model, found = _load(path, trust, config=config, dtype=dtype)
        if not plain:
            check_tensors(found, path, flag, ours=lambda name: "head" in name)
        if getattr(text, "tie_word_embeddings", False):
            # Ignore a separate head in the files: transformers would use it, vLLM does not.
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def check_whole(path: str, flag: str, trust: bool = False) -> bool:
    """Make sure that a folder's weights are those of its model, without loading any. Raises UserError.

    Returns whether they are plain; quantised ones are not checked.
    """
    check_folder(path, flag, trust)
    check_shards(path, flag)
    with reading(path, flag):
        if dequantised(AutoConfig.from_pretrained(path, trust_remote_code=trust), f"{flag} {path}"):
            return False
        _, found = _load(path, trust, device_map="meta")
        check_tensors(found, path, flag)
        check_types(path, flag)
    return True


def _load(path: str, trust: bool, **options: Any) -> Any:
    """transformers' model of a folder, and its report on the weights. Attention is sdpa if the model supports it."""
    try:
        return _from_pretrained(path, trust, attn_implementation="sdpa", **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return _from_pretrained(path, trust, **options)


def _from_pretrained(path: str, trust: bool, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=trust,
        # Other formats are pickles, which can run code.
        use_safetensors=True,
        # By default transformers fills missing weights with random numbers; these make it report what does not fit.
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )


def disable_dropout(model: nn.Module) -> None:
    """Turn off dropout everywhere, in training mode too: scores and gradients must be of the same distribution."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that modules pass to functional.dropout: dropout, attention_dropout, activation_dropout, layerdrop, …
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def check_folder(path: str, flag: str, trust: bool = False) -> None:
    """A path must be a model folder, without code of its own unless that is trusted. Raises UserError.

    Its generation config must not be damaged: transformers would continue without its end tokens.

    A hub name (owner/name) is left to transformers, which gets the same setting for its code.
    """
    check_model_path(path, flag)
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{flag} {path}: it holds an adapter next to the model (adapter_config.json, "
                "adapter_model.safetensors), which was not loaded; merge it into the model, or move it elsewhere"
            )
        code = own_code(folder)
        if code is not None and not trust:
            raise UserError(
                f"{flag} {path}: it comes with its own code ({code}), which was not run; "
                "give --trust_remote_code True if you trust it, or another model"
            )
        if (folder / "generation_config.json").is_file():
            with said(f"{flag} {path}: its generation_config.json cannot be read", "fix that file"):
                GenerationConfig.from_pretrained(path)


def own_code(folder: Path) -> str | None:
    """Where a folder refers to code of its own or to a kernel on the hub; None if it does not."""
    for name in ("config.json", "tokenizer_config.json"):
        named = json_object(folder / name)
        if named.get("auto_map"):
            return f"auto_map in its {name}"
        if "/" in str(named.get("_attn_implementation", "")):
            return f"_attn_implementation in its {name}"
    return None

"""Attention over sequences of any length in one row, without a mask: flash-attn's, or else torch's own kernel.

torch includes the kernel for CUDA; here it is registered with transformers, so that nothing has to be compiled.

Legend: L tokens of a packed row, S sequences in it, H heads, of which G share a key-value head, D head size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from opsd.utils.errors import UserError

FLASH, VARLEN = "flash_attention_2", "opsd_varlen"
# What torch's kernel supports: compute types, the largest head size, and GPUs from Ampere on.
KERNEL_TYPES, KERNEL_HEAD, KERNEL_CAPABILITY = (torch.bfloat16, torch.float16), 256, (8, 0)

# True while a model runs on one row and is given the lengths of the sequences in it.
_LENGTHS_TELL: ContextVar[bool] = ContextVar("lengths_tell", default=False)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that products of a tensor are computed in: autocast's if it is on, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def attention_for(model: PreTrainedModel, compute: torch.dtype, device: torch.device) -> str:
    """The attention to set on a loaded model: variable-length if model, type and device support it, else sdpa.

    compute: the type that the run computes products in, whatever the weights' own.
    """
    if device.type != "cuda" or compute not in KERNEL_TYPES or not _takes_lengths(model):
        return "sdpa"
    if is_flash_attn_2_available():
        return FLASH
    new_enough = torch.cuda.get_device_capability(device) >= KERNEL_CAPABILITY
    return VARLEN if new_enough and _kernel_fits(model.config.get_text_config()) else "sdpa"


def has_varlen_attention(model: PreTrainedModel) -> bool:
    """Whether attention takes sequences of any length in one row, without a mask."""
    name = str(model.config._attn_implementation)
    return name == VARLEN or "flash" in name


def in_one_row(model: Any, lengths: list[int], **inputs: Any) -> Any:
    """A model's output on one row of sequences with these lengths, which do not attend to each other.

    Variable-length attention is given the lengths, so that it need not wait for the device in every layer to find them;
    any other attention finds them in position_ids and masks.
    """
    if not has_varlen_attention(model):
        return model(**inputs)
    device = inputs["input_ids"].device
    ends_S = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    with _lengths_tell():
        return model(**inputs, cu_seq_lens_q=ends_S, cu_seq_lens_k=ends_S, max_length_q=longest, max_length_k=longest)


@contextmanager
def _lengths_tell() -> Iterator[None]:
    token = _LENGTHS_TELL.set(True)
    try:
        yield
    finally:
        _LENGTHS_TELL.reset(token)


def _takes_lengths(model: PreTrainedModel) -> bool:
    """Whether a model lets its attention be replaced by one without a mask, and passes the lengths on to it."""
    takes = inspect.signature(model.base_model.forward).parameters.values()
    named = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)
    return named and model._supports_flash_attn and model._can_set_attn_implementation()


def _kernel_fits(config: Any) -> bool:
    """Whether torch's kernel can replace a model's own attention, judging by the text model's settings."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # In latent attention, values and keys differ in size; chunked attention is a mask that no window describes.
    other = any(getattr(config, name, None) for name in ("kv_lora_rank", "attention_chunk_size"))
    windows = getattr(config, "sliding_window", None) is None or "window_size" in _takes(varlen_attn)
    return head <= KERNEL_HEAD and head % 8 == 0 and windows and not other


@cache
def _takes(kernel: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """torch's kernel on one row, query [1, H, L, D], key and value [1, H / G, L, D]; sdpa if no lengths are given.

    Raises UserError for features that the kernel lacks.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    asked = {name: kwargs.get(name) for name in ("softcap", "s_aux", "position_bias")} | {"dropout": dropout or None}
    if unable := [name for name, value_of in asked.items() if value_of is not None]:
        raise UserError(
            f"torch's variable-length attention kernel does not support {unable[0]}; "
            "install flash-attn (`FLASH_ATTN=1 make setup`), or give --engine.dtype float32"
        )
    wanted = compute_dtype(value)
    query_LHD, key_LHD, value_LHD = (states.transpose(1, 2).flatten(0, 1).to(wanted) for states in (query, key, value))
    out_LHD = _kernel(query_LHD, key_LHD, value_LHD, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return out_LHD.unflatten(0, (query.shape[0], -1)), None


def _kernel(
    query_LHD: Tensor,
    key_LHD: Tensor,
    value_LHD: Tensor,
    ends_S: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """torch's kernel, causal, with the option names of the installed version of torch."""
    takes, more = _takes(varlen_attn), {}
    if "window_size" in takes:
        # torch counts the tokens to the left; transformers also counts the token itself.
        more["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    else:
        more["is_causal"] = True
    if "scale" in takes:
        more["scale"] = scaling
    elif scaling is not None:
        query_LHD = query_LHD * (scaling * math.sqrt(query_LHD.shape[-1]))
    shared = query_LHD.shape[1] // key_LHD.shape[1]
    if "enable_gqa" in takes:
        more["enable_gqa"] = shared > 1
    elif shared > 1:
        key_LHD, value_LHD = (states.repeat_interleave(shared, 1) for states in (key_LHD, value_LHD))
    out: Any = varlen_attn(query_LHD, key_LHD, value_LHD, ends_S, ends_S, longest, longest, **more)
    return out


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None if the lengths keep sequences apart, else sdpa's mask."""
    return None if _LENGTHS_TELL.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(VARLEN, _attend)
AttentionMaskInterface.register(VARLEN, _mask)

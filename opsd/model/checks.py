"""What is measured on a loaded model before anything is trained: its head, its packing, its vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from opsd.model.attention import compute_dtype
from opsd.model.scorer import Scorer, head_of
from opsd.model.vocabulary import vocabulary_size
from opsd.types import MicroBatch
from opsd.utils.errors import UserError


@torch.no_grad()
def check_plain_head(model: PreTrainedModel, name: str) -> None:
    """Make sure that logits are hidden·headᵀ: the loss core knows no bias, scale or soft cap.

    Raises UserError for models whose own logits differ (measured on four tokens).
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    head = head_of(model)
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    # A soft cap leaves small logits as they are, so the model's own are taken with the head a hundredfold.
    larger = head.register_forward_hook(lambda _module, _inputs, logits: 100 * logits)
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        larger.remove()
    ours = 100 * functional.linear(hidden, head.weight).float()
    if not torch.isfinite(ours).all():
        raise UserError(f"{name}: its logits are not finite; the weights are damaged, give another copy")
    plain = torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(ours.abs().max()))
    if not plain or getattr(head, "bias", None) is not None:
        raise UserError(
            f"{name}: its logits are not hidden·head (bias, scale or soft cap); this trainer needs plain ones"
        )


@torch.no_grad()
def check_packing(scorer: Scorer, name: str) -> None:
    """Make sure that the sequences of a micro-batch stay apart in the layout that the scorer uses.

    Raises UserError where a sequence's hidden states change with those beside it (measured on 16 and 5 tokens).
    """
    model, lengths = scorer.model, (16, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.arange(len(positions)) % model.config.get_text_config().vocab_size
    owners = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    micro = MicroBatch(ids[None], positions[None], torch.arange(len(ids)), ids, owners).to(model.device)
    scorer.eval()
    together = scorer.hidden(micro).split(lengths)
    for ids_L, hidden_LD in zip(micro.input_ids_1L[0].split(lengths), together, strict=True):
        alone_LD = model.base_model(input_ids=ids_L[None], use_cache=False).last_hidden_state[0]
        tolerance = 1e-3 if compute_dtype(alone_LD) == torch.float32 else 0.1
        if float((hidden_LD - alone_LD).float().norm()) > tolerance * float(alone_LD.float().norm()):
            where = "packed into one row" if scorer.packed else "of one batch"
            raise UserError(
                f"{name}: sequences {where} see each other; this trainer needs a model that keeps them apart"
            )


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any, student: Scorer, teacher: Scorer) -> int:
    """How many vocabulary rows both models share: the tokenizer's largest id + 1.

    Heads are often padded to different heights (Qwen2.5: 152,064 and 151,936); rows past the tokenizer get no
    probability. Tokenizers agree when their id → token maps do. Raises UserError with the first difference.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = min((set(ours.items()) ^ set(theirs.items())), key=lambda item: (item[1], item[0]))[0]
        raise UserError(
            f"--student and --teacher have different tokenizers ({token!r} has id {ours.get(token, 'none')} and "
            f"{theirs.get(token, 'none')}); on-policy distillation needs one vocabulary"
        )
    size = vocabulary_size(student_tokenizer)
    for flag, scorer in (("--student", student), ("--teacher", teacher)):
        _check_rows(scorer.head.weight.shape[0], size, flag)
    return size


def check_height(tokenizer: Any, model: PreTrainedModel, flag: str) -> None:
    """Raises UserError where the model has fewer vocabulary rows than its tokenizer has ids."""
    _check_rows(head_of(model).weight.shape[0], max(tokenizer.get_vocab().values()) + 1, flag)


def _check_rows(height: int, size: int, flag: str) -> None:
    if height < size:
        raise UserError(f"{flag}: the model has {height} vocabulary rows, its tokenizer {size}; they do not fit")

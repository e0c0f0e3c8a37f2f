"""The most likely next tokens of both models at each row, streamed: nothing of size N×V.

Legend: N tokens, C rows of a chunk, K tokens named per row, V shared vocabulary, D and E hidden sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.distill.chunks import attempts, row_width, slices
from opsd.distill.divergence import logits_
from opsd.distill.inputs import Inputs, LossSpec
from opsd.distill.matmul import Projection
from opsd.utils.errors import UserError


@dataclass(frozen=True)
class ModelTop:
    """One model's view of each row: its K likeliest tokens, likeliest first, and the sampled token's log-probability.

    ids_NK: int64. log_prob_NK, sampled_N: fp32, natural logarithms; −inf for a token outside the shared vocabulary.
    """

    ids_NK: Tensor
    log_prob_NK: Tensor
    sampled_N: Tensor


@torch.no_grad()
def top_tokens(inputs: Inputs, k: int, spec: LossSpec) -> tuple[ModelTop, ModelTop]:
    """Student's and teacher's k likeliest tokens (all, if the vocabulary is smaller) over the shared vocabulary.

    inputs: must hold the sampled tokens. Errors: UserError for a k below 1.
    """
    if k < 1:
        raise UserError(f"top tokens {k}: give a number from 1")
    ids_N = inputs.token_ids_N
    assert ids_N is not None
    # A head may have more rows than the vocabulary, and its sampler may draw from those.
    outside_N = ids_N >= inputs.vocab_size
    inside_N1 = ids_N.masked_fill(outside_N, 0)[:, None]
    k = min(k, inputs.vocab_size)
    tops = (_blank(inputs.rows, k, ids_N), _blank(inputs.rows, k, ids_N))
    if not inputs.rows:
        return tops

    for attempt in attempts(spec.chunk_tokens, inputs.rows, inputs.vocab_size, inputs.student_ND, inputs.wide):
        with attempt as chunk:
            _fill(tops, inputs, spec.temperature, chunk, inside_N1)
    for top in tops:
        top.sampled_N.masked_fill_(outside_N, float("-inf"))
    return tops


def _fill(tops: tuple[ModelTop, ModelTop], inputs: Inputs, temperature: float, chunk: int, ids_N1: Tensor) -> None:
    """Fill `tops`, `chunk` rows at a time; one buffer serves both models in turn."""
    device, k = inputs.student_ND.device, tops[0].ids_NK.shape[1]
    buffer_CW = torch.empty(chunk, row_width(device.type, inputs.vocab_size), dtype=inputs.wide, device=device)
    teacher, (own, its) = inputs.teacher_projection(), inputs.transforms
    assert isinstance(teacher, Projection), "the likeliest tokens are taken from hidden states alone"
    models = ((inputs.student_ND, inputs.student_projection(), own), (inputs.teacher_NE, teacher, its))
    with torch.autocast(device.type, enabled=False):
        for part in slices(inputs.rows, chunk):
            for (hidden, projection, transform), top in zip(models, tops, strict=True):
                logits_CW = projection.project_(hidden[part], buffer_CW[: part.stop - part.start])
                logits_(logits_CW, transform, inputs.vocab_size, temperature)
                log_p_CV = torch.log_softmax(logits_CW, -1, out=logits_CW)[:, : inputs.vocab_size]
                top.log_prob_NK[part], top.ids_NK[part] = log_p_CV.topk(k)
                top.sampled_N[part] = log_p_CV.gather(-1, ids_N1[part]).squeeze(-1)


def _blank(rows: int, k: int, ids_N: Tensor) -> ModelTop:
    return ModelTop(
        ids_N.new_zeros(rows, k, dtype=torch.int64),
        ids_N.new_zeros(rows, k, dtype=torch.float32),
        ids_N.new_zeros(rows, dtype=torch.float32),
    )

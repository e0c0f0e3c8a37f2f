"""A teacher of which only some log-probabilities per token are known: how the loss core reads it.

Legend: C rows, K entries known per row, V shared vocabulary, W width of a row of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.distill.divergence import logits_
from opsd.distill.matmul import BEYOND
from opsd.types import PLAIN, Transform

# Most that the known entries may hold of a distribution: rounding must not leave less than nothing for the others.
MOST = 1.0 - 1e-6


def packed(ids_NK: Tensor, log_prob_NK: Tensor) -> Tensor:
    """Ids and log-probabilities as one fp32 tensor [N, 2K], as it stands in the place of a teacher's hidden states.

    An id of -1 is an empty entry; one is full in every row. fp32 holds ids below 2^24 exactly.
    """
    return torch.cat([ids_NK.float(), log_prob_NK.float()], 1)


class TopLogProbs:
    """In the place of a teacher's head: logits from what `packed` holds.

    What the known entries leave of the teacher's distribution is spread over the other tokens as the student's own.
    Then a divergence from the student, and its gradient, is exactly that of distributions over the K known tokens and
    one bucket for all others: log(p/q) is the same for each of these. The teacher's entropy is not known so; what is
    taken for it is that of the spread. Only at temperature 1: what a teacher gives at another one does not follow from
    some of its log-probabilities.
    """

    def __init__(self, vocab_size: int, student: Transform = PLAIN) -> None:
        self._vocab_size, self._student = vocab_size, student

    def project_(self, known_C2K: Tensor, out_CW: Tensor, student_CW: Tensor) -> Tensor:
        """The teacher's log-probabilities, `BEYOND` outside the vocabulary. student_CW: the student's products."""
        ids_CK, log_prob_CK = known_C2K.to(out_CW.dtype).chunk(2, 1)
        # A model may have rows beyond the vocabulary, which its server names too: as a local teacher's, they are cut.
        beyond_CK = ids_CK >= self._vocab_size
        beyond_C1 = log_prob_CK.exp().masked_fill(~beyond_CK, 0.0).sum(1, keepdim=True).clamp_max(MOST)
        log_prob_CK = log_prob_CK - torch.log1p(-beyond_C1)
        empty_CK = (ids_CK < 0) | beyond_CK
        # An empty entry says what the first full one says: it is written twice, and counted once.
        full_C1 = (~empty_CK).int().argmax(1, keepdim=True)
        ids_CK = torch.where(empty_CK, ids_CK.gather(1, full_C1), ids_CK).to(torch.int64)
        log_prob_CK = torch.where(empty_CK, log_prob_CK.gather(1, full_C1), log_prob_CK)
        known_C1 = log_prob_CK.exp().masked_fill(empty_CK, 0.0).sum(1, keepdim=True).clamp_max(MOST)
        logits_(out_CW.copy_(student_CW), self._student, self._vocab_size, 1.0)
        out_CW[:, self._vocab_size :] = BEYOND
        out_CW.scatter_(1, ids_CK, BEYOND)
        out_CW.add_(torch.log1p(-known_C1) - out_CW.logsumexp(1, keepdim=True))
        out_CW[:, self._vocab_size :] = BEYOND
        return out_CW.scatter_(1, ids_CK, log_prob_CK)

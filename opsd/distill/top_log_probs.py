"""How the loss core reads a teacher of which only some log-probabilities per token are known.

Legend: C rows, K entries known per row, V shared vocabulary, W width of a row of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.distill.divergence import logits_
from opsd.distill.matmul import BEYOND
from opsd.types import PLAIN, Transform

# Maximum total probability of the known entries: rounding must not leave a negative rest for the others.
MOST = 1.0 - 1e-6


def packed(ids_NK: Tensor, log_prob_NK: Tensor) -> Tensor:
    """Ids and log-probabilities as one fp32 tensor [N, 2K], to be passed in place of a teacher's hidden states.

    An id of -1 is an empty entry; every row has at least one full entry. fp32 holds ids below 2^24 exactly.
    """
    return torch.cat([ids_NK.float(), log_prob_NK.float()], 1)


class TopLogProbs:
    """Takes the place of a teacher's head: computes logits from what `packed` holds.

    The probability that the known entries leave is spread over the other tokens in proportion to the student's own.
    A divergence from the student, and its gradient, are then exactly those of distributions over the K known tokens and
    one bucket for all others: log(p/q) is the same for each of these. The teacher's entropy is not known; that of the
    spread distribution is used for it. Only at temperature 1: some log-probabilities do not determine the teacher's
    distribution at another temperature.
    """

    def __init__(self, vocab_size: int, student: Transform = PLAIN) -> None:
        self._vocab_size, self._student = vocab_size, student

    def project_(self, known_C2K: Tensor, out_CW: Tensor, student_CW: Tensor) -> Tensor:
        """The teacher's log-probabilities, `BEYOND` outside the vocabulary. student_CW: the student's products."""
        ids_CK, log_prob_CK = known_C2K.to(out_CW.dtype).chunk(2, 1)
        # A model may have rows beyond the vocabulary, and its server may return them: they are cut, as for a local
        # teacher.
        beyond_CK = ids_CK >= self._vocab_size
        beyond_C1 = log_prob_CK.exp().masked_fill(~beyond_CK, 0.0).sum(1, keepdim=True).clamp_max(MOST)
        log_prob_CK = log_prob_CK - torch.log1p(-beyond_C1)
        empty_CK = (ids_CK < 0) | beyond_CK
        # Each empty entry repeats the first full one: that is written more than once, but counted once.
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

"""The one place where logits exist: token statistics and the distillation loss, from hidden states.

Legend: N student tokens, K trained ones, C rows of a chunk, B of a block, V shared vocabulary, D and E hidden sizes
of student and teacher. Start at `loss.py`.
"""

from opsd.distill.loss import DistillResult, distill_loss
from opsd.distill.stats import concatenate_stats, token_stats
from opsd.types import Head, Transform

__all__ = ["DistillResult", "Head", "Transform", "concatenate_stats", "distill_loss", "token_stats"]

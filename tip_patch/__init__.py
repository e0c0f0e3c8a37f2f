"""Token selection for on-policy distillation, plugged into a trainer by entry points.

The rules are those of "TIP: Token Importance in On-Policy Distillation" (arXiv 2604.14084) and of related work.
Start at `selectors.py`.

Legend: N student tokens (of a micro-batch, or of a step), R rollouts among them, M tokens that a scale is fitted on.
"""

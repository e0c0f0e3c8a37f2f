"""The frozen teacher: hidden states now, logits only inside the loss."""

from opsd.teacher.base import Teacher
from opsd.teacher.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]

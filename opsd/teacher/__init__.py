"""The teacher: hidden states now, logits only inside the loss."""

from opsd.teacher.base import Teacher
from opsd.teacher.local import LocalTeacher
from opsd.teacher.own import SelfTeacher

__all__ = ["LocalTeacher", "SelfTeacher", "Teacher"]

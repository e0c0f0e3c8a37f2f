"""The teacher: hidden states now, logits only inside the loss."""

from opsd.teacher.base import Teacher
from opsd.teacher.local import LocalTeacher
from opsd.teacher.own import SelfTeacher
from opsd.teacher.routed import RoutedTeacher

__all__ = ["LocalTeacher", "RoutedTeacher", "SelfTeacher", "Teacher"]

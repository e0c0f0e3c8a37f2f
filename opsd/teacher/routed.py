"""Several teachers, each of which scores its own prompts."""

from __future__ import annotations

from torch import Tensor

from opsd.teacher.base import Teacher
from opsd.types import Head, MicroBatch


class RoutedTeacher(Teacher):
    """Teacher made of several, by name; each micro-batch names its own. Their hidden sizes may differ.

    They compute one after another: only one offloaded teacher is on the device at a time.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        self._teachers = teachers

    def hidden(self, batches: list[MicroBatch]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for name, teacher in self._teachers.items():
            own = [place for place, micro in enumerate(batches) if micro.teacher == name]
            found |= zip(own, teacher.hidden([batches[place] for place in own]), strict=True)
        return [found[place] for place in range(len(batches))]

    def head_for(self, micro: MicroBatch) -> Head | None:
        return self._teachers[micro.teacher].head_for(micro)

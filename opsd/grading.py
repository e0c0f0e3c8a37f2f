"""The published name of `opsd.eval.grading`."""

from opsd.eval.grading import Grader, extract_answer, grade, load_grader

__all__ = ["Grader", "extract_answer", "grade", "load_grader"]

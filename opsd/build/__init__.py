"""Loads and checks all parts of a run before anything is written."""

from opsd.build.assembly import Parts, assemble
from opsd.build.models import build_teachers, check_student, load_student
from opsd.build.sampler import build_rollout, build_selector, check_rollout
from opsd.build.stops import compare_templates, settle_stops

__all__ = [
    "Parts",
    "assemble",
    "build_rollout",
    "build_selector",
    "build_teachers",
    "check_rollout",
    "check_student",
    "compare_templates",
    "load_student",
    "settle_stops",
]

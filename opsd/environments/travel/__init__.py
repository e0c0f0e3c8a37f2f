"""Travel planning with nine tools over seven tables: DeepPlanning's format, and our own tasks in that format."""

from opsd.environments.travel.env import TravelEnv
from opsd.environments.travel.pocket import pocket_tasks
from opsd.environments.travel.score import PlanScore
from opsd.environments.travel.synthetic import generate_tasks
from opsd.environments.travel.task import TravelTask, load_tasks, read_task_file, split_tasks, write_task_file

__all__ = [
    "PlanScore",
    "TravelEnv",
    "TravelTask",
    "generate_tasks",
    "load_tasks",
    "pocket_tasks",
    "read_task_file",
    "split_tasks",
    "write_task_file",
]

"""Travel planning with nine tools over seven tables: DeepPlanning's format, and our own tasks in that format."""

from opsd.environments.travel.env import TravelEnv as TravelEnv
from opsd.environments.travel.pocket import pocket_tasks as pocket_tasks
from opsd.environments.travel.score import PlanScore as PlanScore
from opsd.environments.travel.synthetic import generate_tasks as generate_tasks
from opsd.environments.travel.task import TravelTask as TravelTask
from opsd.environments.travel.task import load_tasks as load_tasks
from opsd.environments.travel.task import read_task_file as read_task_file
from opsd.environments.travel.task import split_tasks as split_tasks
from opsd.environments.travel.task import write_task_file as write_task_file

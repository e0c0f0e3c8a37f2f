#!/usr/bin/env python
"""A wandb workspace for runs of this trainer: accuracy, memory, selection and time, seeds averaged within their cell.

    python scripts/wandb_dashboard.py --entity TEAM --project opsd --suites math500 aime24 aime25
    python scripts/wandb_dashboard.py --entity TEAM --project opsd --dry_run

Only saving needs the network; --dry_run prints the workspace as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import tyro

from opsd.utils.errors import UserError

# What a run's config says at its top (opsd/run/wandb_run.py); seeds of one cell share all of them.
GROUP_BY = ("recipe", "pair", "selector")


def workspace(entity: str, project: str, name: str, suites: tuple[str, ...], samples: int) -> Any:
    """The whole workspace, runs grouped by cell. Needs no network. Raises UserError without wandb-workspaces."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("wandb-workspaces is not installed; pip install wandb-workspaces")
    import wandb_workspaces.workspaces as ws

    from wandb_sections import sections

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections(suites, samples),
        settings=ws.WorkspaceSettings(x_axis="step", remove_legends_from_panels=False, max_runs=50),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUP_BY]),
    )


def main(
    entity: str,
    project: str = "opsd",
    name: str = "Token selection",
    suites: tuple[str, ...] = ("math500", "aime24", "aime25"),
    samples: int = 16,
    dry_run: bool = False,
) -> None:
    """Build the workspace and save it, printing its address.

    Args:
        entity: The wandb user or team.
        project: The project that runs were tracked in (--track.project).
        name: The workspace's name.
        suites: Evaluation suites, by their names in --eval.suite.
        samples: Responses per problem (the k of mean@k).
        dry_run: Print the workspace as JSON instead; needs no network and no account.
    """
    built = workspace(entity, project, name, suites, samples)
    if dry_run:
        print(json.dumps(built._to_model().model_dump(by_alias=True, mode="json"), indent=1))
        return
    print(built.save().url)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        print(f"wandb_dashboard: {error}", file=sys.stderr)
        sys.exit(2)

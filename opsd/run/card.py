"""The model card of a checkpoint, README.md on the hub: what it was made from, how, and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from opsd.config import TrainConfig
from opsd.config.file import as_command
from opsd.utils.markdown import markdown_text
from opsd.utils.plugins import ALL_TOKENS

CITATION = """@article{tip2026,
  title  = {{TIP}: Token Importance in On-Policy Distillation},
  journal = {arXiv preprint arXiv:2604.14084},
  year   = {2026}
}"""


def model_card(config: TrainConfig, step: int, evaluations: dict[str, dict[str, Any]]) -> str:
    """The card of the weights after `step`. evaluations: contents of eval/*.json, by the files' names."""
    own = evaluations.get(f"step_{step}", {}).get("suites", {})
    data = ModelCardData(
        model_name=Path(config.out).name,
        base_model=_on_hub(config.student),
        datasets=[config.prompts.split(":")[1]] if config.prompts.startswith("hub:") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "opsd"],
        eval_results=[
            EvalResult("text-generation", name, name, f"mean@{suite['k']}", round(suite["mean@k"], 4))
            for name, suite in own.items()
        ],
    )
    select = config.select
    kept = "all tokens" if select.by == ALL_TOKENS else f"{select.by}, {100 * select.retention:g} % of each answer"
    facts = {
        "student at the start": _code(config.student),
        "teacher": ", ".join(map(_code, config.teacher_paths().values())),
        "prompts": _code(config.prompts),
        "trained on": kept,
        "loss": f"{config.loss.divergence}, per token",
        "steps": f"{step} of {config.steps}, {config.prompts_per_step} prompts × "
        f"{config.rollout.samples_per_prompt} answers each",
        "optimiser": f"{config.optim.kind}, learning rate {config.optim.lr:g}, {config.optim.schedule}",
        "type": config.engine.dtype,
        "seed": str(config.seed),
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {markdown_text(Path(config.out).name)}\n",
            "Made by on-policy distillation: the student wrote answers, a frozen teacher scored every token, and the "
            "student was trained on the divergence between the two.\n",
            "| | |\n|:--|:--|",
            *lines,
            *_scores(config, step, evaluations),
            f"\n## Made with\n\n```\n{as_command(config)}\n```",
            f"\n## Citation\n\n```bibtex\n{CITATION}\n```\n",
        ]
    )


def _scores(config: TrainConfig, step: int, evaluations: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the evaluations, and their settings."""
    names = {"step_0": "student at the start", f"step_{step}": "this model", "teacher": "teacher"}
    found = {title: evaluations[name] for name, title in names.items() if name in evaluations}
    suites = list(dict.fromkeys(suite for one in found.values() for suite in one["suites"]))
    if not suites:
        return ["\nNot evaluated."]
    heads = "".join(f" | {markdown_text(suite)}" for suite in suites)
    rows = [f"| {title}{''.join(f' | {_score(one, suite)}' for suite in suites)} |" for title, one in found.items()]
    sampling = next(iter(found.values()))["sampling"]
    how = ", ".join(f"{name} {value}" for name, value in sampling.items() if name != "seed")
    rule = "--:|" * len(suites)
    return [
        f"\n## Evaluation\n\n| accuracy, % (± standard error over problems){heads} |\n|:--|{rule}",
        *rows,
        f"\nSampled with {how}; graded by {markdown_text(config.eval.grader)}.",
    ]


def _score(evaluation: dict[str, Any], suite: str) -> str:
    found = evaluation["suites"].get(suite)
    if found is None:
        return "-"
    error = found["stderr_problems"]
    return f"{100 * found['mean@k']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _code(text: str) -> str:
    """A user's text in a table's cell."""
    return f"`{text}`".replace("|", "\\|")


def _on_hub(model: str) -> str | None:
    """A model's name if it is on the hub, else None: a folder on this machine means nothing elsewhere."""
    return model if model.count("/") == 1 and not Path(model).exists() and not model.startswith((".", "/")) else None

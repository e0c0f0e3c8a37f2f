"""A pair of tiny random models and their sums, for whole runs that take seconds."""

import json
import runpy
from pathlib import Path

HELPERS = runpy.run_path(str(Path(__file__).parent / "scale" / "worker.py"))


def tiny_pair(folder: Path) -> dict:
    """Writes models and prompts into `folder`; returns the settings that name them, for a run of raw prompts."""
    data = folder / "sums.jsonl"
    tasks = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]
    data.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    for name, seed in (("student", 0), ("teacher", 1)):
        HELPERS["model"](True, seed).save_pretrained(folder / name)
        HELPERS["tokenizer"]().save_pretrained(folder / name)
    return {
        "student": str(folder / "student"),
        "teacher": {"model": str(folder / "teacher")},
        "prompts": str(data),
        "prompt_format": "raw",
        "track": {"progress": False},
    }

"""Two steps on a head with a bias, the teacher's soft-capped: in one process, and on two ranks that share both models.

    python sharded_heads.py FOLDER

Leaves FOLDER/one and FOLDER/two, run folders with a checkpoint, beside FOLDER/student and FOLDER/teacher.
"""

import json
import sys
from pathlib import Path

from families import write
from model_table import train

RUNS = {
    "one": ({}, 1),
    "two": ({"engine.kind": "deepspeed", "engine.zero_stage": 3, "teacher.shard": True}, 2),
}


def main(folder: Path) -> None:
    student, teacher = write(folder / "student", "Phi"), write(folder / "teacher", "Gemma 2", seed=1)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("1+2=", "abcdefghijklmnop")))
    for name, (engine, ranks) in RUNS.items():
        flags = {
            "student": student, "teacher": teacher, "prompts": prompts, "out": folder / name, "steps": 2,
            "prompt_format": "raw", "prompts_per_step": 2, "rollout.max_prompt_tokens": 16, "rollout.max_new_tokens": 8,
            "rollout.samples_per_prompt": 2, "optim.kind": "sgd", "optim.lr": 0.1, "engine.device": "cpu",
            "telemetry.every": 0, "telemetry.save_rollouts_every": 1, "track.progress": False, **engine,
        }  # fmt: skip
        code, said = train(flags, folder / f"{name}.said", ranks)
        assert code == 0, said


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Run folders with a token record whose every number is known, and a tokenizer with hostile words."""

import json
import math
from pathlib import Path

import pandas as pd

# A tokenizer whose tokens are whole words, some of them hostile: what a page does with them must be to show them.
HOSTILE = "<script>document.title='owned'</script>"
WORDS = [
    "<eos>",
    "2",
    "+",
    "=",
    "4",
    "5",
    " so",
    "\n",
    HOSTILE,
    "</script><img src=x onerror=document.title='owned'>",
    "é",
]


def save_word_tokenizer(folder: Path) -> None:
    """WORDS as a tokenizer in the Hugging Face format; the place of a word is its id."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<eos>"))
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    (folder / "config.json").write_text("{}")


def token_table(rollouts: int, length: int, top: bool) -> pd.DataFrame:
    """Rows in a fixed pattern: h cycles through 0, 0.25, 0.5, 0.75, 1; δ through 0, 1, 2, 3; ids through WORDS."""
    rows = []
    for number in range(rollouts * length):
        entropy, divergence = (number % 5) / 4, float(number % 4)
        token = number % len(WORDS)
        row = {
            "rollout": number // length,
            "position": number % length,
            "token_id": token,
            "entropy": entropy,
            "reverse_kl": divergence,
            "forward_kl": divergence / 2,
            "teacher_entropy": 0.125,
            "top1_agree": divergence == 0,
            "quadrant": 4 - 2 * (entropy > 0.5) - (divergence > 1.0),
            "kept": number % 2 == 0,
        }
        if top:
            ids = [(token + step) % len(WORDS) for step in range(5)]
            log_probs = [math.log(p) for p in (0.5, 0.25, 0.125, 0.0625)] + [-math.inf]
            row |= {"log_prob": log_probs[0], "teacher_log_prob": -math.inf}
            row |= {"student_top_ids": ids, "student_top_log_probs": log_probs}
            row |= {"teacher_top_ids": ids[::-1], "teacher_top_log_probs": log_probs}
        rows.append(row)
    return pd.DataFrame(rows)


def write_token_run(
    folder: Path,
    rollouts: int = 4,
    length: int = 6,
    written: bool = True,
    top: bool = True,
    steps: tuple[int, ...] = (20,),
) -> Path:
    """A run folder with a token record at `steps`. written: the rollouts of step 20 stand in a file as well."""
    run = folder / "token-run"
    (run / "tokens").mkdir(parents=True)
    (run / "rollouts").mkdir()
    save_word_tokenizer(folder / "student-model")
    config = {
        "student": str(folder / "student-model"),
        "teacher": {"model": "models/teacher-<b>8B</b>"},
        "steps": 40,
        "select": {"by": "soft_or", "retention": 0.5},
        "telemetry": {"options": {"entropy_split": "0.5", "divergence_split": "1.0"}},
    }
    (run / "config.json").write_text(json.dumps(config))
    splits = {"quadrant/entropy_split_nats": 0.5, "quadrant/divergence_split_nats": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 20, **splits}) + "\n")
    table = token_table(rollouts, length, top)
    for step in steps:
        table.assign(step=step).to_parquet(run / "tokens" / f"step_{step}.parquet", index=False)
    records = [
        {
            "id": number,
            "prompt_ids": [1, 2, 1, 3],
            "response_ids": table.loc[table["rollout"] == number, "token_id"].tolist(),
            "answer": "4",
            "reward": float(number % 2),
            "truncated": False,
        }
        for number in range(rollouts if written else 0)
    ]
    if records:
        (run / "rollouts" / "step_20.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run

"""One trainer of the step benchmark, in its own process: it runs a step each time `bench_step.py` asks for one.

Started with the number of an inherited socket, which carries JSON messages: the settings first, then for each step
{"responses": [[token ids], …] or null}, answered by what the step took. responses: answers to train on in place of the
trainer's own, by prompt.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# More steps than are ever requested: `bench_step.py` ends the process.
STEPS = 10_000


class Line:
    """The connection to `bench_step.py`, and what the current step has taken so far, in seconds by stage."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.stages: dict[str, dict[str, float]] = {}

    def read(self) -> Any:
        return json.loads(self._connection.recv_bytes())

    def send(self, message: dict[str, Any]) -> None:
        message = {**message, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        self._connection.send_bytes(json.dumps(message).encode())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        so_far = self.stages.setdefault(name, {"wall_s": 0.0, "cpu_s": 0.0})
        so_far["wall_s"] += time.perf_counter() - wall
        so_far["cpu_s"] += time.process_time() - cpu


def run_opsd(line: Line, settings: dict[str, Any]) -> None:
    """`opsd train`, except that each step waits for a request."""
    import opsd.train
    from opsd.config import from_json

    run = Path(settings["out"])

    class Asked(opsd.train.Trainer):
        whole_step: Any = None

        @contextmanager
        def stage(self, name: str) -> Iterator[None]:
            if name == "rollout":  # a step begins
                if self.whole_step is not None:
                    self.whole_step.__exit__(None, None, None)
                    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
                    counts = {"tokens": metrics["rollout/tokens"], "loss_nats": metrics["loss/nats"]}
                    counts["kept_frac"] = metrics["select/kept_frac"]
                    line.send({"stages": line.stages, **counts})
                else:
                    line.send({"ready": True})
                line.read()
                line.stages = {}
                self.whole_step = line.stage("step")
                self.whole_step.__enter__()
            with line.stage(name), super().stage(name):
                yield

    opsd.train.Trainer = Asked
    opsd.train.start(
        from_json(
            {
                "student": settings["student"],
                "teacher": {"model": settings["teacher"]},
                "prompts": settings["prompts_file"],
                "prompt_format": "raw",
                "out": str(run),
                "steps": STEPS,
                "prompts_per_step": len(settings["prompts"]),
                "rollout": {
                    "engine": settings["method"].split("-")[1],
                    "samples_per_prompt": 1,
                    "max_prompt_tokens": settings["prompt_tokens"],
                    "max_new_tokens": settings["new_tokens"],
                },
                "select": {
                    "by": settings["selector"] if settings["method"].endswith("-tip") else "all",
                    "retention": settings["retention"],
                    "normalise_over": "rollout",
                },
                "optim": {"lr": settings["lr"], "schedule": "constant"},
                "engine": {"device": "cpu"},
                "checkpoint": {"every": 0},
                "telemetry": {"every": 0, "save_rollouts_every": 1},
                "track": {"progress": False},
            }
        )
    )


def trl_trainer(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of TRL's trainer, and the arguments that selection adds to it."""
    from trl.trainer.distillation_trainer import DistillationTrainer

    engine = settings["method"].partition("-")[2]
    if not engine:
        return DistillationTrainer, {}
    from tip_patch.adapters.trl import tip

    options = {"retention": settings["retention"], "normalise_over": "rollout"}
    more = {"selector": settings["selector"], "selector_options": options, "engine": engine, "telemetry_every": 0}
    return tip(DistillationTrainer), more


def run_trl(line: Line, settings: dict[str, Any]) -> None:
    """TRL's DistillationTrainer: on-policy, reverse KL, the teacher in the same process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.trainer.distillation_config import DistillationConfig

    trainer, selection = trl_trainer(settings)
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["student"], trust_remote_code=False)
    # It needs an end token; min_new_tokens keeps the model from writing it.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(max(tokenizer.get_vocab().values()))
    given: dict[str, Any] = {"responses": None}
    counts: dict[str, Any] = {}

    class Timed(trainer):
        def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **more: Any) -> Any:
            with line.stage("rollout"):
                ids = given["responses"] or super()._generate_single_turn(prompt_ids, *others, **more)
            counts["tokens"] = sum(map(len, ids))
            return ids

        def compute_loss(self, *inputs: Any, **more: Any) -> Any:
            with line.stage("teacher, student forward and loss"):
                loss = super().compute_loss(*inputs, **more)
            counts["loss_nats"] = float(loss)
            return loss

    class Baton(TrainerCallback):
        step: Any = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            line.send({"ready": True} if self.step is None else {"stages": line.stages, **counts})
            given.update(line.read())
            line.stages = {}
            self.step = line.stage("step")
            self.step.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step.__exit__(None, None, None)
            done = made.tip.done if selection else []
            kept = sum(int(part.kept_N.sum()) for part in done)
            counts["kept_frac"] = kept / counts["tokens"] if selection else 1.0

    config = DistillationConfig(
        output_dir=settings["out"],
        per_device_train_batch_size=len(settings["prompts"]),
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_steps=STEPS,
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"min_new_tokens": settings["new_tokens"]},
        beta=1.0,
        temperature=1.0,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in settings["prompts"]])
    with torch.random.fork_rng():
        made = Timed(
            settings["student"],
            settings["teacher"],
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[Baton()],
            **selection,
        )
        made.train()


def run_vllm(line: Line, settings: dict[str, Any]) -> None:
    """vLLM's own loop with constant weights, with the options that opsd gives it."""
    import torch

    from opsd.model.loading import load_tokenizer
    from opsd.rollout.vllm import import_vllm

    vllm = import_vllm(torch.device("cpu"))
    llm = vllm.LLM(
        model=settings["student"],
        dtype="float32",
        load_format="safetensors",
        trust_remote_code=False,
        max_model_len=settings["prompt_tokens"] + settings["new_tokens"],
        max_num_seqs=len(settings["prompts"]),
        enforce_eager=True,
        generation_config="vllm",
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=0,
    )
    ids = load_tokenizer(settings["student"], "--student")(settings["prompts"])["input_ids"]
    requests = [{"prompt_token_ids": prompt} for prompt in ids]
    line.send({"ready": True})
    for step in range(STEPS):
        line.read()
        line.stages = {}
        seeds = range(step * len(ids), (step + 1) * len(ids))
        params = [vllm.SamplingParams(max_tokens=settings["new_tokens"], seed=n, detokenize=False) for n in seeds]
        with line.stage("step"), line.stage("rollout"):
            outputs = llm.generate(requests, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        line.send({"stages": line.stages, "tokens": tokens, "loss_nats": None})


def main(socket: int) -> None:
    line = Line(Connection(socket))
    settings = line.read()
    import torch

    torch.set_num_threads(settings["threads"])
    try:
        family = settings["method"].partition("-")[0]
        {"trl": run_trl, "vllm": run_vllm, "opsd": run_opsd}[family](line, settings)
    except EOFError:
        return  # no more requests
    except Exception as error:
        line.send({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main(int(sys.argv[1]))

"""Distil the pocket pair with a selection rule of our own, without the command line: a minute on a CPU.

It says what it does while it does it, as `opsd train` would; the run folder is runs/product.
"""

from opsd.config import EvalConfig, OptimConfig, RolloutConfig, SelectConfig, TeacherConfig, TrainConfig
from opsd.train import start
from tip_patch.selector import Selector, read_field


class Product(Selector):
    """Keep the tokens of highest entropy × divergence: unsure and wrong at once."""

    name, needs = "product", frozenset({"entropy_N", "reverse_kl_N"})

    def score(self, stats, rollouts, seed):
        return read_field(stats, "entropy_N", self.name) * read_field(stats, "reverse_kl_N", self.name)


if __name__ == "__main__":
    config = TrainConfig(
        student="assets/pocket/student",
        teacher=TeacherConfig("assets/pocket/teacher"),
        prompts="assets/pocket/train.jsonl",
        out="runs/product",
        steps=60,
        prompts_per_step=16,
        prompt_format="raw",
        rollout=RolloutConfig(samples_per_prompt=4, max_prompt_tokens=16, max_new_tokens=40),
        select=SelectConfig(by="__main__:Product", retention=0.2),
        optim=OptimConfig(lr=1e-3, warmup_steps=4),
        eval=EvalConfig(suite=("pocket=assets/pocket/eval.jsonl",), grader="suffix", generate_batch=1024),
    )
    start(config)

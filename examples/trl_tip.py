"""TRL distils the pocket pair on half of the tokens, chosen by Soft-OR: a minute on a CPU. docs/trl.md says more."""

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from tip_patch.adapters.trl import tip

if __name__ == "__main__":
    config = DistillationConfig(
        output_dir="runs/trl_tip",
        max_steps=40,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        max_completion_length=40,
        learning_rate=1e-3,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = tip(DistillationTrainer)(
        "assets/pocket/student",
        "assets/pocket/teacher",
        config,
        train_dataset=Dataset.from_json("assets/pocket/train.jsonl"),
        selector="soft_or",
        selector_options={"retention": 0.5, "normalise_over": "rollout"},
    )
    trainer.train()

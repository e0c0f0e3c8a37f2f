"""A run that is killed between two checkpoints."""

from pathlib import Path

import pytest

from opsd.config import TrainConfig
from opsd.run import checkpoint
from opsd.train import start


def killed_at_step_3(monkeypatch: pytest.MonkeyPatch, config: TrainConfig) -> Path:
    """The folder of a run that was killed with step 3 done and step 2 saved."""
    whole = checkpoint.save

    def save(folder, model, tokenizer, state, *rest):
        if state.step == 4:
            raise KeyboardInterrupt
        return whole(folder, model, tokenizer, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save)
        start(config)
    return Path(config.out)

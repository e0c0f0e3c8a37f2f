"""A model's files: whether it can be saved, the names of its weights there, and the other files of its folder."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from opsd.model.scorer import head_of
from opsd.model.tensors import QUANTISED, json_object
from opsd.utils.errors import UserError, first_line, said

# Files besides weights that belong to the model: processors, templates, vocabularies, its own code.
BELONGS = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
# Files that do not: adapters, quantisation settings, and leftovers of a training run.
FOREIGN = ("adapter_", "trainer_state", "training_args", "optimizer", "scheduler", "all_results", "train_results",
           "eval_results", "quantize_config", "quant_config")  # fmt: skip


def files_digest(folder: Path, *patterns: str) -> str | None:
    """A digest of the files' names, sizes and last MiB each: enough to tell models apart without reading all of them.

    None for a model that is not a local folder.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            content.seek(max(0, size - 2**20))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def copy_rest(source: Path, folder: Path) -> None:
    """Copy files that belong to the model from `source` to `folder` if they are missing there, chat templates too."""
    if not source.is_dir():
        return
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        if not _belongs(place) or not file.is_file() or (folder / place).exists():
            continue
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / place)


def _belongs(place: Path) -> bool:
    if len(place.parts) > 1 and place.parts[0] != "additional_chat_templates":
        return False
    name = place.name
    return name.endswith(BELONGS) and not name.startswith((*FOREIGN, ".")) and not name.endswith(".index.json")


@torch.no_grad()
def make_savable(model: PreTrainedModel, tokenizer: Any, path: str, flag: str) -> list[str]:
    """Try to save all but the weights, before anything is trained. Returns what had to be changed, one line each.

    A generation config that transformers refuses to save is fixed: a run has its own sampling settings, and needs only
    the end tokens of that file. Raises UserError if something cannot be saved or read back.
    """
    notes = [note] if (note := _mend_generation(model, path, flag)) else []
    saving = said(f"{flag} {path}: its checkpoints could not be saved", "fix its configuration")
    with tempfile.TemporaryDirectory() as place, saving:
        model.config.save_pretrained(place)
        tokenizer.save_pretrained(place)
        again = type(model.config).from_pretrained(place, trust_remote_code=False)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(place)
            GenerationConfig.from_pretrained(place, trust_remote_code=False)
    if again.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise UserError(f"{flag} {path}: its configuration changes when it is saved; fix it")
    return notes


def _mend_generation(model: PreTrainedModel, path: str, flag: str) -> str | None:
    """Fix a generation config that cannot be saved; returns what was changed, or None."""
    config = model.generation_config
    if config is None or (problem := _unsavable(config)) is None:
        return None
    config.do_sample = True
    changed = "do_sample true"
    if _unsavable(config) is not None:
        ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ends)
        changed = "only its special tokens"
    return f"{flag} {path}: its generation_config.json cannot be saved as it is ({problem}); checkpoints have {changed}"


def _unsavable(config: GenerationConfig) -> str | None:
    """Why transformers refuses to save a generation config; None if it does not."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).strip().splitlines() if line.strip()]
        return next((line for line in lines if "`" in line), lines[0])
    return None


def as_saved(model: PreTrainedModel, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under the names, and in the pieces, that a checkpoint has: fused experts one by one."""
    yield from revert_weight_conversion(model, {name: weight}).items()


def in_pieces(model: PreTrainedModel) -> bool:
    """Whether any parameter has a different form in a checkpoint than in the model."""
    conversions: Any = getattr(model, "_weight_conversions", None) or []
    return any(isinstance(conversion, WeightConverter) for conversion in conversions)


def check_sampled(model: PreTrainedModel, path: str, flag: str) -> None:
    """Make sure that a sampler that loaded the folder accepts the weights of `as_saved`. Raises UserError."""
    settings = json_object(Path(path) / "config.json")
    if any(settings.get(key) for key in QUANTISED):
        raise _unsampled(path, flag, "the folder's weights are quantised, and vLLM would keep them so")
    text, head = model.config.get_text_config(), head_of(model)
    if getattr(text, "tie_word_embeddings", False) and head.weight is not model.get_input_embeddings().weight:
        raise _unsampled(path, flag, "config.json ties head and embeddings, but the files hold two")
    own = {
        name.replace(".base_layer.", "."): torch.empty(p.shape, dtype=p.dtype, device="meta")
        for name, p in model.named_parameters()
        if ".lora_" not in name
    }
    try:
        pieces = [piece for name, weight in own.items() for piece in as_saved(model, name, weight)]
        whole = revert_weight_conversion(model, own)
    except Exception as error:  # a conversion that needs more than one parameter
        raise _unsampled(path, flag, first_line(error)) from error
    given = {name: piece.shape for name, piece in pieces}
    if given != {name: piece.shape for name, piece in whole.items()}:
        other = min(set(given) ^ set(whole), default="one")
        raise _unsampled(path, flag, f"{other} is made of several parameters")


def _unsampled(path: str, flag: str, why: str) -> UserError:
    return UserError(f"{flag} {path}: its weights cannot be sent to vLLM ({why}); give --rollout.engine hf")

"""Loading models, the vocabulary they share, and the module that keeps every projection to logits in one place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opsd.attention import attention_for, compute_dtype, has_varlen_attention, in_one_row
from opsd.batch import MicroBatch, padded_rows
from opsd.errors import UserError
from opsd.memory import is_out_of_memory
from opsd.rollout.draws import vocabulary_size

Result = TypeVar("Result")
HeadUse = Callable[[torch.Tensor, torch.Tensor], Result]


class DistillHead(nn.Module):
    """The vocabulary projection, as a module that owns the head's own Parameter (tied or not).

    Called with hidden states alone it is the linear layer that it replaces, so `generate` and `save_pretrained`
    go on as before. Called with `use` it hands (hidden_ND, head_VD) to it and returns what it returns: the loss is
    formed within this module's forward, where a sharding engine has the whole weight gathered.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, use: HeadUse[Any] | None = None) -> Any:
        """Logits [..., V], or use(hidden, head): hidden in the compute type, the head as it is.

        Under autocast, which stays on, the loss core rounds the head for its products alone: the head's gradient
        reaches the Parameter in fp32, as it was summed. The core keeps logits in fp32 by itself.
        """
        if use is None:
            return functional.linear(hidden, self.weight)
        return use(hidden.to(compute_dtype(hidden)), self.weight)


class Scorer(nn.Module):
    """A causal language model that gives hidden states at the rows of a micro-batch, never all logits.

    packed: a micro-batch is one call of the model on one row, as it must be where ranks have to call it equally often
    (ZeRO-3). Otherwise every sequence has a row of its own, in as many calls as there are groups of about equal length
    (`opsd.batch.padded_rows`): a mask over a packed row would cost its length squared. Attention of variable length
    needs no mask and always gets the packed row.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.packed = packed or has_varlen_attention(model)
        self.model.set_output_embeddings(DistillHead(_head_of(model).weight))

    @property
    def head(self) -> DistillHead:
        """The model's projection to logits."""
        return _head_of(self.model)

    def forward(self, micro: MicroBatch, use: HeadUse[Result]) -> Result:
        """use(hidden_ND, head_VD), with the final hidden states that predict the micro-batch's student tokens."""
        return self.head(self.hidden(micro), use)

    def hidden(self, micro: MicroBatch) -> torch.Tensor:
        """Final hidden states [N, D], after the last norm, each predicting one student token.

        The cache must stay off: with it, packed sequences silently attend to each other.
        """
        base = self.model.base_model
        if self.packed:
            row = {"input_ids": micro.input_ids_1L, "position_ids": micro.position_ids_1L}
            out = in_one_row(base, micro.lengths, **row, use_cache=False)
            return out.last_hidden_state[0].index_select(0, micro.rows_N)
        rows = padded_rows(micro)
        hidden = [base(input_ids=ids_RL, use_cache=False).last_hidden_state.flatten(0, 1) for ids_RL in rows.groups]
        return torch.cat(hidden).index_select(0, rows.place_L[micro.rows_N])


def load_tokenizer(path: str, flag: str, trust: bool = False) -> Any:
    """The tokenizer of a model folder. flag: the option that named it, for the error message.

    trust: the folder may bring code of its own, which then runs (--trust_remote_code).
    """
    check_folder(path, flag, trust)
    give = "give a folder that holds one"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # whatever a damaged folder makes transformers raise
        raise _unloadable(error, f"{flag} {path}: its tokenizer cannot be loaded", give) from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        # What transformers makes of a folder without a tokenizer's files: special tokens alone.
        raise UserError(f"{flag} {path}: its tokenizer cannot be loaded (it has no token but special ones); {give}")
    return tokenizer


def load_scorer(
    path: str,
    flag: str,
    dtype: torch.dtype,
    device: torch.device,
    trust: bool = False,
    packed: bool = False,
    compute: torch.dtype | None = None,
) -> Scorer:
    """A model folder as a `Scorer`, dropout off, safetensors only. Raises UserError where it cannot serve.

    dtype: the weights'. compute: what the run takes products in, under autocast where it is another; None: dtype.
    """
    model = load_model(path, flag, dtype, device, trust, compute)
    disable_dropout(model)
    autocast = compute not in (None, dtype)
    with torch.autocast(device.type, compute) if autocast else contextlib.nullcontext():
        check_plain_head(model, f"{flag} {path}")
        scorer = Scorer(model, packed)
        check_packing(scorer, f"{flag} {path}")
    return scorer


def load_model(
    path: str,
    flag: str,
    dtype: torch.dtype | Literal["auto"],
    device: torch.device,
    trust: bool = False,
    compute: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model folder on `device`, safetensors only. dtype "auto": as the folder's config.json says.

    trust: as for `load_tokenizer`. compute: as for `load_scorer`; attention is chosen by it.
    Raises UserError where it cannot be loaded whole.
    """
    check_folder(path, flag, trust)
    _check_shards(path, flag)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust,
            # Other formats are pickles, which run what they hold.
            use_safetensors=True,
            # Left alone, transformers fills what is missing with random numbers; what does not fit is named below.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a damaged folder makes transformers raise
        what = f"{flag} {path}: the model cannot be loaded"
        raise _unloadable(error, what, "give a whole Hugging Face model folder, in safetensors") from error
    model, loading = loaded
    lacking = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if lacking:
        raise UserError(
            f"{flag} {path}: its weights hold no {min(lacking)} of the shape that config.json says; "
            "give a whole Hugging Face model folder"
        )
    model = model.to(device)
    attention = attention_for(model, compute or model.dtype, device)
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    return model


def _unloadable(error: Exception, what: str, give: str) -> Exception:
    """What to raise in place of `error`: itself where memory ran out."""
    return error if is_out_of_memory(error) else UserError(f"{what} ({_first_line(error)}); {give}")


def disable_dropout(model: nn.Module) -> None:
    """Scores and gradients must speak of one distribution: no dropout anywhere, in training mode neither."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that modules hand to functional.dropout: dropout, attention_dropout, activation_dropout, layerdrop, …
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


@torch.no_grad()
def check_plain_head(model: PreTrainedModel, name: str) -> None:
    """Make sure that logits are hidden·headᵀ: the loss core knows no bias, scale or soft cap.

    Raises UserError for models whose own logits differ (measured on four tokens).
    """
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    head = _head_of(model)
    model.eval()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    # A soft cap leaves small logits as they are, so the model's own are taken with the head a hundredfold.
    larger = head.register_forward_hook(lambda _module, _inputs, logits: 100 * logits)
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        larger.remove()
    ours = 100 * functional.linear(hidden, head.weight).float()
    if not torch.isfinite(ours).all():
        raise UserError(f"{name}: its logits are not finite; the weights are damaged, give another copy")
    plain = torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(ours.abs().max()))
    if not plain or getattr(head, "bias", None) is not None:
        raise UserError(
            f"{name}: its logits are not hidden·head (bias, scale or soft cap); this trainer needs plain ones"
        )


@torch.no_grad()
def check_packing(scorer: Scorer, name: str) -> None:
    """Make sure that the sequences of a micro-batch stay apart in the layout that the scorer uses.

    Raises UserError where a sequence's hidden states change with those beside it (measured on 16 and 5 tokens).
    """
    model, lengths = scorer.model, (16, 5)
    positions = torch.cat([torch.arange(length) for length in lengths])
    ids = torch.arange(len(positions)) % model.config.get_text_config().vocab_size
    owners = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    micro = MicroBatch(ids[None], positions[None], torch.arange(len(ids)), ids, owners).to(model.device)
    scorer.eval()
    together = scorer.hidden(micro).split(lengths)
    for ids_L, hidden_LD in zip(micro.input_ids_1L[0].split(lengths), together, strict=True):
        alone_LD = model.base_model(input_ids=ids_L[None], use_cache=False).last_hidden_state[0]
        tolerance = 1e-3 if compute_dtype(alone_LD) == torch.float32 else 0.1
        if float((hidden_LD - alone_LD).float().norm()) > tolerance * float(alone_LD.float().norm()):
            where = "packed into one row" if scorer.packed else "of one batch"
            raise UserError(
                f"{name}: sequences {where} see each other; this trainer needs a model that keeps them apart"
            )


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any, student: Scorer, teacher: Scorer) -> int:
    """How many vocabulary rows both models share: the tokenizer's largest id + 1.

    Heads are often padded to different heights (Qwen2.5: 152,064 and 151,936); rows past the tokenizer get no
    probability. Tokenizers agree when their id → token maps do. Raises UserError with the first difference.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        token = min((set(ours.items()) ^ set(theirs.items())), key=lambda item: (item[1], item[0]))[0]
        raise UserError(
            f"--student and --teacher have different tokenizers ({token!r} has id {ours.get(token, 'none')} and "
            f"{theirs.get(token, 'none')}); on-policy distillation needs one vocabulary"
        )
    size = vocabulary_size(student_tokenizer)
    for flag, scorer in (("--student", student), ("--teacher", teacher)):
        _check_rows(scorer.head.weight.shape[0], size, flag)
    return size


def check_height(tokenizer: Any, model: PreTrainedModel, flag: str) -> None:
    """Raises UserError where the model has fewer vocabulary rows than its tokenizer has ids."""
    _check_rows(_head_of(model).weight.shape[0], max(tokenizer.get_vocab().values()) + 1, flag)


def _check_rows(height: int, size: int, flag: str) -> None:
    if height < size:
        raise UserError(f"{flag}: the model has {height} vocabulary rows, its tokenizer {size}; they do not fit")


def _head_of(model: PreTrainedModel) -> Any:
    """The module that projects to logits; every causal language model has one."""
    return model.get_output_embeddings()


def check_folder(path: str, flag: str, trust: bool = False) -> None:
    """A path must be a model folder, without code of its own unless that is trusted. Raises UserError.

    A hub name (owner/name) is left to transformers, which is told the same about its code.
    """
    folder = Path(path)
    if not path:
        raise UserError(f"{flag} is empty; give a Hugging Face model folder")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{flag} {path}: no config.json there; give a Hugging Face model folder")
        code = own_code(folder)
        if code is not None and not trust:
            raise UserError(
                f"{flag} {path}: it brings code of its own ({code}), which was not run; "
                "give --trust_remote_code True if you trust it, or another model"
            )
    elif folder.exists():
        raise UserError(f"{flag} {path}: is a file; give a Hugging Face model folder")
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{flag} {path}: no such folder; give a Hugging Face model folder")


def own_code(folder: Path) -> str | None:
    """Where a folder names code of its own, or a kernel on the hub; None where it does not."""
    for name in ("config.json", "tokenizer_config.json"):
        named = _json_object(folder / name)
        if named.get("auto_map"):
            return f"auto_map in its {name}"
        if "/" in str(named.get("_attn_implementation", "")):
            return f"_attn_implementation in its {name}"
    return None


def _check_shards(path: str, flag: str) -> None:
    """Raises UserError for an index that names other files than safetensors, which transformers would load."""
    shards = _json_object(Path(path) / "model.safetensors.index.json").get("weight_map")
    names = [str(name) for name in shards.values()] if isinstance(shards, dict) else []
    others = [name for name in names if not name.endswith(".safetensors")]
    if others:
        raise UserError(
            f"{flag} {path}: its model.safetensors.index.json names {min(others)}, which was not loaded; "
            "give a whole Hugging Face model folder, in safetensors"
        )


def _json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none: what is missing or damaged is named where it is loaded."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

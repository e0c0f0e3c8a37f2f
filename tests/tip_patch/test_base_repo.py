"""The base repository's loss table, patched: against plain autograd, and against a checkout where one is at hand."""

import importlib.util
import math
import os
import types
from pathlib import Path

import pytest
import torch
from tolerance import close
from torch.nn import functional

from opsd.distill import distill_loss
from opsd.selection import load_selector
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed
from tip_patch.adapters.base_repo import patch

NAMES = ["reverse_kl", "forward_kl", "jsd"]
BASE_REPO = os.environ.get("BASE_REPO")


def plain(divergence: str, teacher_NV, student_NV, beta=0.5, chunk_size=512):
    """The definition, a mean over tokens, differentiated by autograd."""
    log_q, log_p = (functional.log_softmax(logits.float(), -1) for logits in (teacher_NV, student_NV))
    if divergence == "jsd":
        log_m = torch.logsumexp(torch.stack([log_q + math.log(beta), log_p + math.log(1 - beta)]), 0)
        each = beta * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)
    else:
        first, second = (log_p, log_q) if divergence == "reverse_kl" else (log_q, log_p)
        each = (first.exp() * (first - second)).sum(-1)
    return each.mean(), len(each)


def stand_in() -> types.SimpleNamespace:
    """A module with the table and its signatures."""
    table = {name: (lambda *a, name=name, **k: plain(name, *a, **k)) for name in NAMES}
    return types.SimpleNamespace(LOSS_FN_MAP=table)


def checkout() -> types.ModuleType:
    if not BASE_REPO:
        pytest.skip("needs the base repository: set BASE_REPO to a checkout of HJSang/OPSD_OnPolicyDistillation")
    spec = importlib.util.spec_from_file_location("base_losses", Path(BASE_REPO) / "src" / "opd" / "losses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["stand-in", "checkout"])
def losses(request):
    return stand_in() if request.param == "stand-in" else checkout()


def logits(tokens=23, vocab=60, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = ((2 * torch.randn(tokens, vocab, generator=generator)).to(dtype) for _ in range(2))
    return teacher_NV, student_NV.requires_grad_()


def value_and_gradient(function, teacher_NV, student_NV, **options):
    loss, count = function(teacher_NV, student_NV, **options)
    return float(loss.detach()), torch.autograd.grad(loss, student_NV)[0], count


def saved_bytes(function, teacher_NV, student_NV) -> int:
    """Bytes that autograd keeps for backward, the two inputs apart."""
    own = {teacher_NV.untyped_storage().data_ptr(), student_NV.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = function(teacher_NV, student_NV, chunk_size=4)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_unselected_loss_and_gradient_are_the_tables_own(name, losses):
    pair = logits()
    expected = value_and_gradient(losses.LOSS_FN_MAP[name], *pair, chunk_size=5)
    patch(losses, None)
    loss, gradient, count = value_and_gradient(losses.LOSS_FN_MAP[name], *pair, chunk_size=7)
    close(loss, expected[0], 60, 23)
    assert count == expected[2] == 23
    close(gradient, expected[1], 60, 23)


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("selector", ["soft_or", "q3", "entropy", "adaptive_kl"])
def test_selected_loss_and_gradient_are_the_cores(name, selector, losses):
    teacher_NV, student_NV = logits()
    patch(losses, load_selector(selector, retention=0.4), seed=0)
    loss, gradient, count = value_and_gradient(losses.LOSS_FN_MAP[name], teacher_NV, student_NV)
    # the loss core takes hidden states and heads: an identity head makes logits of them
    eye_VV = torch.eye(60)
    ours = distill_loss(
        student_NV,
        eye_VV,
        teacher_NV,
        eye_VV,
        selector=load_selector(selector, retention=0.4),
        divergence=name,
        seed=derive_seed(0, 1),
    )
    assert count == int(ours.kept_N.sum()) == 9
    close(loss, ours.loss_sum / 9, 60, 60, 9)
    close(gradient, torch.autograd.grad(ours.loss_sum / 9, student_NV)[0], 60, 60, 9)
    assert not gradient[~ours.kept_N].any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_for_backward_does_not_grow_with_the_vocabulary(name, losses):
    small, large = logits(vocab=60), logits(vocab=600)
    theirs = saved_bytes(losses.LOSS_FN_MAP[name], *large)
    patch(losses, load_selector("soft_or"))
    ours = losses.LOSS_FN_MAP[name]
    # row numbers of 11 kept tokens, 8 bytes each
    assert saved_bytes(ours, *small) == saved_bytes(ours, *large) <= 100
    assert theirs > 4 * 23 * 600


@pytest.mark.numeric
def test_low_precision_logits_get_a_gradient_of_their_type_and_fp32_arithmetic():
    losses, (teacher_NV, student_NV) = stand_in(), logits(dtype=torch.bfloat16)
    patch(losses, None)
    loss, gradient, _ = value_and_gradient(losses.LOSS_FN_MAP["reverse_kl"], teacher_NV, student_NV)
    assert gradient.dtype == torch.bfloat16
    close(loss, plain("reverse_kl", teacher_NV, student_NV)[0], 60, 23)


def test_a_call_without_tokens_still_backpropagates(losses):
    patch(losses, load_selector("soft_or"))
    teacher_NV, student_NV = logits(tokens=0)
    loss, gradient, count = value_and_gradient(losses.LOSS_FN_MAP["reverse_kl"], teacher_NV, student_NV)
    assert (loss, count, gradient.shape) == (0.0, 0, (0, 60))


def test_undo_puts_the_table_back_and_calls_draw_anew(losses):
    before = dict(losses.LOSS_FN_MAP)
    table = losses.LOSS_FN_MAP
    undo = patch(losses, load_selector("random", retention=0.2), seed=4)
    found = {value_and_gradient(table["reverse_kl"], *logits())[0] for _ in range(6)}
    assert len(found) > 1
    undo()
    assert table == before and losses.LOSS_FN_MAP is table


def test_what_cannot_work_here_is_said_at_once():
    for selector in (load_selector("soft_or", normalise_over="batch"), load_selector("verify")):
        losses = stand_in()
        with pytest.raises(UserError):
            patch(losses, selector)
    with pytest.raises(UserError, match="LOSS_FN_MAP"):
        patch(types.SimpleNamespace(), None)

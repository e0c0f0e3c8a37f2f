"""The loss core once more, as its definitions in fp64 with plain autograd, and random cases to compare on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from tolerance import close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.distill import DistillResult, chunks, distill_loss, token_stats
from opsd.distill.matmul import Projection
from opsd.selection import Selection, TokenStats


@dataclass
class Case:
    """Hidden states and heads of two models, as leaves that want gradients, and how the loss is to be taken."""

    student_ND: Tensor
    student_head_VD: Tensor
    teacher_NE: Tensor
    teacher_head_VE: Tensor
    divergence: str = "reverse_kl"
    beta: float = 0.5
    entropy_threshold: float = 0.4
    temperature: float = 1.0
    vocab_size: int | None = None
    kept_N: Tensor | None = None
    weight_N: Tensor | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_ND, self.student_head_VD, self.teacher_NE, self.teacher_head_VE

    @property
    def sums(self) -> tuple[int, ...]:
        """The lengths of the sums behind the loss: two projections, the vocabulary, the tokens."""
        tokens, width = self.student_ND.shape
        return width, self.teacher_NE.shape[1], self.shared, max(1, tokens)

    @property
    def shared(self) -> int:
        return self.vocab_size or min(self.student_head_VD.shape[0], self.teacher_head_VE.shape[0])

    def loss(self, **options: Any) -> DistillResult:
        """What the loss core says. `options` go to `distill_loss` before the case's own."""
        own = {
            "divergence": self.divergence,
            "beta": self.beta,
            "entropy_threshold": self.entropy_threshold,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
            "kept_N": self.kept_N,
            "weight_N": self.weight_N,
            **self.more,
        }
        if "selector" in options:
            own.pop("kept_N")
        return distill_loss(*self.tensors, **{**own, **options})

    def stats(self, **options: Any) -> TokenStats:
        return token_stats(*self.tensors, vocab_size=self.vocab_size, temperature=self.temperature, **options)

    def gradients(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss sum and its gradients with respect to the student's hidden states and head."""
        loss_sum = self.loss(**options).loss_sum
        return loss_sum.detach(), *torch.autograd.grad(loss_sum, (self.student_ND, self.student_head_VD))


def build_case(
    tokens: int,
    vocab: int,
    *,
    width: int = 8,
    teacher_width: int = 6,
    student_pad: int = 0,
    teacher_pad: int = 0,
    spread: float = 3.0,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
    **rest: Any,
) -> Case:
    """Random logits with a standard deviation of `spread`; padded rows of either head are NaN: they must not matter."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, scale: float, pad: int = 0, dtype: torch.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        values = torch.cat([values, torch.full((pad, shape[1]), float("nan"), dtype=torch.float64)])
        return values.to(dtype)

    teacher_dtype = teacher_dtype or dtype
    return Case(
        leaf(tokens, width, scale=spread, dtype=dtype).requires_grad_(),
        leaf(vocab, width, scale=width**-0.5, pad=student_pad, dtype=dtype).requires_grad_(),
        leaf(tokens, teacher_width, scale=spread, dtype=teacher_dtype),
        leaf(vocab, teacher_width, scale=teacher_width**-0.5, pad=teacher_pad, dtype=teacher_dtype),
        **rest,
    )


@dataclass(frozen=True)
class Reference:
    """What the definitions give in fp64: loss, and gradients in full shape.

    size, size_ND, size_VD: loss and gradients with every term of their sums made positive, and a term's own logits
    counted in, whose rounding it inherits: what rounding is relative to.
    logit_ND, logit_VD: the products of the logit gradient, made positive: what rounding it is relative to.
    """

    loss_sum: Tensor
    size: Tensor
    loss_N: Tensor
    grad_ND: Tensor
    grad_VD: Tensor
    size_ND: Tensor
    size_VD: Tensor
    logit_ND: Tensor
    logit_VD: Tensor
    kept_N: Tensor


class Naive:
    """Definitions in fp64; everything of size N×V is simply there."""

    @staticmethod
    def divergence(name: str, logp: Tensor, logq: Tensor, beta: float, threshold: float = 0.4) -> Tensor:
        if name == "eopd":
            unsure = -(logq.exp() * logq).sum(-1) > threshold
            both = [Naive.divergence(kl, logp, logq, beta, threshold) for kl in ("reverse_kl", "forward_kl")]
            return torch.where(unsure, both[0] + both[1], both[0])
        if name == "reverse_kl":
            return (logp.exp() * (logp - logq)).sum(-1)
        if name == "forward_kl":
            return (logq.exp() * (logq - logp)).sum(-1)
        # M = β·P_T + (1 − β)·P_S, as a logarithm that underflow does not reach.
        log_beta = torch.tensor(beta, dtype=torch.float64).log()
        log_rest = torch.tensor(1 - beta, dtype=torch.float64).log()
        logm = torch.logaddexp(logq + log_beta, logp + log_rest)
        return beta * (logq.exp() * (logq - logm)).sum(-1) + (1 - beta) * (logp.exp() * (logp - logm)).sum(-1)

    @staticmethod
    def log_probs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log P_S and log P_T [N, V], the student leaves in fp64, and its logits [N, V]."""
        student_ND = case.student_ND.detach().double().requires_grad_()
        head_VD = case.student_head_VD.detach().double().requires_grad_()
        logits_NV = student_ND @ head_VD[: case.shared].T
        teacher_NV = case.teacher_NE.double() @ case.teacher_head_VE.double()[: case.shared].T / case.temperature
        return (
            (logits_NV / case.temperature).log_softmax(-1),
            teacher_NV.log_softmax(-1),
            student_ND,
            head_VD,
            logits_NV,
        )

    @staticmethod
    def terms(case: Case, logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
        """How much of each token's loss [N, V] a rounding can move: the terms of every closed form of a divergence and
        its logit gradient (p·r, p·kl, p and q), each with the logits behind it, which are off by their own products."""
        p_NV, q_NV, ratio_NV = logp_NV.exp(), logq_NV.exp(), (logp_NV - logq_NV).abs()
        student_ND, head_VD, teacher_NE, head_VE = (tensor.detach().double().abs() for tensor in case.tensors)
        logits_NV = student_ND @ head_VD[: case.shared].T + teacher_NE @ head_VE[: case.shared].T
        terms_NV = p_NV * (1 + ratio_NV + (p_NV * ratio_NV).sum(-1, keepdim=True)) + q_NV * (1 + ratio_NV)
        return (terms_NV * (1 + logits_NV / case.temperature)).detach()

    def loss(self, case: Case) -> Reference:
        logp_NV, logq_NV, student_ND, head_VD, logits_NV = self.log_probs(case)
        tokens = student_ND.shape[0]
        kept_N = torch.ones(tokens, dtype=torch.bool) if case.kept_N is None else case.kept_N
        weight_N = torch.ones(tokens) if case.weight_N is None else case.weight_N
        loss_N = self.divergence(case.divergence, logp_NV, logq_NV, case.beta, case.entropy_threshold)
        loss_sum = (loss_N * weight_N.double())[kept_N].sum()
        grad_ND, grad_VD, grad_NV = torch.autograd.grad(loss_sum, (student_ND, head_VD, logits_NV))
        size = (self.terms(case, logp_NV, logq_NV).sum(-1) * weight_N)[kept_N].sum()

        def products(values_NV: Tensor) -> tuple[Tensor, Tensor]:
            of_VD = torch.zeros_like(grad_VD)
            of_VD[: case.shared] = values_NV.T @ student_ND.detach().abs()
            return values_NV @ head_VD.detach()[: case.shared].abs(), of_VD

        terms_NV = self.terms(case, logp_NV, logq_NV) * (weight_N * kept_N)[:, None] / case.temperature
        sizes = (*products(terms_NV), *products(grad_NV.abs()))
        return Reference(loss_sum.detach(), size, loss_N.detach(), grad_ND, grad_VD, *sizes, kept_N)

    def stats(self, case: Case, token_ids_N: Tensor | None = None) -> dict[str, Tensor]:
        logp_NV, logq_NV, *_ = self.log_probs(case)
        logp_NV, logq_NV = logp_NV.detach(), logq_NV.detach()
        p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
        reverse_kl_N = (p_NV * (logp_NV - logq_NV)).sum(-1)
        fields = {
            "entropy_N": -(p_NV * logp_NV).sum(-1),
            "reverse_kl_N": reverse_kl_N,
            "forward_kl_N": (q_NV * (logq_NV - logp_NV)).sum(-1),
            "teacher_entropy_N": -(q_NV * logq_NV).sum(-1),
            "top1_agree_N": logp_NV.argmax(-1) == logq_NV.argmax(-1),
            "size": self.terms(case, logp_NV, logq_NV).sum(-1),
            "teacher_mass_N": q_NV.gather(-1, logp_NV.argsort(-1)[:, -16:]).sum(-1),
            "grad_norm_N": (p_NV * (logp_NV - logq_NV - reverse_kl_N[:, None])).norm(dim=-1) / case.temperature,
        }
        if token_ids_N is not None:
            own_N1 = logq_NV.gather(-1, token_ids_N[:, None])
            fields["teacher_rank_N"] = (logq_NV > own_N1).sum(-1)
            fields["log_ratio_N"] = (own_N1 - logp_NV.gather(-1, token_ids_N[:, None])).squeeze(-1)
        return fields


@dataclass
class Rule:
    """A selector for tests: `choose(stats)` gives the mask; weights come with it, or from `weigher` on kept rows."""

    choose: Callable[[TokenStats], Tensor]
    needs: frozenset[str] = frozenset()
    needs_kept: frozenset[str] = frozenset()
    weigher: Callable[[TokenStats, Selection], Selection] | None = None
    weights: Callable[[TokenStats], Tensor] | None = None
    normalise_over: str = "micro_batch"
    fixed_budget: bool = True
    seen: list[tuple[TokenStats, int]] = field(default_factory=list)

    def __call__(self, stats: TokenStats, seed: int = 0) -> Selection:
        self.seen.append((stats, seed))
        return Selection(self.choose(stats), None if self.weights is None else self.weights(stats))

    def weigh(self, stats: TokenStats, selection: Selection) -> Selection:
        assert self.weigher is not None
        return self.weigher(stats, selection)


class ProductCounter(TorchDispatchMode):
    """Adds up the multiplications and additions of every matrix product, in place or not (torch's own counter skips
    the in-place ones)."""

    PRODUCTS: ClassVar = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "_linear_pointwise": (0, 1)}

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS:
            left, right = (args[place] for place in self.PRODUCTS[name])
            # [M, K] by [K, N], or by [N, K] in a linear layer: M·K · K·N / K.
            self.flops += 2 * left.numel() * right.numel() // left.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits as wide as on CUDA: a multiple of 64."""
    monkeypatch.setitem(chunks.ROW_MULTIPLE, "cpu", chunks.ROW_MULTIPLE["cuda"])


@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """CUDA's way through the products, whose `out_dtype` torch has on CUDA alone; their left operands."""
    operands: list[Tensor] = []
    start, mm, addmm = Projection.__init__, torch.mm, torch.addmm

    def as_on_cuda(self: Projection, weight_VD: Tensor, product: torch.dtype, wide: torch.dtype, *bias: Any) -> None:
        start(self, weight_VD, product, wide, *bias)
        self.on_cuda, self.onednn, self.weight_VD, self.direct = True, False, weight_VD.to(product), product == wide

    def wide_mm(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        operands.append(left)
        return mm(left.to(out_dtype or left.dtype), right.to(out_dtype or right.dtype), out=out)

    def wide_addmm(total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        operands.append(left)
        return addmm(total, left.to(out_dtype), right.to(out_dtype), out=out)

    monkeypatch.setattr(Projection, "__init__", as_on_cuda)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    return operands


@pytest.fixture(scope="session")
def flops() -> Callable[[Callable[[], Any]], int]:
    """How many multiplications and additions the matrix products of a call make."""

    def count(run: Callable[[], Any]) -> int:
        with ProductCounter() as counter:
            run()
        return counter.flops

    return count


@pytest.fixture(scope="session")
def naive() -> Naive:
    return Naive()


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """See build_case."""
    return build_case


@pytest.fixture(scope="session")
def make_rule() -> Callable[..., Rule]:
    """See Rule."""
    return Rule


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """See tolerance.close."""
    return close

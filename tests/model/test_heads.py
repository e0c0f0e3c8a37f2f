"""Models with a bias, a scale or a soft cap on their logits: found by measuring, proven, trained right, or refused."""

import copy

import pytest
import torch
from tolerance import close, transformer
from torch import nn

from families import FAMILIES, write
from opsd.config import LoraConfig
from opsd.data.packing import empty, pack
from opsd.distill import distill_loss, token_stats
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.topk import top_tokens
from opsd.model.loading import load_scorer
from opsd.model.lora import add_adapters
from opsd.model.scorer import Scorer
from opsd.model.transform import find_transform
from opsd.teacher import LocalTeacher
from opsd.teacher.vllm import read_head
from opsd.types import PLAIN, Transform
from opsd.utils.errors import UserError

CPU, FP32 = torch.device("cpu"), torch.float32
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
TRANSFORMS = {
    "Gemma 2": Transform(1.0, 30.0),
    "Gemma 3n (text)": Transform(1.0, 30.0),
    "Gemma 4 (text)": Transform(1.0, 30.0),
    "Cohere 2": Transform(1 / 16),
    "Granite": Transform(1 / 8),
    "Falcon-H1": Transform(1 / 2),
    "Phi": PLAIN,
    "Phi-MoE": PLAIN,
}
# Of each as a student, another one's head as the teacher's.
PAIRS = list(zip(TRANSFORMS, [*list(TRANSFORMS)[3:], *list(TRANSFORMS)[:3]], strict=True))
BIASED = ("Phi", "Phi-MoE")
VOCABULARY = 49


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*TRANSFORMS, "Qwen3"])
def test_the_transform_is_found_by_measuring(family, dtype):
    model = FAMILIES[family].build().to(dtype)
    assert find_transform(model, "M") == TRANSFORMS.get(family, PLAIN)
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("scale", [1 / 3, 0.0625, 8.25])
def test_a_scale_is_found_to_nine_digits_whatever_the_head_is_like(scale):
    # Logits of 1e-3, as a model with transformers' own spread has them: nothing of a cap or a scale shows on them.
    model = FAMILIES["Cohere 2"].build(logit_scale=scale)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-4)
    assert find_transform(model, "M").scale == pytest.approx(scale, rel=1e-8)


def bent(model, change):
    """The model with something done to its logits."""
    whole = type(model).forward

    def forward(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        found.logits = change(found.logits)
        return found

    model.forward = forward.__get__(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 0.1,  # a shift is no bias of the head's
        lambda logits: logits.abs(),
        lambda logits: -logits,
        lambda logits: logits.clamp(-20, 20),
        lambda logits: torch.where(logits.abs() > 10, logits * 1.001, logits),
        lambda logits: 30 * torch.tanh(logits / 30) + 0.01 * logits,
        lambda logits: logits * torch.linspace(0.9, 1.1, logits.shape[-1]),
        lambda logits: logits[..., :-1],
        lambda logits: torch.full_like(logits, float("nan")),
        lambda logits: torch.zeros_like(logits),
    ],
)
@pytest.mark.parametrize("family", ["Qwen3", "Gemma 2"])
def test_what_is_no_scale_and_no_soft_cap_is_refused_in_a_line(family, change):
    said = r"^M: its logits are not hidden·head \+ bias, scaled and soft-capped; [^\n]+$"
    with pytest.raises(UserError, match=said):
        find_transform(bent(FAMILIES[family].build(), change), "M")


def test_a_model_that_changes_hidden_states_before_its_head_is_refused():
    # It divides them by its width over that of a smaller model.
    with pytest.raises(UserError, match="its logits are not hidden·head"):
        find_transform(FAMILIES["MiniCPM 3"].build(), "M")


def test_a_head_that_is_no_linear_layer_is_refused():
    model = FAMILIES["Qwen3"].build()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match=r"its head is not a plain matrix \(Sequential\)"):
        find_transform(model, "M")


@pytest.mark.parametrize("family", TRANSFORMS)
def test_a_served_teachers_head_is_the_same_read_without_its_layers(family, tmp_path):
    folder = str(write(tmp_path / "model", family))
    whole = load_scorer(folder, "--teacher", FP32, CPU).head.as_head()
    served = read_head(folder, FP32)
    assert served.transform == whole.transform == TRANSFORMS[family]
    assert torch.equal(served.weight_VD, whole.weight_VD)
    assert (served.bias_V is None) == (family not in BIASED)
    assert served.bias_V is None or (torch.equal(served.bias_V, whole.bias_V) and served.bias_V.abs().sum() > 1)


def pair(student, teacher):
    """Both as a run has them, and copies of theirs as transformers makes them.

    All in fp64: random layers at this scale amplify rounding, by how much depends on the processor.
    """
    models = FAMILIES[student].build(), FAMILIES[teacher].build(seed=1)
    transforms = [find_transform(model, "M") for model in models]
    for model in models:
        if model.config.model_type == "phimoe":
            model.set_experts_implementation("eager")  # the fast one knows no fp64
        model.double()
    scorers = [Scorer(copy.deepcopy(model), transform=found) for model, found in zip(models, transforms, strict=True)]
    return *scorers, *models


def own_logs(model, rollouts):
    """log-probabilities [N, 49] of a model's own logits, each rollout alone."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.ids + rollout.response_ids])
        logits_LV = model(ids, use_cache=False).logits[0]
        found.append(logits_LV[len(rollout.prompt.ids) - 1 : -1, :VOCABULARY].log_softmax(-1))
    return torch.cat(found)


@pytest.fixture
def rollouts(make_rollout):
    return [make_rollout(0, [6, 7, 8], list(range(9, 26))), make_rollout(1, [13, 14], [15, 16, 17, 40, 3])]


def losses(scorer, teacher, rollouts, divergence):
    (micro,) = pack(rollouts, 100)
    (teacher_NE,) = teacher.hidden([micro])

    def use(hidden_ND, head):
        models = (hidden_ND, head, teacher_NE, teacher.head_for(empty()))
        about = {"token_ids_N": micro.token_ids_N, "vocab_size": VOCABULARY}
        loss = distill_loss(*models, divergence=divergence, beta=0.3, **about).loss_sum
        return loss, token_stats(*models, **about), top_tokens(check_inputs(*models, **about), 3, LossSpec())

    return scorer(micro, use)


def naive_kl(divergence, log_p, log_q, beta=0.3):
    """A divergence of each token by its definition."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def compare(found, expected, said):
    """All gradients as one, and the bias's by itself; None for a parameter that takes no part on either side."""
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] is None] == [name for name in expected if expected[name] is None]
    one, other = (torch.cat([grad.flatten() for grad in of.values() if grad is not None]) for of in (found, expected))
    close(one, other, *transformer(2, 64, backward=1), 52, said=said)
    if found.get("lm_head.bias") is not None:
        close(found["lm_head.bias"], expected["lm_head.bias"], *transformer(2, 64), 52, said=said)


def gradients(loss, model):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


@pytest.mark.numeric
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_loss_statistics_and_all_gradients_are_those_of_the_models_own_logits(student, teacher, rollouts):
    scorer, teacher_scorer, twin, twin_teacher = pair(student, teacher)
    frozen = LocalTeacher(teacher_scorer, CPU)
    with torch.no_grad():
        log_q = own_logs(twin_teacher, rollouts)
    for divergence in DIVERGENCES:
        loss, stats, (top, _) = losses(scorer, frozen, rollouts, divergence)
        log_p = own_logs(twin, rollouts)
        expected = naive_kl(divergence, log_p, log_q).sum()
        close(loss, expected, *transformer(2, 64), 52)
        found = gradients(loss, scorer.model)
        compare(found, gradients(expected, twin), divergence)
        assert ("lm_head.bias" in found) == (student in BIASED)
    log_p = log_p.detach()
    close(stats.entropy_N, -(log_p.exp() * log_p).sum(-1), *transformer(2, 64), 52)
    close(stats.teacher_entropy_N, -(log_q.exp() * log_q).sum(-1), *transformer(2, 64), 52)
    close(stats.forward_kl_N, naive_kl("forward_kl", log_p, log_q), *transformer(2, 64), 52)
    close(top.log_prob_NK, log_p.topk(3).values, *transformer(2, 64), 52)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["Gemma 2", "Cohere 2", "Phi"])
def test_adapters_get_their_gradients_through_it_and_the_head_none(family, rollouts):
    scorer, teacher_scorer, _, twin_teacher = pair(family, "Granite")
    add_adapters(scorer.model, LoraConfig(rank=2), 0, "")
    for name, parameter in scorer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(scorer.model).double()
    with torch.no_grad():
        log_q = own_logs(twin_teacher, rollouts)
    loss, *_ = losses(scorer, LocalTeacher(teacher_scorer, CPU), rollouts, "reverse_kl")
    found = gradients(loss, scorer.model)
    assert found and all(".lora_" in name for name in found)
    expected = naive_kl("reverse_kl", own_logs(twin, rollouts), log_q).sum()
    compare(found, gradients(expected, twin), family)

"""The loss on a real model's hidden states, against the model's own logits in fp64."""

import pytest
import torch
from tolerance import transformer

from opsd.distill import distill_loss, token_stats

TEXT = "The prime factors of 91 are 7 and 13, so 91 is not a prime number. Next we look at 97,"


def hidden_of(model, ids):
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


@pytest.mark.numeric
@pytest.mark.e2e
@pytest.mark.parametrize(
    ("tied", "divergence"), [(True, "reverse_kl"), (True, "forward_kl"), (True, "jsd"), (False, "reverse_kl")]
)
def test_parameter_gradients_of_smollm2_equal_plain_autograd(tied, divergence, real_models, naive, assert_close):
    student, teacher, ids = real_models(tied)
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert (embedding is head) == tied
    watched = [embedding, student.base_model.layers[0].self_attn.q_proj.weight, student.base_model.norm.weight]
    if not tied:
        watched.append(head)
    with torch.no_grad():
        teacher_hidden = hidden_of(teacher, ids)
    hidden = hidden_of(student, ids)
    # The model's own logits, differentiated by autograd as they are.
    logp = student(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    logq = teacher(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    plain = naive.divergence(divergence, logp, logq.detach(), 0.5).sum()
    expected = torch.autograd.grad(plain, watched)
    result = distill_loss(
        hidden, head, teacher_hidden, teacher.get_output_embeddings().weight, divergence=divergence, chunk_tokens=16
    )
    found = torch.autograd.grad(result.loss_sum, watched)
    # Both ways start from the same hidden states, and what differs in their gradients goes back through the same
    # five layers: each adds about 1/√5 to the stream, and as much of its rounding, that of one layer in all.
    sums = (576, 576, 49_152, ids.shape[1], *transformer(1, 576))
    assert_close(result.loss_sum, plain, *sums)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, *sums)


@pytest.mark.numeric
@pytest.mark.e2e
def test_statistics_of_smollm2_equal_plain_logits(real_models, naive, assert_close):
    student, teacher, ids = real_models(True)
    with torch.no_grad():
        logp = student(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        logq = teacher(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        heads = [model.get_output_embeddings().weight for model in (student, teacher)]
        stats = token_stats(hidden_of(student, ids), heads[0], hidden_of(teacher, ids), heads[1])
    sums = (576, 576, 49_152)
    assert_close(stats.entropy_N, -(logp.exp() * logp).sum(-1), *sums)
    assert_close(stats.reverse_kl_N, naive.divergence("reverse_kl", logp, logq, 0.5), *sums)
    assert_close(stats.forward_kl_N, naive.divergence("forward_kl", logp, logq, 0.5), *sums)
    assert torch.equal(stats.top1_agree_N, logp.argmax(-1) == logq.argmax(-1))


@pytest.fixture(scope="module")
def real_models(thin_smollm2):
    """The lower half of its layers learns from all: student (tied head or not), teacher, and the ids of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = AutoModelForCausalLM.from_pretrained(thin_smollm2.folder).eval()
    ids = AutoTokenizer.from_pretrained(thin_smollm2.folder)(TEXT, return_tensors="pt").input_ids

    def make(tied):
        student = AutoModelForCausalLM.from_pretrained(thin_smollm2.folder, num_hidden_layers=5).eval()
        if not tied:
            own = student.get_output_embeddings()
            own.weight = torch.nn.Parameter(own.weight.detach().clone())
        return student, teacher, ids

    return make

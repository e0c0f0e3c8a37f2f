"""The student: a head in one place that changes nothing else, models that cannot serve, and one vocabulary."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import close, transformer
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    OPTConfig,
)

from opsd.data.packing import pack
from opsd.distill import distill_loss
from opsd.model.checks import check_causal, check_packing
from opsd.model.loading import disable_dropout, load_scorer, load_tokenizer
from opsd.model.scorer import DistillHead, Scorer
from opsd.model.transform import find_transform
from opsd.model.vocabulary import shared_vocabulary
from opsd.types import PLAIN
from opsd.utils.errors import UserError

CPU = torch.device("cpu")
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
SMALL = {
    "vocab_size": 52,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def from_config(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def opt(**settings):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2}
    return from_config(OPTConfig(vocab_size=52, num_hidden_layers=2, init_std=0.3, **sizes, **settings))


# ---- DistillHead


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@TIES
def test_the_head_changes_neither_names_nor_numbers_nor_the_saved_folder(make_model, tmp_path, family, tied):
    model = make_model(family, tied)
    ids = torch.tensor([[6, 7, 8, 9]])
    names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    logits, written = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    model.save_pretrained(tmp_path / "before")

    model = Scorer(model).model
    assert isinstance(model.lm_head, DistillHead)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == parameters
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), written)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "after")(ids).logits, logits)


@pytest.mark.numeric
@pytest.mark.parametrize("memory", ["fused", "whole"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
@TIES
def test_gradients_through_the_head_equal_autograd_on_full_logits(make_model, make_rollout, family, tied, memory):
    student, twin = make_model(family, tied), make_model(family, tied)
    teacher = make_model("llama", False, seed=1, hidden_size=32, head_dim=16)
    rollouts = [
        make_rollout(0, [6, 7, 8], [9, 10, 11, 12, 1], [True, False, False, True, True]),
        make_rollout(1, [13, 14], [15, 16, 17]),
    ]
    scorer, teacher_scorer = Scorer(student), Scorer(teacher)
    (micro,) = pack(rollouts, 100)
    with torch.no_grad():
        teacher_NE = teacher_scorer.hidden(micro)
    teacher_VE = teacher.get_output_embeddings().weight.detach()

    def loss_of(hidden_ND, head_VD):
        return distill_loss(
            hidden_ND, head_VD, teacher_NE, teacher_VE, rollout_N=micro.rollout_N, memory=memory, vocab_size=49
        ).loss_sum

    loss = scorer(micro, loss_of)
    loss.backward()

    # By hand: each rollout alone, all logits, KL(P_S‖P_T) = Σ P_S (log P_S − log P_T) over the 49 shared rows.
    expected = torch.zeros(())
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.ids + rollout.response_ids])
        log_s = twin(ids).logits[0, len(rollout.prompt.ids) - 1 : -1, :49].log_softmax(-1)
        with torch.no_grad():
            log_t = teacher(ids).logits[0, len(rollout.prompt.ids) - 1 : -1, :49].log_softmax(-1)
        kl_N = (log_s.exp() * (log_s - log_t)).sum(-1)
        expected = expected + kl_N[torch.tensor(rollout.student_mask or [True] * len(rollout.response_ids))].sum()
    expected.backward()
    close(loss, expected, *transformer(2, 16), 49)
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        close(ours.grad, theirs.grad, *transformer(2, 16, backward=1), 49, said=name)


def test_under_autocast_hidden_states_are_in_the_compute_type_and_the_head_is_the_parameter(make_model, make_rollout):
    scorer = Scorer(make_model())
    (micro,) = pack([make_rollout(0, [6, 7], [8, 9])], 100)
    seen = {}

    def use(hidden_ND, head):
        seen.update(hidden=hidden_ND.dtype, same=head.weight_VD is scorer.head.weight)

    with torch.autocast("cpu", torch.bfloat16):
        scorer(micro, use)
    assert seen == {"hidden": torch.bfloat16, "same": True}
    scorer(micro, use)
    assert seen == {"hidden": torch.float32, "same": True}


@pytest.mark.numeric
class Casts(TorchDispatchMode):
    """Which weights were turned to another type, by address."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy":
            self.found.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def test_the_loss_finds_no_copies_of_weights_that_autocast_made_for_the_layers(make_model, make_rollout):
    model = make_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    (micro,) = pack([make_rollout(0, [6, 7], [8, 9])], 100)

    def use(hidden_ND, head_VD):
        with Casts() as casts:
            functional.linear(hidden_ND, weight)
            first = weight.data_ptr() in casts.found
            casts.found.clear()
            functional.linear(hidden_ND, weight)
        return first, weight.data_ptr() in casts.found

    with torch.autocast("cpu", torch.bfloat16):
        # Cast anew, and kept from then on: what is looked for can be seen.
        assert Scorer(model)(micro, use) == (True, False)


@pytest.mark.parametrize("memory", ["fused", "whole"])
def test_under_autocast_the_heads_gradient_is_not_rounded_to_the_compute_type(make_model, make_rollout, memory):
    scorer, teacher = Scorer(make_model(tied=False)), Scorer(make_model(seed=1))
    (micro,) = pack([make_rollout(0, [6, 7], [8, 9, 10, 11])], 100)
    with torch.no_grad():
        teacher_NE = teacher.hidden(micro)
    given = []

    def loss_of(hidden_ND, head_VD):
        given.append(hidden_ND.detach().float())
        return distill_loss(hidden_ND, head_VD, teacher_NE, teacher.head.weight.detach(), memory=memory).loss_sum

    with torch.autocast("cpu", torch.bfloat16):
        loss = scorer(micro, loss_of)
    loss.backward()
    found = scorer.head.weight.grad
    # By hand: logits of operands rounded to bf16, in fp32, and their gradients, in fp32.
    head = scorer.head.weight.detach().bfloat16().float().requires_grad_()
    log_q = (teacher_NE.bfloat16().float() @ teacher.head.weight.detach().bfloat16().float().T).log_softmax(-1)
    log_p = (given[0] @ head.T).log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum().backward()
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    # The product may round its operands to bf16, 2^-9 each: a whole rounding of the sum would be one more.
    assert float((found - head.grad).norm()) < 2.0**-8 * float(head.grad.norm())


# ---- models that can or cannot serve


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@TIES
def test_plain_heads_are_accepted_in_both_compute_types(make_model, family, dtype, tied):
    model = make_model(family, tied).to(dtype)
    ids = torch.tensor([[6, 7, 8]])
    before = model(ids).logits
    assert find_transform(model, "M") == PLAIN
    for packed in (False, True):
        check_packing(Scorer(model, packed), "M")
    assert torch.equal(model(ids).logits, before)  # the checks leave nothing behind


@pytest.mark.parametrize("family", ["falcon", "opt"])
def test_a_model_that_mixes_packed_sequences_is_refused_where_they_are_packed(family):
    sizes = {"vocab_size": 52, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = opt() if family == "opt" else from_config(FalconConfig(**sizes, initializer_range=0.3))
    with pytest.raises(UserError, match=r"^M: sequences packed into one row see each other; [^\n]+$"):
        check_packing(Scorer(model, packed=True), "M")
    check_packing(Scorer(model), "M")


def test_a_model_that_mixes_the_sequences_of_a_batch_is_refused(make_model):
    model = make_model()
    # A model that looks at its neighbours: every row is shifted by the mean over the batch.
    model.model.norm.register_forward_hook(lambda _module, _inputs, hidden: hidden + 0.1 * hidden.mean(0))
    with pytest.raises(UserError, match=r"^M: sequences of one batch see each other; [^\n]+$"):
        check_packing(Scorer(model), "M")


def test_a_model_that_looks_ahead_is_refused(make_model):
    check_causal(Scorer(make_model()), "M")
    sizes = SMALL | {"head_dim": 8, "sliding_window": 64, "initializer_range": 0.3}
    for both in (False, True):
        scorer = Scorer(from_config(Gemma3TextConfig(**sizes, use_bidirectional_attention=both)))
        if not both:
            check_causal(scorer, "M")
            continue
        with pytest.raises(UserError, match=r"^M: its hidden states change with the tokens after them [^\n]+$"):
            check_causal(scorer, "M")


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_no_dropout_is_left_in_training_mode(make_model, family):
    if family == "gpt2":  # nn.Dropout modules
        rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        model = from_config(GPT2Config(vocab_size=52, n_embd=16, n_layer=2, n_head=2, **rates))
    elif family == "opt":  # rates handed to functional.dropout
        model = opt(dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    else:
        model = make_model("llama", attention_dropout=0.5)
    ids = torch.arange(6, 20)[None]
    expected = model.eval()(ids, use_cache=False).logits
    assert not torch.allclose(model.train()(ids, use_cache=False).logits, expected)  # dropout was on
    disable_dropout(model)
    close(model.train()(ids, use_cache=False).logits, expected, *transformer(2, 16))


@pytest.mark.numeric
@TIES
def test_a_model_folder_loads_with_dropout_off_and_logits_unchanged(make_model, make_folder, tied):
    model = make_model("llama", tied, attention_dropout=0.5)
    scorer = load_scorer(str(make_folder(model)), "--student", torch.float32, CPU).train()
    ids = torch.tensor([[6, 7, 8, 9]])
    close(scorer.model(ids).logits, model.eval()(ids).logits, *transformer(2, 16))


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])


def drop_head(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shorten_head(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:40].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_weights, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (drop_head, "hold no lm_head.weight"),
        (shorten_head, "hold no lm_head.weight of the shape"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nobody"}'), "nobody"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
    ],
)
def test_a_damaged_model_folder_gives_one_line_with_the_flag_and_the_folder(make_model, make_folder, damage, said):
    folder = make_folder(make_model("llama", tied=False))
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_scorer(str(folder), "--student", torch.float32, CPU)
    assert str(caught.value).startswith(f"--student {folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_a_damaged_tokenizer_gives_one_line(make_folder, text):
    folder = make_folder()
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=rf"^--teacher.model {folder}: its tokenizer cannot be loaded [^\n]+$"):
        load_tokenizer(str(folder), "--teacher.model")


@pytest.mark.parametrize(
    ("path", "said"), [("{tmp}/nothing", "no such folder"), ("{tmp}/file", "is a file"), ("{tmp}", "no config.json")]
)
def test_a_path_that_is_no_model_folder_is_named(tmp_path, path, said):
    (tmp_path / "file").touch()
    path = path.format(tmp=tmp_path)
    for load in (load_tokenizer, lambda p, flag: load_scorer(p, flag, torch.float32, CPU)):
        with pytest.raises(UserError, match=rf"^--student {path}: {said}[^\n]+$"):
            load(path, "--student")


# ---- one vocabulary


def head_of(model):
    return Scorer(model).head.as_head()


def test_padded_heads_of_different_heights_share_the_tokenizers_rows(make_model, tokenizer):
    # ids 0…48 are the tokenizer's: 49 rows, however high the heads are
    heads = head_of(make_model(vocab_size=52)), head_of(make_model("llama", False, vocab_size=64))
    assert shared_vocabulary(tokenizer, tokenizer, *heads) == 49


def test_a_gap_in_the_ids_does_not_shorten_the_vocabulary(make_model, make_tokenizer):
    gapped = make_tokenizer()
    vocab = json.loads(gapped.backend_tokenizer.to_str())
    del vocab["model"]["vocab"]["m"]  # 48 tokens, the largest id still 48
    gapped._tokenizer = type(gapped.backend_tokenizer).from_str(json.dumps(vocab))
    assert len(gapped.get_vocab()) == 48
    assert shared_vocabulary(gapped, gapped, head_of(make_model()), head_of(make_model())) == 49


def test_chat_templates_may_differ(make_model, make_tokenizer):
    heads = head_of(make_model()), head_of(make_model())
    assert shared_vocabulary(make_tokenizer(chat=False), make_tokenizer(), *heads) == 49


@pytest.mark.parametrize(
    ("characters", "difference"),
    [
        # 0 1 2 3 … against 0 1 3 2 …: 2 has id 8 in one and 9 in the other; it is the first to differ
        ("0132456789abcdefghijklmnopqrstuvwxyz +-=?.;", r"\('2' has id 8 and 9\)"),
        ("0123456789abcdefghijklmnopqrstuvwxyz +-=?.", r"\(';' has id 48 and none\)"),
        ("0123456789abcdefghijklmnopqrstuvwxyz +-=?.;!", r"\('!' has id none and 49\)"),
    ],
)
def test_different_tokenizers_give_one_line_with_the_first_difference(
    make_model, tokenizer, make_tokenizer, characters, difference
):
    heads = head_of(make_model()), head_of(make_model())
    with pytest.raises(UserError, match=rf"^--student and --teacher [^\n]*{difference}[^\n]+$"):
        shared_vocabulary(tokenizer, make_tokenizer(characters), *heads)


def test_a_model_with_fewer_rows_than_its_tokenizer_is_refused(make_model, tokenizer):
    said = r"^--teacher: the model has 48 vocabulary rows, its tokenizer 49 \(';' has id 48\); [^\n]+$"
    with pytest.raises(UserError, match=said):
        shared_vocabulary(tokenizer, tokenizer, head_of(make_model()), head_of(make_model(vocab_size=48)))


def test_the_head_alone_is_the_linear_layer(make_model):
    model = make_model()
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    head = DistillHead(model.get_output_embeddings().weight)
    assert torch.equal(head(hidden), functional.linear(hidden, model.get_output_embeddings().weight))

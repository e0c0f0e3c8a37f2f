"""Sampling by transformers: equal to a loop by hand, alone or side by side, and reproducible from its seed."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MiniMaxConfig,
    OpenAIGPTConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from opsd.rollout import HFRollout
from opsd.rollout.hf import cut_at_eos, eos_token_ids
from opsd.types import Prompt, Sampling
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed

EOS = 1
# The model has three rows more than the tokenizer has tokens.
TOKENS = 49
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
RANDOM = Sampling(max_new_tokens=12)


@pytest.fixture(params=["qwen3", "llama"])
def model(request, make_model):
    return make_model(request.param)


def prompts_of(*texts, tokenizer):
    return [Prompt(str(number), text, tokenizer(text).input_ids, None) for number, text in enumerate(texts)]


@pytest.fixture
def prompts(tokenizer):
    return prompts_of("abcdef", "a", "xyz 1+2=", "q0", tokenizer=tokenizer)


@torch.no_grad()
def argmax_loop(model, ids, max_new_tokens, eos=(EOS,)):
    """Greedy decoding of the tokenizer's tokens without cache, batch or padding: the naive way."""
    written = []
    while len(written) < max_new_tokens and not (written and written[-1] in eos):
        logits = model(torch.tensor([ids + written]), use_cache=False).logits[0, -1, :TOKENS]
        written.append(int(logits.argmax()))
    return written


def ids_of(rollouts):
    return [rollout.response_ids for rollout in rollouts]


def test_greedy_equals_an_argmax_loop_prompt_by_prompt(model, tokenizer, prompts):
    rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(rollouts) == [argmax_loop(model, prompt.ids, 12) for prompt in prompts]


def test_ids_count_prompt_by_prompt_though_batches_go_by_length(model, tokenizer, prompts):
    rollouts = HFRollout(model, tokenizer, 3).generate(prompts, 2, GREEDY, seed=0)
    assert [rollout.id for rollout in rollouts] == list(range(8))
    assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(2)]
    assert ids_of(rollouts)[::2] == ids_of(rollouts)[1::2]  # greedy: both samples of a prompt are equal
    assert [rollout.student_mask for rollout in rollouts] == [None] * 8


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_how_many_go_side_by_side_does_not_change_greedy_answers(model, tokenizer, prompts, batch):
    rollouts = HFRollout(model, tokenizer, batch).generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(rollouts) == [argmax_loop(model, prompt.ids, 12) for prompt in prompts]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_the_answer_ends_with_eos_whatever_the_padding_token_is(make_model, make_tokenizer, pad):
    # The most likely token of some step is declared EOS: those answers end there, with it; the others run on.
    model, tokenizer = make_model(), make_tokenizer(pad=pad)
    prompts = prompts_of("abcdef", "a", "xyz 1+2=", "q0", tokenizer=tokenizer)
    free = [argmax_loop(model, prompt.ids, 12, eos=()) for prompt in prompts]
    stop = free[0][3]
    model.generation_config.eos_token_id = stop
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    if pad == "<eos>":
        tokenizer.pad_token = tokenizer.eos_token
    rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 1, GREEDY, seed=0)
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert ids_of(rollouts) == expected
    assert [rollout.truncated for rollout in rollouts] == [stop not in ids for ids in free]
    assert rollouts[0].response_ids[-1] == stop
    assert len({rollout.truncated for rollout in rollouts}) == 2  # both kinds were seen


def test_the_length_limit_is_in_tokens_and_flagged(model, tokenizer, prompts):
    for limit in (1, 5):
        rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 1, Sampling(0.0, max_new_tokens=limit), seed=0)
        free = [argmax_loop(model, prompt.ids, limit) for prompt in prompts]
        assert ids_of(rollouts) == free
        assert [rollout.truncated for rollout in rollouts] == [EOS not in ids for ids in free]


def test_cutting_by_hand():
    assert cut_at_eos([5, 6, 1, 1, 1], [1], 8) == ([5, 6, 1], False)  # what stands behind is padding
    assert cut_at_eos([5, 2, 1], [1, 2], 8) == ([5, 2], False)  # the first of several ends
    assert cut_at_eos([1], [1], 8) == ([1], False)
    assert cut_at_eos([5, 6, 1], [1], 3) == ([5, 6, 1], False)  # EOS on the last place is no truncation
    assert cut_at_eos([5, 6, 7], [1], 3) == ([5, 6, 7], True)


def test_a_model_that_knows_no_eos_writes_to_the_limit(make_model, make_tokenizer):
    model, tokenizer = make_model(), make_tokenizer(pad=None)
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    prompts = prompts_of("abcdef", "a", tokenizer=tokenizer)
    rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 1, GREEDY, seed=0)
    assert ids_of(rollouts) == [argmax_loop(model, prompt.ids, 12, eos=()) for prompt in prompts]
    assert all(rollout.truncated for rollout in rollouts)


def test_every_eos_of_the_models_own_configuration_counts(make_model, tokenizer):
    model = make_model()
    model.generation_config.eos_token_id = [7, 8]
    assert eos_token_ids(model.generation_config, tokenizer) == [7, 8, EOS]
    model.generation_config.eos_token_id = EOS
    assert eos_token_ids(model.generation_config, tokenizer) == [EOS]
    model.generation_config = None
    assert eos_token_ids(model.generation_config, tokenizer) == [EOS]


def test_the_same_seed_gives_the_same_answers_whatever_torch_drew_before(model, tokenizer, prompts):
    engine = HFRollout(model, tokenizer, 3)
    torch.manual_seed(1)
    first = engine.generate(prompts, 4, RANDOM, seed=5)
    torch.manual_seed(2)
    torch.rand(100)
    assert engine.generate(prompts, 4, RANDOM, seed=5) == first
    assert ids_of(engine.generate(prompts, 4, RANDOM, seed=6)) != ids_of(first)
    # neither samples of a prompt nor batches repeat each other
    assert len({tuple(ids) for ids in ids_of(first)}) == 16


def test_sampling_leaves_torchs_own_generator_alone(model, tokenizer, prompts):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    HFRollout(model, tokenizer, 2).generate(prompts, 2, RANDOM, seed=5)
    assert torch.equal(torch.rand(4), expected)


def test_nothing_is_inherited_from_the_folders_generation_config(model, tokenizer, prompts):
    plain = HFRollout(model, tokenizer, 64)
    expected, sampled = plain.generate(prompts, 2, GREEDY, seed=0), plain.generate(prompts, 2, RANDOM, seed=0)
    inherited = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=2,
        top_p=0.1,
        min_p=0.9,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(6, 40)),
        min_new_tokens=12,
        max_length=3,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model.generation_config = inherited
    engine = HFRollout(model, tokenizer, 64)
    assert engine.generate(prompts, 2, GREEDY, seed=0) == expected
    assert engine.generate(prompts, 2, RANDOM, seed=0) == sampled
    assert model.generation_config is inherited  # it goes into the checkpoint as it came


def test_the_models_mode_is_put_back(model, tokenizer, prompts, monkeypatch):
    model.train()
    engine = HFRollout(model, tokenizer, 64)
    engine.generate(prompts, 1, GREEDY, seed=0)
    assert model.training
    monkeypatch.setattr(model, "prepare_inputs_for_generation", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate(prompts, 1, GREEDY, seed=0)
    assert model.training and model.config._attn_implementation == "sdpa"


def test_temperature_1_samples_from_the_models_own_distribution(make_model, make_tokenizer):
    # 4000 first tokens against softmax(logits): Σ (seen − expected)²/expected over the tokens with at least 5
    # expected is about χ² with as many degrees of freedom; the bound is its mean + 5 standard deviations. The
    # distribution is flat over 120 tokens, so that a cut at the library's default of the 50 most likely would show.
    model = make_model("llama", vocab_size=120, initializer_range=0.05)
    tokenizer = make_tokenizer("".join(chr(ord("0") + place) for place in range(114)))  # and six special ones
    (prompt,) = prompts_of("ab", tokenizer=tokenizer)
    with torch.no_grad():
        expected_V = 4000 * model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)
    rollouts = HFRollout(model, tokenizer, 1000).generate([prompt], 4000, Sampling(max_new_tokens=1), seed=0)
    seen_V = torch.bincount(torch.tensor([ids[0] for ids in ids_of(rollouts)]), minlength=120)
    often = expected_V >= 5
    chi_squared = float(((seen_V - expected_V) ** 2 / expected_V)[often].sum())
    degrees = int(often.sum())
    assert degrees > 100
    assert chi_squared < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("sampling", [Sampling(top_k=1, max_new_tokens=8), Sampling(top_p=1e-6, max_new_tokens=8)])
def test_top_k_and_top_p_are_applied(model, tokenizer, prompts, sampling):
    # only the most likely token is left
    rollouts = HFRollout(model, tokenizer, 64).generate(prompts, 1, sampling, seed=0)
    assert ids_of(rollouts) == [argmax_loop(model, prompt.ids, 8) for prompt in prompts]


def test_temperature_divides_the_logits(make_model, tokenizer):
    # doubled logits at temperature 2 are the logits at temperature 1
    model = make_model("llama", tied=False)
    (prompt,) = prompts_of("ab", tokenizer=tokenizer)
    expected = HFRollout(model, tokenizer, 64).generate([prompt], 8, Sampling(1.0, max_new_tokens=8), seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    again = HFRollout(model, tokenizer, 64).generate([prompt], 8, Sampling(2.0, max_new_tokens=8), seed=0)
    assert ids_of(again) == ids_of(expected)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, Sampling(0.7, 0.9, 10, 12)])
def test_rows_without_a_token_are_never_drawn_however_likely(make_model, tokenizer, prompts, sampling):
    # Against the same model without those rows: they are not only left out, the others' chances are those among them.
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[TOKENS:] *= 20
        favourites = model(torch.tensor([prompts[0].ids])).logits[0].argmax(-1)
    assert int(favourites.max()) >= TOKENS
    narrow = copy.deepcopy(model)
    narrow.resize_token_embeddings(TOKENS)
    ours, theirs = (HFRollout(each, tokenizer, 64).generate(prompts, 4, sampling, seed=0) for each in (model, narrow))
    assert ours == theirs
    assert max(max(ids) for ids in ids_of(ours)) < TOKENS


def test_no_prompts_give_no_rollouts(model, tokenizer):
    assert HFRollout(model, tokenizer, 64).generate([], 4, GREEDY, seed=0) == []


def test_batches_draw_from_streams_of_their_own(make_model, tokenizer):
    # twice the same prompt, one rollout a batch: a shared stream would make them equal
    prompts = prompts_of("ab", "ab", tokenizer=tokenizer)
    first, second = HFRollout(make_model(), tokenizer, 1).generate(prompts, 1, RANDOM, seed=0)
    assert first.response_ids != second.response_ids
    assert derive_seed(0, "generate", 0) != derive_seed(0, "generate", 1)


# ---- models whose caches are their own

SIZES = {"vocab_size": 52, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}


def own_cache(config):
    """A model whose matrices are wide enough that what it remembers decides the next token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.35)
    return model


@pytest.mark.parametrize(
    "config",
    [
        RecurrentGemmaConfig(**SIZES, num_key_value_heads=1, lru_width=32, attention_window_size=16),
        MiniMaxConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_where_padding_or_leaving_rows_out_changes_a_model_rows_of_one_length_go_together(config, tokenizer):
    prompts = prompts_of("abcdef", "ab", "xyz 1+2=", "q0", "ghijkl", "yz", tokenizer=tokenizer)
    sampler = HFRollout(model := own_cache(config), tokenizer, 64, eos_ids=(ends := range(2, 49, 8)))
    assert sampler.switches == {0}
    written = ids_of(sampler.generate(prompts, 1, GREEDY, seed=0))
    assert written == [argmax_loop(model, prompt.ids, 12, ends) for prompt in prompts]


@pytest.mark.parametrize(
    "config",
    [
        OpenAIGPTConfig(vocab_size=52, n_embd=32, n_layer=2, n_head=4),
        RwkvConfig(vocab_size=52, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_cannot_be_decoded_on_a_cache_is_refused(config, tokenizer):
    with pytest.raises(UserError, match=r"^model [^\n]* transformers cannot sample from it here [^\n]+$"):
        HFRollout(own_cache(config), tokenizer, 4).generate(prompts_of("ab", tokenizer=tokenizer), 1, GREEDY, seed=0)


def test_a_model_that_is_well_is_sampled_as_without_the_check(model, tokenizer):
    assert HFRollout(model, tokenizer, 4).switches == frozenset()

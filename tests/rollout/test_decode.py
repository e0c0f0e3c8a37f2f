"""The decode loop against transformers' own generate, token for token, and what it leaves behind: nothing."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    GenerationConfig,
    LogitsProcessorList,
    MambaConfig,
    MistralConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.rollout import HFRollout
from opsd.rollout.attention import GrowingLayer, decode_attention, new_cache
from opsd.rollout.hf import cut_at_eos, eos_token_ids
from opsd.rollout.onednn import LEAST_WEIGHTS, onednn_weights
from opsd.types import Prompt, Sampling
from opsd.utils.errors import RunStopped
from opsd.utils.seeding import derive_seed

TOKENS = 49  # of the tokenizer; the models have 52 rows
SIZES = {
    "vocab_size": 52,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
# Windows of 6 tokens, which the longest prompt overflows; one family of windows alone, one of both kinds of layers.
GEMMA3 = Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
MISTRAL = MistralConfig(**SIZES, sliding_window=6)
FALCON_H1 = FalconH1Config(
    **SIZES, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1
)
MAMBA = MambaConfig(vocab_size=52, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=1, pad_token_id=0)
FAMILIES = ["qwen3", "llama", "gemma3", "mistral", "falcon_h1", "mamba"]


def build(make_model, family):
    """A random model in fp64, in which no two programs ever draw differently by rounding."""
    if family in ("qwen3", "llama"):
        return make_model(family, num_attention_heads=4, num_key_value_heads=2).double()
    config = {"gemma3": GEMMA3, "mistral": MISTRAL, "falcon_h1": FALCON_H1, "mamba": MAMBA}[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for weight in model.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=0.3)
    return model.eval()


class DrawOne:
    """A logits processor that leaves one token possible: the naive form of what `opsd.rollout.sampling` draws."""

    def __init__(self, seed, ids, width):
        self.streams = [torch.Generator().manual_seed(derive_seed(seed, "draws", number)) for number in ids]
        self.width = width

    def __call__(self, input_ids, scores):
        left = torch.full_like(scores, float("-inf"))
        for row, stream in enumerate(self.streams):
            draw = torch.rand(1, generator=stream, dtype=torch.float64)
            mass = scores[row].double().softmax(-1).cumsum(-1)
            left[row, int((mass <= draw * mass[-1]).sum())] = 0.0
        return left


def generated(model, tokenizer, prompts, samples, sampling, seed):
    """The same answers by `generate`, all in one batch: (id, token ids, cut by the length limit)."""
    jobs = [(number * samples + k, prompt) for number, prompt in enumerate(prompts) for k in range(samples)]
    width = max(len(prompt.ids) for _, prompt in jobs)
    ids_BL = torch.tensor([[0] * (width - len(prompt.ids)) + prompt.ids for _, prompt in jobs])
    mask_BL = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for _, prompt in jobs])
    steps = LogitsProcessorList([lambda _, scores: scores[:, : len(tokenizer)]])
    if sampling.temperature:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(DrawOne(seed, [number for number, _ in jobs], width))
    eos = eos_token_ids(model.generation_config, tokenizer)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=eos or None, pad_token_id=0
    )
    kept, model.generation_config = model.generation_config, GenerationConfig()
    out = model.generate(ids_BL, attention_mask=mask_BL, generation_config=config, logits_processor=steps)
    model.generation_config = kept
    answers = [cut_at_eos(ids, eos, sampling.max_new_tokens) for ids in out[:, width:].tolist()]
    return [(number, *answer) for (number, _), answer in zip(jobs, answers, strict=True)]


def decoded(model, tokenizer, prompts, samples, sampling, seed, batch=64):
    rollouts = HFRollout(model, tokenizer, batch).generate(prompts, samples, sampling, seed)
    return [(rollout.id, rollout.response_ids, rollout.truncated) for rollout in rollouts]


@pytest.fixture
def prompts(tokenizer):
    texts = ["abcdef", "a", "xyz 1+2=", "q0"]
    return [Prompt(str(n), text, tokenizer(text).input_ids, None) for n, text in enumerate(texts)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(0.0, max_new_tokens=20), marks=pytest.mark.e2e),
        pytest.param(Sampling(max_new_tokens=20), marks=pytest.mark.e2e),
        Sampling(0.7, top_p=0.9, top_k=10, max_new_tokens=20),
        Sampling(max_new_tokens=1),
    ],
    ids=["greedy", "temperature 1", "temperature 0.7, top-k, top-p", "one token"],
)
def test_token_for_token_what_generate_writes(make_model, tokenizer, prompts, family, sampling):
    model = build(make_model, family)
    # Several end tokens, so that rows leave the batch at different lengths, down to a few.
    model.generation_config.eos_token_id = [1, *range(10, 14)]
    expected = generated(model, tokenizer, prompts, 3, sampling, 5)
    assert decoded(model, tokenizer, prompts, 3, sampling, 5) == expected
    if sampling.temperature and sampling.max_new_tokens > 1:
        assert len({len(ids) for _, ids, _ in expected}) > 3


@pytest.mark.e2e
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_draws_are_the_same_whatever_is_side_by_side(make_model, tokenizer, prompts, family):
    model, sampling = build(make_model, family), Sampling(max_new_tokens=20)
    expected = decoded(model, tokenizer, prompts, 3, sampling, 5)
    for batch in (1, 2, 5):
        assert decoded(model, tokenizer, prompts, 3, sampling, 5, batch) == expected
    # One prompt fewer at the end changes no other's draws.
    assert decoded(model, tokenizer, prompts[:3], 3, sampling, 5) == expected[:9]


def test_layers_of_a_window_or_a_state_keep_transformers_own_cache():
    kinds = [[type(layer).__name__ for layer in new_cache(config, 9).layers] for config in (GEMMA3, MISTRAL, FALCON_H1)]
    assert kinds == [
        ["DynamicSlidingWindowLayer", "GrowingLayer"],
        ["DynamicSlidingWindowLayer"] * 2,
        ["LinearAttentionAndFullAttentionLayer"] * 2,
    ]


def test_a_growing_layer_holds_what_was_put_in_and_moves_it_seldom():
    layer, parts, rooms = GrowingLayer(300), [], set()
    for tokens in (7, *[1] * 200):
        parts.append(torch.randn(3, 2, tokens, 4))
        keys, values = layer.update(parts[-1], -parts[-1])
        rooms.add(keys.untyped_storage().data_ptr())
        assert torch.equal(keys, torch.cat(parts, dim=2)) and torch.equal(values, -keys)
    assert layer.get_seq_length() == 207 and len(rooms) <= 4  # 71, 136, 205, 300
    layer.reorder_cache(torch.tensor([2, 0]))
    assert layer.keys is not None and torch.equal(layer.keys, torch.cat(parts, dim=2)[[2, 0]])
    new = torch.randn(2, 2, 1, 4)
    assert torch.equal(layer.update(new, new)[0][:, :, -1:], new) and layer.get_seq_length() == 208


def test_under_autocast_the_cache_is_in_the_compute_type_and_gives_the_same_bits(make_model):
    """transformers' own is in fp32 there, and attention rounds all of it for every token."""
    model = make_model("qwen3", num_attention_heads=4, num_key_value_heads=2)
    ids_BL = torch.randint(6, 49, (3, 9))
    found, types = [], []
    for cache in (new_cache(model.config, 9), DynamicCache(config=model.config)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(ids_BL[:, :8], past_key_values=cache, use_cache=True)
            found.append(model(ids_BL[:, 8:], past_key_values=cache, use_cache=True).logits)
        types.append({states.dtype for layer in cache.layers for states in (layer.keys, layer.values)})
    torch.clear_autocast_cache()
    assert types == [{torch.bfloat16}, {torch.float32}]
    assert torch.equal(*found)


def test_shared_heads_attend_as_by_sdpa(make_model):
    """One query per row against the cache, with padding in front: within rounding of fp64."""
    model = make_model("llama", num_attention_heads=4, num_key_value_heads=2).double()
    ids_BL, mask_BL = torch.randint(6, 49, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask_BL[1, :4] = 0
    found = []
    for context in (contextlib.nullcontext(), decode_attention(model)):
        with torch.no_grad(), context:
            cache = new_cache(model.config, 9)
            common = {"past_key_values": cache, "use_cache": True}
            model(ids_BL[:, :8], attention_mask=mask_BL[:, :8], **common)
            found.append(model(ids_BL[:, 8:], attention_mask=mask_BL, **common).logits)
    assert float((found[0] - found[1]).abs().max()) < 1e-12


def test_training_goes_on_after_sampling_whatever_the_model_made_while_it_ran(make_model, tokenizer):
    """Rotary frequencies for a text beyond the model's length are made anew within the forward pass."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = make_model("llama", max_position_embeddings=16, rope_parameters=rope)
    prompt = Prompt("0", "", [6 + n % 40 for n in range(20)], None)
    HFRollout(model, tokenizer, 4).generate([prompt], 4, Sampling(max_new_tokens=8), 0)
    held = [v for m in model.modules() for v in (*vars(m).values(), *m.buffers(), *m.parameters())]
    assert not any(isinstance(value, torch.Tensor) and value.is_inference() for value in held)
    model.train()
    model(torch.tensor([prompt.ids])).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_training_under_autocast_goes_on_after_sampling_within_it(make_model, tokenizer, prompts):
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        engine = HFRollout(model, tokenizer, 4)
        first = engine.generate(prompts, 2, Sampling(0.0, max_new_tokens=8), 0)
        model(torch.tensor([prompts[0].ids])).logits.sum().backward()
        assert engine.generate(prompts, 2, Sampling(0.0, max_new_tokens=8), 0) == first
    assert all(weight.grad is not None for weight in model.parameters())


def test_weights_in_onednns_layout_multiply_as_the_weights_do_and_are_gone_afterwards(make_model):
    model = make_model("llama", hidden_size=256, intermediate_size=512, vocab_size=300, tied=False)
    hidden_ND = torch.randn(5, 256)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    expected = [layer(hidden_ND).detach() for layer in layers if layer.in_features == 256]
    with onednn_weights(model, rows=8, tokens=64):
        replaced = {layer for layer in layers if "forward" in vars(layer)}
        found = [layer(hidden_ND).detach() for layer in layers if layer.in_features == 256]
    assert replaced == {layer for layer in layers if layer.weight.numel() >= LEAST_WEIGHTS} != set()
    assert model.lm_head in replaced and replaced != set(layers)
    for a, b in zip(found, expected, strict=True):
        # A sum of 256 products in another order.
        assert float((a - b).abs().max()) <= 256 * torch.finfo(torch.float32).eps * float(b.abs().max())
    assert not any("forward" in vars(layer) for layer in layers)
    with onednn_weights(model, rows=1, tokens=64):
        assert not any("forward" in vars(layer) for layer in layers)


def test_logits_that_are_not_finite_stop_the_run(make_model, tokenizer, prompts):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunStopped, match="rollout 1: the model's logits are not finite"):
        decoded(model, tokenizer, prompts[:2], 1, Sampling(max_new_tokens=4), 0)


@pytest.mark.own_process
@pytest.mark.e2e
def test_a_real_model_writes_what_generate_writes(thin_smollm2):
    """SmolLM2: nine query heads on three key-value heads, 49,152 tokens; greedy in fp32, draws in fp64.

    In fp32 two programs draw differently now and then: sums over so many tokens are off by more than the rare ones.
    """
    tokenizer = AutoTokenizer.from_pretrained(thin_smollm2.folder)
    model = AutoModelForCausalLM.from_pretrained(thin_smollm2.folder, dtype=torch.float32)
    texts = ["The capital of France is", "One", "def add(a, b):\n    return"]
    prompts = [Prompt(str(n), text, tokenizer(text).input_ids, None) for n, text in enumerate(texts)]
    greedy, random = Sampling(0.0, max_new_tokens=24), Sampling(max_new_tokens=24)
    assert decoded(model, tokenizer, prompts, 2, greedy, 3) == generated(model, tokenizer, prompts, 2, greedy, 3)
    model.double()
    assert decoded(model, tokenizer, prompts, 2, random, 3) == generated(model, tokenizer, prompts, 2, random, 3)

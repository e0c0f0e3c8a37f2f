"""What a sampler of vLLM is told of a tiny model, as `opsd.build` tells it."""

from opsd.model.stops import eos_token_ids
from opsd.model.vocabulary import vocabulary_size


def vllm_settings(path, tokenizer, engine, rollout, longest=96) -> dict:
    return {
        "path": path,
        "eos_ids": eos_token_ids(engine.student.model.generation_config, tokenizer),
        "dtype": "float32",
        "max_model_tokens": longest,
        "batch_rollouts": rollout.generate_batch,
        "memory_share": rollout.gpu_memory_share,
        "trust": False,
        "vocab_size": vocabulary_size(tokenizer),
    }

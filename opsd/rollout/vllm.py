"""Rollouts by vLLM in the training processes. In training its weights are updated after every step, and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from opsd.config import RolloutConfig
from opsd.engine import Engine
from opsd.model.files import in_pieces
from opsd.rollout.base import RolloutEngine, gather_rollouts, jobs_of
from opsd.rollout.hf import cut_at_eos
from opsd.rollout.probe import Probe
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.distributed import ONE_RANK, Ranks, before_leaving
from opsd.utils.errors import said
from opsd.utils.seeding import derive_seed

# What to do if vLLM cannot be used.
INSTEAD = "give --rollout.engine hf"


class VLLMSampler(RolloutEngine):
    """A model folder in vLLM, in this process: RolloutEngine with fixed weights.

    dtype: "float32", "bfloat16" or "auto" (as in config.json). max_model_tokens: longest prompt plus response.
    batch_rollouts: sampled at once. memory_share: fraction of a GPU's memory. With several `ranks`, each group of
    `tensor_parallel` ranks is one sampler, and the samplers divide the rollouts. Every rollout is a request with its
    own seed, from (seed, rollout id), so it does not depend on the sampler. vocab_size: only ids below it are sampled
    (None: all).
    """

    def __init__(
        self,
        path: str,
        eos_ids: list[int],
        device: torch.device,
        dtype: str,
        max_model_tokens: int,
        batch_rollouts: int,
        memory_share: float = 0.9,
        tensor_parallel: int = 1,
        ranks: Ranks = ONE_RANK,
        sleeps: bool = False,
        trust: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self._ranks, self._width, self._eos_ids = ranks, tensor_parallel, eos_ids
        self._sleeps = sleeps and device.type == "cuda"
        self._vllm = import_vllm(device)
        self._llm = self._vllm.LLM(
            model=path,
            # Other formats are pickles, which can execute code. trust: the folder's own code may run.
            load_format="safetensors",
            trust_remote_code=trust,
            dtype=dtype,
            max_model_len=max_model_tokens,
            max_num_seqs=batch_rollouts,
            tensor_parallel_size=self._width,
            # Under a launcher the ranks exist already; vLLM uses them instead of starting processes.
            distributed_executor_backend="external_launcher" if ranks.world_size > 1 else "uni",
            gpu_memory_utilization=memory_share,
            enable_sleep_mode=self._sleeps,
            enforce_eager=device.type == "cpu",
            logits_processors=None if vocab_size is None else [_only_tokens(vocab_size)],
            # Sampling is stated with every request; nothing is inherited from the model's folder.
            generation_config="vllm",
            skip_tokenizer_init=True,
            disable_log_stats=True,
            seed=0,
            **_shared_memory(device, ranks),
        )
        # vLLM's shutdown destroys the ranks' process group, so it must come before `leave` does that.
        before_leaving(self._llm.llm_engine.engine_core.shutdown)

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        samplers = Ranks(self._ranks.rank // self._width, self._ranks.world_size // self._width)
        jobs = jobs_of(prompts, samples, samplers)
        answers = self.sample([(number, prompt.ids) for number, prompt in jobs], sampling, seed)
        written = rollouts_of(jobs, answers, self._eos_ids, sampling)
        # All ranks of a sampler have its rollouts; only the first of them contributes them.
        return gather_rollouts(written if self._ranks.rank % self._width == 0 else [], self._ranks)

    def sample(self, jobs: list[tuple[int, list[int]]], sampling: Sampling, seed: int) -> list[list[int]]:
        """The sampled ids after each (rollout id, prompt ids); draws depend on (seed, rollout id)."""
        params = [self._params(sampling, seed, number) for number, _ in jobs]
        return [list(output.outputs[0].token_ids) for output in self._run([ids for _, ids in jobs], params)]

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights one by one as they come, and drop what was cached for the old ones."""
        # The worker's method, not its model runner's: it sets the current config, which layers may read.
        self._llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=iter(weights)))
        self._llm.reset_prefix_cache()

    def score(self, ids: list[int]) -> list[float]:
        """The log-probability of every token but the first, in nats."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._run([ids], [params])
        pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        return [chances[token].logprob for token, chances in pairs]

    def sync(self) -> None:
        """Nothing to do: the weights are fixed."""

    def _run(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        """vLLM's output for each prompt, in order."""
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        return self._llm.generate(requests, params, use_tqdm=False) if requests else []

    def _params(self, sampling: Sampling, seed: int, number: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_new_tokens,
            seed=derive_seed(seed, "draws", number),
            stop_token_ids=self._eos_ids,
            detokenize=False,
        )


class VLLMRollout(VLLMSampler):
    """A sampler for training: it gets the student's new weights after every step, checked by a probe.

    settings: VLLMSampler's arguments as JSON values, for a folder with the plain weights of `engine`'s student. On a
    GPU it may sleep from the end of a rollout to the next `sync`; then it stays awake until the next rollout ends.
    """

    # While asleep it has neither weights nor KV cache.
    _asleep = False

    def __init__(self, engine: Engine, rollout: RolloutConfig, settings: dict[str, Any]) -> None:
        path = settings["path"]
        with said(f"--rollout.engine vllm: it cannot load {path}", INSTEAD):
            super().__init__(
                **settings,
                device=engine.device,
                tensor_parallel=rollout.tensor_parallel,
                ranks=engine.ranks,
                sleeps=rollout.sleep,
            )
        self._engine = engine
        self._probe = Probe(engine, settings["dtype"], rollout.probe_tolerance, settings["max_model_tokens"])
        if in_pieces(engine.student.model):
            # Some layers cannot reload weights that come in pieces; find out now, not after the first step.
            with said(f"--rollout.engine vllm: it cannot reload the weights of {path}", INSTEAD):
                self._load_weights()
                self._probe.try_out(self._scores, settings["vocab_size"])
        self._rest()

    def generate(self, prompts: list[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Rollout]:
        self._wake()
        rollouts = super().generate(prompts, samples, sampling, seed)
        self._probe.take(rollouts, self._scores)
        self._rest()
        return rollouts

    def sync(self) -> None:
        """See RolloutEngine. Goes parameter by parameter, so that no second full copy exists.

        Raises RunStopped, on every rank, if sampler and trainer then disagree on a probe.
        """
        if self._asleep:
            self._wake()
        else:
            self._load_weights()
        self._probe.check(self._scores)

    def _load_weights(self) -> None:
        self.load(self._engine.gathered())

    def _scores(self, ids: list[int]) -> list[list[float]]:
        return [self.score(ids)]

    def _wake(self) -> None:
        """Allocate GPU memory again: first for the weights, which are then loaded, and only then for the cache."""
        if not self._asleep:
            return
        self._llm.wake_up(["weights"])
        self._load_weights()
        self._llm.wake_up(["kv_cache"])
        self._asleep = False

    def _rest(self) -> None:
        """Free GPU memory. Level 2 keeps no copy of the weights: the trainer has them, and soon newer ones."""
        if self._sleeps:
            self._llm.sleep(level=2)
            self._asleep = True


def rollouts_of(
    jobs: list[tuple[int, Prompt]], answers: list[list[int]], eos_ids: list[int], sampling: Sampling
) -> list[Rollout]:
    """Each job's answer as a rollout, cut after its first end token."""
    return [
        Rollout(number, prompt, *cut_at_eos(ids, eos_ids, sampling.max_new_tokens))
        for (number, prompt), ids in zip(jobs, answers, strict=True)
    ]


def import_vllm(device: torch.device) -> Any:
    """Import vLLM, set to stay in this process and to log only errors."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cpu":
        # Bound threads would take cores from the trainer; by default the cache would take half of the memory.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    return vllm


def _shared_memory(device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Arguments that name the shared memory of ranks on a CPU after this run: see `opsd.rollout.cpu_worker`."""
    if device.type != "cpu" or ranks.world_size == 1:
        return {}
    worker = "opsd.rollout.cpu_worker.RunCPUWorker"
    return {"worker_cls": worker, "additional_config": {"run": ranks.broadcast(uuid4().hex)}}


def _only_tokens(vocab_size: int) -> type:
    """A logits processor for vLLM that excludes ids from `vocab_size` on, as `opsd.rollout.sampling` does.

    vLLM takes a class and instantiates it. One class serves both of its model runners: V2, used on a GPU, refuses a
    class with V1's interface, and vice versa. They pass different arguments to it and to `apply`; none is needed.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor as ForV1
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ForV2

    class OnlyTokens(ForV1, ForV2):
        def __init__(self, vllm_config: Any, *_: Any) -> None:
            pass

        def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
            logits[:, vocab_size:] = float("-inf")
            return logits

        def is_argmax_invariant(self) -> bool:
            # An excluded id may have the largest logit.
            return False

        def update_state(self, batch_update: Any) -> None:
            pass

    return OnlyTokens

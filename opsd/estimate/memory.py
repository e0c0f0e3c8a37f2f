"""The peak memory of a GPU by phase and part, estimated from settings and what the code allocates; and a rough time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opsd.config import TrainConfig
from opsd.distill.chunks import BLOCK_BYTES, most_held_rows, most_rows, row_width
from opsd.distill.divergence import SCRATCH_BUFFERS
from opsd.estimate.hardware import Hardware
from opsd.estimate.shapes import ModelShape
from opsd.utils.errors import UserError

GIB = 2**30
WIDE = 4  # bytes of a logit, a master weight and a moment: all fp32
# Whole [K, V] fp32 buffers alive at the worst moment of --loss.memory whole: both models' logits, and what autograd
# keeps for backward.
WHOLE_BUFFERS = {"reverse_kl": 5, "forward_kl": 4, "jsd": 8, "eopd": 8, "forward_then_reverse": 5, "sampled_token": 5}
# DeepSpeed's defaults, in elements: gradients that are reduced at once, and weights gathered at once under ZeRO-3.
REDUCE_BUCKET, LIVE_WEIGHTS = 500_000_000, 1_000_000_000
# Assumed, not measured: CUDA's context, NCCL and memory fragmentation. On a CPU: Python with torch and transformers.
PROCESS_GIB = {"cuda": 2.0, "cpu": 0.6}
# Seconds of Python and kernel launches in one layer's forward pass, with transformers.
LAYER_CALL_S = 2e-4


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory and time of one rank, for one pair of models. All lengths are the longest that the settings allow."""

    config: TrainConfig
    student: ModelShape
    teacher: ModelShape
    hardware: Hardware

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute type."""
        dtype = self.config.engine.dtype
        return 2 if dtype == "bfloat16" or (dtype == "auto" and self.hardware.kind == "cuda") else 4

    @property
    def longest(self) -> int:
        r, t = self.config.rollout, self.config.teacher
        prompt = r.max_prompt_tokens if t.context is None else max(r.max_prompt_tokens, t.max_prompt_tokens)
        return prompt + r.max_new_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens of a step over all ranks, with every rollout at its maximum length."""
        return self.config.prompts_per_step * self.config.rollout.samples_per_prompt * self.longest

    @property
    def rank_tokens(self) -> int:
        return math.ceil(self.step_tokens / self.hardware.gpus)

    @property
    def micro_tokens(self) -> int:
        """L: a single rollout is never split, and a step may be smaller than a micro-batch."""
        return min(max(self.config.engine.micro_batch_tokens, self.longest), self.step_tokens)

    @property
    def zero(self) -> int | None:
        """The ZeRO stage; None is the torch engine."""
        return self.config.engine.zero_stage if self.config.engine.kind == "deepspeed" else None

    @property
    def masked(self) -> bool:
        """Whether attention needs a mask: sdpa over a packed row, a layout that only ZeRO-3 uses."""
        return self.zero == 3 and not self.hardware.flash

    @property
    def autocast(self) -> bool:
        """Whether weights are fp32 and products bf16."""
        return self.itemsize == 2 and not self.zero

    @property
    def trained(self) -> int:
        """Trained parameters: all, or the adapters'."""
        rank, s = self.config.lora.rank, self.student
        if not rank:
            return s.parameters
        sides = {
            "q_proj": s.hidden + s.query_width,
            "k_proj": s.hidden + s.kv_width,
            "v_proj": s.hidden + s.kv_width,
            "o_proj": s.query_width + s.hidden,
            "gate_proj": s.hidden + s.ffn,
            "up_proj": s.hidden + s.ffn,
            "down_proj": s.ffn + s.hidden,
        }
        targets = self.config.lora.target_modules
        chosen = sides if targets == ("all-linear",) else targets
        if unknown := sorted(set(chosen) - set(sides)):
            raise UserError(f"--lora.target_modules {unknown[0]}: the planner knows {', '.join(sides)}")
        return rank * s.layers * sum(sides[name] for name in chosen)

    def share(self, stage: int) -> int:
        """The number of ranks that share whatever ZeRO partitions from `stage` on; 1 below that stage."""
        return self.hardware.gpus if (self.zero or 0) >= stage else 1

    def states(self) -> dict[str, float]:
        """Bytes of weights, gradients and the optimiser's state on a rank."""
        engine, frozen = self.config.engine, self.student.parameters if self.config.lora.rank else 0
        held = self.itemsize if self.zero else WIDE
        weights = (self.trained * held + frozen * self.itemsize) / self.share(3)
        moments = 2 * WIDE if self.config.optim.kind == "adamw" else 0
        # ZeRO keeps fp32 weights in addition to those in the compute type.
        state = self.trained * (moments + (WIDE if self.zero else 0)) / self.share(1)
        return {
            "student weights": 0.0 if engine.offload_parameters else weights,
            "gradients": self.trained * WIDE / self.share(2),
            "optimiser": 0.0 if engine.offload_optimizer else state,
        }

    def layer_bytes(self) -> float:
        """Bytes that autograd keeps per token of one layer, without masks; counted on transformers' own layers."""
        s, i = self.student, self.itemsize
        norms_and_inputs = 24 if i == 4 else (26 if self.autocast else 16)
        # With a mask, sdpa repeats keys and values for every query head.
        attention = 2 * s.query_width + 2 * (s.query_width if self.masked else s.kv_width)
        small = 8 + 4 * s.heads
        if s.head_norms:
            small += (8 if i == 4 else 6) * (s.query_width + s.kv_width) + 4 * (s.heads + s.kv_heads)
        return norms_and_inputs * s.hidden + i * (attention + 4 * s.ffn) + small

    def activations(self) -> dict[str, float]:
        """Bytes that a micro-batch's forward keeps for backward, and that one layer's backward takes in addition."""
        s, i, tokens, layers = self.student, self.itemsize, self.micro_tokens, self.kept_layers
        ends = (2 * i + 4) * s.hidden + 2 * i * s.head_dim
        inputs = s.layers * s.hidden * i if self.config.engine.gradient_checkpointing else 0
        return {
            "activations": tokens * (layers * self.layer_bytes() + ends + inputs),
            # In every layer, sdpa converts the mask that separates packed sequences to floats, and keeps it.
            "attention masks": layers * i * tokens**2 if self.masked else 0.0,
            "one layer's backward": tokens * i * (3 * s.ffn + 2 * s.hidden),
        }

    @property
    def kept_layers(self) -> int:
        """Number of layers whose activations exist at once."""
        return 1 if self.config.engine.gradient_checkpointing else self.student.layers

    def autocast_copies(self, layers: int, head: bool = False) -> dict[str, float]:
        """Bytes of autocast's copies of the weights of `layers` layers, and of the head, in the compute type."""
        s = self.student
        weights = layers * s.layer_matrices + (s.head_parameters if head else 0)
        return {"autocast's copies": self.itemsize * weights if self.autocast else 0}

    def loss(self) -> float:
        """Bytes of the loss stage besides hidden states: logits, and gradients of hidden states and head."""
        tokens, kind, chosen = self.micro_tokens, self.hardware.kind, self.config.loss.chunk_tokens
        vocab = min(self.student.vocab, self.teacher.vocab)
        kept = math.ceil(tokens * (1.0 if self.config.select.by == "all" else self.config.select.retention))
        chunk = min(most_rows(kind, vocab) if chosen == "auto" else chosen, kept)
        head = 0 if self.config.lora.rank else self.student.head_parameters * WIDE
        if kind == "cuda" and self.autocast:
            head += self.student.head_parameters * self.itemsize  # the head in the products' type
        if self.config.loss.memory == "whole":
            buffers = WHOLE_BUFFERS[self.config.loss.divergence] * kept + 2 * chunk
            return buffers * row_width(kind, vocab) * WIDE + head
        most_held = most_held_rows(kind, vocab) if chosen == "auto" else chosen
        # Logits that are scored for selection are held for the loss.
        held = self.config.select.by != "all" and tokens <= most_held
        logits = self._logits(tokens, kept, held=True) if held else self._logits(chunk, chunk, held=False)
        return logits + head + tokens * self.student.hidden * self.itemsize

    def _logits(self, rows: int, trained: int, held: bool) -> float:
        """Bytes of both models' logits, and of what the element-wise work needs besides them."""
        kind = self.hardware.kind
        width = row_width(kind, min(self.student.vocab, self.teacher.vocab))
        logits = 2 * rows * width * WIDE
        if kind == "cuda":
            # Kernels need no scratch. Gradients need a buffer of their own, unless type and rows are the same.
            return logits + (trained * width * self.itemsize if held or self.itemsize != WIDE else 0)
        scratch = SCRATCH_BUFFERS + (2 if held else 0)
        block = min(rows, max(1, BLOCK_BYTES[kind] // ((2 + SCRATCH_BUFFERS) * width * WIDE)))
        return logits + scratch * block * width * WIDE

    @property
    def in_student(self) -> bool:
        """Whether the teacher is the student's own model, at other weights or with its adapters off."""
        c = self.config.teacher
        return c.follows or (c.is_student and self.config.lora.rank > 0 and c.kind == "local" and not c.shard)

    def teacher_weights(self, working: bool) -> float:
        """Bytes of the teacher's weights on a rank, while it computes (working) or not; its head is always there."""
        t, i, c = self.teacher, self.itemsize, self.config.teacher
        head = t.head_parameters * i
        if self.in_student:
            return self.trained * WIDE / self.share(1) if c.weights == "ema" or c.every > 1 else 0.0
        if c.kind != "local":
            return head
        if c.shard:
            spread = 0 if c.offload else t.parameters * i / self.hardware.gpus
            return head + spread + (min(LIVE_WEIGHTS, t.parameters) * i if working else 0)
        return t.parameters * i if working or not c.offload else head

    def teacher_layer(self) -> float:
        """Bytes that one of the teacher's layers needs to compute; 0 if the teacher is not on these ranks."""
        t, c, tokens = self.teacher, self.config.teacher, self.micro_tokens
        if c.kind != "local":
            return 0.0
        mask = tokens if c.shard and not self.hardware.flash else 0
        return tokens * self.itemsize * (t.query_width * 2 + 3 * t.ffn + 4 * t.hidden + mask)

    def student_parts(self) -> dict[str, float]:
        """Bytes of a micro-batch at the larger of two moments: the end of its layers, and its loss and backward."""
        activations = self.activations() | {"DeepSpeed's buffers": self.buffers()}
        backward = activations | {"loss stage": self.loss()} | self.autocast_copies(self.kept_layers)
        forward = activations | {"one layer's backward": 0.0} | self.autocast_copies(self.student.layers)
        return max(forward, backward, key=lambda parts: sum(parts.values()))

    def buffers(self) -> float:
        """Bytes of DeepSpeed's own buffers: a bucket of gradients, and gathered weights under ZeRO-3."""
        if not self.zero:
            return 0.0
        bucket = min(REDUCE_BUCKET, self.trained) * self.itemsize
        return bucket + (min(LIVE_WEIGHTS, self.student.parameters) * self.itemsize if self.zero == 3 else 0)

    def sampler(self) -> dict[str, float]:
        """Bytes that sampling takes in addition to training."""
        r = self.config.rollout
        if r.engine == "vllm_process" and (r.sampler_gpus or self.hardware.kind == "cpu"):
            return {}  # on GPUs of its own, or not in this process
        if r.engine != "hf":
            there = r.samplers if r.engine == "vllm_process" else 1
            return {"sampler (vLLM's share)": there * r.gpu_memory_share * self.hardware.gib * GIB}
        side_by_side = min(r.generate_batch, math.ceil(self.step_tokens / self.longest / self.hardware.gpus))
        cache = side_by_side * self.longest * self.student.kv_bytes(self.itemsize)
        return self.sampling_weights() | {"sampler (key-value cache)": cache}

    def sampling_weights(self) -> dict[str, float]:
        """Bytes of the additional copies of the student's weights that exist while transformers samples."""
        whole = self.student.parameters * self.itemsize if self.zero == 3 else 0
        whole += self.copied_weights(self.student)
        return {"sampler (whole weights)": whole} | self.autocast_copies(self.student.layers, head=True)

    def copied_weights(self, shape: ModelShape) -> int:
        """Bytes of the weights in oneDNN's layout, which sampling with transformers keeps on a CPU in fp32."""
        if self.hardware.kind != "cpu" or self.itemsize != WIDE:
            return 0
        return WIDE * (shape.layers * shape.layer_matrices + shape.vocab * shape.hidden)

    def evaluations(self, resident: dict[str, float]) -> dict[str, dict[str, float]]:
        """Bytes while transformers answers the suites: the student under rollout.engine hf, a local teacher always."""
        r, e, t = self.config.rollout, self.config.eval, self.config.teacher
        if not e.suite:
            return {}
        length = r.max_prompt_tokens + (e.max_new_tokens or r.max_new_tokens)

        def answers(shape: ModelShape) -> dict[str, float]:
            return {"evaluation's key-value cache": e.generate_batch * length * shape.kv_bytes(self.itemsize)}

        found = {}
        if r.engine == "hf":
            found["evaluation"] = resident | self.sampling_weights() | answers(self.student)
        if e.teacher and t.kind == "local" and not t.shard:
            working = {"teacher weights": self.teacher_weights(working=True) + self.copied_weights(self.teacher)}
            found["teacher's evaluation"] = resident | working | answers(self.teacher)
        return found

    def phases(self) -> dict[str, dict[str, float]]:
        """GiB by phase and part. The peak is the largest phase's sum."""
        states, t = self.states(), self.config.teacher
        always = {"process": PROCESS_GIB[self.hardware.kind] * GIB, **states}
        if not self.zero:
            del always["gradients"]  # dropped after every step
        r = self.config.rollout
        sleeps = r.engine == "vllm" and r.sleep and self.hardware.kind == "cuda"
        resident = always | ({} if r.engine == "hf" or sleeps else self.sampler())
        resident |= {"teacher weights": self.teacher_weights(working=False)}
        hidden = self.rank_tokens * self.teacher.hidden * self.itemsize if t.cache == "device" else 0
        waiting = resident | {"teacher's states": hidden}
        # With a single micro-batch, backward starts without accumulated gradients.
        first = not self.zero and self.rank_tokens <= self.micro_tokens
        held = {} if first else {"gradients": states["gradients"]}
        update = 0.0  # AdamW's fused kernel makes no copies
        if self.config.optim.kind == "sgd" and not self.config.engine.offload_optimizer:
            all_at_once = self.hardware.kind == "cuda"
            update = WIDE * (self.trained / self.share(1) if all_at_once else 2 * self.student.largest_matrix)
        found = {
            "rollout": resident | self.sampler(),
            "teacher": waiting
            | {"teacher weights": self.teacher_weights(working=True), "teacher's layer": self.teacher_layer()},
            "student": waiting | held | self.student_parts(),
            "step": waiting
            | {"gradients": states["gradients"], "one update's copies": update, "DeepSpeed's buffers": self.buffers()},
        }
        found |= self.evaluations(resident)
        return {phase: {part: n / GIB for part, n in parts.items() if n} for phase, parts in found.items()}

    def seconds(self) -> dict[str, float]:
        """Rough seconds of a step by phase: products at the given rate, sampling mostly at the rate of memory reads."""
        s, t, h, r = self.student, self.teacher, self.hardware, self.config.rollout
        tokens, mean = self.rank_tokens, self.longest / 2

        def forward(shape: ModelShape, masked: bool) -> float:
            # With a mask every token attends to the whole row, including its own future and other sequences.
            met = self.micro_tokens if masked else mean
            return tokens * (2 * shape.parameters + 4 * met * shape.query_width * shape.layers) / (h.tflops * 1e12)

        rollouts = math.ceil(self.step_tokens / self.longest / h.gpus)
        batches = math.ceil(rollouts / r.generate_batch)
        cache = min(rollouts, r.generate_batch) * mean * s.kv_bytes(self.itemsize)
        # For a token of every answer, weights and cache are read, products computed, and layers called one by one.
        read_s = (s.parameters * self.itemsize + cache) / (h.bandwidth_gbs * 1e9)
        products_s = min(rollouts, r.generate_batch) * 2 * s.parameters / (h.tflops * 1e12)
        token_s = max(read_s, products_s) + s.layers * (LAYER_CALL_S if r.engine == "hf" else 0.0)
        student = forward(s, self.masked) * (4 if self.config.engine.gradient_checkpointing else 3)
        sharded = self.config.teacher.shard and not h.flash
        teacher = 0.0 if self.config.teacher.kind != "local" else forward(t, sharded)
        return {"rollout": batches * r.max_new_tokens * token_s, "teacher": teacher, "student": student}

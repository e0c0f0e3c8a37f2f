"""Two ranks, once for all tests of them; what came out is JSON, safetensors and run folders.

The ranks are forks of this process, in which everything is imported already, and meet as a launcher's would.

A case trains a tiny random student for two steps on rollouts fixed by hand, with an engine of its own. Then whole
runs of the trainer, from settings that the tests wrote.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from tiny_models import tiny_model
from two_ranks import on_ranks

from bench.updates import trainer_of
from opsd.config import EngineConfig, LoraConfig, OptimConfig, TeacherConfig, from_json
from opsd.data import packing as batch
from opsd.data.packing import empty, for_teacher, pack, share
from opsd.distill import DistillResult
from opsd.engine import TorchEngine
from opsd.engine.deepspeed_engine import DeepSpeedEngine
from opsd.model.lora import add_adapters
from opsd.model.scorer import Scorer
from opsd.selection import load_selector
from opsd.teacher import LocalTeacher, SelfTeacher
from opsd.train import Trainer, resume, start
from opsd.types import Prompt, Rollout
from opsd.utils.distributed import join

NOTHING: tuple = (None, None)
CPU = torch.device("cpu")
STEPS, VOCABULARY = 2, 49
# Clipping is active in every step (norms are around 1), decay and warm-up are on.
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.25)
# Without Adam's scaling the clipped gradient of norm 0.25 wants a larger rate.
SGD = dataclasses.replace(OPTIM, kind="sgd", lr=1.0)
LENGTHS = [1, 9, 4, 0, 7, 12, 2]


@dataclass(frozen=True)
class Case:
    """engine None: as a plain run has it. tokens: budget of a micro-batch; hand: micro-batches by rank instead.

    rank: of LoRA adapters; 0 trains all weights.
    """

    name: str
    engine: EngineConfig | None
    by: str = "all"
    optim: OptimConfig = OPTIM
    tied: bool = True
    tokens: int = 16
    hand: tuple[tuple[tuple[int, ...], ...], ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    rank: int = 0


# How a step's rollouts lie on two ranks, for each micro-batch the rollouts in it. even: as the trainer deals them out.
# uneven: three micro-batches against one. empty: all that the second rank has is a rollout without a token.
EVEN: tuple = ()
UNEVEN = (((1,), (0, 2), (4, 6)), ((5,),))
EMPTY = (((1, 2), (0, 4, 5, 6)), ((3,),))
LAYOUTS = {"even": EVEN, "uneven": UNEVEN, "empty": EMPTY}
# Under stage z selector number i has layout (2i + z) mod 3, and of these ways of checkpointing and head (i + z) mod 4.
# So every two of stage, selector, layout, checkpointing and head meet.
WAYS = [(False, True), (True, True), (False, False), (True, False)]
SELECTORS = ("all", "entropy", "soft_or")
BATCH = {"normalise_over": "batch"}


def grid(stage: int) -> list[Case]:
    """Every selector under a stage; under stage 3, whose ranks meet at every weight, Soft-OR in every layout."""
    found = []
    for number, by in enumerate(SELECTORS):
        first = 2 * number + stage
        for place in range(first, first + (3 if (stage, by) == (3, "soft_or") else 1)):
            layout = list(LAYOUTS)[place % 3]
            checkpointing, tied = WAYS[(number + stage + place - first) % 4]
            engine = EngineConfig(kind="deepspeed", zero_stage=stage, gradient_checkpointing=checkpointing)
            name = f"zero{stage}/{by}-{head(tied)}/{layout}{', checkpointed' * checkpointing}"
            found.append(Case(name, engine, by, tied=tied, hand=LAYOUTS[layout], options=options(by)))
    return found


def head(tied: bool) -> str:
    return "tied" if tied else "untied"


def options(by: str) -> dict[str, str]:
    return BATCH if by == "soft_or" else {}


def cases() -> list[Case]:
    """The grid under every stage, and beside it SGD, adapters, offloading and bfloat16. Plain ones first.

    A name's middle part, or the whole, is that of the plain case to compare with.
    """
    found = [
        Case(f"{by}-{head(tied)}", None, by, tied=tied, options=options(by))
        for by in SELECTORS
        for tied in (True, False)
    ]
    found += [
        Case("sgd-tied", None, optim=SGD),
        Case("lora-tied", None, rank=4),
        Case("lora soft_or-untied", None, "soft_or", tied=False, options=BATCH, rank=4),
    ]
    # Plain torch itself: other micro-batches, checkpointed.
    again = EngineConfig(gradient_checkpointing=True)
    for by, tied, tokens in (("all", True, 1000), ("entropy", False, 10), ("soft_or", False, 1000)):
        name = f"torch/{by}-{head(tied)}/{tokens}, checkpointed"
        found.append(Case(name, again, by, tied=tied, tokens=tokens, options=options(by)))
    for stage in (0, 1, 2, 3):

        def deepspeed(stage=stage, **more):
            return EngineConfig(kind="deepspeed", zero_stage=stage, **more)

        again = deepspeed(gradient_checkpointing=True)
        found += [
            *grid(stage),
            # One micro-batch for two ranks, dealt out by the trainer.
            Case(f"zero{stage}/sgd-tied/one", deepspeed(), optim=SGD, tokens=1000),
            Case(f"zero{stage}/lora-tied/empty", deepspeed(), hand=EMPTY, rank=4),
            Case(
                f"zero{stage}/lora soft_or-untied/uneven",
                again,
                "soft_or",
                tied=False,
                hand=UNEVEN,
                options=BATCH,
                rank=4,
            ),
        ]
        if stage:
            found.append(Case(f"zero{stage}/all-tied/offload", deepspeed(offload_optimizer=True)))
        found.append(Case(f"zero{stage}/all-tied/bfloat16", deepspeed(dtype="bfloat16")))
        found.append(Case(f"zero{stage}/lora-tied/bfloat16", deepspeed(dtype="bfloat16"), rank=4))
    found.append(
        Case(
            "zero3/all-tied/offload all",
            EngineConfig(kind="deepspeed", zero_stage=3, offload_optimizer=True, offload_parameters=True),
        )
    )
    return found


def rollouts() -> list[Rollout]:
    """Seven of uneven lengths; the fourth has no token."""
    generator = torch.Generator().manual_seed(5)

    def ids(count):
        return torch.randint(6, VOCABULARY, (count,), generator=generator).tolist()

    return [
        Rollout(number, Prompt(str(number), "", ids(3 + number % 2), None), ids(length), False)
        for number, length in enumerate(LENGTHS)
    ]


def layout(case: Case, ranks):
    """This rank's micro-batches."""
    written = rollouts()
    if is_plain(case):
        return pack(written, case.tokens)
    if not case.hand:
        return share(pack(written, case.tokens), ranks.rank, ranks.world_size)
    most = max(len(part) for part in case.hand)
    own = [micro for numbers in case.hand[ranks.rank] for micro in pack([written[n] for n in numbers], 1000)]
    return own + [empty()] * (most - len(own))


def is_plain(case: Case) -> bool:
    """One process of plain torch: the first rank alone trains."""
    return case.engine is None or case.engine.kind == "torch"


def build(case: Case, ranks, held=None):
    """Engine, trainer and teacher of a case; held: weights to start from."""
    # DeepSpeed collects garbage as it builds an engine: among what was there before, it need not look.
    gc.freeze()
    student = Scorer(tiny_model(case.tied, seed=0))
    if held is not None:
        missing, unknown = student.model.load_state_dict(held, strict=False)
        assert (missing, unknown) == (["lm_head.weight"] if case.tied else [], [])
    if case.rank:
        add_adapters(student.model, LoraConfig(rank=case.rank, alpha=8.0), 0, "")
    engine = case.engine or EngineConfig()
    if is_plain(case):
        engine = TorchEngine(student, engine, case.optim, CPU)
    elif engine.zero_stage == 0:
        engine = TorchEngine(student, engine, case.optim, CPU, ranks)
    else:
        engine = DeepSpeedEngine(student, engine, case.optim, CPU, ranks)
    selector = load_selector(case.by, retention=0.5, **case.options) if case.by != "all" else None
    teacher = LocalTeacher(Scorer(tiny_model(True, seed=1)), CPU)
    return engine, trainer_of(engine, teacher, selector, None, VOCABULARY, case.optim, STEPS), teacher


def train(case: Case, ranks, built, first: int, last: int) -> dict:
    """Steps first to last; what the updates say."""
    _, trainer, teacher = built
    record = {"loss_nats": [], "grad_norm": [], "kept": [], "tokens": [], "reverse_kl_nats": []}
    batches = layout(case, ranks)
    for step in range(first, last + 1):
        update = trainer.update(batches, teacher.hidden(batches), step, frozenset({"reverse_kl_N"}))
        for name in ("loss_nats", "grad_norm", "kept", "tokens"):
            record[name].append(getattr(update, name))
        record["reverse_kl_nats"].append(float(update.stats.reverse_kl_N.mean()))
        assert update.stats.reverse_kl_N.shape == update.kept_N.shape
    return record


def weights(engine) -> dict[str, torch.Tensor]:
    """What is trained, whole."""
    whole = engine.adapters()
    whole = engine.weights() if whole is None else whole
    return dict(engine.student.model.named_parameters()) if whole is None else whole


def plain_model(case: Case, engine, ranks) -> dict:
    """With adapters: whether the weights for a checkpoint and for a sampler are those that the parts make."""
    saved, trained = engine.weights(), engine.adapters()
    streamed = {name: tensor.clone() for name, tensor in engine.gathered()}
    if not ranks.is_main:
        return {}
    base = tiny_model(case.tied, seed=0)
    dtype = next(iter(streamed.values())).dtype
    gaps = {"saved": 0.0, "streamed": 0.0, "frozen": 0.0}
    for name, weight in base.named_parameters():
        expected = weight.detach().to(dtype).float()
        adapter = name.removesuffix(".weight")
        if f"{adapter}.lora_A.default.weight" in trained:
            a, b = (trained[f"{adapter}.lora_{part}.default.weight"] for part in "AB")
            expected = expected + 8.0 / case.rank * (b @ a)
        else:
            gaps["frozen"] = max(gaps["frozen"], float((saved[name] - expected).abs().max()))
        gaps["saved"] = max(gaps["saved"], float((saved[name] - expected).abs().max()))
        gaps["streamed"] = max(
            gaps["streamed"], float((streamed[name].float() - saved[name].to(dtype).float()).abs().max())
        )
    names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
    return {**gaps, "names as they were": list(streamed) == names}


def keep(out: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, out / f"{name.replace('/', '+')}.safetensors")


def carry_over(ranks) -> dict[str, dict]:
    """A step under one stage, the last one under another, which is given weights and optimiser state."""
    results = {}
    for source, target in ((3, 1), (1, 0), (0, 2), (2, 3)):
        first, second = (Case("", EngineConfig(kind="deepspeed", zero_stage=stage)) for stage in (source, target))
        one = build(first, ranks)
        train(first, ranks, one, 1, STEPS - 1)
        held, moments = weights(one[0]), one[0].optimizer_state()
        held, moments = ranks.broadcast([{k: v.detach() for k, v in held.items()}, moments])
        two = build(second, ranks, held)
        two[0].load_optimizer_state(moments)
        results[f"{source} to {target}"] = train(second, ranks, two, STEPS, STEPS)
    return results


def not_finite(ranks) -> dict[str, list]:
    """A gradient that is not finite on the last rank only: [the norm, whether any weight moved], by stage."""
    results = {}
    for stage in (0, 1, 2, 3):
        case = Case("", EngineConfig(kind="deepspeed", zero_stage=stage))
        engine, *_ = build(case, ranks)
        before = {name: tensor.detach().clone() for name, tensor in weights(engine).items()}
        factor = math.nan if ranks.rank == ranks.world_size - 1 else 1.0
        for micro in layout(case, ranks):
            loss = engine.forward(
                micro, lambda hidden, _, factor=factor: DistillResult(hidden.sum() * factor, *NOTHING)
            )
            engine.backward(loss.loss_sum, 1)
        norm = engine.step(1.0)
        after = weights(engine)
        results[str(stage)] = [norm, any(not torch.equal(after[name], before[name]) for name in before)]
    return results


def discarded(ranks) -> dict[str, list]:
    """Gradients of adapters that are dropped: whether a weight or a moment then differs, by stage."""
    results = {}
    for stage in (0, 1, 2, 3):
        case = Case("", EngineConfig(kind="deepspeed", zero_stage=stage), rank=4)
        engine, *_ = built = build(case, ranks)
        train(case, ranks, built, 1, 1)
        before = {**weights(engine), **engine.optimizer_state()}
        before = {name: tensor.detach().clone() for name, tensor in before.items()}
        for micro in layout(case, ranks):
            engine.backward(engine.forward(micro, lambda hidden, _: DistillResult(hidden.sum(), *NOTHING)).loss_sum, 1)
        engine.discard()
        after = {**weights(engine), **engine.optimizer_state()}
        results[str(stage)] = [name for name in before if not torch.equal(after[name], before[name])]
    return results


def self_taught(ranks, out: Path) -> dict[str, list]:
    """Losses under an average of the student's weights, behind another prompt, by stage; the averages are kept."""
    asked = [
        dataclasses.replace(r, prompt=dataclasses.replace(r.prompt, teacher_ids=[7, *r.prompt.ids])) for r in rollouts()
    ]
    results = {}
    for stage in (None, 0, 1, 2, 3):
        case = Case("", None if stage is None else EngineConfig(kind="deepspeed", zero_stage=stage))
        if is_plain(case) and not ranks.is_main:
            continue
        engine, *_ = build(case, ranks)
        teacher = SelfTeacher(engine, TeacherConfig("self", weights="ema", ema=0.5))
        trainer, batches = trainer_of(engine, teacher, None, None, VOCABULARY, OPTIM, STEPS + 1), layout(case, ranks)
        losses = []
        for step in range(1, STEPS + 2):
            losses.append(trainer.update(batches, teacher.hidden(for_teacher(batches, asked)), step).loss_nats)
            teacher.end_step(step)
        name = "plain" if stage is None else str(stage)
        whole, results[name] = teacher.state(), losses
        part = engine.part(whole if stage is None else ranks.broadcast(whole))
        assert all(torch.equal(part[key], teacher._shares[key]) for key in part)
        if ranks.is_main:
            keep(out, f"self taught {name}", whole)
    return results


def stopped(config) -> None:
    """A run that ends before its third step is saved."""
    whole = Trainer.save_if_due

    def stop_in_step_3(trainer, step, metrics):
        if step == 3:
            raise KeyboardInterrupt
        whole(trainer, step, metrics)

    Trainer.save_if_due = stop_in_step_3
    try:
        start(config)
    except KeyboardInterrupt:
        Trainer.save_if_due = whole


def whole_runs(ranks, settings: Path) -> None:
    """A run to its end; one that is stopped after its second step and resumed; on a bfloat16 model; with adapters."""
    values = json.loads(settings.read_text())

    def config(name, engine=None, **parts):
        return from_json(
            {**values, "out": values["out"] + name, "engine": {**values["engine"], **(engine or {})}, **parts}
        )

    start(config("whole"))
    for offload in (False, True):
        name = f"sharded teacher{', offloaded' if offload else ''}"
        teacher = {**values["teacher"], "shard": True, "offload": offload, "cache": "host" if offload else "device"}
        start(config(name, teacher=teacher, eval={}))
    stopped(config("resumed"))
    if ranks.is_main:
        # For one process to go on from.
        shutil.copytree(config("resumed").out, f"{values['out']}half")
    resume(Path(config("resumed").out))
    bfloat16 = {"dtype": "bfloat16", "zero_stage": 1}
    start(config("bfloat16", bfloat16, eval={}))
    for kind, engine in (("lora", {}), ("lora bfloat16", bfloat16)):
        parts = {"engine": engine, "lora": {"rank": 4}, "eval": {}}
        start(config(f"{kind} whole", **parts))
        stopped(config(f"{kind} resumed", **parts))
        resume(Path(config(f"{kind} resumed").out))
    own = {"model": "self", "weights": "ema", "ema": 0.5, "every": 2, "context": f"{values['out']}context.txt"}
    start(config("self whole", teacher=own, eval={}))
    stopped(config("self resumed", teacher=own, eval={}))
    resume(Path(config("self resumed").out))


def main(out: Path) -> None:
    # So that the few tokens here come in several groups of lengths.
    batch.PADDING_TOKENS = 4
    ranks = join(CPU)
    results = {}
    for case in cases():
        if is_plain(case) and not ranks.is_main:
            continue
        built = build(case, ranks)
        results[case.name] = train(case, ranks, built, 1, STEPS)
        if case.rank:
            results[case.name]["plain model"] = plain_model(case, built[0], ranks)
        found, moments = weights(built[0]), built[0].optimizer_state()
        if ranks.is_main:
            keep(out, case.name, {**found, **moments})
    extra = {"carried over": carry_over(ranks), "not finite": not_finite(ranks), "discarded": discarded(ranks)}
    extra["self taught"] = self_taught(ranks, out)
    if ranks.is_main:
        (out / "results.json").write_text(json.dumps({"cases": results, **extra}))
    gc.freeze()
    whole_runs(ranks, out / "settings.json")


if __name__ == "__main__":
    on_ranks(2, lambda: main(Path(sys.argv[1])))

"""The per-token record against both models' logits, computed the plain way; and that recording changes no training."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tolerance import close, transformer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from opsd.config import from_json
from opsd.distill.inputs import LossSpec, check_inputs
from opsd.distill.topk import top_tokens
from opsd.run.token_record import recorded_rollouts, token_table
from opsd.selection import TokenStats
from opsd.train import start
from opsd.utils.errors import UserError


@pytest.fixture(scope="module")
def settings(make_folder, make_model, tmp_path_factory):
    """Settings of a one-step run that records five rollouts and three tokens of each model."""
    data = tmp_path_factory.mktemp("data") / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(4)))
    student, teacher = make_folder(make_model(seed=0)), make_folder(make_model(seed=1))

    def make(out: Path, **telemetry):
        values = {
            "student": str(student),
            "teacher": {"model": str(teacher)},
            "prompts": str(data),
            "out": str(out),
            "steps": 1,
            "prompts_per_step": 4,
            "prompt_format": "raw",
            "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 8, "max_new_tokens": 6},
            "select": {"by": "soft_or"},
            "loss": {"temperature": 1.5},
            "engine": {"device": "cpu", "micro_batch_tokens": 24},
            "telemetry": {
                "options": {"entropy_split": "median", "divergence_split": "mean"},
                "every": 1,
                "save_tokens": True,
                "top_tokens": 3,
                "max_rollouts_saved": 5,
                "save_rollouts_every": 1,
                **telemetry,
            },
            "track": {"progress": False},
        }
        return from_json(values)

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = settings(tmp_path_factory.mktemp("runs") / "run")
    start(config)
    return config


def rollouts_of(config):
    lines = (Path(config.out) / "rollouts" / "step_1.jsonl").read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


def table_of(config):
    return pd.read_parquet(Path(config.out) / "tokens" / "step_1.parquet")


def plain_log_probs(folder, record):
    """Log-probabilities [response, 49] at the loss temperature, by the model's own logits over one whole sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt, response = record["prompt_ids"], record["response_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    return torch.log_softmax(logits[len(prompt) - 1 : -1, :49] / 1.5, -1)


@pytest.mark.numeric
def test_every_recorded_number_is_what_both_models_say_before_the_step(finished):
    table, rollouts = table_of(finished), rollouts_of(finished)
    for number, rows in table.groupby("rollout"):
        record = rollouts[number]
        assert rows["position"].tolist() == list(range(len(record["response_ids"])))
        assert rows["token_id"].tolist() == record["response_ids"]
        log_p = plain_log_probs(finished.student, record)
        log_q = plain_log_probs(finished.teacher.model, record)
        p, q = log_p.exp(), log_q.exp()
        # The head is three rows higher than the tokenizer: sampled from there, a token has no shared probability.
        sampled = torch.tensor(record["response_ids"])[:, None]
        of_sampled = [
            torch.nn.functional.pad(x, (0, 3), value=-torch.inf).gather(-1, sampled)[:, 0] for x in (log_p, log_q)
        ]
        expected = {
            "entropy": -(p * log_p).sum(-1),
            "teacher_entropy": -(q * log_q).sum(-1),
            "reverse_kl": (p * (log_p - log_q)).sum(-1),
            "forward_kl": (q * (log_q - log_p)).sum(-1),
            "log_prob": of_sampled[0],
            "teacher_log_prob": of_sampled[1],
        }
        for name, values in expected.items():
            close(rows[name], values, *transformer(2, 16), 49, said=name)
        for side, log_probs in (("student", log_p), ("teacher", log_q)):
            top = log_probs.topk(3)
            assert [list(ids) for ids in rows[f"{side}_top_ids"]] == top.indices.tolist()
            close(np.stack(rows[f"{side}_top_log_probs"]), top.values, *transformer(2, 16), 49, said=side)
        assert rows["top1_agree"].tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).tolist()


def test_the_record_says_step_quadrant_and_what_was_kept(finished):
    table, rollouts = table_of(finished), rollouts_of(finished)
    assert set(table["step"]) == {1}
    assert set(table["quadrant"]) <= {1, 2, 3, 4} and table["quadrant"].nunique() > 1
    for number, rows in table.groupby("rollout"):
        assert rows["kept"].sum() == max(1, len(rollouts[number]["response_ids"]) // 2)


def test_at_most_so_many_rollouts_are_recorded_spread_over_the_prompts(finished):
    # 8 rollouts, two a prompt; ⌊place·8/5⌋ for place 0 … 4
    assert sorted(table_of(finished)["rollout"].unique()) == [0, 1, 3, 4, 6]


def test_recording_changes_nothing_that_is_trained(finished, settings, tmp_path):
    plain = settings(tmp_path / "plain", every=0, save_tokens=False, top_tokens=0)
    start(plain)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(Path(config.out) / "checkpoints" / "step_1").state_dict()
        for config in (finished, plain)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (Path(plain.out) / "tokens").exists()


def test_without_top_tokens_their_columns_are_absent(settings, tmp_path):
    config = settings(tmp_path / "run", top_tokens=0)
    start(config)
    assert {"entropy", "forward_kl", "quadrant"} <= set(table_of(config))
    assert not [name for name in table_of(config) if "top_ids" in name or name.removeprefix("teacher_") == "log_prob"]


@pytest.mark.parametrize("telemetry", [{"save_tokens": False}, {"every": 0}])
def test_top_tokens_without_a_record_to_stand_in_are_refused(settings, tmp_path, telemetry):
    with pytest.raises(UserError, match=r"^--telemetry.top_tokens 3 is part of the token record: [^\n]+$"):
        settings(tmp_path / "run", **telemetry)


def test_positions_count_tool_tokens_that_carry_no_row(make_rollout):
    rollouts = [make_rollout(4, [6], [7, 8, 9, 10], [True, False, False, True]), make_rollout(2, [6], [11])]
    stats = TokenStats(
        rollout_N=torch.tensor([4, 4, 2]),
        entropy_N=torch.tensor([0.1, 0.2, 0.3]),
        reverse_kl_N=None,
        forward_kl_N=None,
        teacher_entropy_N=None,
        top1_agree_N=None,
        token_ids_N=torch.tensor([7, 10, 11]),
    )
    kept_N = torch.tensor([True, False, True])
    telemetry = SimpleNamespace(label_tokens=lambda _: {"quadrant": torch.tensor([1, 2, 3])})
    table = token_table(9, rollouts, 64, stats, kept_N, [telemetry])
    assert list(table) == ["step", "rollout", "position", "token_id", "entropy", "quadrant", "kept"]
    assert table["rollout"].tolist() == [2, 4, 4]
    assert table["position"].tolist() == [0, 0, 3]
    assert table["token_id"].tolist() == [11, 7, 10]
    assert table["kept"].tolist() == [True, True, False]


def test_empty_rollouts_are_not_recorded(make_rollout):
    rollouts = [make_rollout(0, [6], []), make_rollout(1, [6], [7]), make_rollout(2, [6], [8], [False])]
    assert recorded_rollouts(rollouts, 64) == [1]
    assert recorded_rollouts(rollouts[:1], 64) == []


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.numeric
@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000, "auto"])
def test_top_tokens_do_not_depend_on_the_chunk_and_never_hold_all_logits(chunk_tokens):
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 8), torch.randn(40, 6)
    student_head, teacher_head = torch.randn(300, 8), torch.randn(310, 6)
    ids = torch.randint(0, 290, (40,))
    with LargestTensor() as seen:
        inputs = check_inputs(student, student_head, teacher, teacher_head, token_ids_N=ids, vocab_size=290)
        tops = top_tokens(inputs, 5, LossSpec(chunk_tokens=chunk_tokens))
    for top, hidden, head in zip(tops, (student, teacher), (student_head, teacher_head), strict=True):
        log_p = torch.log_softmax(hidden.double() @ head[:290].double().T, -1)
        assert torch.equal(top.ids_NK, log_p.topk(5).indices)
        close(top.log_prob_NK, log_p.topk(5).values, 8, 290)
        close(top.sampled_N, log_p[torch.arange(40), ids], 8, 290)
    if chunk_tokens in (1, 7):
        # the largest things around are the heads and a chunk's logits, 7·290
        assert seen.most <= max(310 * 8, 7 * 290) < 40 * 290


@pytest.mark.numeric
def test_a_vocabulary_smaller_than_k_gives_all_of_it_and_no_row_gives_none():
    head = torch.randn(3, 4)
    (top, _) = top_tokens(check_inputs(head, head, head, head, token_ids_N=torch.tensor([0, 1, 2])), 5, LossSpec())
    assert top.ids_NK.shape == (3, 3)
    close(top.log_prob_NK.exp().sum(-1), torch.ones(3), 4, 3)
    none = torch.empty(0, 4)
    nobody = torch.empty(0, dtype=torch.int64)
    (top, _) = top_tokens(check_inputs(none, head, none, head, token_ids_N=nobody), 2, LossSpec())
    assert top.ids_NK.shape == (0, 2)

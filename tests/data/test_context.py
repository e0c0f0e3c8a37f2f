"""What the teacher is asked: a record's columns, a rewarded sample, and where the student's tokens stand behind it."""

import json

import pytest
import torch
from tolerance import close, transformer

from opsd.data.context import TeacherContext, TeacherPrompts
from opsd.data.packing import for_teacher, pack
from opsd.data.prompts import load_prompts
from opsd.data.rendering import PromptFormat
from opsd.model.scorer import Scorer
from opsd.types import Prompt, Rollout
from opsd.utils.errors import UserError

RAW = PromptFormat(kind="raw")


def asking(text, tokenizer, how=RAW, most=100):
    return TeacherPrompts(TeacherContext(text), tokenizer, how, most)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Prompts of some records, asked of the teacher by `text`."""

    def load(text, *records, how=RAW):
        file = tmp_path / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return load_prompts(file, tokenizer, how, asking(text, tokenizer, how).of_record)[0]

    return load


def test_columns_are_filled_in_and_other_braces_stay(load, tokenizer):
    record = {"prompt": "1+1", "answer": "2", "meta": {"hint": "a=b"}, "n": 7}
    (prompt,) = load("{prompt} so {answer}; {meta.hint} {n}", record)
    assert prompt.teacher_ids == tokenizer("1+1 so 2; a=b 7").input_ids
    assert prompt.ids == tokenizer("1+1").input_ids
    assert TeacherContext(r"\boxed{7} {} {2}").fill("p", None, lambda _: 0, "here") == r"\boxed{7} {} {2}"
    # A value that looks like a column is not filled in again.
    (prompt,) = load("{prompt}", {"prompt": "1{answer}", "answer": "2"})
    assert prompt.teacher_ids == prompt.ids


def test_a_chat_keeps_its_earlier_messages_and_the_context_is_the_last_one(load, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    (prompt,) = load("{prompt} is {answer}", {"prompt": messages, "answer": 2}, how=PromptFormat())
    asked = [messages[0], {"role": "user", "content": "1+1 is 2"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt.teacher_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert prompt.ids != prompt.teacher_ids


def test_the_teachers_own_template_renders_it(make_tokenizer, tokenizer, tmp_path):
    other = make_tokenizer()
    other.chat_template = "{{ messages[-1].content }}<think>{% if enable_thinking %}{% endif %}"
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "1+1"}\n')
    how = PromptFormat(thinking="on")
    ((prompt,), _) = load_prompts(file, tokenizer, how, asking("{prompt}", other, how).of_record)
    assert prompt.teacher_ids == other("1+1<think>").input_ids


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{answer}", "record 1 has no answer, which --teacher.context uses"),
        ("{solution}", "record 1 has no field 'solution'; it has: prompt, list"),
        ("{list}", "'list' is neither a text nor a number"),
    ],
)
def test_a_record_that_lacks_what_the_context_names_is_said_in_a_line(load, text, said):
    with pytest.raises(UserError, match=said):
        load(text, {"prompt": "1+1", "list": [1]})


@pytest.mark.parametrize(
    ("text", "said"),
    [("Think well.", "names no column"), ("{prompt is {answer}", "'{prompt is {answer}' lacks a brace")],
)
def test_a_context_that_cannot_show_the_question_is_said_in_a_line(tmp_path, text, said):
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=f"^--teacher.context {tmp_path}/c.txt:? {said}; "):
        TeacherContext.read(str(tmp_path / "c.txt"))


def test_a_byte_order_mark_is_not_part_of_the_context(tmp_path):
    (tmp_path / "c.txt").write_text("{prompt}\n", encoding="utf-8-sig")
    assert TeacherContext.read(str(tmp_path / "c.txt")).fill("p", None, lambda _: 0, "here") == "p"


def test_contexts_that_are_too_long_are_dropped_and_counted(load, tokenizer):
    prompts = load("{prompt}{prompt}", {"prompt": "1"}, {"prompt": "12"})
    kept, dropped = asking("{prompt}{prompt}", tokenizer, most=3).fitting(prompts)
    assert (kept, dropped) == (prompts[:1], 1)
    with pytest.raises(UserError, match=r"--teacher\.max_prompt_tokens 1: all 2 prompts of the teacher are longer"):
        asking("{prompt}{prompt}", tokenizer, most=1).fitting(prompts)


def test_what_the_teacher_reads_is_part_of_what_a_run_began_with(load):
    plain, other = (load(text, {"prompt": "1", "answer": "2"})[0] for text in ("{prompt}", "{answer}"))
    open_one = load("{rollout}", {"prompt": "1", "answer": "2"})[0]
    contents = [json.dumps(p.content()) for p in (plain, other, open_one, Prompt("0", "1", plain.ids, "2"))]
    assert len(set(contents)) == 4


def test_a_rewarded_sample_of_the_same_prompt_is_shown_and_never_ones_own(load, tokenizer):
    first, second = load("{prompt}; {rollout}", {"prompt": "1", "answer": "7"}, {"prompt": "2", "answer": "8"})
    eos = tokenizer.eos_token_id
    texts = ["a", "b", "c", "d", "e", "f"]
    rollouts = [
        Rollout(n, first if n < 3 else second, [*tokenizer(text).input_ids, eos], False) for n, text in enumerate(texts)
    ]
    # Of the first prompt's samples a and c are right; of the second's e alone.
    shown = asking("{prompt}; {rollout}", tokenizer).with_samples(rollouts, [1.0, 0.0, 1.0, 0.5, 1.0, 0.0], 3)
    read = [r.prompt.teacher_ids and tokenizer.decode(r.prompt.teacher_ids) for r in shown]
    assert read == ["1; c", "1; c", "1; a", "2; e", None, "2; e"]
    assert [r.prompt.ids for r in shown] == [r.prompt.ids for r in rollouts]
    # One that would be too long is not shown: the next one is.
    long = [*rollouts[:2], Rollout(2, first, tokenizer("c" * 9).input_ids, False)]
    shown = asking("{prompt}; {rollout}", tokenizer, most=6).with_samples(long, [1.0, 1.0, 1.0], 3)
    assert [r.prompt.teacher_ids and tokenizer.decode(r.prompt.teacher_ids) for r in shown] == ["1; b", "1; a", "1; a"]


def test_positions_line_up_by_hand_when_the_teachers_prompt_is_longer(make_rollout):
    # Student: 10 11 | 20 t21 22. Teacher: 30 31 32 33 | 20 t21 22, with 21 a tool's. 20 is predicted at the prompt's
    # last token: place 1 here, 3 there; 22 at place 3 here, 5 there. Behind them a second rollout, 12 | 23 24, and for
    # the teacher 34 35 | 23 24: places 4 and 5 here, 6 + 1 and 6 + 2 there.
    rollouts = [make_rollout(3, [10, 11], [20, 21, 22], [True, False, True]), make_rollout(7, [12], [23, 24])]
    for rollout, ids in zip(rollouts, ([30, 31, 32, 33], [34, 35]), strict=True):
        object.__setattr__(rollout.prompt, "teacher_ids", ids)
    (micro,) = pack(rollouts, 100)
    (theirs,) = for_teacher([micro], rollouts)
    assert micro.input_ids_1L.tolist() == [[10, 11, 20, 21, 12, 23]] and micro.rows_N.tolist() == [1, 3, 4, 5]
    assert theirs.input_ids_1L.tolist() == [[30, 31, 32, 33, 20, 21, 34, 35, 23]]
    assert theirs.position_ids_1L.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert theirs.rows_N.tolist() == [3, 5, 7, 8]
    assert torch.equal(micro.token_ids_N, theirs.token_ids_N) and torch.equal(micro.rollout_N, theirs.rollout_N)


def test_without_contexts_the_micro_batches_are_handed_through(make_rollout):
    rollouts = [make_rollout(0, [10], [20, 21]), make_rollout(1, [11], [22])]
    micros = pack(rollouts, 2)
    assert all(ours is theirs for ours, theirs in zip(for_teacher(micros, rollouts), micros, strict=True))


def test_micro_batches_are_filled_by_whichever_prompt_is_longer(make_rollout):
    # Inputs of the student: 2 and 2 tokens, of the teacher 6 and 2. Eight fit, seven do not.
    rollouts = [make_rollout(0, [10], [20, 21]), make_rollout(1, [11], [22, 23])]
    object.__setattr__(rollouts[0].prompt, "teacher_ids", [1, 2, 3, 4, 5])
    assert len(pack(rollouts, 8)) == 1 and len(pack(rollouts, 7)) == 2


@pytest.mark.numeric
def test_the_states_are_the_models_own_behind_the_context_whatever_the_layout(make_model, make_rollout):
    model = make_model("qwen3", seed=1)
    rollouts = [make_rollout(n, [6 + n, 7], [9, 10 + n, 11, 1], [True, n == 0, True, True]) for n in range(3)]
    for rollout, length in zip(rollouts, (9, 1, 4), strict=True):
        object.__setattr__(rollout.prompt, "teacher_ids", list(range(12, 12 + length)))
    (micro,) = for_teacher(pack(rollouts, 100), rollouts)
    expected = []
    for rollout in rollouts:
        sequence = rollout.prompt.teacher_ids + rollout.response_ids
        hidden_LD = model.model(torch.tensor([sequence])).last_hidden_state[0]
        first = len(rollout.prompt.teacher_ids) - 1
        expected += [hidden_LD[first + place] for place, own in enumerate(rollout.student_mask) if own]
    for packed in (False, True):
        found_ND = Scorer(make_model("qwen3", seed=1), packed).hidden(micro)
        close(found_ND, torch.stack(expected), *transformer(2, 16))

"""Prompt files to ids: both formats alike, every fault named with its place, and an order that needs no memory."""

import hashlib
import json
import math
import random
import re
from collections import Counter
from datetime import datetime

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from opsd.data.prompts import PromptStream, digest, hidden_messages, load_prompts, read_records
from opsd.data.rendering import PromptFormat
from opsd.data.template import Clock, steady
from opsd.types import Prompt
from opsd.utils.errors import UserError

RAW = PromptFormat(kind="raw")
CHAT = PromptFormat()


@pytest.fixture
def write(tmp_path):
    """A jsonl file from records or from text."""

    def write(content, name="prompts.jsonl"):
        text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def error_of(path, tokenizer, how=RAW):
    with pytest.raises(UserError) as caught:
        load_prompts(path, tokenizer, how)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- reading


def test_jsonl_and_parquet_give_the_same_records(write, tmp_path):
    records = [
        {"id": 7, "prompt": [{"role": "user", "content": "1+1"}], "reward": {"gold": "2"}, "level": 3, "p": 0.1 + 0.2},
        # a value that is absent must not turn the others' integers into fractions, nor round anything
        {
            "id": 2**60 + 1,
            "prompt": [{"role": "user", "content": "é"}],
            "reward": {"gold": "x"},
            "level": None,
            "p": 1e-17,
        },
    ]
    pd.DataFrame({key: pd.Series([r[key] for r in records], dtype="object") for key in records[0]}).to_parquet(
        tmp_path / "prompts.parquet"
    )
    assert read_records(tmp_path / "prompts.parquet") == read_records(write(records)) == records


def test_both_formats_give_the_same_prompts(write, tmp_path, tokenizer):
    records = [{"id": 3, "prompt": "1+1=", "answer": 2}, {"id": None, "prompt": "ab", "answer": None}]
    pd.DataFrame(records, dtype="object").to_parquet(tmp_path / "prompts.parquet")
    expected = [Prompt("3", "1+1=", [7, 43, 7, 45], "2"), Prompt("1", "ab", [16, 17], None)]
    assert load_prompts(write(records), tokenizer, RAW) == (expected, 0)
    assert load_prompts(tmp_path / "prompts.parquet", tokenizer, RAW) == (expected, 0)


def test_blank_lines_and_a_byte_order_mark_are_no_fault(write, tokenizer):
    prompts, _ = load_prompts(write('\ufeff{"prompt": "a"}\n\n  \n{"prompt": "b"}'), tokenizer, RAW)
    assert [(prompt.id, prompt.ids) for prompt in prompts] == [("0", [16]), ("1", [17])]


def test_fields_are_found_by_name_or_by_dotted_path(write, tokenizer):
    record = {"q": {"text": "a"}, "reward_model": {"ground_truth": "34"}, "a.b": "flat", "a": {"b": "deep"}}
    how = PromptFormat(kind="raw", prompt_field="q.text", answer_field="reward_model.ground_truth")
    ((prompt,), _) = load_prompts(write([record]), tokenizer, how)
    assert (prompt.text, prompt.answer) == ("a", "34")
    how = PromptFormat(kind="raw", prompt_field="a.b", answer_field="q.nothing.deeper")
    ((prompt,), _) = load_prompts(write([record]), tokenizer, how)
    assert (prompt.text, prompt.answer) == ("flat", None)  # a name that is there wins over a path


@pytest.mark.parametrize(
    ("answer", "gold"), [("025", "025"), (25, "25"), (0.5, "0.5"), (0, "0"), ("", None), ("  ", None), (None, None)]
)
def test_answers_become_text_and_blank_ones_none(write, tokenizer, answer, gold):
    ((prompt,), _) = load_prompts(write([{"prompt": "a", "answer": answer}]), tokenizer, RAW)
    assert prompt.answer == gold


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is not JSON"),
        ('\n\n{"prompt": \n', "line 3 is not JSON"),
        ('{"prompt": "a"}\n["b"]\n', "line 2 is a list; give one object per line"),
        ('"a"\n', "line 1 is a str"),
        ("", "holds no records"),
        ("\n \n", "holds no records"),
        (
            '{"prompt": "a"}\n{"question": "b", "answer": "c"}\n',
            "record 2 has no field 'prompt'; it has: question, answer",
        ),
        ('{"prompt": ""}\n', "record 1: 'prompt' is ''"),
        ('{"prompt": null}\n', "record 1: 'prompt' is None"),
        ('{"prompt": 5}\n', "record 1: 'prompt' is 5"),
        ('{"prompt": []}\n', "record 1: 'prompt' is []"),
        ('{"prompt": ["a"]}\n', "record 1: 'prompt' is ['a']"),
        ('{"prompt": {"role": "user", "content": "a"}}\n', "record 1: 'prompt' is {"),
        ('{"prompt": [{"role": "user"}]}\n', "record 1: 'prompt' is [{'role': 'user'}]"),
        ('{"prompt": [{"role": "user", "content": null}]}\n', "record 1: 'prompt' is [{"),
        ('{"prompt": [{"content": "a"}]}\n', "record 1: 'prompt' is [{'content': 'a'}]"),
        ('{"prompt": "a", "answer": ["1"]}\n', "record 1: 'answer' is ['1']; give a text or a number"),
        ('{"prompt": "a", "answer": true}\n', "record 1: 'answer' is True"),
    ],
)
@pytest.mark.parametrize("how", [RAW, CHAT], ids=["raw", "chat"])
def test_each_malformed_record_is_named_with_its_place(write, tokenizer, text, said, how):
    assert said in error_of(write(text), tokenizer, how)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path, tokenizer):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n')
    assert "line 2 is not JSON" in error_of(tmp_path / "p.jsonl", tokenizer)


@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "nothing.jsonl", "folder.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, tokenizer, name):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 this is none")
    (tmp_path / "p.csv").write_text("prompt\na\n")
    (tmp_path / "folder.jsonl").mkdir()
    error_of(tmp_path / name, tokenizer)


def test_long_values_are_shown_shortened(write, tokenizer):
    message = error_of(write([{"prompt": ["x" * 10_000]}]), tokenizer)
    assert len(message) < 400


# ---- chat template


def test_the_template_is_applied_once_with_the_generation_prompt(write, tokenizer, make_tokenizer):
    # <user> a b <assistant>: 3 16 17 4
    ((prompt,), _) = load_prompts(write([{"prompt": "ab"}]), tokenizer, CHAT)
    assert prompt.ids == [3, 16, 17, 4]
    # A tokenizer that puts a token in front of every text must not put another before the template's own.
    fronted = make_tokenizer()
    fronted.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    fronted.chat_template = "<eos>" + fronted.chat_template
    assert fronted("ab").input_ids == [1, 16, 17]
    ((prompt,), _) = load_prompts(write([{"prompt": "ab"}]), fronted, CHAT)
    assert prompt.ids == [1, 3, 16, 17, 4]
    ((prompt,), _) = load_prompts(write([{"prompt": "ab"}]), fronted, RAW)
    assert prompt.ids == [1, 16, 17]


def test_chat_messages_are_used_as_they_stand(write, tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ((prompt,), _) = load_prompts(write([{"prompt": messages}]), tokenizer, CHAT)
    assert prompt.ids == [3, 16, 4, 17, 3, 18, 4]
    assert prompt.text == "c"


def test_thinking_is_handed_to_the_template(write, tokenizer):
    path = write([{"prompt": "ab"}])
    ((on,), _) = load_prompts(path, tokenizer, PromptFormat(thinking="on"))
    ((off,), _) = load_prompts(path, tokenizer, PromptFormat(thinking="off"))
    assert on.ids == [3, 16, 17, 4, 5]
    assert off.ids == [3, 16, 17, 4]


ALWAYS = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant><think>"
NEVER = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.mark.parametrize(
    ("template", "thinking", "said"),
    [
        (NEVER, "on", "--thinking on: the chat template has no thinking mode; give --thinking off"),
        (ALWAYS, "off", "--thinking off: the chat template always starts with thinking; give --thinking on"),
        (NEVER, "off", None),
        (ALWAYS, "on", None),
    ],
)
def test_a_thinking_mode_that_the_template_does_not_have_is_no_guess(write, make_tokenizer, template, thinking, said):
    path, tokenizer = write([{"prompt": "ab"}]), make_tokenizer()
    tokenizer.chat_template = template
    if said is None:
        ((prompt,), _) = load_prompts(path, tokenizer, PromptFormat(thinking=thinking))
        assert prompt.ids[:4] == [3, 16, 17, 4]
    else:
        with pytest.raises(UserError, match=f"^{said}$"):
            load_prompts(path, tokenizer, PromptFormat(thinking=thinking))


def test_a_template_that_wants_several_messages_is_asked_with_the_records_own(write, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages|length < 2 %}{{ raise_exception('two') }}{% endif %}<user><assistant>"
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    ((prompt,), _) = load_prompts(write([{"prompt": messages}]), tokenizer, CHAT)
    assert prompt.ids == [3, 4]


def test_a_tokenizer_without_template_is_refused_unless_raw(write, make_tokenizer):
    path, plain = write([{"prompt": "ab"}]), make_tokenizer(chat=False)
    with pytest.raises(UserError, match=r"^[^\n]*no chat template; give --prompt_format raw[^\n]*$"):
        load_prompts(path, plain, CHAT)
    ((prompt,), _) = load_prompts(path, plain, RAW)
    assert prompt.ids == [16, 17]


def test_messages_need_the_chat_format(write, tokenizer):
    path = write([{"prompt": [{"role": "user", "content": "a"}]}])
    assert "record 1 holds chat messages; give --prompt_format chat" in error_of(path, tokenizer, RAW)


def test_messages_that_the_template_refuses_are_named(write, make_tokenizer):
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    message = error_of(write([{"prompt": "a"}]), strict, CHAT)
    assert "record 1 does not fit the student's chat template (System role not supported)" in message


DAILY = "{{ strftime_now('%d') }}" + "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
DICE = "{{ ['a', 'b', 'c', 'd', 'e', 'f'] | random }}" + "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_a_template_sees_the_time_of_its_clock_and_a_clock_knows_that_it_was_asked(write, make_tokenizer):
    path, tokenizer, clock = write([{"prompt": "a"}]), make_tokenizer(), Clock(datetime(2024, 2, 29, 23, 59))
    steady(tokenizer, clock)
    load_prompts(path, tokenizer, CHAT)
    assert not clock.asked
    tokenizer.chat_template = DAILY
    ((prompt,), _) = load_prompts(path, tokenizer, CHAT)
    assert prompt.ids == [8, 15, 3, 16, 4] and clock.asked  # 2 9 <user> a <assistant>


def test_a_templates_random_choices_hang_on_the_messages_alone(write, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DICE
    steady(tokenizer, Clock())
    path = write([{"prompt": "a" * n} for n in range(1, 21)])
    random.seed(0)
    first, _ = load_prompts(path, tokenizer, CHAT)
    then = random.random()
    random.seed(0)
    assert random.random() == then  # whoever else draws is not disturbed
    assert load_prompts(path, tokenizer, CHAT)[0] == first
    assert len({prompt.ids[0] for prompt in first}) > 1


@pytest.mark.parametrize("text", ["ab", "<bos>ab", "<bos><bos>ab", "ab<eos>", "<bos>ab<eos>"])
@pytest.mark.parametrize("frame", ["<bos> $A", "<bos> $A <eos>", "$A <eos>", "$A"])
def test_a_raw_prompt_begins_once_and_does_not_end(write, make_tokenizer, text, frame):
    # a b, behind one <bos> where either the text or the tokenizer has it
    ((prompt,), _) = load_prompts(write([{"prompt": text}]), framed(make_tokenizer(), frame), RAW)
    assert prompt.ids == ([49] if "<bos>" in text + frame else []) + [16, 17]


def test_a_token_that_is_begin_and_end_stays_where_the_text_has_it(write, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    prompts, _ = load_prompts(write([{"prompt": "<eos>"}, {"prompt": "ab<eos>"}]), tokenizer, RAW)
    assert [prompt.ids for prompt in prompts] == [[1], [16, 17, 1]]


def framed(tokenizer, frame):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>") if token in frame]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=special)
    return tokenizer


def turns(*roles):
    return [{"role": role, "content": "abc"[place]} for place, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (turns("user", "assistant"), "ends with a message of role 'assistant': no answer can follow it"),
        (turns("user", "model"), "ends with a message of role 'model'"),
        (turns("user", "assistant", "system"), "ends with a message of role 'system'"),
        (turns("system"), "ends with a message of role 'system'"),
        ([{"role": "user", "content": " \n"}], "ends with an empty user message"),
        (" \n", "ends with an empty user message"),
        ([], "'prompt' is []"),
        (turns("user", "assistant", "tool"), "leaves out the last message, of role 'tool'"),
    ],
)
def test_a_prompt_that_asks_nothing_is_refused(write, make_tokenizer, messages, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}<user>{{ m.content }}{% endif %}{% endfor %}<assistant>"
    )
    assert said in error_of(write([{"prompt": messages}]), tokenizer, CHAT)


@pytest.mark.parametrize("shown", ["m.content", "m.content | trim", "m.content | tojson"])
def test_a_tools_answer_may_come_last_where_the_template_shows_it(write, make_tokenizer, shown):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ " + shown + " }}{% endfor %}<assistant>"
    messages = [*turns("user", "assistant"), {"role": "tool", "content": ' {"a": "1"}\n'}]
    ((prompt,), _) = load_prompts(write([{"prompt": messages}]), tokenizer, CHAT)
    assert prompt.ids[-1] == 4


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", None),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            "1 of 2 .*2 lacks.*'system'",
        ),
        ("{{ messages[-1].content }}", "1 of 2 .*record 2 lacks a message of role 'system'"),
        ("constant", "2 of 2 .*record 1 lacks a message of role 'user'"),
    ],
)
def test_messages_that_the_template_leaves_out_are_counted(write, make_tokenizer, template, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    talk = [*turns("system", "user", "assistant"), {"role": "user", "content": " d e\n"}]
    talk[2]["content"] = "<think>f</think>g"
    found = hidden_messages(write([{"prompt": "1+1"}, {"prompt": talk}]), tokenizer, CHAT)
    assert len(found) == bool(said) and all(re.search(said, line) for line in found)


# ---- length


def test_a_prompt_of_the_limit_is_taken_and_one_token_more_is_not(write, tokenizer):
    path = write([{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "ab"}])
    drop = PromptFormat(kind="raw", max_tokens=3, overlong="drop")
    prompts, dropped = load_prompts(path, tokenizer, drop)
    # ids go by the record's place, so that dropping one renames nobody
    assert [(prompt.id, len(prompt.ids)) for prompt in prompts] == [("0", 3), ("2", 2)]
    assert dropped == 1
    message = error_of(path, tokenizer, PromptFormat(kind="raw", max_tokens=3))
    assert "record 2 has 4 tokens, over --rollout.max_prompt_tokens 3" in message


def test_the_template_counts_towards_the_limit(write, tokenizer):
    # <user> a b <assistant> is 4 tokens
    message = error_of(write([{"prompt": "ab"}]), tokenizer, PromptFormat(max_tokens=3))
    assert "record 1 has 4 tokens" in message


def test_dropping_every_prompt_is_an_error(write, tokenizer):
    how = PromptFormat(kind="raw", max_tokens=1, overlong="drop")
    assert "all 2 prompts are over" in error_of(write([{"prompt": "ab"}, {"prompt": "cd"}]), tokenizer, how)


# ---- order

sizes = st.tuples(st.integers(1, 13), st.integers(1, 20), st.integers(0, 5))


def stream_of(count, per_step, seed):
    return PromptStream([Prompt(str(number), "", [6], None) for number in range(count)], per_step, seed)


@given(sizes)
@settings(deadline=None, max_examples=60)
def test_each_epoch_is_a_permutation_of_all_prompts(size):
    count, per_step, seed = size
    stream = stream_of(count, per_step, seed)
    steps = math.ceil(3 * count / per_step)
    taken = [prompt.id for step in range(1, steps + 1) for prompt in stream.take(step)]
    for epoch in range(3):
        assert Counter(taken[epoch * count : (epoch + 1) * count]) == Counter(str(n) for n in range(count))


@given(sizes, st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_a_steps_prompts_depend_on_seed_and_step_alone(size, order):
    # asked in any order, as after a resume, against a stream that is asked for this step only
    used = stream_of(*size)
    assert [used.take(step) for step in order] == [stream_of(*size).take(step) for step in order]


def test_epochs_and_seeds_are_shuffled_differently():
    stream, other = stream_of(50, 50, 0), stream_of(50, 50, 1)
    in_file_order = [str(number) for number in range(50)]
    orders = [[prompt.id for prompt in s.take(step)] for s in (stream, other) for step in (1, 2)]
    assert len({tuple(order) for order in [*orders, in_file_order]}) == 5


def test_a_digest_is_of_ids_tokens_and_answers_in_order():
    # the first 16 digits of sha256 over the JSON list of [id, ids, answer]
    prompts = [Prompt("0", "a", [16], "1"), Prompt("1", "b", [17, 18], None)]
    whole = hashlib.sha256(b'[["0", [16], "1"], ["1", [17, 18], null]]').hexdigest()[:16]
    assert digest(prompts) == whole != digest(prompts[::-1])


@pytest.mark.parametrize("how", [RAW, CHAT])
def test_a_character_that_the_tokenizer_lacks_is_said_with_its_place(write, how):
    """The pocket tokenizer's unknown token is not in its vocabulary, so that it encodes nothing but sums."""
    pocket = AutoTokenizer.from_pretrained("assets/pocket/student")
    pocket.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    message = error_of(write([{"prompt": "1+1="}, {"prompt": "one and one"}]), pocket, how)
    assert "record 2: the tokenizer cannot encode it" in message
    assert "UNK" in message

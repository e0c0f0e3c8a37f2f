"""What ends a turn: by a model's files, by its template, and for a pair; and pairs that cannot be reconciled."""

import dataclasses
import json

import pytest
from tiny_models import build_tokenizer
from transformers import GenerationConfig

from opsd.model.stops import PairStops, end_of_turn, eos_token_ids, generation_of, reconcile, stated_stops, turn_ends
from opsd.types import Stops
from opsd.utils.errors import UserError

EOS, USER, THINK = 1, 3, 5
ENDED = "{% for m in messages %}<user>{{ m['content'] }}<think>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ENDED, THINK),
        ("{% for m in messages %}{{ m['content'] }}  <think>{% endfor %}", THINK),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }}. <think>{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }}abc{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        # The words are not in the text: changed, or left out.
        ("{% for m in messages %}<user>{{ m['content'] | upper }}<think>{% endfor %}", None),
        ("<user>{{ messages[0]['content'] }}<think>", None),
        ("{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}", None),
        (None, None),
    ],
)
def test_the_end_of_turn_is_the_control_token_right_behind_the_assistants_words(template, end):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == end


def test_a_chat_ends_with_what_files_and_template_name_and_a_raw_text_with_what_files_name():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = ENDED
    generation = GenerationConfig(eos_token_id=[7, 8])
    assert eos_token_ids(generation, tokenizer) == [7, 8, EOS]
    assert turn_ends(generation, tokenizer, chat=False) == [7, 8, EOS]
    assert turn_ends(generation, tokenizer, chat=True) == [7, 8, EOS, THINK]
    assert turn_ends(GenerationConfig(eos_token_id=THINK), tokenizer, chat=True) == [THINK, EOS]


def test_an_end_that_is_named_twice_counts_once(tokenizer):
    assert eos_token_ids(GenerationConfig(eos_token_id=[7, 7, EOS, 7]), tokenizer) == [7, EOS]
    assert eos_token_ids(GenerationConfig(), tokenizer) == eos_token_ids(None, tokenizer) == [EOS]


@pytest.mark.parametrize("named", [-1, [-1, 1], "1", [None], [[1]], 1.0, True, {}])
def test_what_is_no_id_is_refused_as_an_end(tokenizer, named):
    with pytest.raises(UserError, match=r"eos_token_id .* is not a token id; give whole numbers from 0"):
        eos_token_ids(GenerationConfig(eos_token_id=named), tokenizer)


def test_a_folder_without_weights_loaded_names_the_same_ends(make_folder, make_model):
    model = make_model()
    model.generation_config.eos_token_id = [1, 5]
    folder = make_folder(model)
    assert generation_of(str(folder), False).eos_token_id == [1, 5]
    (folder / "generation_config.json").unlink()
    assert generation_of(str(folder), False).eos_token_id == model.config.eos_token_id == 1


def test_stops_are_stated_by_spelling_or_by_id(tokenizer):
    assert stated_stops(["<eos>", ";", "5", "<eos>", "12"], tokenizer, 49, "--rollout.stop_tokens") == [1, 48, 11, 12]
    with pytest.raises(UserError, match=r"--rollout.stop_tokens '<\|im_end\|>': the models share no such token"):
        stated_stops(["<|im_end|>"], tokenizer, 49, "--rollout.stop_tokens")
    for unknown in ("49", "٣"):
        with pytest.raises(UserError, match=f"'{unknown}'"):
            stated_stops([unknown], tokenizer, 49, "--rollout.stop_tokens")


def test_the_line_tells_the_token_that_is_a_digit_from_an_id(tokenizer):
    digit = stated_stops(["7"], tokenizer, 49, "--rollout.stop_tokens")
    line = reconcile([1], [1], digit, 49).line(tokenizer)
    assert line.endswith(f"rollouts end with 7 (id {digit[0]}) (--rollout.stop_tokens)")


@pytest.mark.parametrize(
    ("student", "teacher", "stated", "ids", "joined"),
    [
        ([1], [1], [], (1,), False),
        ([1, 3], [3, 1], [], (1, 3), False),
        ([1], [3], [], (1, 3), True),
        ([1], [3, 1], [], (1, 3), True),
        ([], [3], [], (3,), False),
        ([], [], [], (), False),
        ([1], [3], [1], (1,), False),
        ([1], [3], [3, 1], (3, 1), True),
        ([1], [], [1], (1,), False),
        ([1], [3, 99], [], (1, 3), True),
        ([1, 3, 10**12], [1, 3, 99], [], (1, 3), False),
        ([99], [1, 99], [1], (1,), False),
    ],
)
def test_rollouts_end_at_what_either_ends_with_and_the_loss_joins_what_differs(student, teacher, stated, ids, joined):
    assert reconcile(student, teacher, stated, 49).stops == Stops(ids, joined)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([1], [99], "--teacher: its end tokens have ids 99, the model knows 0 to 48"),
        ([60], [1], "--student: its end tokens have ids 60"),
        ([1], [], "--teacher: it names no end token, so training would remove the student's; name one as eos_token_id"),
    ],
)
def test_stops_that_cannot_be_reconciled_are_refused_with_the_remedy(student, teacher, message):
    with pytest.raises(UserError, match=message):
        reconcile(student, teacher, [], 49)


def test_the_line_says_what_was_found_and_chosen_and_survives_json(tokenizer):
    both = reconcile([1], [1], [], 49)
    apart = reconcile([1], [3], [], 49)
    stated = reconcile([1], [3], [1], 49)
    capped = reconcile([1], [3], [], 49, joinable=False)
    assert both.line(tokenizer) == "stops: both models end with <eos>"
    assert apart.line(tokenizer) == (
        "stops: the student ends with <eos>, the teacher with <user>; rollouts end with <eos> <user>, which the loss "
        "merges into one token"
    )
    assert stated.line(tokenizer).endswith("; rollouts end with <eos> (--rollout.stop_tokens)")
    assert capped.line(tokenizer).endswith(
        "which the loss keeps separate: a head with a soft cap has no logit for their sum"
    )
    assert reconcile([60, 1], [1, 10**12], [], 49).line(tokenizer) == both.line(tokenizer)
    assert reconcile([50, 1], [1, 50], [], 60).line(tokenizer) == "stops: both models end with id 50 <eos>"
    for pair in (both, apart, stated, capped):
        assert PairStops.from_json(json.loads(json.dumps(dataclasses.asdict(pair)))) == pair

"""Episodes: whose token is whose, how calls are answered, where an episode ends, and that both samplers agree."""

import json
import re
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from trips import golds, plan_text

from opsd.config import from_json
from opsd.data.packing import pack
from opsd.environments.travel import TravelEnv, generate_tasks, pocket_tasks, write_task_file
from opsd.environments.travel.oracle import oracle_plan
from opsd.environments.travel.talk import Talk, last_turn
from opsd.rollout import HFRollout
from opsd.rollout.agent import AgentRollout
from opsd.rollout.cached_agent import CachedAgentRollout
from opsd.rollout.tool_calls import ChatTurns, cut_middle, read_calls
from opsd.selection import load_selector
from opsd.train import start
from opsd.types import Prompt, Rollout, Sampling
from opsd.utils.errors import UserError
from opsd.utils.seeding import derive_seed
from pocket.tokenizer import trips_tokenizer

# The shape of Qwen3's template: tools in the system message, tool outputs in a user turn.
HERMES = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<user>{% endif %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<eos>\n{% endif %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% if loop.first and tools %}{{ tools | tojson }}{% endif %}"
    "<eos>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
CALL = '<tool_call>\n{"name": "search_location", "arguments": {"place_name": "Nowhere"}}\n</tool_call>'

LOOK = ("search_location", {"place_name": "Nowhere"})


def called(arguments):
    return f"<tool_call>{json.dumps({'name': 'a', 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def chat_tokenizer(make_tokenizer):
    """Every printable character is a token, and so is every sign of the generated tasks."""
    tokenizer = make_tokenizer(characters=string.printable + "¥：，。…—–∎")
    tokenizer.backend_tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")  # line ends too
    tokenizer.chat_template = HERMES
    return tokenizer


@pytest.fixture(scope="module")
def word_tokenizer():
    return trips_tokenizer()


class Parrot:
    """A conversation that answers the first turns of an episode with a few tokens made from the turn."""

    def reply(self, prompt, turn_ids):
        made = [6 + (token * 7 + place) % 40 for place, token in enumerate(turn_ids[-3:])]
        return None if sum(turn_ids) % 5 == 0 else made * (1 + len(prompt.ids) % 2)


@pytest.fixture(scope="module")
def talker(make_model):
    """A random model a fifth of whose tokens end a turn."""
    model = make_model(seed=3)
    model.generation_config.eos_token_id = [1, *range(10, 20)]
    return model


@pytest.fixture(scope="module")
def questions():
    """Prompts of different lengths, as ids."""
    return [Prompt(str(n), "", [6 + (n * 5 + k * 3) % 44 for k in range(2 + n % 4)], None) for n in range(12)]


class Scripted:
    """A RolloutEngine that writes what `script(prompt text so far, turn)` says; one that is too long is cut."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.batches, self.syncs = tokenizer, script, [], 0

    def generate(self, prompts, samples, sampling, seed):
        self.batches.append([prompt.id for prompt in prompts])
        rollouts = []
        for number, prompt in enumerate(prompts):
            assert samples == 1
            text = self.script(prompt, self.tokenizer.decode(prompt.ids))
            ids = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            cut = len(ids) > sampling.max_new_tokens
            rollouts.append(Rollout(number, prompt, ids[: sampling.max_new_tokens], cut))
        return rollouts

    def sync(self):
        self.syncs += 1


def talk_of(tokenizer, limit=1024, thinking=False):
    return Talk(TravelEnv(), tokenizer, thinking, limit)


def play(tokenizer, script, tasks, max_turns=10, max_new_tokens=20_000, samples=1, **settings):
    talk = talk_of(tokenizer, **settings)
    engine = Scripted(tokenizer, script)
    agent = AgentRollout(engine, talk, max_turns)
    rollouts = agent.generate(
        [talk.prompt(task) for task in tasks], samples, Sampling(max_new_tokens=max_new_tokens), 0
    )
    return rollouts, talk, engine


@pytest.fixture(scope="module")
def tasks():
    return generate_tasks(6, seed=21)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CALL, [("search_location", {"place_name": "Nowhere"})]),
        (f"I look.\n{CALL}\n{CALL}", [("search_location", {"place_name": "Nowhere"})] * 2),
        (f"<think>{CALL}</think>nothing", []),
        (f"<think>{CALL}", []),
        (f"<think>hm</think>{CALL}", [("search_location", {"place_name": "Nowhere"})]),
        ('{"name": "a", "parameters": {"b": 1}}', [("a", {"b": 1})]),
        ('```json\n[{"name": "a", "arguments": "{}"}, {"name": "b", "arguments": {}}]\n```', [("a", "{}"), ("b", {})]),
        ("{not json}", []),
        ('{"name": "a"}', []),
        ("[]", []),
        # A tag inside a string is text; so are braces, quotes and a thought's tags.
        (called({"q": "</tool_call>"}), [("a", {"q": "</tool_call>"})]),
        (called({"q": "<tool_call>"}), [("a", {"q": "<tool_call>"})]),
        (called({"q": CALL}) * 2, [("a", {"q": CALL})] * 2),
        (called({"q": '\\"}}</tool_call>{"'}) + CALL, [("a", {"q": '\\"}}</tool_call>{"'}), LOOK]),
        (called({"q": {"r": [{"s": "}{</tool_call>"}]}}), [("a", {"q": {"r": [{"s": "}{</tool_call>"}]}})]),
        (called({"q": "</think>"}), [("a", {"q": "</think>"})]),
        (called({"q": "<think>"}) + CALL, [("a", {"q": "<think>"}), LOOK]),
        (f"I may write <tool_call>.</think>{CALL}", [LOOK]),
        (f"<think>{called({'q': '</tool_call>'})}</think>{CALL}", [LOOK]),
        ('{"name": "a", "arguments": {"q": "<tool_call></think>"}}', [("a", {"q": "<tool_call></think>"})]),
        ('hm</think>{"name": "a", "arguments": {"q": "</tool_call>"}}', [("a", {"q": "</tool_call>"})]),
        # A thought behind a call, closed or not, does not undo it.
        (f"{CALL} then <think>x</think>", [LOOK]),
        (f"{CALL}<think>{called({})}</think>{CALL}", [LOOK] * 2),
        (f"{CALL}<think>{called({})}", [LOOK]),
        ('<think>hm</think>{"name": "a", "arguments": {}}', [("a", {})]),
        ("The plan: <plan>x</plan>", []),
        ("", []),
    ],
)
def test_calls_are_read_in_hermes_and_in_plain_form(text, found):
    assert [(call.name, call.arguments) for call in read_calls(text)] == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<tool_call>{", "not closed"),
        ("<tool_call></tool_call>", "not a JSON object with a name"),
        ("<tool_call>[1]</tool_call>", "not a JSON object with a name"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not a JSON object with a name"),
        ('<tool_call>{"name": "x"}</tool_call>', "not a JSON object with a name"),
        ('<tool_call>{"name": "x", "arguments": {}} and</tool_call>', "not a JSON object with a name"),
        ('<tool_call>{"name": "x", "arguments": {"q": "</tool_call>"', "not a JSON object with a name"),
        ('<tool_call>{"name": "x", "arguments": {}}', "not closed"),
    ],
)
def test_a_call_that_cannot_be_read_is_an_error_and_not_the_end(text, says):
    (call,) = read_calls(text)
    assert says in (call.error or "")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"name"', ":", "[", "```", "1"]
        )
    )
)
def test_no_turn_raises(pieces):
    assert isinstance(read_calls("".join(pieces)), list)


def test_long_output_keeps_head_and_tail():
    # 10 of 26 characters: five at each end.
    assert cut_middle(string.ascii_lowercase, 10) == "abcde\n… 16 characters left out …\nvwxyz"
    assert cut_middle("abc", 1) == "a\n… 2 characters left out …\n"
    assert cut_middle("abc", 3) == cut_middle("abc", 0) == "abc"


def test_mask_token_by_token(chat_tokenizer, tasks):
    """Every response token, in order: student's call, environment's answer, student's last words."""
    turns = iter([CALL, "No plan."])
    (rollout,), _, _ = play(chat_tokenizer, lambda prompt, text: next(turns), tasks[:1])
    answer = (
        "\n<user><tool_response>\nNothing was found for Nowhere. Use names, dates and coordinates exactly as tools "
        "return them.\n</tool_response><eos>\n<assistant>"
    )
    pieces = [(CALL + "<eos>", True), (answer, False), ("No plan.<eos>", True)]
    expected = [
        (token, by_student)
        for text, by_student in pieces
        for token in chat_tokenizer(text, add_special_tokens=False).input_ids
    ]
    assert list(zip(rollout.response_ids, rollout.student_mask, strict=True)) == expected
    assert not rollout.truncated and chat_tokenizer.decode(last_turn(rollout)) == "No plan.<eos>"
    assert chat_tokenizer.unk_token_id not in [*rollout.prompt.ids, *rollout.response_ids]


def test_only_the_students_tokens_are_selected_from_and_trained_on(chat_tokenizer, tasks):
    turns = iter([CALL, "No plan."])
    (rollout,), _, _ = play(chat_tokenizer, lambda prompt, text: next(turns), tasks[:1])
    own = [token for token, by_student in zip(rollout.response_ids, rollout.student_mask, strict=True) if by_student]
    (micro,) = pack([rollout], 100_000)
    assert micro.token_ids_N.tolist() == own and len(own) == len(CALL) + 1 + len("No plan.") + 1
    # Half of the student's tokens, whatever the tools said: ⌊0.5·m⌋.
    assert load_selector("entropy", retention=0.5).budget(micro.student_tokens()) == len(own) // 2


def test_a_whole_episode_of_the_oracle_scores_one(chat_tokenizer, tasks):
    """Calls first, by name and coordinates that the tools returned; then the plan."""
    plans = {f"en-{task.id}": plan_text(oracle_plan(task)) for task in tasks}

    def script(prompt, text):
        if "Recommended" not in text:
            return '<tool_call>{"name": "recommend_attractions", "arguments": {"city": "x"}}</tool_call>'
        if '"latitude"' not in text.partition("Recommended")[2]:
            name = re.findall(r"\n\n(.*?), A ", text)[-1]
            return json.dumps({"name": "search_location", "arguments": {"place_name": name}})
        return f"<think>now</think>{plans[prompt.id]}"

    rollouts, talk, engine = play(chat_tokenizer, script, tasks, samples=2)
    assert [talk.score(rollout).hard_fraction for rollout in rollouts] == [1.0] * 12
    assert len(engine.batches) == 3 and all(len(batch) == 12 for batch in engine.batches)
    assert [rollout.id for rollout in rollouts] == list(range(12))


def test_parallel_and_malformed_calls_are_answered_together(chat_tokenizer, tasks):
    turns = iter(
        [
            CALL + '<tool_call>{"name": "fly"}</tool_call><tool_call>{"name": "fly", "arguments": {}}</tool_call>',
            "x",
        ]
    )
    (rollout,), _, _ = play(chat_tokenizer, lambda prompt, text: next(turns), tasks[:1])
    outputs = re.findall(
        r"<tool_response>\n(.*?)\n</tool_response>", chat_tokenizer.decode(rollout.response_ids), re.DOTALL
    )
    assert len(outputs) == 3
    assert outputs[0].startswith("Nothing was found") and "not a JSON object" in outputs[1]
    assert outputs[2].startswith("There is no tool 'fly'. The tools are: query_train_info")


def test_finished_episodes_leave_the_batch(chat_tokenizer, tasks):
    script = lambda prompt, text: CALL if prompt.id.endswith("-1") and text.count("Nothing") < 3 else "done"  # noqa: E731
    rollouts, _, engine = play(chat_tokenizer, script, tasks[:3])
    assert [len(batch) for batch in engine.batches] == [3, 1, 1, 1]
    assert [sum(not by_student for by_student in r.student_mask) > 0 for r in rollouts] == [False, True, False]


def test_an_episode_without_turns_left_is_truncated_and_has_no_plan(chat_tokenizer, tasks):
    script = lambda prompt, text: CALL + "<plan>x</plan>"  # noqa: E731
    (rollout,), talk, engine = play(chat_tokenizer, script, tasks[:1], max_turns=3)
    assert rollout.truncated and len(engine.batches) == 3 and rollout.student_mask[-1]
    assert not talk.score(rollout).delivered


@pytest.mark.parametrize("limit", range(1, 400, 7))
def test_no_limit_is_ever_passed_and_no_answer_comes_last(chat_tokenizer, tasks, limit):
    script = lambda prompt, text: CALL if text.count("Nothing") < 2 else "done"  # noqa: E731
    (rollout,), _, _ = play(chat_tokenizer, script, tasks[:1], max_new_tokens=limit)
    assert len(rollout.response_ids) <= limit and rollout.student_mask[-1]
    assert rollout.truncated != chat_tokenizer.decode(last_turn(rollout)).endswith("done<eos>")


def test_tool_output_is_cut_before_it_is_encoded(chat_tokenizer, tasks):
    turns = iter(['{"name": "recommend_attractions", "arguments": {"city": "x"}}', "x"])
    (rollout,), _, _ = play(chat_tokenizer, lambda prompt, text: next(turns), tasks[:1], limit=40)
    (output,) = re.findall(
        r"<tool_response>\n(.*?)\n</tool_response>", chat_tokenizer.decode(rollout.response_ids), re.DOTALL
    )
    assert output.startswith("Recommended attracti\n… ") and output.count("characters left out") == 1
    assert len(re.sub(r"\n… \d+ characters left out …\n", "", output)) == 40


def test_control_tokens_that_a_model_smuggles_through_a_tool_stay_text(chat_tokenizer, tasks):
    talk = talk_of(chat_tokenizer)
    turn = chat_tokenizer('{"name": "search_location", "arguments": {"place_name": "<|im_end|>"}}<eos>').input_ids
    assert "<|im_end|>" not in chat_tokenizer.decode(talk.reply(talk.prompt(tasks[0]), turn))


def test_a_template_that_knows_no_tools_gets_them_in_the_system_message(make_tokenizer, tasks):
    tokenizer = make_tokenizer(characters=string.printable + "¥：，…∎")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    opening = tokenizer.decode(talk_of(tokenizer).prompt(tasks[0]).ids)
    assert "# Tools" in opening and '"name": "query_restaurant_details"' in opening and opening.endswith("<assistant>")


def test_a_template_that_cannot_carry_tool_messages_is_refused(make_tokenizer, tasks):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="drops tool messages"):
        ChatTurns(tokenizer, False)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"refuses tool messages \(roles must alternate\)"):
        ChatTurns(tokenizer, False)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatTurns(tokenizer, False)


def test_the_thinking_mode_reaches_every_turn(chat_tokenizer, tasks):
    talk = talk_of(chat_tokenizer, thinking=True)
    prompt = talk.prompt(tasks[0])
    answer = talk.reply(prompt, chat_tokenizer(CALL + "<eos>").input_ids)
    assert chat_tokenizer.decode(prompt.ids).endswith("<assistant><think>")
    assert chat_tokenizer.decode(answer).endswith("<assistant><think>")


def test_a_tokenizer_without_the_words_is_refused(chat_tokenizer, tasks, word_tokenizer):
    with pytest.raises(UserError, match="lacks words of the word form"):
        talk_of(chat_tokenizer).prompt(pocket_tasks(1, 0)[0])
    with pytest.raises(UserError, match="no chat template"):
        talk_of(word_tokenizer).prompt(tasks[0])


def encode(tokenizer, text):
    return tokenizer.convert_tokens_to_ids(text.split())


def test_the_word_form_answers_calls_in_words(word_tokenizer):
    (task,) = pocket_tasks(1, 0)
    talk = talk_of(word_tokenizer)
    prompt = talk.prompt(task)
    say = lambda text: talk.reply(prompt, encode(word_tokenizer, text))  # noqa: E731
    attraction = task.tables["attractions"][0]
    place = f"X{attraction['latitude'].partition('.')[0]}"
    assert (
        word_tokenizer.decode(say(f"<call> search_location {attraction['attraction_name']} </call>"))
        == f"<rows> {place} </rows>"
    )
    rows = word_tokenizer.decode(say(f"<note> T¥1 <call> recommend_restaurants {place} </call>")).split()
    assert len(rows) == 2 + 2 * 4 and rows[1].startswith("R¥") and rows[2].startswith("Rr")
    assert len(say("<call> query_hotel_info any </call>")) == 2 + 2 * 9
    assert word_tokenizer.decode(say("<call> search_location X1 </call>")) == "<rows> error </rows>"
    assert word_tokenizer.decode(say("</call>")) == "<rows> error </rows>"
    missing = next(star for star in "2345" if star not in {row["hotel_star"] for row in task.tables["hotels"]})
    assert word_tokenizer.decode(say(f"<call> query_hotel_info s{missing} </call>")) == "<rows> none </rows>"
    assert say(f"<plan> {' '.join(f'{s} {w}' for s, w in golds(task).items())} </plan> <eos>") is None


def test_both_samplers_play_the_same_greedy_episodes(tokenizer, talker, questions):
    """The cache with its queues against reading everything anew each turn; prompts and turns of different lengths."""
    greedy = Sampling(temperature=0.0, max_new_tokens=40)
    turnwise = AgentRollout(HFRollout(talker, tokenizer, 8), Parrot(), 4).generate(questions, 1, greedy, 0)
    cached = CachedAgentRollout(HFRollout(talker, tokenizer, 5), Parrot(), 4).generate(questions, 1, greedy, 0)
    assert cached == turnwise
    answered = [rollout for rollout in cached if not all(rollout.student_mask)]
    assert len(answered) > 3 and len({len(rollout.response_ids) for rollout in cached}) > 3
    assert {rollout.truncated for rollout in cached} == {True, False}


def test_cached_tokens_are_the_models_own_choice_at_every_place(tokenizer, talker, questions):
    """Each student token is the greedy one given all before it, in one forward pass without a cache."""
    agent = CachedAgentRollout(HFRollout(talker, tokenizer, 12), Parrot(), 4)
    for rollout in agent.generate(questions, 1, Sampling(0.0, max_new_tokens=40), 0):
        ids, start = [*rollout.prompt.ids, *rollout.response_ids], len(rollout.prompt.ids)
        with torch.no_grad():
            logits_LV = talker(torch.tensor([ids])).logits[0, :, : len(tokenizer)]
        best = logits_LV.argmax(-1).tolist()[start - 1 : -1]
        choices = zip(rollout.response_ids, best, rollout.student_mask, strict=True)
        assert all(token == choice for token, choice, by_student in choices if by_student)


def test_a_cached_episode_depends_on_its_own_stream_alone(tokenizer, talker, questions):
    how = Sampling(max_new_tokens=30)
    whole = CachedAgentRollout(HFRollout(talker, tokenizer, 64), Parrot(), 4).generate(questions[:4], 2, how, 7)
    assert CachedAgentRollout(HFRollout(talker, tokenizer, 3), Parrot(), 4).generate(questions[:4], 2, how, 7) == whole
    assert CachedAgentRollout(HFRollout(talker, tokenizer, 64), Parrot(), 4).generate(questions[:4], 2, how, 8) != whole
    assert [rollout.id for rollout in whole] == list(range(8)) and whole[2].prompt is questions[1]


class OneOfTwo:
    """Ranks of which the other has played already: `others` is what it hands over."""

    def __init__(self, rank, others):
        self.rank, self.world_size, self.others, self.own = rank, 2, others, None

    def gather(self, value):
        self.own = value
        return [value, self.others]


def test_two_ranks_play_the_episodes_of_one(tokenizer, talker, questions):
    how = Sampling(max_new_tokens=30)
    alone = CachedAgentRollout(HFRollout(talker, tokenizer, 64), Parrot(), 4).generate(questions[:5], 3, how, 7)
    first = OneOfTwo(0, [])
    play = CachedAgentRollout(HFRollout(talker, tokenizer, 64, ranks=first), Parrot(), 4)
    half = play.generate(questions[:5], 3, how, 7)
    second = OneOfTwo(1, first.own)
    whole = CachedAgentRollout(HFRollout(talker, tokenizer, 64, ranks=second), Parrot(), 4).generate(
        questions[:5], 3, how, 7
    )
    assert len(half) == 8 and len(second.own) == 7 and whole == alone


def test_cached_draws_follow_the_models_distribution(tokenizer, talker, questions):
    """First tokens of 4,000 episodes of one prompt against the softmax; a right sampler is about 0.04 away."""
    agent = CachedAgentRollout(HFRollout(talker, tokenizer, 4000), Parrot(), 4)
    rollouts = agent.generate(questions[:1], 4000, Sampling(temperature=2.0, max_new_tokens=1), 3)
    with torch.no_grad():
        expected_V = (talker(torch.tensor([questions[0].ids])).logits[0, -1] / 2.0).softmax(-1)
    drawn_V = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=len(expected_V)) / 4000
    assert float((expected_V - drawn_V).abs().sum()) / 2 < 0.07 and expected_V.max() < 0.5


def test_the_agent_hands_sync_on_and_seeds_every_turn_anew(chat_tokenizer, tasks):
    seeds = []

    class Noting(Scripted):
        def generate(self, prompts, samples, sampling, seed):
            seeds.append(seed)
            return super().generate(prompts, samples, sampling, seed)

    turns = iter([CALL, CALL, "done"])
    engine, talk = Noting(chat_tokenizer, lambda prompt, text: next(turns)), talk_of(chat_tokenizer)
    agent = AgentRollout(engine, talk, 9)
    agent.generate([talk.prompt(tasks[0])], 1, Sampling(max_new_tokens=9999), 5)
    agent.sync()
    assert seeds == [derive_seed(5, "turn", turn) for turn in (1, 2, 3)] and engine.syncs == 1


def test_prompts_of_an_episode_are_plain_prompts_that_grow(chat_tokenizer, tasks):
    seen = []

    def script(prompt, text):
        seen.append(prompt)
        return CALL if len(seen) == 1 else "done"

    (rollout,), _, _ = play(chat_tokenizer, script, tasks[:1])
    first, second = seen
    assert type(second) is Prompt and second.ids[: len(first.ids)] == first.ids == rollout.prompt.ids
    assert [*second.ids, *last_turn(rollout)] == [*rollout.prompt.ids, *rollout.response_ids]


@pytest.mark.e2e
def test_a_whole_run_in_the_chat_form(chat_tokenizer, make_model, make_folder, tmp_path):
    """One step of random models on generated trips: their babble is no plan, and everything around it works."""
    settings = {"vocab_size": len(chat_tokenizer) + 1, "max_position_embeddings": 16_384}
    student, teacher = (make_folder(make_model(seed=seed, **settings), chat_tokenizer) for seed in (0, 1))
    write_task_file(generate_tasks(2, 0), tmp_path / "trips.jsonl")
    config = {
        "student": str(student),
        "teacher": {"model": str(teacher)},
        "prompts": str(tmp_path / "trips.jsonl"),
        "out": str(tmp_path / "run"),
        "steps": 1,
        "prompts_per_step": 1,
        "environment": {"kind": "travel", "max_turns": 2},
        "rollout": {"samples_per_prompt": 2, "max_prompt_tokens": 16_000, "max_new_tokens": 20},
        "engine": {"device": "cpu", "micro_batch_tokens": 16_384},
        "eval": {
            "suite": [f"synthetic-travel={tmp_path / 'trips.jsonl'}"],
            "samples": 1,
            "at_start": False,
            "teacher": False,
        },
        "telemetry": {"every": 0},
        "track": {"progress": False},
    }
    start(from_json(config))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["rollout/reward"] == 0.0 == line["eval/synthetic-travel/mean@1"] and 2 <= line["rollout/tokens"] <= 40
    suite = json.loads((tmp_path / "run" / "eval" / "step_1.json").read_text())["suites"]["synthetic-travel"]
    assert suite["delivered_frac"] == 0.0 and set(suite["scores"]) == {"en-synthetic-0-0", "en-synthetic-0-1"}

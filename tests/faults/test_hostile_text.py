"""What a model wrote is never run and breaks nothing that reads it: a corpus (hostile.py), and a number of draws."""

import html
import json
import pickle
import re
import string
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
from browser import binary, browser
from hostile import CALL, CHARACTERS, CODE, CORPUS, MARKER, NUMBERS, PICKLE, POWERS, calls, plans, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from token_runs import write_token_run
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import report as report_script
from opsd.environments.travel import TravelEnv, generate_tasks, pocket_tasks
from opsd.environments.travel.plan import parse_plan
from opsd.eval import grading, math_verify_process
from opsd.eval.grading import MATH, grade
from opsd.rollout.tool_calls import ChatTurns, read_calls
from opsd.utils.markdown import markdown_text
from opsd.viewer.command import InspectConfig, inspect

pytestmark = pytest.mark.e2e
# A tenth of a second is enough, work that grows with the square of these texts takes more than a minute: room for a
# processor that is slow or shared.
SECONDS_OF_PROCESSOR = 10.0
TASKS = [*generate_tasks(1, seed=5), *generate_tasks(1, seed=5, compact=False), *pocket_tasks(1, seed=5)]
ENV = TravelEnv()
SHORT = [piece for piece in (*CODE, *NUMBERS, *CHARACTERS) if len(piece) < 500]


def texts(*glue: str) -> st.SearchStrategy[str]:
    """Up to eight pieces: of the corpus, of what a reader looks for, or any characters, half surrogate pairs too."""
    any_text = st.text(st.characters(exclude_categories=()), max_size=8)
    return st.lists(st.sampled_from(SHORT) | st.sampled_from(glue) | any_text, max_size=8).map("".join)


def draw(check: Callable[..., None], *strategies: st.SearchStrategy[str]) -> None:
    """`check` on 150 draws, the same ones every time."""

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*strategies))
    def drawn(values: tuple[str, ...]) -> None:
        check(*values)

    drawn()


@pytest.fixture(autouse=True, scope="module")
def _live():
    """The corpus is live: what it holds does touch the marker once it is run."""
    for run in (CALL, f"import pickle; pickle.loads({PICKLE.encode()!r})"):
        subprocess.run([sys.executable, "-c", run], check=True)
        MARKER.unlink()
    with watched() as found:
        pickle.dumps(compile("1", "", "eval").co_code)
    assert any("compile" in event for event in found)


@pytest.fixture(autouse=True)
def _nothing_ran():
    yield
    ran = MARKER.exists()
    MARKER.unlink(missing_ok=True)
    assert not ran, "a text of the corpus was run"


# ---- the grader


@pytest.fixture
def asked(monkeypatch):
    """The questions that the grading process got, with a limit on each that a test can wait for."""
    questions, ask = [], math_verify_process.WORKER._ask
    monkeypatch.setattr(math_verify_process, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(
        math_verify_process.WORKER, "_ask", lambda question: questions.append(question) or ask(question)
    )
    return questions


def judge(response: str, gold: str, asked: list[str]) -> None:
    """A verdict, after four questions at the most (two forms, twice where the process dies) and little work here."""
    asked.clear()
    start = time.process_time()
    assert isinstance(grade(response, gold), bool)
    assert isinstance(MATH.answer(response, gold), str | None)
    assert time.process_time() - start < SECONDS_OF_PROCESSOR
    assert len(asked) <= 4


ANSWERS = (
    *("\\boxed{", "}", "</think>", "\nAnswer: ", "$", "\\frac{1}{", "^{", "_{", " and \\boxed{2}", "\\text{"),
    *("=", ",", "\\left(", "\\sqrt{"),
)


@pytest.mark.fault(
    "the math grader gets code in 41 guises (Python, LaTeX, shell, templates, YAML, pickles), numbers, towers of "
    "powers, brackets 10,000 deep, odd characters and megabytes, as text, answer and gold answer; then 150 "
    "random mixtures",
    "right or wrong, never an error; nothing runs; at most four requests to the grading process, each with its "
    "time limit",
)
@pytest.mark.parametrize(
    "kind", [pytest.param("corpus", marks=pytest.mark.slow), pytest.param("drawn", marks=pytest.mark.e2e)]
)
def test_the_grader_judges_whatever_comes(kind, asked, monkeypatch):
    if kind == "drawn":
        draw(lambda response, gold: judge(response, gold, asked), texts(*ANSWERS), texts("7", "x"))
    else:
        for text in (*CORPUS, *POWERS):
            judge(text, "7", asked)
            judge(f"\\boxed{{{text}}}", "7", asked)
            judge(f"Answer: {text}", "7", asked)
            judge("\\boxed{7}", text, asked)
    monkeypatch.undo()
    assert grade("\\boxed{\\frac{1}{2}}", "0.5")


# A call that is no LaTeX command, in every place that LaTeX has for one.
CANARY = "quux(1)"
PLACES = [
    *("%s", "%s=1", "x=%s", "x<%s", "x \\in %s", "\\{%s, 2\\}", "(%s, 2)", "[%s, 2)", "%s and 2", "%s, 2", "1 + %s"),
    *("\\text{%s}", "\\mathrm{%s}", "\\operatorname{%s}(1)", "\\frac{%s}{2}", "\\sqrt[%s]{2}", "2^{%s}", "x_{%s}"),
    *("|%s|", "\\int_0^1 %s dx", "\\sum_{n=%s}^{2} n", "\\begin{pmatrix} %s & 1 \\end{pmatrix}", "%s\\%%", "$%s$"),
    *("f(%s)", "%s \\text{ cm}"),
]
# The grading process, with a witness of what Python is asked to do there.
WITNESS = """
import runpy, sys
import math_verify
def hook(event, args):
    if event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "pickle.")) or (
        event == "open" and isinstance(args[0], str) and ("passwd" in args[0] or set(str(args[1])) & set("wax+"))
    ):
        print("did", event, args, file=sys.stderr, flush=True)
    # What is compiled of a file is a module that is imported for the first time.
    if event == "compile" and args[0] is not None and not str(args[1]).endswith(".py"):
        print("compile", args[0], file=sys.stderr, flush=True)
sys.addaudithook(hook)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.e2e
@pytest.mark.fault(
    "the same code to the grading process, and a call in each of 26 LaTeX positions, watched by Python's audit hook",
    "no process, socket, pickle or file; what sympy compiles contains none of it",
)
def test_sympy_compiles_nothing_that_a_model_wrote():
    texts = [*CODE, *(place % CANARY for place in PLACES)]
    questions = [{"answer": text, "gold": "7", "boxed": boxed} for text in texts for boxed in (True, False)]
    questions += [{"answer": "7", "gold": text, "boxed": True} for text in texts]
    questions.append({"answer": "It is 3*4+1", "gold": "13", "boxed": False})
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, str(Path(grading.__file__).with_name("grading_worker.py"))],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert len(done.stdout.splitlines()) == 1 + len(questions) and json.loads(done.stdout.splitlines()[-1])["equal"]
    witnessed = done.stderr.splitlines()
    assert [line for line in witnessed if line.startswith("did ")] == []
    compiled = [line for line in witnessed if line.startswith("compile ")]
    assert any("Integer (3 )*Integer (4 )" in line for line in compiled)  # the witness sees
    assert [line for line in compiled if re.search(r"system|touch|passwd|quux ?\(|globals|eval|exec", line)] == []


# ---- plans and tool calls


def score(answer: str) -> None:
    """A score by each form of task, from the text alone."""
    for task in TASKS:
        start = time.process_time()
        with watched() as found:
            result = ENV.score(answer, task)
        assert found == []
        assert time.process_time() - start < SECONDS_OF_PROCESSOR
        assert 0.0 <= result.hard_fraction <= 1.0 and set(result.hard) == set(task.constraints)
        json.dumps(asdict(result), allow_nan=False)


def answered(text: str) -> list[str]:
    """What the tools answer to the calls of a turn: from the tables alone, in bounded time."""
    start = time.process_time()
    with watched() as found:
        outputs = [call.error or ENV.call(call.name, call.arguments, TASKS[0]) for call in read_calls(text)]
    assert found == []
    assert time.process_time() - start < 2 * SECONDS_OF_PROCESSOR
    assert all(isinstance(output, str) and "root:" not in output for output in outputs)
    return outputs


LINES = (
    *("<plan>", "</plan>", "</think>", "\nDay 1:\n", "\nAccommodation: ", "\n09:00-10:00 | meal | ", " | ", "¥", ", "),
    *("\nTotal Estimated Budget: ", " meal ", " Accommodation "),
)


@pytest.mark.fault(
    "a plan with these texts in each of its fields, and 150 random ones",
    "a score from 0 to 1, never an error; Python opens, imports, compiles and starts nothing",
)
@pytest.mark.parametrize("kind", ["corpus", "drawn"])
def test_a_plan_is_scored_whatever_it_holds(kind):
    if kind == "drawn":
        draw(lambda text: score(f"<plan>Day 1:\n{text}</plan>"), texts(*LINES))
        draw(score, texts(*LINES))
    for text in CORPUS if kind == "corpus" else ():
        for answer in plans(text):
            score(answer)


PARTS = (
    *("<tool_call>", "</tool_call>", '{"name": ', '"search_location"', ', "arguments": ', '{"place_name": ', "}", '"'),
    *("```json\n", "\n```", "[", "]", "</think>"),
)


@pytest.mark.fault(
    "a tool call with these texts as name, arguments, key or JSON: dunder names, paths, 1e999, NaN, brackets "
    "10,000 deep, 5,000 digits; and 150 random ones",
    "a line of feedback for the model, never an error; Python opens, imports, compiles and starts nothing",
)
@pytest.mark.parametrize("kind", ["corpus", "drawn"])
def test_a_tool_call_is_answered_whatever_it_holds(kind):
    if kind == "drawn":
        draw(answered, texts(*PARTS))
    # Where Python's own limit lies depends on how deep the caller is: one of these brackets is just below it.
    for text in [*CORPUS, *("[" * depth + "]" * depth for depth in range(900, 1010))] if kind == "corpus" else ():
        for call in calls(text):
            answered(call)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Every printable character is a token; `<eos>` and `<|im_end|>` end a turn; the template keeps tool messages."""
    words = ["<unk>", "<eos>", "<|im_end|>", *string.printable]
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return tokenizer


@pytest.mark.fault(
    "a tool's answer repeats the model's text: half a surrogate pair, control tokens, NULs, code; 4,000 calls in "
    "a turn",
    "the episode continues; no control token comes back; the chat template sees plain text",
)
def test_an_answer_that_repeats_the_corpus_is_plain_text():
    tokenizer = chat_tokenizer()
    turns, stops = ChatTurns(tokenizer, False), tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    for text in SHORT:
        ids = turns.answers([ENV.call("search_location", {"place_name": text}, TASKS[0])], stops[:1])
        assert ids and not set(ids) & set(stops), text
    outputs = [ENV.call(f"tool {number}", {}, TASKS[0]) for number in range(4000)]
    start = time.process_time()
    turns.answers(outputs, stops[:1])
    assert time.process_time() - start < 3 * SECONDS_OF_PROCESSOR


# ---- time

HEADS = [
    *("total estimated budget:", "total estimated budget", "Day", "Day 1", "current city", "current city:", ""),
    *("accommodation:", "budget summary", "09:00", "09:00-", "09:00-10:00 | meal |", "¥", "¥1", "¥1,", "Lunch,", "a -"),
    *("<plan>", "</plan>", "\\boxed", "\\boxed{", "\\fbox{1}", "\\boxed{1} \\text{", "\\boxed{1} a_{", "Answer"),
    *("Answer:", "final", "final answer", "**", "<tool_call>", "<tool_call>{", "</think>", "```json"),
]
FILLINGS = [
    *(" ", "\t", "\n", "1", ",", "1,", "*", "#", "-", "¥", "{", "}", "\\", "$", "_", "a", ".", "|", ": ", "<plan>"),
    *("\r\n", "９", "\\boxed{1},", "Answer:", "final\n"),
]


@pytest.mark.e2e
@pytest.mark.fault(
    "1,650 texts of 20,000 characters that are built to make regular expressions backtrack",
    "each parser's time grows in proportion to the text",
)
def test_no_pattern_takes_the_square_of_a_text(monkeypatch, seen):
    monkeypatch.setattr(math_verify_process.WORKER, "equal", lambda *_, **__: False)
    slowest = 0.0
    for head, filling, tail in product(HEADS, FILLINGS, ("", "x")):
        text = head + filling * (20_000 // len(filling)) + tail
        for read in (
            parse_plan,
            lambda text: score(f"<plan>Day 1:\n{text}</plan>"),
            read_calls,
            lambda text: grade(text, text),
        ):
            start = time.process_time()
            read(text)
            slowest = max(slowest, time.process_time() - start)
            assert slowest < SECONDS_OF_PROCESSOR, (head, filling, tail)
    seen(f"the slowest took {slowest:.2f} s")


# ---- pages, Markdown, terminal

SCRIPT = "<script>document.title='owned'</script>"
IMAGE = "\"><img src=x onerror=document.title='owned'>"
NAMES = [
    SCRIPT,
    IMAGE,
    "</title>",
    "a|b",
    "`touch x`",
    "[/bold]",
    "[red]",
    "$\\foo{$",
    "_x_ *y* ~~z~~",
    "[a](javascript:alert(1))",
]


def hostile_runs(folder: Path) -> Path:
    """Run folders whose models, rules, suites and own names are NAMES; the last one is not finished."""
    for number, name in enumerate(NAMES):
        run = folder / "runs" / f"{number} {name.replace('/', '∕')}"
        (run / "eval").mkdir(parents=True)
        config = {"student": f"models/{SCRIPT}", "teacher": {"model": f"{IMAGE} $x$ [/b] |`"}, "steps": 2, "seed": 0}
        (run / "config.json").write_text(json.dumps({**config, "select": {"by": f"my:{name}", "retention": 0.5}}))
        (run / "metrics.jsonl").write_text('{"step": 1, "loss/nats": 1.0}\n{"step": 2, "loss/nats": 0.5}\n')
        suite = {f"s{IMAGE}$\\x{{$[/i]": {"k": 2, "scores": {"a": 0.5, "b": 1.0}}}
        for file in ("step_0", "step_2", "teacher"):
            (run / "eval" / f"{file}.json").write_text(json.dumps({"model": "m", "suites": suite}))
        if number < len(NAMES) - 1:
            (run / "DONE").touch()
    return folder / "runs"


def hostile_token_run(folder: Path) -> Path:
    """A run with a token record whose tokens, answers, models, rule and own name are hostile."""
    run = write_token_run(folder)
    student = folder / f"student {IMAGE}"
    (folder / "student-model").rename(student)
    config = json.loads((run / "config.json").read_text())
    config |= {"student": str(student), "teacher": {"model": IMAGE}, "select": {"by": f"my:{IMAGE}", "retention": 0.5}}
    (run / "config.json").write_text(json.dumps(config))
    file = run / "rollouts" / "step_20.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**record, "answer": SCRIPT + IMAGE}) + "\n" for record in records))
    return run.rename(folder / f"run {IMAGE}")


@pytest.mark.e2e
@pytest.mark.skipif(binary() is None, reason="needs Chromium or Chrome, e.g. apt-get install chromium")
@pytest.mark.fault(
    'rollouts, answers, rules, suites, models and run folders named `<script>…`, `"><img onerror=…>`, '
    "`</title>`: the token viewer and the report in headless Chromium",
    "shown as text; no script of theirs runs, no image is requested, nothing is reported in the console",
)
def test_pages_show_hostile_names_as_text(tmp_path):
    report_script.main(hostile_runs(tmp_path), "table5", tmp_path / "out")
    viewer = inspect(InspectConfig(hostile_token_run(tmp_path / "tokens"), out=tmp_path / "page.html"))
    with browser(tmp_path / "profile") as page:
        for file, names, scripts in ((viewer, [SCRIPT, IMAGE], 2), (tmp_path / "out" / "report.html", NAMES[:-1], 0)):
            page.open(file)
            shown = page.value("document.body.innerText")
            assert [name for name in names if name not in shown] == []
            assert page.value("document.title") != "owned"
            assert page.value("document.scripts.length") == scripts
            assert page.value("[...document.images].filter(i => !i.src.startsWith('data:image/svg')).length") == 0
            assert page.value("document.querySelectorAll('[onerror], [onload], a[href], iframe, object').length") == 0
        assert page.problems == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}


@pytest.mark.fault(
    "the same names, and some with `|`, backticks, `[/bold]` and `$`, in the report's Markdown, pictures and on "
    "the terminal",
    "each is shown literally: no HTML, no extra cell, no formula, no mark-up",
)
def test_markdown_and_terminal_show_hostile_names_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    report_script.main(hostile_runs(tmp_path), "table5", tmp_path / "out")
    printed = capsys.readouterr().out
    assert [name for name in NAMES[:-1] if f"my:{name} 50 %" not in printed] == []
    found = rendered((tmp_path / "out" / "table.md").read_text())
    cells = {html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", found)}
    assert [name for name in NAMES[:-1] if f"my:{name} 50 %" not in cells] == []
    assert not re.findall(r"<(?:script|img|code|em|del|a)\b", found)
    for text in CODE:
        (cell,) = re.findall(r"<td>(.*?)</td>", rendered(f"| a |\n|---|\n| {markdown_text(text)} |\n"))
        assert html.unescape(cell).split() == text.split()


def rendered(text: str) -> str:
    """Markdown as HTML by a renderer that lets HTML through."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)

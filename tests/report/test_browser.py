"""The pages in headless Chromium: nothing is empty, keys and pointer work, hostile text is text, nothing is loaded."""

import json

import pytest
from browser import binary, browser
from token_runs import HOSTILE, token_table

import report as report_script
from opsd.viewer.command import InspectConfig, inspect

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(binary() is None, reason="needs Chromium or Chrome, e.g. apt-get install chromium"),
]
BACKGROUND = "getComputedStyle(document.querySelector('.rollout .token')).backgroundColor"
# Whatever the page scrolls to, an element with words in it has a size.
EMPTY_PARTS = """[...document.querySelectorAll(%r)].filter(e => e.offsetParent !== null &&
    (!e.textContent.trim() || e.getBoundingClientRect().height < 5)).length"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_the_viewer_shows_rollouts_examples_and_numbers(page, token_run, tmp_path):
    file = inspect(InspectConfig(token_run(), out=tmp_path / "page.html"))
    page.open(file)
    assert page.value("document.querySelectorAll('.rollout').length") == 4
    assert page.value("document.querySelectorAll('.rollout .token').length") == 24
    assert page.value("new Set([...document.querySelectorAll('.kind')].map(e => e.firstChild.data)).size") == 5
    assert page.value(EMPTY_PARTS % ".card, .rollout, .rollout header, #legend, #facts, #run, #detail") == 0
    page.point(".rollout:nth-child(1) .token:nth-child(6)")
    detail = page.value("document.getElementById('detail').innerText")
    # row 5: h (5 mod 5)/4 = 0, δ 5 mod 4 = 1, forward 0.5, Q4 (h ≤ 0.5, δ ≤ 1), odd rows are left out; "5" at 0.5
    for said in ("Q4 sure, teacher agrees", "not trained on", "1.00 nats", "0.50 nats", "token 6 of 6 in rollout 0"):
        assert said in detail
    assert (
        page.value("[...document.querySelectorAll('#detail .student li')].map(e => e.innerText.split('\\n')[0])")[0]
        == "5"
    )
    assert page.problems == []
    assert set(page.requests) == {file.resolve().as_uri()}


def test_hostile_text_is_shown_and_never_run(page, token_run, tmp_path):
    page.open(inspect(InspectConfig(token_run(), out=tmp_path / "page.html")))
    shown = page.value("document.getElementById('rollouts').innerText")
    assert HOSTILE in shown and "<img src=x" in shown
    assert page.value("document.title") == "token-run · step 20 · tokens"
    assert page.value("document.querySelectorAll('img').length") == 0
    assert page.value("document.scripts.length") == 2
    # even a script that got into the page would not run
    page.value(
        "document.body.append(Object.assign(document.createElement('script'), {text: \"document.title='owned'\"}))"
    )
    assert page.value("document.title") != "owned"
    page.problems.clear()  # the policy's refusal of that very script


def test_keys_switch_colours_and_walk_through_tokens(page, token_run, tmp_path):
    page.open(inspect(InspectConfig(token_run(), out=tmp_path / "page.html")))
    colours = {}
    for key, mode in zip("12345", ("h", "r", "f", "label quadrant", "k"), strict=True):
        page.press(key)
        assert page.value("document.querySelector('#modes :checked').value") == mode
        colours[mode] = page.value(
            "[...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor).join()"
        )
        assert page.value(EMPTY_PARTS % "#legend") == 0
    # δ and forward KL are in proportion here, but not in the same hue
    assert len(set(colours.values())) == 5
    page.value("document.querySelector('.rollout .text').focus()")
    where = "document.querySelector('#detail p:not(.keys)').textContent"
    assert page.value(where) == "token 1 of 6 in rollout 0"
    for key, expected in (("ArrowRight", "token 2 of 6 in rollout 0"), ("ArrowDown", "token 1 of 6 in rollout 1")):
        page.press(key)
        assert page.value(where) == expected
    page.press("Enter")
    assert page.value("document.querySelectorAll('.token.held').length") == 1
    page.point(".rollout:nth-child(1) .token:nth-child(4)")
    assert page.value(where) == "token 1 of 6 in rollout 1"  # held
    page.press("Escape")
    page.point(".rollout:nth-child(1) .token:nth-child(5)")
    assert page.value(where) == "token 5 of 6 in rollout 0"


def test_a_card_leads_to_its_token_and_lists_can_be_narrowed(page, token_run, tmp_path):
    page.open(inspect(InspectConfig(token_run(), out=tmp_path / "page.html")))
    page.point(".card", click=True)
    assert page.value("document.querySelector('.token.held').getBoundingClientRect().top") > 0
    shown = "[...document.querySelectorAll('.rollout')].filter(e => !e.hidden).length"
    choose = "(() => { const e = document.getElementById(%r); e.value = %r; e.dispatchEvent(new Event('input')); })()"
    page.value(choose % ("show", "right"))
    assert page.value(shown) == 2  # rewards are 0, 1, 0, 1
    page.value(choose % ("find", "no such text"))
    assert page.value(shown) == 0 and page.value("document.getElementById('empty').offsetHeight") > 10
    page.value("document.querySelector('.card').click()")
    assert page.value(shown) == 4


def test_a_cards_token_is_in_sight_however_long_what_stands_before_it(page, token_run, tmp_path):
    run = token_run(rollouts=2, length=60)
    # A template's preamble, of many lines, in front of every answer.
    file = run / "rollouts" / "step_20.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**r, "prompt_ids": [6, 7] * 300 + r["prompt_ids"]}) + "\n" for r in records))
    page.open(inspect(InspectConfig(run, out=tmp_path / "page.html")))
    inside = """[...document.querySelectorAll('.context')].every(box => {
        const mark = box.querySelector('mark').getBoundingClientRect(), all = box.getBoundingClientRect();
        return mark.top >= all.top - 2 && mark.bottom <= all.bottom + 2; })"""
    assert page.value("document.querySelectorAll('.context').length") > 3 and page.value(inside)
    page.point(".card", click=True)
    held = "document.querySelector('.token.held').getBoundingClientRect()"
    top, bottom = page.value(f"[{held}.top, {held}.bottom]")
    assert top > 0 and bottom < 900
    # Of a prompt that does not fit its end is in sight: the question.
    at_end = "(p => p.scrollHeight > p.clientHeight && p.scrollTop + p.clientHeight >= p.scrollHeight - 2)"
    assert page.value(f"[...document.querySelectorAll('.prompt')].some({at_end})")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_two_hundred_rollouts_fit_every_width_in_both_schemes(page, token_run, tmp_path, width, dark):
    file = inspect(InspectConfig(token_run(rollouts=200, length=40), out=tmp_path / "page.html"))
    page.open(file, width, 844, dark)
    assert page.value("document.querySelectorAll('.rollout').length") == 200
    assert page.value("document.documentElement.scrollWidth") <= width
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (page.value(light) < 60) is dark
    # rollouts far down get their tokens as they come into view
    assert page.value("document.querySelectorAll('.rollout:nth-child(200) .token').length") == 0
    page.value("document.querySelector('.rollout:nth-child(200)').scrollIntoView()")
    page.value("new Promise(done => setTimeout(done, 200))")
    assert page.value("document.querySelectorAll('.rollout:nth-child(200) .token').length") == 40
    picture = page.screenshot(tmp_path / "shot.png").read_bytes()
    assert len(picture) > 15_000  # a blank page of this size is under 5 kB
    assert page.problems == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_shows_every_table_and_figure(page, make_run, tmp_path, width, dark):
    quadrants = {f"quadrant/q{n}_frac": 0.25 for n in (1, 2, 3, 4)}
    metrics = tuple(
        {"step": n, "loss/nats": 1 / n, "mem/peak_gib": 1.0, "time/step_s": 2.0, "time/rollout_s": 1.0, **quadrants}
        for n in (1, 2, 3)
    )
    for by, kept in (("all", 1.0), ("soft_or", 0.5), ("soft_or", 0.2)):
        folder = make_run(by, kept, {"a": kept, "b": 0.5}, metrics=metrics)
    (folder / "all-1.0-2-seed0" / "tokens").mkdir()
    token_table(2, 20, False).to_parquet(folder / "all-1.0-2-seed0" / "tokens" / "step_1.parquet")
    report_script.main(folder, "table5", tmp_path / "out")
    page.open(tmp_path / "out" / "report.html", width, 844, dark)
    assert page.value("document.querySelectorAll('figure').length") == 5
    assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 200)")
    chosen = page.value("[...document.images].map(image => image.currentSrc)")
    assert len(set(chosen)) == 5
    # the rendering of this scheme, not the other
    assert page.value("[...document.images].every(image => image.currentSrc === image.src)") is not dark
    assert (
        page.value(EMPTY_PARTS % "h1, h2, .findings li, caption, figcaption, thead th:not(:first-child), tbody th") == 0
    )
    assert page.value("document.documentElement.scrollWidth") <= width  # wide tables scroll within themselves
    assert len(page.screenshot(tmp_path / "shot.png", whole=True).read_bytes()) > 100_000
    assert page.problems == []
    assert {url.partition(":")[0] for url in page.requests[-6:]} <= {"file", "data"}

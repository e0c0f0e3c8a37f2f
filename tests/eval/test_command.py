"""`opsd eval` as a user meets it: what it writes, that it goes on where it was killed, what it refuses."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import begin, python

from opsd import __main__ as cli
from opsd.config.cli import flags_of
from opsd.eval import command as evalcommand
from opsd.eval.command import EvalCommand
from opsd.eval.evaluator import ProblemRecord, statistics
from opsd.eval.files import DoneProblem, EvalFiles, table
from opsd.rollout import HFRollout

SAMPLES, PROBLEMS = 2, {"letters": 6, "digits": 3}


@pytest.fixture(scope="module")
def places(make_folder, make_model, make_tokenizer, tmp_path_factory):
    """Placeholders of the cases below, as paths."""
    data = tmp_path_factory.mktemp("data")
    found = {"folder": data, "nothing": data / "nothing"}
    for name, count in PROBLEMS.items():
        symbols = "abcdefghij" if name == "letters" else "0123456789"
        rows = [{"id": f"{name}{n}", "prompt": f"{symbols[n]}=", "answer": symbols[n]} for n in range(count)]
        found[name] = data / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in {
        "unanswered": '{"prompt": "1+1="}\n',
        "empty": "",
        "long": "".join(json.dumps({"prompt": "1" * n, "answer": "1"}) + "\n" for n in (3, 30)),
    }.items():
        found[name] = data / f"{name}.jsonl"
        found[name].write_text(content)
    found["model"] = make_folder(make_model(seed=3))
    found["other"] = make_folder(make_model(seed=4))
    found["nochat"] = make_folder(make_model(), make_tokenizer(chat=False))
    damaged = make_model()
    damaged.get_input_embeddings().weight.data[0] = float("nan")
    found["damaged"] = make_folder(damaged)
    cut = make_folder(make_model())
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found["cut"] = cut
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def run(places, monkeypatch, capsys):
    """Runs `opsd eval` with these arguments; exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["opsd", "eval", *(str(arg).format(**places) for arg in args)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def arguments(out, /, **changed):
    """A small evaluation in groups of two problems; a change of None takes the flag away."""
    flags = {
        "--model": ["{model}"],
        "--suite": ["letters={letters}", "digits={digits}"],
        "--out": [out],
        "--samples": [SAMPLES],
        "--max_new_tokens": [24],
        "--generate_batch": [2 * SAMPLES],
        "--grader": ["suffix"],
        "--prompt_format": ["raw"],
        "--progress": [False],
        **{f"--{name}": value if isinstance(value, list) else [value] for name, value in changed.items()},
    }
    return [word for flag, values in flags.items() if values != [None] for word in (flag, *values)]


def records_of(out):
    lines = out.with_suffix(".records.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def files_of(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """The files of an evaluation that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    words = [str(word).format(**places) for word in arguments(folder / "scores.json")]
    evalcommand.evaluate(cli_config(words))
    return files_of(folder)


def cli_config(words):
    from opsd.config.cli import parse

    return parse(EvalCommand, words, "opsd eval")


# ---- several processes


@pytest.mark.e2e
def test_ranks_share_the_responses_out_and_write_what_one_process_would(places, tmp_path):
    # Greedy: nothing turns on a digit. What two ranks generate side by side is what one does with twice the batch.
    one, two = tmp_path / "one" / "scores.json", tmp_path / "two" / "scores.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [str(word).format(**places) for word in arguments(two, temperature=0)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "opsd", "eval", *words],
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and said[1] == b""
    alone = arguments(one, temperature=0, generate_batch=4 * SAMPLES)
    evalcommand.evaluate(cli_config([str(word).format(**places) for word in alone]))
    assert files_of(two.parent) == files_of(one.parent)
    assert two.with_suffix(".md").read_bytes() in said[0]


# ---- what is written


def test_the_result_is_the_statistics_of_its_records_suite_by_suite(run, tmp_path, places):
    out = tmp_path / "new" / "scores.json"
    code, printed, error = run(*arguments(out))
    assert code == 0, error
    result, records = json.loads(out.read_text()), records_of(out)
    assert list(result["suites"]) == ["letters", "digits"]
    assert [(line["suite"], line["id"]) for line in records] == [
        (name, f"{name}{n}") for name, count in PROBLEMS.items() for n in range(count)
    ]
    for name, stated in result["suites"].items():
        own = [ProblemRecord(**{k: v for k, v in line.items() if k != "suite"}) for line in records]
        own = [record for record, line in zip(own, records, strict=True) if line["suite"] == name]
        assert stated == statistics(own) and stated["problems"] == PROBLEMS[name]
    tokens = [length for line in records for length in line["tokens"]]
    assert len(tokens) == SAMPLES * 9 and max(tokens) <= 24 and 0 < sum(sum(line["truncated"]) for line in records) < 18
    assert all(
        (length == 24) or not cut
        for line in records
        for length, cut in zip(line["tokens"], line["truncated"], strict=True)
    )
    assert out.with_suffix(".md").read_text() in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["scores.json", "scores.md", "scores.records.jsonl"]


def test_everything_that_decides_the_numbers_is_stated(run, tmp_path, places):
    out = tmp_path / "scores.json"
    run(*arguments(out, temperature=0.6, top_p=0.95, top_k=20, seed=7, prompt_format="chat", thinking="on"))
    result = json.loads(out.read_text())
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 24, "samples": SAMPLES, "seed": 7}
    assert result["sampling"] == sampling and result["model"] == places["model"]
    stated = result["settings"]
    assert (stated["prompt_format"], stated["thinking"], stated["grader"], stated["engine"]) == (
        "chat",
        "on",
        "suffix",
        "hf",
    )
    assert len(stated["weights"]) == len(stated["suite"]["letters"]) == 16
    page = out.with_suffix(".md").read_text()
    for part in ("temperature 0.6", "top-p 0.95", "top-k 20", "24 new tokens", "2 samples", "seed 7", "thinking on"):
        assert part in page


def test_the_table_shows_percents_and_a_dash_for_what_is_not_known():
    one = ProblemRecord("p", "1", [True], [None], [10], [False])
    settings = {
        "prompt_format": "raw", "thinking": "off", "grader": "a:b", "engine": "hf", "dtype": "auto", "device": "cpu"
    }  # fmt: skip
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "samples": 1, "seed": 0}
    result = {"model": "m", "sampling": sampling, "settings": settings, "suites": {"s": statistics([one], False)}}
    row = next(line for line in table(result).splitlines() if line.startswith("| s |"))
    # one problem has no standard error, one sample no spread, a grader without answers no majority
    assert row == "| s | 1 | 100.0 | - | - | 100.0 | - | 10 | 0.0 |"
    four = [
        ProblemRecord(n, "1", [n == "a", True, False, False], ["1", "1", "2", "2"], [10] * 4, [False] * 4) for n in "ab"
    ]
    page = table(result | {"sampling": sampling | {"samples": 4}, "suites": {"s": statistics(four)}})
    assert "| mean@4 % | s.e. over problems | spread over samples | pass@2 % | best@4 % | majority@4 % |" in page
    # a: 2 of 4, b: 1 of 4 → mean 37.5, deviations ±12.5: s.e. 12.5. Draws .5 1 0 0: spread √(.6875/3) = 47.9.
    # pass@2: 1 − 1/6 and 1 − 3/6: mean 66.7. Majority: "1" ties first; its first vote is right for a only.
    assert "| s | 2 | 37.5 | 12.5 | 47.9 | 66.7 | 100.0 | 50.0 | 10 | 0.0 |" in page


def test_responses_are_kept_when_asked_for(run, tmp_path):
    out = tmp_path / "scores.json"
    run(*arguments(out, save_responses=True))
    records = records_of(out)
    assert all(len(line["responses"]) == SAMPLES for line in records)
    for line in records:
        for text, right, cut in zip(line["responses"], line["correct"], line["truncated"], strict=True):
            assert right == (text.removesuffix("<eos>").endswith(line["gold"]) and not cut)


def test_a_model_whose_logits_are_not_hidden_times_head_can_be_evaluated(run, tmp_path, make_folder, make_tokenizer):
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=52, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=1, pad_token_id=0, final_logit_softcapping=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = make_folder(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    code, _, error = run(*arguments(tmp_path / "scores.json", model=folder, suite=["digits={digits}"]))
    assert code == 0, error


def test_an_end_token_beyond_the_vocabulary_ends_nothing(run, tmp_path, monkeypatch, make_folder, make_model):
    asked, own = [], HFRollout.__init__

    def watched(self, *args, eos_ids=None, **how):
        asked.append(eos_ids)
        own(self, *args, eos_ids=eos_ids, **how)

    monkeypatch.setattr(HFRollout, "__init__", watched)
    model = make_model()
    model.generation_config.eos_token_id = [7, 10_000]
    code, _, error = run(*arguments(tmp_path / "scores.json", model=str(make_folder(model)), limit=1))
    assert code == 0, error
    assert asked[0][0] == 7 and 10_000 not in asked[0]


def test_each_group_draws_from_a_stream_of_its_own_whatever_other_suites_there_are(run, tmp_path, monkeypatch):
    seeds, generate = {}, HFRollout.generate

    def watched(self, prompts, samples, sampling, seed):
        seeds[prompts[0].id] = seed
        return generate(self, prompts, samples, sampling, seed)

    monkeypatch.setattr(HFRollout, "generate", watched)
    run(*arguments(tmp_path / "both.json"))
    assert list(seeds) == GROUPED[::2] and len(set(seeds.values())) == 5
    both = dict(seeds)
    seeds.clear()
    run(*arguments(tmp_path / "one.json", suite=["digits={digits}"]))
    assert seeds == {name: seed for name, seed in both.items() if name.startswith("digits")}
    run(*arguments(tmp_path / "other.json", seed=5))
    assert not set(seeds.values()) & set(both.values())


# ---- going on


@pytest.fixture
def asked(monkeypatch):
    """The prompts that were generated for, in order."""
    found, generate = [], HFRollout.generate

    def watched(self, prompts, *rest):
        found.extend(prompt.id for prompt in prompts)
        return generate(self, prompts, *rest)

    monkeypatch.setattr(HFRollout, "generate", watched)
    return found


@pytest.fixture
def stop_after(monkeypatch):
    """Interrupts the evaluation after so many groups are on the disk."""
    append = EvalFiles.append

    def stop_after(groups):
        left = [groups]

        def stopping(self, problems):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            append(self, problems)

        monkeypatch.setattr(EvalFiles, "append", stopping)
        return lambda: monkeypatch.setattr(EvalFiles, "append", append)

    return stop_after


# letters0+1, 2+3, 4+5, then digits0+1, 2
GROUPED = ["letters0", "letters1", "letters2", "letters3", "letters4", "letters5", "digits0", "digits1", "digits2"]


@pytest.mark.e2e
@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_a_killed_evaluation_goes_on_to_the_same_files(groups, run, asked, stop_after, whole, tmp_path):
    out = tmp_path / "scores.json"
    again = stop_after(groups)
    code, _, error = run(*arguments(out))
    assert code == 130 and "continue with the same command" in error and not out.exists()
    kept = records_of(out)
    assert [line["id"] for line in kept] == GROUPED[: 2 * groups]
    again()
    asked.clear()
    assert run(*arguments(out))[0] == 0
    assert asked == GROUPED[2 * groups :]
    assert files_of(tmp_path) == whole


@pytest.mark.e2e
@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_that_a_kill_has_cut_is_done_again(cut, run, asked, stop_after, whole, tmp_path):
    out = tmp_path / "scores.json"
    again = stop_after(3)
    run(*arguments(out))
    again()
    records = out.with_suffix(".records.jsonl")
    text = records.read_text()
    records.write_text(text[:-cut])
    lines_left = text[:-cut].count("\n") + (cut == 1)  # without its line break, a line is still whole
    asked.clear()
    assert run(*arguments(out))[0] == 0
    assert asked == GROUPED[lines_left // 2 * 2 :]
    assert files_of(tmp_path) == whole


def test_a_finished_evaluation_is_shown_and_not_done_again(run, asked, tmp_path):
    out = tmp_path / "scores.json"
    _, first, _ = run(*arguments(out))
    before = files_of(tmp_path)
    asked.clear()
    code, second, error = run(*arguments(out))
    assert (code, asked, second) == (0, [], first) and "finished already" in error
    assert files_of(tmp_path) == before


OTHER = [
    ({"samples": 3}, "sampling.samples 2, not 3"),
    ({"temperature": 0.5}, "sampling.temperature 1.0, not 0.5"),
    ({"max_new_tokens": 25}, "sampling.max_new_tokens 24, not 25"),
    ({"seed": 1}, "sampling.seed 1234, not 1"),
    ({"grader": "operator:contains"}, "settings.grader suffix, not operator:contains"),
    ({"prompt_format": "chat"}, "settings.prompt_format raw, not chat"),
    ({"limit": 4}, "settings.suite.letters"),
    ({"suite": ["letters={digits}", "digits={digits}"]}, "settings.suite.letters"),
    ({"suite": ["letters={letters}"]}, "settings.suite.digits"),
    ({"suite": ["letters={letters}", "digits={digits}", "more={digits}"]}, "settings.suite.more -, not"),
    ({"model": "{other}"}, "model "),
    ({"generate_batch": 9}, "settings.generate_batch 4, not 9"),
]


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize(("changed", "said"), OTHER, ids=[said for _, said in OTHER])
def test_other_settings_than_the_files_are_refused(finished, changed, said, run, stop_after, tmp_path, whole):
    out = tmp_path / "scores.json"
    if finished:
        for name, text in whole.items():
            (tmp_path / name).write_text(text)
    else:
        again = stop_after(1)
        run(*arguments(out))
        again()
    before = files_of(tmp_path)
    code, _, error = run(*arguments(out, **changed))
    assert code == 2 and error.count("\n") == 1 and said in error and "give the same settings" in error
    assert files_of(tmp_path) == before


def test_other_weights_under_the_same_name_are_refused(run, stop_after, tmp_path, make_folder, make_model):
    model, out = make_folder(make_model(seed=3)), tmp_path / "scores.json"
    again = stop_after(1)
    run(*arguments(out, model=model))
    again()
    make_model(seed=4).save_pretrained(model)
    code, _, error = run(*arguments(out, model=model))
    assert code == 2 and "settings.weights" in error


@pytest.mark.e2e
def test_a_process_killed_outright_goes_on(places, whole, tmp_path):
    out = tmp_path / "scores.json"
    command = ["-m", "opsd", "eval", *(str(word).format(**places) for word in arguments(out))]
    records = out.with_suffix(".records.jsonl")
    first = begin(*command)
    deadline = time.monotonic() + 600
    while not (records.exists() and records.read_text()) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    done = records.read_text()
    assert done
    second = python(*command)
    assert second.returncode == 0, second.stderr
    assert records.read_text().startswith(done[: done.rindex("\n") + 1])
    assert files_of(tmp_path) == whole


# ---- what is refused

BAD = [
    ({"model": "{nothing}"}, ["--model", "no such folder"]),
    ({"model": "{letters}"}, ["--model", "is a file"]),
    ({"model": "{folder}"}, ["--model", "no config.json"]),
    ({"model": "{damaged}"}, ["--model", "not finite"]),
    ({"model": "{cut}"}, ["--model", "cannot be loaded"]),
    ({"model": "{nochat}", "prompt_format": "chat"}, ["no chat template", "--prompt_format raw"]),
    ({"model": None}, ["missing: --model"]),
    ({"suite": None}, ["missing: --suite"]),
    ({"out": None}, ["missing: --out"]),
    ({"suite": []}, ["--suite"]),
    ({"suite": "letters"}, ["--suite 'letters'", "NAME=FILE"]),
    ({"suite": ["a={letters}", "a={digits}"]}, ["--suite names 'a' twice"]),
    ({"suite": "a={nothing}"}, ["nothing does not exist"]),
    ({"suite": "a={empty}"}, ["holds no records"]),
    ({"suite": "a={unanswered}"}, ["no field 'answer'", "gold answers"]),
    (
        {"suite": "a={long}", "max_prompt_tokens": 10},
        ["1 problems are over --max_prompt_tokens 10", "suites are evaluated completely"],
    ),
    ({"suite": "a={letters}", "max_prompt_tokens": 1}, ["all 6 prompts are over --max_prompt_tokens 1"]),
    ({"prompt_field": "question"}, ["no field 'question'"]),
    ({"samples": 0}, ["--samples 0", "above 0"]),
    ({"samples": "many"}, ["--samples", "many"]),
    ({"max_new_tokens": 0}, ["--max_new_tokens 0"]),
    # the model has 256 positions, the longest prompt 2 tokens
    ({"max_new_tokens": 255}, ["--max_new_tokens 255", "256 positions", "at most 254"]),
    ({"limit": 0}, ["--limit 0"]),
    ({"generate_batch": 0}, ["--generate_batch 0"]),
    ({"tensor_parallel": 2}, ["--tensor_parallel 2", "does not divide the 1 processes"]),
    ({"temperature": -1}, ["--temperature -1.0"]),
    ({"temperature": "nan"}, ["--temperature nan"]),
    ({"top_p": 0}, ["--top_p 0.0", "(0, 1]"]),
    ({"top_k": -1}, ["--top_k -1", "0 or more"]),
    ({"grader": "guess"}, ["--grader 'guess'", "math, suffix or module:function"]),
    ({"engine": "sglang"}, ["sglang"]),
    ({"dtype": "float8"}, ["float8"]),
    ({"device": "cuda"}, ["--device cuda", "no CUDA device"]),
    ({"sample": 3}, ["unknown option --sample", "did you mean --samples?"]),
    ({"out": "{folder}"}, ["--out", "ends in .json"]),
    ({"out": "{letters}"}, ["ends in .json"]),
    ({"out": "{letters}/scores.json"}, ["--out", "cannot be written"]),
]


@pytest.mark.parametrize(("changed", "said"), BAD, ids=[" ".join(map(str, changed.items())) for changed, _ in BAD])
def test_bad_input_is_one_line_exit_2_and_writes_nothing(changed, said, run, places, tmp_path):
    if changed.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    before = sorted(Path(places["folder"]).rglob("*"))
    code, printed, error = run(*arguments(tmp_path / "out" / "scores.json", **changed))
    assert code == 2 and printed == "" and error.startswith("opsd: ") and error.count("\n") == 1, error
    for part in said:
        assert part in error
    assert list(tmp_path.iterdir()) == [] and sorted(Path(places["folder"]).rglob("*")) == before


@pytest.mark.parametrize("name", ["scores.records.jsonl", "scores.md"])
def test_files_of_someone_else_are_not_overwritten(name, run, tmp_path):
    (tmp_path / name).write_text("mine\n")
    code, _, error = run(*arguments(tmp_path / "scores.json"))
    assert code == 2 and f"{name} exists already" in error and files_of(tmp_path) == {name: "mine\n"}


@pytest.mark.parametrize("content", ["no json", "[1]", '{"model": "m"}'])
def test_a_result_that_is_not_ours_is_not_overwritten(content, run, tmp_path):
    (tmp_path / "scores.json").write_text(content)
    code, _, error = run(*arguments(tmp_path / "scores.json"))
    assert code == 2 and error.count("\n") == 1 and "give" in error
    assert files_of(tmp_path) == {"scores.json": content}


def test_help_lists_every_flag(run):
    code, shown, _ = run("--help")
    assert code == 0 and [flag for flag in flags_of(EvalCommand) if flag not in shown] == []


def test_records_survive_their_file_whatever_stands_in_them(tmp_path):
    # U+2028 ends a line for some readers; half a character fits no file
    record = ProblemRecord("p\n1", "½", [True], ["½\u2028x\ud83d"], [3], [False])
    problems = [DoneProblem("s", record), DoneProblem("t", record, ["a\u2028b\nc\r"])]
    plan = [[("s", "p\n1")], [("t", "p\n1")]]
    files = EvalFiles(str(tmp_path / "scores.json"))
    assert files.begin({}, plan) == []
    files.append(problems)
    assert files.begin({}, plan) == problems
    assert len(files.records.read_bytes().splitlines()) == 2

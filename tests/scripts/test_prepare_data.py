"""Files in, files out: the same records from a file and from the hub; the real sets; what is refused."""

import json
import re
import sys
import types
from pathlib import Path

import pandas as pd
import pytest
from forked import python

from mathdata.problems import INSTRUCTIONS, problem_key
from mathdata.sources import KNOWN
from opsd.data.prompts import read_records
from opsd.eval.grading import grade

ROOT = Path(__file__).parents[2]
FIRST = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
LAST = '\n\nRemember to put your answer on its own line after "Answer:".'
# Text and label; the second and the last are dropped, the first stands in the suite below.
DAPO = [("Find $a$.", "1"), ("Find $b$.", "-1"), *((f"Find ${n}x$.", str(n)) for n in range(40)), ("Find  $a$.", "1")]
SUITE = [{"problem": "Find \\(a\\)", "answer": "1"}, {"problem": "Find $z$.", "answer": "\\frac{1}{2}"}]


def verl_rows(pairs):
    """Rows in the format of the public DAPO files."""
    return [
        {
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"ground_truth": label, "style": "rule"},
            "extra_info": {"index": number},
        }
        for number, (text, label) in enumerate(pairs)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    """dapo and mine, as files."""
    pd.DataFrame(verl_rows(DAPO)).to_parquet(tmp_path / "dapo.parquet")
    return {"dapo": tmp_path / "dapo.parquet", "mine": write_jsonl(tmp_path / "mine.jsonl", SUITE)}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package datasets: load_dataset(path, name, split=…) gives an iterable of rows as dicts."""
    tables, asked = {}, []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        if path not in tables:
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.\nmore")
        return tables[path]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return types.SimpleNamespace(tables=tables, asked=asked)


def test_a_file_and_the_hub_give_the_same_records(files, hub, tmp_path, run_script):
    # The hub's own file: every row many times, in another order, with instructions around the problem.
    hub.tables["BytedTsinghua-SIA/DAPO-Math-17k"] = verl_rows(
        [(FIRST + text + LAST, label) for text, label in DAPO[::-1]] * 3
    )
    assert run_script("--out", tmp_path / "file", "--sets", f"dapo={files['dapo']}")[0] == 0
    assert run_script("--out", tmp_path / "hub", "--sets", "dapo=hub")[0] == 0
    for name in ("dapo_train.jsonl", "math_dapo.jsonl"):
        assert (tmp_path / "file" / name).read_text() == (tmp_path / "hub" / name).read_text() != ""
    assert hub.asked == [("BytedTsinghua-SIA/DAPO-Math-17k", None, "train")]


def test_every_known_set_is_asked_for_by_its_hub_name(hub, run_script, tmp_path):
    hub.tables["BytedTsinghua-SIA/DAPO-Math-17k"] = verl_rows(DAPO)
    hub.tables["HuggingFaceH4/MATH-500"] = [{"problem": f"Find {n}.", "answer": "x"} for n in range(500)]
    for name in ("HuggingFaceH4/aime_2024", "math-ai/aime25"):
        hub.tables[name] = [{"id": n, "problem": f"Find {n}.", "answer": f"{n:03}"} for n in range(30)]
    hub.tables["openai/gsm8k"] = [{"question": f"How many {n}?", "answer": f"So.\n#### {n}"} for n in range(1319)]
    code, out, error = run_script("--out", tmp_path / "data")
    assert code == 0, error
    assert ("openai/gsm8k", "main", "test") in hub.asked and len(hub.asked) == 5
    lines = {path.name: len(read(path)) for path in (tmp_path / "data").glob("*.jsonl")}
    suites = {"math500.jsonl": 500, "aime24.jsonl": 30, "aime25.jsonl": 30, "gsm8k.jsonl": 1319}
    assert {name: lines[name] for name in suites} == suites
    assert read(tmp_path / "data" / "aime24.jsonl")[7]["answer"] == "7"
    assert read(tmp_path / "data" / "gsm8k.jsonl")[1318]["answer"] == "1318"
    assert f"{tmp_path}/data/gsm8k.jsonl" in out


def test_a_hub_dataset_of_one_s_own(hub, run_script, tmp_path):
    hub.tables["someone/problems"] = [{"text": "Find $y$.", "info": {"Gold": 5}}]
    place = "hub:someone/problems:hard:validation"
    assert run_script("--out", tmp_path, "--sets", f"mine={place}", "--columns", "mine=text,info.gold")[0] == 0
    assert hub.asked == [("someone/problems", "hard", "validation")]
    (record,) = read(tmp_path / "mine.jsonl")
    assert record["prompt"] == "Find $y$." + INSTRUCTIONS["boxed"] and record["answer"] == "5"


def test_decontaminate_leaves_out_what_stands_in_a_suite(files, tmp_path, run_script):
    sets = ["--sets", f"dapo={files['dapo']}", f"mine={files['mine']}"]
    run_script("--out", tmp_path / "with", *sets)
    code, out, _ = run_script("--out", tmp_path / "without", *sets, "--decontaminate")
    found = {}
    for name in ("with", "without"):
        rows = [*read(tmp_path / name / "dapo_train.jsonl"), *read(tmp_path / name / "math_dapo.jsonl")]
        found[name] = {row["prompt"].removesuffix(INSTRUCTIONS["boxed"]) for row in rows}
    assert found["with"] - found["without"] == {"Find  $a$."} and len(found["without"]) == 40
    assert code == 0 and "1  problems that occur in a suite" in out
    counts = json.loads((tmp_path / "without" / "dapo.counts.json").read_text())
    assert counts["counts"]["in_a_suite"] == 1 and counts["decontaminate"] is True


def test_ids_are_unique_and_the_same_wherever_a_problem_stands(files, tmp_path, run_script):
    run_script("--out", tmp_path / "one", "--sets", f"dapo={files['dapo']}")
    pd.DataFrame(verl_rows(DAPO[20:])).to_parquet(tmp_path / "part.parquet")
    run_script("--out", tmp_path / "two", "--sets", f"dapo={tmp_path / 'part.parquet'}", "--held_out_fraction", "0")
    whole = [*read(tmp_path / "one" / "dapo_train.jsonl"), *read(tmp_path / "one" / "math_dapo.jsonl")]
    ids = {row["prompt"]: row["id"] for row in whole}
    assert len(set(ids.values())) == len(whole) == 41
    part = read(tmp_path / "two" / "dapo_train.jsonl")
    assert len(part) == 23 and all(ids[row["prompt"]] == row["id"] for row in part)
    assert not (tmp_path / "two" / "math_dapo.jsonl").exists()


def test_the_instruction_is_stated_and_can_be_left_out(files, tmp_path, run_script):
    for name in ("boxed", "answer", "none"):
        run_script("--out", tmp_path / name, "--sets", f"mine={files['mine']}", "--instruction", name)
        assert read(tmp_path / name / "mine.jsonl")[1]["prompt"] == "Find $z$." + INSTRUCTIONS[name]
        assert json.loads((tmp_path / name / "mine.counts.json").read_text())["instruction"] == name
    run_script("--out", tmp_path / "default", "--sets", f"mine={files['mine']}")
    assert (tmp_path / "default" / "mine.jsonl").read_text() == (tmp_path / "boxed" / "mine.jsonl").read_text()


def test_the_same_command_again_changes_nothing_and_another_one_is_refused(files, tmp_path, run_script):
    out = tmp_path / "out"
    assert run_script("--out", out, "--sets", f"mine={files['mine']}")[0] == 0
    before = {path: path.read_text() for path in out.iterdir()}
    assert run_script("--out", out, "--sets", f"mine={files['mine']}")[0] == 0
    code, _, error = run_script("--out", out, "--sets", f"mine={files['mine']}", "--instruction", "none")
    assert code == 2 and "made from other data or options" in error
    assert {path: path.read_text() for path in out.iterdir()} == before


# Arguments beside --out, and what the line must say.
BAD = [
    (["--sets", "math500"], ["--sets 'math500'", "NAME=FILE or NAME=hub"]),
    (["--sets", "../x=a.jsonl"], ["--sets '../x=a.jsonl'", "NAME=FILE"]),
    (["--sets", "mine={mine}", "mine={mine}"], ["names 'mine' twice"]),
    (["--sets", "mine={folder}/none.jsonl"], ["none.jsonl does not exist"]),
    (["--sets", "mine={folder}/none.parquet"], ["none.parquet does not exist"]),
    (["--sets", "mine={broken}"], ["broken.parquet cannot be read as parquet", "give a complete file"]),
    (["--sets", "mine={text}"], ["'.txt'", ".jsonl or .parquet"]),
    (["--sets", "mine={other}"], ["row 1 has the columns frage, antwort", "--columns mine=PROBLEM,ANSWER"]),
    (["--sets", "mine={other}", "--columns", "mine=frage,answer"], ["no column 'answer'", "frage, antwort"]),
    (["--sets", "mine={other}", "--columns", "mine=frage"], ["--columns 'mine=frage'", "NAME=PROBLEM,ANSWER"]),
    (["--sets", "mine={mine}", "--columns", "other=a,b"], ["--columns names 'other'", "not in --sets"]),
    (["--sets", "mine=hub"], ["known for dapo, math500, aime24, aime25, gsm8k only"]),
    (["--sets", "mine=hub:a/b"], ["hub:OWNER/NAME:SPLIT"]),
    (["--sets", "math500={mine}"], ["gives 2 problems instead of 500", "under another name"]),
    (["--sets", "mine={unknown}"], ["row 1 holds an answer instruction that is not known"]),
    (["--sets", "mine={blank}"], ["none of its 1 rows is left"]),
    (["--sets", "mine={talk}"], ["neither a text nor a list of messages"]),
    (["--sets", "mine={half}"], ["row 1 holds half a character"]),
    (["--sets", "mine={halfgold}"], ["row 1 holds half a character"]),
    (["--sets", "gsm8k={mine}"], ["no '####'"]),
    (["--sets", "aime24={mine}"], ["integers from 0 to 999"]),
    (["--sets", "mine={mine}", "--decontaminate"], ["--decontaminate needs the training set 'dapo'"]),
    (["--sets", "mine={mine}", "--train", "mine", "--decontaminate"], ["at least one other"]),
    (["--sets", "mine={mine}", "--held_out_fraction", "1"], ["--held_out_fraction 1.0", "[0, 1)"]),
    (["--sets", "mine={mine}", "--instruction", "latex"], ["latex"]),
    (["--set", "mine={mine}"], ["unknown option --set", "did you mean --sets?"]),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_exit_2_and_writes_nothing(arguments, said, files, tmp_path, run_script):
    places = {name: str(path) for name, path in files.items()} | {"folder": str(tmp_path)}
    rows = {
        "other": {"frage": "Find $y$.", "antwort": "1"},
        "unknown": {"problem": "Think step by step. Find $y$.", "answer": "1"},
        "blank": {"problem": "Find $y$.", "answer": ""},
        "half": {"problem": "Find \ud83d.", "answer": "1"},
        "halfgold": {"problem": "Find $y$.", "answer": "\ud83d"},
        "talk": {"problem": [{"role": "system", "content": "Be brief."}], "answer": "1"},
    }
    for name, row in rows.items():
        places[name] = str(write_jsonl(tmp_path / f"{name}.jsonl", [row]))
    for name in ("broken.parquet", "text.txt"):
        (tmp_path / name).write_text("no table")
        places[name.split(".")[0]] = str(tmp_path / name)
    code, out, error = run_script("--out", tmp_path / "out", *(word.format(**places) for word in arguments))
    assert code == 2 and out == "" and error.startswith("prepare_data: ") and error.count("\n") == 1, error
    for part in said:
        assert part in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "under a file"])
def test_an_output_folder_that_cannot_be_is_one_line(kind, files, tmp_path, run_script):
    out = files["mine"] if kind == "file" else files["mine"] / "out"
    code, _, error = run_script("--out", out, "--sets", f"mine={files['mine']}")
    assert code == 2 and error.count("\n") == 1 and "give a" in error


def test_without_the_package_datasets_the_hub_is_one_line_with_the_way_out(monkeypatch, run_script, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error = run_script("--out", tmp_path / "out", "--sets", "math500=hub")
    assert code == 2 and "pip install datasets" in error and "math500=FILE" in error
    assert not (tmp_path / "out").exists()


def test_what_the_hub_refuses_is_one_line(hub, run_script, tmp_path):
    code, _, error = run_script("--out", tmp_path / "out", "--sets", "math500=hub")
    assert code == 2 and "doesn't exist on the Hub" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def real(math_files, tmp_path_factory):
    """The real sets prepared as docs/data.md does it: folder, and what was printed."""
    out = tmp_path_factory.mktemp("real")
    sets = [f"{name}={path}" for name, path in math_files.items()]
    script = ROOT / "scripts" / "prepare_data.py"
    done = python(script, "--out", out, "--decontaminate", "--sets", *sets, cwd=out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_recipes_find_their_files(real):
    recipe = (ROOT / "recipes" / "common.sh").read_text()
    named = set(re.findall(r"(?:\$DATA|\$DATA_DIR\}?)/(\w+\.jsonl)", recipe))
    assert {"dapo_train.jsonl", "math500.jsonl", "aime24.jsonl", "aime25.jsonl"} <= named
    for name in (*named, "math_dapo.jsonl", "gsm8k.jsonl"):
        records = read_records(real[0] / name)
        assert all(set(record) == {"id", "prompt", "answer"} for record in records)
        assert len({record["id"] for record in records}) == len(records)


def test_real_dapo_has_no_copies_no_doubtful_labels_and_no_suite_in_it(real):
    out, _ = real
    files = {path.stem: read(path) for path in out.glob("*.jsonl")}
    keys = {
        name: [problem_key(row["prompt"].removesuffix(INSTRUCTIONS["boxed"])) for row in rows]
        for name, rows in files.items()
    }
    dapo = keys["dapo_train"] + keys["math_dapo"]
    assert len(set(dapo)) == len(dapo) > 16000
    for suite in ("math500", "aime24", "aime25", "gsm8k"):
        assert not set(dapo) & set(keys[suite]), suite
    golds = [row["answer"] for name in ("dapo_train", "math_dapo") for row in files[name]]
    assert all(re.fullmatch(r"-?(0|[1-9]\d*)", gold) and gold != "-1" and abs(int(gold)) <= 2**53 for gold in golds)
    assert [len(files[name]) for name in ("math500", "aime24", "aime25", "gsm8k")] == [500, 30, 30, 1319]
    assert not any("Answer: \\boxed" in row["prompt"] for row in files["dapo_train"] + files["math_dapo"])


def test_real_golds_are_right_answers(real):
    out, _ = real
    golds = [row["answer"] for name in ("aime24", "aime25", "gsm8k") for row in read(out / f"{name}.jsonl")]
    assert all(re.fullmatch(r"-?\d+", gold) for gold in golds) and len(golds) == 1379
    assert all(grade(f"\\boxed{{{gold}}}", gold) for gold in golds)


def test_the_counts_in_the_documentation_are_what_the_command_prints(real):
    out, printed = real
    page = (ROOT / "docs" / "data.md").read_text()
    for name in KNOWN:
        counts = json.loads((out / f"{name}.counts.json").read_text())["counts"]
        assert all(f"{count:,}" in printed for step, count in counts.items() if count and step != "instructions")
    ledger = [line for line in printed.splitlines() if re.match(r" +[−=→]? +[\d,]+  ", line)]
    assert len(ledger) > 10 and [line for line in ledger if line not in page] == []

"""Bad input from the command line's end to the other: one line with what came and what to do, exit code 2, no file.

The table of cases is data: `CASES`. Cases of single settings stand in tests/config/test_cli.py and test_config.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import ROOT
from tiny_models import plain_tokenizer, tiny_model

from opsd import __main__ as cli

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
RULES = """
class Raises:
    def __init__(self, retention=0.5):
        raise ValueError("not today")
class Hollow:
    def __init__(self, retention=0.5): pass
class Unknown:
    needs, needs_kept, normalise_over, fixed_budget = frozenset({"colour"}), frozenset(), "micro_batch", True
    def __init__(self, retention=0.5): pass
    def budget(self, tokens): return tokens
    def prepare(self, stats): pass
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def __call__(self, stats, seed=0): pass
number = 3
"""
TASK = {"id": "1", "lang": "en", "query": "q", "meta": {"days": 1}, "form": "full", "source": "synthetic-travel"}


def models(folder: Path) -> None:
    """`model`, and copies of it with one thing damaged each."""
    tiny_model(True, 0).save_pretrained(folder / "model")
    plain_tokenizer().save_pretrained(folder / "model")
    config = json.loads((folder / "model/config.json").read_text())
    weights = (folder / "model/model.safetensors").read_bytes()
    index = json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}})
    damages = {
        "config-text": ("config.json", "{not json"),
        "config-list": ("config.json", "[]"),
        "config-empty": ("config.json", "{}"),
        "config-bytes": ("config.json", b"\xff\xfe\x00\x01"),
        "config-type": ("config.json", json.dumps({**config, "model_type": "zork"})),
        "config-size": ("config.json", json.dumps({**config, "hidden_size": "big"})),
        "config-heads": ("config.json", json.dumps({**config, "num_attention_heads": 0})),
        "weights-cut": ("model.safetensors", weights[: len(weights) // 2]),
        "weights-none": ("model.safetensors", b""),
        "weights-gone": ("model.safetensors", None),
        "shard-gone": ("model.safetensors.index.json", index),
        "tokenizer-text": ("tokenizer.json", '{"a":'),
        "tokenizer-other": ("tokenizer.json", '{"a": 1}'),
        "tokenizer-gone": ("tokenizer.json", None),
        "template-broken": ("chat_template.jinja", "{% for x in %}"),
        "template-raises": ("chat_template.jinja", "{{ 1 / 0 }}"),
        "size-text": ("config.json", json.dumps({**config, "num_hidden_layers": "3"})),
        "size-null": ("config.json", json.dumps({**config, "vocab_size": None})),
        "size-none": ("config.json", json.dumps({**config, "vocab_size": 0})),
        "size-half": ("config.json", json.dumps({**config, "hidden_size": 1.5})),
        "size-minus": ("config.json", json.dumps({**config, "hidden_size": -4})),
        "size-huge": ("config.json", json.dumps({**config, "num_hidden_layers": 10**30})),
        "code": ("config.json", json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Model"}})),
    }
    for name, (file, content) in damages.items():
        shutil.copytree(folder / "model", folder / name)
        put(folder / name / file, content)
    (folder / "shard-gone/model.safetensors").unlink()
    for name in ("tokenizer-gone",):
        (folder / name / "tokenizer_config.json").unlink()
    shutil.copytree(folder / "weights-gone", folder / "pickle")
    (folder / "pickle/pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nU\x0btouch PWNEDq\x85R.")
    shutil.copytree(folder / "model", folder / "weights-folder")
    (folder / "weights-folder/model.safetensors").unlink()
    (folder / "weights-folder/model.safetensors").mkdir()


def put(path: Path, content: str | bytes | None) -> None:
    """Write a file; None removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def data(folder: Path) -> None:
    """Prompt, task and module files."""
    for name, content in {
        "prompts.jsonl": '{"prompt": "1+1=", "answer": "2"}\n',
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "number.jsonl": '{"prompt": 3}\n',
        "numbers.jsonl": "5\n",
        "null.jsonl": '{"prompt": null}\n',
        "latin.jsonl": '{"prompt": "caf\xe9"}\n'.encode("latin-1"),
        "utf16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
        "half.jsonl": '{"prompt": "1\\ud800+1=", "answer": "2"}\n',
        "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        "message.jsonl": '{"prompt": [{"role": "user", "content": 5}]}\n',
        "messages.jsonl": '{"prompt": []}\n',
        "gold-object.jsonl": '{"prompt": "1", "answer": {"a": 1}}\n',
        "gold-nan.jsonl": '{"prompt": "1", "answer": NaN}\n',
        "twice.jsonl": '{"prompt": "1", "answer": "1", "id": 1}\n{"prompt": "1", "answer": "1", "id": "1"}\n',
        "fake.parquet": b"PAR1garbage",
        "rules.py": RULES,
        "broken.py": "def (:\n",
        "loud.py": 'raise RuntimeError("at import")\n',
        "leaves.py": "import sys\nsys.exit(0)\n",
        "task-fields.jsonl": '{"id": 1}\n',
        "task-bytes.jsonl": b"\xff\xfe",
        "task-meta.jsonl": json.dumps({**TASK, "meta": 3, "tables": {}}) + "\n",
        "task-form.jsonl": json.dumps({**TASK, "form": "verse", "tables": {}}) + "\n",
        "task-query.jsonl": json.dumps({**TASK, "query": 7, "tables": {}}) + "\n",
        "task-tables.jsonl": json.dumps({**TASK, "tables": {}}) + "\n",
        "record/tokens/step_1.parquet": "x",
    }.items():
        put(folder / name, content)
    (folder / "folder.jsonl").mkdir()
    (folder / "nothing").mkdir()
    pq.write_table(pa.table({"question": ["a"]}), folder / "column.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), folder / "rows.parquet")
    pq.write_table(pa.table({"prompt": [b"\xff\xfe"]}), folder / "bytes.parquet")


def runs(folder: Path) -> None:
    """Run folders that cannot be resumed."""
    whole = {
        "student": str(folder / "model"),
        "teacher": {"model": str(folder / "model")},
        "prompts": str(folder / "prompts.jsonl"),
        "out": "x",
        "prompt_format": "raw",
        "track": {"progress": False},
    }
    for name, content in {
        "run-empty": "",
        "run-bytes": b"\xff\xfe\x00",
        "run-list": "[]",
        "run-null": "null",
        "run-unknown": json.dumps({**whole, "colour": "red"}),
        "run-text": json.dumps({**whole, "steps": "two"}),
        "run-part": json.dumps({**whole, "optim": 3}),
        "run-choice": json.dumps({**whole, "engine": {"kind": "zork"}}),
        "run-moved": json.dumps({**whole, "student": str(folder / "gone")}),
    }.items():
        put(folder / name / "config.json", content)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder in which every case runs."""
    folder = tmp_path_factory.mktemp("bad")
    models(folder)
    data(folder)
    runs(folder)
    return folder


HUGE = "9" * 20
# What is damaged, the flags that stand in for those of a command that would run, and what the line must say.
MODELS = [
    ("config.json is not JSON", ["config-text"], "JSON"),
    ("config.json is a list", ["config-list"], "config.json cannot be read"),
    ("config.json is empty", ["config-empty"], "cannot be loaded"),
    ("config.json is binary", ["config-bytes"], "config.json cannot be read"),
    ("an unknown model type", ["config-type"], "zork"),
    ("a size that is a text", ["config-size"], "config.json cannot be read"),
    ("no attention heads", ["config-heads"], "cannot be loaded"),
    ("half of the weights", ["weights-cut"], "safetensors"),
    ("empty weights", ["weights-none"], "safetensors"),
    ("no weights", ["weights-gone"], "safetensors"),
    ("weights that are a folder", ["weights-folder"], "cannot be loaded"),
    ("a missing shard", ["shard-gone"], "cannot be loaded"),
    ("a pickle in place of safetensors", ["pickle"], "safetensors"),
    ("a tokenizer that is not JSON", ["tokenizer-text"], "tokenizer cannot be loaded"),
    ("a tokenizer of another kind", ["tokenizer-other"], "tokenizer cannot be loaded"),
    ("no tokenizer", ["tokenizer-gone"], "tokenizer cannot be loaded"),
    ("code of its own", ["code"], "--trust_remote_code True"),
    ("an empty name", [""], "is empty"),
]
TRAIN = [
    ("a broken chat template", ["--prompt_format", "chat", "--student", "template-broken"], "chat template"),
    ("a chat template that raises", ["--prompt_format", "chat", "--student", "template-raises"], "chat template"),
    ("thinking without a template", ["--thinking", "on"], "--prompt_format chat"),
    ("a run below a file", ["--out", "prompts.jsonl/run"], "another folder"),
    ("a name of 300 letters", ["--out", "r" * 300], "another folder"),
    ("a seed that is not a number", ["--seed", "nan"], "--seed"),
    ("a learning rate of 1e400", ["--optim.lr", "1e400"], "--optim.lr inf"),
    ("an epsilon of inf", ["--optim.eps", "inf"], "--optim.eps inf"),
    ("a weight decay of inf", ["--optim.weight_decay", "inf"], "--optim.weight_decay inf"),
    ("a clip at inf", ["--optim.max_grad_norm", "inf"], "--optim.max_grad_norm inf"),
    ("a reward beta of inf", ["--loss.reward_beta", "inf"], "--loss.reward_beta inf"),
    ("10^20 samples", ["--rollout.samples_per_prompt", HUGE], f"--rollout.samples_per_prompt {HUGE}"),
    ("10^20 new tokens", ["--rollout.max_new_tokens", HUGE], f"--rollout.max_new_tokens {HUGE}"),
    ("a negative bound on skips", ["--optim.max_skipped_steps", "-1"], "--optim.max_skipped_steps -1"),
    ("a selector that raises", ["--select.by", "rules:Raises"], "ValueError: not today"),
    ("a selector without a budget", ["--select.by", "rules:Hollow"], "is not a TokenSelector"),
    ("a selector that needs what is not", ["--select.by", "rules:Unknown"], "needs the statistic 'colour'"),
    ("a selector that is a number", ["--select.by", "rules:number"], "is a int"),
    ("a selector in a broken module", ["--select.by", "broken:Rule"], "SyntaxError"),
    ("a selector in a module that raises", ["--select.by", "loud:Rule"], "RuntimeError: at import"),
    ("a selector in a module that exits", ["--select.by", "leaves:Rule"], "cannot be loaded"),
    ("a selector without a module", ["--select.by", ":Rule"], "cannot be loaded"),
    ("a selector that is a function", ["--select.by", "json:loads"], "json:loads"),
    ("an option that is not a number", ["--select.by", "soft_or", "--select.options", "running_decay", "zork"], "zork"),
    ("an option without a value", ["--select.options", "ranks"], "--select.options"),
    ("a grader in a broken module", ["--eval.suite", "s=prompts.jsonl", "--eval.grader", "broken:f"], "SyntaxError"),
    (
        "a grader of one argument",
        ["--eval.suite", "s=prompts.jsonl", "--eval.grader", "os:system"],
        "is not a function",
    ),
    ("a suite with a path for a name", ["--eval.suite", "../s=prompts.jsonl"], "the name '../s'"),
    ("a suite named twice", ["--eval.suite", "s=prompts.jsonl", "s=prompts.jsonl"], "twice"),
    ("a teacher's address that is a file", ["--teacher.kind", "vllm", "--teacher.urls", "file:///etc/hosts"], "urls"),
    (
        "a password in an address",
        ["--teacher.kind", "vllm", "--teacher.urls", "http://a:b@h"],
        "api_key_env",
    ),
    ("a teacher's address that is broken", ["--teacher.kind", "vllm", "--teacher.urls", "http://[::1"], "urls"),
    (
        "a task without fields",
        ["--prompts", "task-fields.jsonl", "--environment.kind", "travel"],
        "is not a travel task",
    ),
    ("a task file in bytes", ["--prompts", "task-bytes.jsonl", "--environment.kind", "travel"], "is not JSON"),
    ("a task whose meta is a number", ["--prompts", "task-meta.jsonl", "--environment.kind", "travel"], "meta must be"),
    ("a task in verse", ["--prompts", "task-form.jsonl", "--environment.kind", "travel"], "form one of"),
    ("a task whose query is a number", ["--prompts", "task-query.jsonl", "--environment.kind", "travel"], "texts"),
    ("a task with no tables", ["--prompts", "task-tables.jsonl", "--environment.kind", "travel"], "tables must hold"),
    ("a task nested deep", ["--prompts", "deep.jsonl", "--environment.kind", "travel"], "is not JSON"),
]
# Files of prompts, as --prompts and as a suite of `opsd eval`.
FILES = [
    ("an empty file", "empty.jsonl", "holds no records"),
    ("blank lines", "blank.jsonl", "holds no records"),
    ("a number for a prompt", "number.jsonl", "'prompt' is 3"),
    ("a number for a record", "numbers.jsonl", "is a int"),
    ("no prompt", "null.jsonl", "'prompt' is None"),
    ("Latin-1", "latin.jsonl", "is not JSON"),
    ("UTF-16", "utf16.jsonl", "is not JSON"),
    ("half of a surrogate pair", "half.jsonl", "contains half of a surrogate pair"),
    ("lists 100,000 deep", "deep.jsonl", "is not JSON"),
    ("a message that is a number", "message.jsonl", "give a text or a list of chat messages"),
    ("no messages", "messages.jsonl", "give a text or a list of chat messages"),
    ("an answer that is an object", "gold-object.jsonl", "give a text or a number"),
    ("an answer that is NaN", "gold-nan.jsonl", "'answer' is nan"),
    ("a folder", "folder.jsonl", "is a folder"),
    ("a parquet that is none", "fake.parquet", "cannot be read as parquet"),
    ("a parquet without the column", "column.parquet", "has no field 'prompt'"),
    ("a parquet without rows", "rows.parquet", "holds no records"),
    ("a parquet of bytes", "bytes.parquet", "give a text"),
]
EVAL = [
    ("an id twice", ["--suite", "s=twice.jsonl"], "several records with the id"),
    ("a result that is a folder's", ["--out", "model"], ".json"),
    ("a result below a file", ["--out", "prompts.jsonl/e.json"], "--out"),
    ("a result in a model's config", ["--out", "model/config.json"], "--out"),
    ("a result of 300 letters", ["--out", "e" * 300 + ".json"], "another file"),
    ("10^20 samples", ["--samples", HUGE], f"--samples {HUGE}"),
    ("a grader in a module that exits", ["--grader", "leaves:f"], "cannot be loaded"),
    ("more tokens than positions", ["--max_new_tokens", "300"], "256 positions"),
    ("thinking without a template", ["--thinking", "on"], "--prompt_format chat"),
]
PLAN = [
    ("config.json is not JSON", ["--student", "config-text"], "config.json lacks a size"),
    ("config.json is a list", ["--student", "config-list"], "config.json lacks a size"),
    ("config.json is empty", ["--student", "config-empty"], "cannot be planned"),
    ("config.json is binary", ["--teacher", "config-bytes"], "config.json lacks a size"),
    ("an unknown model type", ["--teacher", "config-type"], "zork"),
    ("a size that is a text", ["--student", "size-text"], "num_hidden_layers is '3'"),
    ("a size that is null", ["--teacher", "size-null"], "vocab_size is None"),
    ("a size of 0", ["--student", "size-none"], "vocab_size is 0"),
    ("half a size", ["--student", "size-half"], "hidden_size is 1.5"),
    ("a size below 0", ["--student", "size-minus"], "hidden_size is -4"),
    ("10^30 layers", ["--student", "size-huge"], "num_hidden_layers is 1000"),
    ("no attention heads", ["--student", "config-heads"], "num_attention_heads is 0"),
    ("a folder that is not a model", ["--student", "nothing"], "no config.json there"),
    ("a shape that is not known", ["--student", "qwen3-99b"], "no built-in shape"),
    ("no GPU", ["--gpus", "0"], "--gpus 0"),
    ("a GPU that is a word", ["--gpus", "x"], "--gpus"),
    ("10^20 GPUs", ["--gpus", HUGE], f"--gpus {HUGE}"),
    ("memory that is not a number", ["--gpu_gib", "nan"], "--gpu_gib nan"),
    ("memory without end", ["--gpu_gib", "inf"], "--gpu_gib inf"),
    ("a speed of 1e400", ["--tflops", "1e400"], "--tflops inf"),
    ("a bandwidth below 0", ["--bandwidth_gbs", "-1"], "--bandwidth_gbs -1"),
    ("two GPUs and one process", ["--gpus", "2"], "--engine.kind deepspeed"),
    ("an attention of another name", ["--attention", "zork"], "zork"),
    ("a flag that is none", ["--colour", "red"], "unknown option --colour"),
    ("a setting of train's", ["--rollout.top_p", "7"], "--rollout.top_p 7.0"),
]
WHOLE = [
    ("resume of a file", ["train", "--resume", "prompts.jsonl"], "no run there"),
    ("resume of a model", ["train", "--resume", "model"], "is not a setting of this version"),
    ("resume with an empty config.json", ["train", "--resume", "run-empty"], "is not JSON"),
    ("resume with a binary config.json", ["train", "--resume", "run-bytes"], "is not JSON"),
    ("resume with a list for a config.json", ["train", "--resume", "run-list"], "holds no settings"),
    ("resume with null for a config.json", ["train", "--resume", "run-null"], "holds no settings"),
    ("resume with an unknown setting", ["train", "--resume", "run-unknown"], "colour"),
    ("resume with a text for a number", ["train", "--resume", "run-text"], "steps is 'two'"),
    ("resume with a number for a part", ["train", "--resume", "run-part"], "optim is 3, not a group"),
    (
        "resume with an engine that is none",
        ["train", "--resume", "run-choice"],
        "run-choice: --engine.kind zork: give one of: torch",
    ),
    ("resume with a student that is gone", ["train", "--resume", "run-moved"], "no such folder"),
    ("a record that is not parquet", ["inspect", "record"], "record"),
    ("a run without a record", ["inspect", "nothing"], "nothing"),
    ("a run that is not there", ["inspect", "nowhere"], "nowhere"),
]
BASE = {
    "train": {
        "--student": "model",
        "--teacher": "model",
        "--prompts": "prompts.jsonl",
        "--out": "out",
        "--steps": "1",
        "--prompt_format": "raw",
        "--engine.device": "cpu",
        "--rollout.samples_per_prompt": "1",
        "--rollout.max_new_tokens": "2",
        "--track.progress": "False",
    },
    "plan": {"--student": "model", "--teacher": "model"},
    "eval": {
        "--model": "model",
        "--suite": "s=prompts.jsonl",
        "--out": "out.json",
        "--samples": "1",
        "--prompt_format": "raw",
        "--max_new_tokens": "2",
        "--device": "cpu",
        "--progress": "False",
    },
}


def command(name: str, flags: list[str]) -> list[str]:
    """A command that would run, but for `flags`."""
    words = [word for flag, value in BASE[name].items() if flag not in flags for word in (flag, value)]
    return [name, *words, *flags]


CASES = [
    *((f"{flag} {what}", command(name, [flag, *model]), said) for what, model, said in MODELS
      for name, flag in (("train", "--student"), ("train", "--teacher"), ("eval", "--model"))),
    *((what, command("train", flags), said) for what, flags, said in TRAIN),
    *((f"--prompts {what}", command("train", ["--prompts", file]), said) for what, file, said in FILES),
    *((f"--suite {what}", command("eval", ["--suite", f"s={file}"]), said) for what, file, said in FILES),
    *((f"eval: {what}", command("eval", flags), said) for what, flags, said in EVAL),
    *((f"plan: {what}", command("plan", flags), said) for what, flags, said in PLAN),
    *WHOLE,
]  # fmt: skip


def listing(place: Path) -> list[tuple[str, int]]:
    """Every file with its size."""
    files = (path for path in place.rglob("*") if "__pycache__" not in path.parts)
    return sorted((str(path), path.stat().st_size if path.is_file() else -1) for path in files)


@pytest.mark.e2e
@pytest.mark.fault(
    "bad input through the command line: models, prompt files, suites, flags, selectors, graders, tasks, damaged "
    "runs, plans",
    "exit code 2; one line on stderr with the value received and the fix; no traceback; nothing written",
)
@pytest.mark.parametrize(("args", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_ends_in_one_line(args, said, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["opsd", *args])
    before = listing(place)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = "".join(line for line in capfd.readouterr().err.splitlines(True) if "Loading weights" not in line)
    assert stop.value.code == 2, error
    assert error.startswith("opsd: ") and error.count("\n") == 1 and said in error, error
    assert listing(place) == before


@pytest.mark.e2e
@pytest.mark.fault(
    "the same through the installed command: a damaged model, a damaged file, a damaged run",
    "exit code 2, one line, no traceback",
)
@pytest.mark.parametrize(
    "args",
    [
        pytest.param(command("train", ["--student", "config-list"]), id="model"),
        # Another process's start each, for what the test above reads from the same command line.
        pytest.param(command("eval", ["--suite", "s=deep.jsonl"]), id="file", marks=pytest.mark.slow),
        pytest.param(WHOLE[3][1], id="run", marks=pytest.mark.slow),
    ],
)
def test_the_installed_command_ends_in_one_line(args, place):
    done = subprocess.run([sys.executable, "-m", "opsd", *args], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


RECIPES = sorted(file.name for file in (ROOT / "recipes").glob("*.sh") if file.name != "common.sh")
POCKET = {"SCALE": "pocket"}
# Of recipes: what is set, and what the line must say.
VARIABLES = [
    ({"SCALE": "banana"}, "SCALE=banana is unknown; give paper or pocket"),
    ({"SCALE": "pocket;true"}, "SCALE=pocket;true is unknown"),
    ({**POCKET, "PAIRS": "nope"}, "PAIRS has nope"),
    ({**POCKET, "CELLS": "nope"}, "CELLS has nope"),
    ({**POCKET, "SEEDS": "x"}, "SEEDS has x"),
    ({**POCKET, "SEEDS": "0 -1"}, "SEEDS has -1"),
    ({**POCKET, "STEPS": "x"}, "STEPS=x: give a whole number above 0"),
    ({**POCKET, "STEPS": "0"}, "STEPS=0: give a whole number above 0"),
    ({"NUM_GPUS": "x"}, "NUM_GPUS=x: give a whole number above 0"),
    ({"DRY_RUN": "1", "TRAIN_BATCH_SIZE": "0"}, "TRAIN_BATCH_SIZE=0: give"),
    # What bash would run, were it to evaluate it.
    ({"DRY_RUN": "1", "TOTAL_EPOCHS": "a[$(touch ran)]"}, "TOTAL_EPOCHS=a[$(touch ran)]: give"),
    ({}, "missing: "),
]
OF_TABLES = ("PAIRS", "CELLS", "SEEDS")


@pytest.mark.fault(
    "bad variables to every recipe: SCALE, PAIRS, CELLS, SEEDS, STEPS, NUM_GPUS, a command in a number, nothing at all",
    "exit code 2, one line with the value received and the fix, no program started, nothing written",
)
@pytest.mark.parametrize(
    "recipe", [r if r == "table5_soft_or.sh" else pytest.param(r, marks=pytest.mark.e2e) for r in RECIPES]
)
def test_bad_variables_stop_a_recipe_in_one_line(recipe, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    names = Path("scripts/reporting/cells.py")
    (tmp_path / names).parent.mkdir(parents=True)
    shutil.copy(ROOT / names, tmp_path / names)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    for name in ("opsd", "python", "deepspeed", "accelerate", "nvidia-smi"):
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n[[ $1 == --list-gpus ]] || touch ran\n")
        (tmp_path / "bin" / name).chmod(0o755)
    before, path = listing(tmp_path), f"{tmp_path / 'bin'}:/usr/bin:/bin"
    for variables, said in VARIABLES:
        if recipe == "grpo_teacher.sh" and set(variables) & set(OF_TABLES):
            continue  # it has neither
        command = ["bash", str(tmp_path / "recipes" / recipe)]
        done = subprocess.run(
            command, cwd="/", env={"PATH": path, **variables}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, (variables, done.stderr)
        assert listing(tmp_path) == before, variables

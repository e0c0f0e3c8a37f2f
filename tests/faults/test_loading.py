"""Nothing that is loaded runs, unless the user said so, and no key ends up where it can be read."""

import ast
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import CALL, MARKER, PICKLE, TOUCH
from runs import ENVIRONMENT, ROOT, flags, started
from served import Server
from tiny_models import tiny_pair

from opsd import __main__ as cli
from opsd.config import from_json
from opsd.train import resume, start


@pytest.fixture(autouse=True)
def _nothing_ran():
    yield
    ran = MARKER.exists()
    MARKER.unlink(missing_ok=True)
    assert not ran, "something that was loaded was run"


# ---- what the code calls

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "torch.jit.load"}
UNPICKLES = {"read_pickle", "recv", "all_gather_object", "gather_object", "broadcast_object_list"}
# What breaks a rule, and why it may.
EXCEPTIONS = {
    (
        "opsd/utils/distributed.py",
        "distributed.all_gather_object",
    ): "values of one run's own ranks",
    ("opsd/model/stops.py", "GenerationConfig.from_pretrained"): "a JSON file of numbers",
    ("opsd/model/loading.py", "GenerationConfig.from_pretrained"): "the same file",
    ("scripts/smollm2.py", "AutoModelForCausalLM.from_pretrained"): "a GGUF file, of a package that pip checks",
    ("scripts/smollm2.py", "AutoTokenizer.from_pretrained"): "the same file",
    ("scripts/mathdata/sources.py", "load_dataset"): "datasets runs no code of a data set since its version 4",
}


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def faults_of(call: ast.Call) -> Iterator[str]:
    """What a call does that loading must not."""
    name = ast.unparse(call.func)
    last, given = name.rsplit(".", 1)[-1], {word.arg: word.value for word in call.keywords}
    if name in RUNS or last in UNPICKLES:
        yield "runs or unpickles what it is given"
    if name == "torch.load" and not is_constant(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if "shell" in given or last == "create_subprocess_shell":
        yield "starts a shell"
    if "allow_pickle" in given:
        yield "numpy's pickles"
    if is_constant(given.get("trust_remote_code"), True) or is_constant(given.get("trust"), True):
        yield "trusts code that the user has not trusted"
    if last in ("from_pretrained", "LLM", "load_dataset") and "trust_remote_code" not in given:
        yield "leaves to a library whether remote code is run"
    if last == "from_pretrained" and "Model" in name and not is_constant(given.get("use_safetensors"), True):
        yield "takes weights that are not safetensors"
    if last == "LLM" and ast.unparse(given.get("load_format", ast.Constant(None))) != "'safetensors'":
        yield "takes weights that are not safetensors"


def faults_in(source: str, file: str) -> Iterator[tuple[str, str, str]]:
    """(file, what, why) of everything in a module that loading must not do; EXCEPTIONS included."""
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((file, name, "a pickle") for name in modules if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            yield from ((file, ast.unparse(node.func), why) for why in faults_of(node))
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "model_init_kwargs" in keys and "'use_safetensors': True" not in ast.unparse(node):
                yield file, "model_init_kwargs", "takes weights that are not safetensors"


@pytest.mark.fault(
    "a walk over every call in opsd/, tip_patch/, scripts/ and examples/",
    "no pickle, no eval, no shell; `torch.load` only with weights_only; weights in safetensors; remote code is "
    "set explicitly at every load, and never on by default",
)
def test_no_call_loads_what_could_run(seen):
    files = [file for part in ("opsd", "tip_patch", "scripts", "examples") for file in (ROOT / part).rglob("*.py")]
    found = {fault for file in files for fault in faults_in(file.read_text(), str(file.relative_to(ROOT)))}
    assert {fault[:2] for fault in found} == set(EXCEPTIONS), [fault for fault in found if fault[:2] not in EXCEPTIONS]
    seen(f"{len(files)} files, {len(EXCEPTIONS)} exceptions, each with its reason")
    # The walk sees what it is to see.
    for source in (
        *("import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)"),
        *("subprocess.run(x, shell=True)", "os.system(x)", "pd.read_pickle(f)", "np.load(f, allow_pickle=True)"),
        *("AutoModel.from_pretrained(f)", "AutoModel.from_pretrained(f, trust_remote_code=trust)", "LLM(f)"),
        *("AutoTokenizer.from_pretrained(f)", "load_tokenizer(f, trust=True)", "yaml.load(f)", "x = compile(s)"),
        "settings = {'model_init_kwargs': {'dtype': 'float32'}}",
    ):
        assert list(faults_in(source, "f.py")), source


# ---- what model folders bring


class Touches:
    """Unpickled, it runs a command."""

    def __reduce__(self):
        return os.system, (TOUCH,)


def torch_file() -> bytes:
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save({"lm_head.weight": Touches()}, file)
    return file.getvalue()


OWN = f"{CALL}\nclass Own: pass\n"
INDEX = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "weights.bin"}})
TEMPLATE = f"{{{{ cycler.__init__.__globals__.os.system('{TOUCH}') }}}}{{{{ messages[0].content }}}}"
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "model"}
# What a folder brings beside or instead of its own files (None: taken away; a dict: added to config.json), and what the
# line says; "" where the folder is loaded and what it brings is left alone.
FOLDERS = {
    "code for the model": ({"config.json": {"auto_map": {"AutoModelForCausalLM": "own.Own"}}}, "its own code"),
    "code for the configuration": (
        {"config.json": {"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}},
        "its own code",
    ),
    "code for the tokenizer": (
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'},
        "its own code",
    ),
    "a kernel of the hub": ({"config.json": {"_attn_implementation": "someone/kernel"}}, "its own code"),
    "code for generate": ({"custom_generate/generate.py": OWN}, ""),
    "torch weights alone": ({"model.safetensors": None, "pytorch_model.bin": torch_file()}, "model.safetensors"),
    "a bare pickle": ({"model.safetensors": None, "pytorch_model.bin": PICKLE.encode()}, "model.safetensors"),
    "torch weights under the name of safetensors": ({"model.safetensors": torch_file()}, "header"),
    "an index that names torch weights": (
        {"model.safetensors": None, "model.safetensors.index.json": INDEX, "weights.bin": torch_file()},
        "weights.bin, which was not loaded",
    ),
    "torch weights beside safetensors": ({"pytorch_model.bin": torch_file(), "training_args.bin": torch_file()}, ""),
    "an adapter of torch weights": (
        {"adapter_config.json": json.dumps(LORA), "adapter_model.bin": torch_file()},
        "adapter_model.safetensors",
    ),
    "a chat template that reaches for os": ({"chat_template.jinja": TEMPLATE}, "chat template"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict:
    """The settings of a run of tiny models; their folder is that of "prompts"."""
    values = tiny_pair(tmp_path_factory.mktemp("pair"))
    return {**values, "prompts_per_step": 1, "rollout": {"max_prompt_tokens": 8, "max_new_tokens": 2}}


def bring(folder: Path, files: dict) -> None:
    """Put `files` into a model folder, and `own.py`."""
    (folder / "own.py").write_text(OWN)
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        if content is None:
            file.unlink()
        elif isinstance(content, dict):
            file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.e2e
@pytest.mark.fault(
    "a model folder with code (auto_map, a kernel of the hub, custom_generate, a chat template) or pickles "
    "(torch weights alone, next to safetensors, through an index, under a wrong name, as an adapter) that would "
    "write a marker, given to train and eval",
    "refused in one line with exit code 2, or ignored; the marker is never written",
)
@pytest.mark.parametrize("what", FOLDERS)
def test_nothing_that_a_folder_brings_is_run(what, pair, tmp_path, monkeypatch, capfd):
    files, said = FOLDERS[what]
    place = Path(pair["prompts"]).parent
    shutil.copytree(place / "student", tmp_path / "model")
    bring(tmp_path / "model", files)
    form = "chat" if "template" in what else "raw"
    common = ["--prompt_format", form, "--trust_remote_code", "False"]
    train = ["train", "--teacher", str(place / "teacher"), "--prompts", pair["prompts"], "--out", str(tmp_path / "run")]
    train += ["--steps", "1", "--rollout.max_prompt_tokens", "8", "--rollout.max_new_tokens", "2", *common]
    train += ["--track.progress", "False", "--engine.device", "cpu", "--prompts_per_step", "1"]
    test = ["eval", "--suite", f"s={pair['prompts']}", "--out", str(tmp_path / "eval.json"), "--samples", "1", *common]
    test += ["--max_new_tokens", "2", "--device", "cpu", "--progress", "False", "--limit", "2"]
    for command, flag in ((train, "--student"), (test, "--model")):
        monkeypatch.setattr(sys, "argv", ["opsd", *command, flag, str(tmp_path / "model")])
        if not said:
            try:
                cli.main()
            except SystemExit as stop:
                assert stop.code in (0, None)
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main()
        error = "".join(line for line in capfd.readouterr().err.splitlines(True) if "Loading weights" not in line)
        assert stop.value.code == 2 and error.count("\n") == 1 and said in error, error
        assert not (tmp_path / "run").exists() and not (tmp_path / "eval.json").exists()


@pytest.mark.slow
@pytest.mark.fault(
    "a folder's own code with `--trust_remote_code True`",
    "it runs, so it is the flag that blocks it",
)
def test_the_flag_lets_a_folders_code_run(pair, tmp_path, monkeypatch):
    place = Path(pair["prompts"]).parent
    shutil.copytree(place / "student", tmp_path / "model")
    bring(tmp_path / "model", FOLDERS["code for the tokenizer"][0])
    command = ["eval", "--model", tmp_path / "model", "--suite", f"s={pair['prompts']}", "--out", tmp_path / "e.json"]
    monkeypatch.setitem(ENVIRONMENT, "HF_HOME", str(tmp_path / "hub"))
    for trust in (False, True):
        started(*command, "--trust_remote_code", str(trust))
        assert MARKER.exists() is trust
    MARKER.unlink()


@pytest.mark.e2e
@pytest.mark.fault(
    "pickles planted in a checkpoint: optimizer.pt, rng_state.pth, scheduler.pt, pytorch_model.bin, training_args.bin; "
    "then `--resume`",
    "the run continues from safetensors and JSON; the pickles are never read",
)
def test_no_pickle_in_a_checkpoint_is_read(pair, tmp_path):
    start(from_json({**pair, "steps": 1, "checkpoint": {"every": 1}, "out": str(tmp_path / "run")}))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model.bin", "training_args.bin", "a.pkl"):
        for folder in (checkpoint, checkpoint / "trainer"):
            (folder / name).write_bytes(torch_file())
    (tmp_path / "run" / "DONE").unlink()
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "steps": 2}))
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "DONE").exists()
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]


# ---- keys

KEYS = {
    "WANDB_API_KEY": "5ecret" + "0" * 34,
    "HF_TOKEN": "hf_5ecretOfTheHub",
    "VLLM_API_KEY": "5ecret-of-the-teacher",
    "OPSD_TEST_KEY": "5ecret-of-the-teacher",
    "OPENAI_API_KEY": "sk-5ecret-of-none",
}


def leaks(*places: Path) -> list[str]:
    """Files below `places` that hold any of KEYS."""
    files = [file for place in places for file in place.rglob("*") if file.is_file()]
    return [str(file) for file in files if b"5ecret" in file.read_bytes()]


@pytest.mark.e2e
@pytest.mark.fault(
    "keys in WANDB_API_KEY, HF_TOKEN, VLLM_API_KEY and the variable of `--teacher.api_key_env`, wandb offline: a "
    "run that finishes, one whose teacher answers 401 and repeats the key, one with a password in the URL",
    "the key reaches the teacher; no file of the run, of wandb or of the home folder, no line and no error "
    "contains one",
)
def test_no_key_is_written_or_said(tmp_path, monkeypatch, capfd):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, value in {**KEYS, "HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setitem(ENVIRONMENT, name, value)
    server = Server()
    common = {"teacher__kind": "vllm", "teacher__retries": 0, "teacher__api_key_env": "OPSD_TEST_KEY", "steps": 1}
    common |= {"eval__teacher": False, "eval__every": 0, "prompts_per_step": 1, "track__wandb": "offline"}
    done = started("train", *flags(**common, teacher__urls=server.url, out=tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert server.keys == {f"Bearer {KEYS['OPSD_TEST_KEY']}"}
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    server.fault = "it refuses and repeats the key"
    errors = {}
    for name, url in {"refused": server.url, "named": server.url.replace("//", "//user:5ecret@")}.items():
        monkeypatch.setattr(sys, "argv", ["opsd", "train", *flags(**common, teacher__urls=url, out=tmp_path / name)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capfd.readouterr()
        errors[name] = said.out + said.err
        assert stop.value.code == 2
    server.stop()
    assert "status 401" in errors["refused"] and "(the key)" in errors["refused"]
    assert "holds a user, password or query" in errors["named"]
    assert "5ecret" not in done.stdout + done.stderr + "".join(errors.values())
    assert leaks(tmp_path) == []
    (tmp_path / "home" / "netrc").write_text(KEYS["WANDB_API_KEY"])
    assert leaks(tmp_path) == [str(tmp_path / "home" / "netrc")]  # it would be seen

"""Disks that fail and files that are damaged: one line, nothing that was saved is lost, and on with what is whole."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import assert_same, flags, opsd, started
from safetensors.torch import load_file
from tiny_models import plain_tokenizer, tiny_model

from opsd.__main__ import main
from opsd.config import TeacherConfig, TrainConfig
from opsd.config.cli import parse
from opsd.run import checkpoint
from opsd.run.folder import RunFolder
from opsd.train import resume, start
from opsd.utils.errors import RunStopped, UserError

POCKET = Path(__file__).parents[2] / "assets" / "pocket"
SMALL = 50_000  # bytes: less than the pocket student's weights, more than any other file of its run
FILES = ["model.safetensors", "config.json", "trainer/optimizer.safetensors", "trainer/state.json"]
CHECKSUMS = "trainer/checksums.json"
# What changes names and folders, by its name among Python's audit events; every file's writing lies between two.
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


def begin(out: Path) -> None:
    """A run of two steps, in this process, with a checkpoint of each."""
    few = flags(steps=2, checkpoint__every=1, eval__limit=1, eval__teacher=False)
    start(parse(TrainConfig, [*few, "--out", str(out)], "opsd train"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("disk") / "whole"
    begin(out)
    return out


@pytest.fixture
def unfinished(whole, tmp_path) -> Path:
    """A copy of it whose end is not marked; both steps are saved."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "DONE").unlink()
    return run


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.fault("the disk is full when a step's metrics are written (/dev/full)", "one line names file and cause")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: Linux")
def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    run = RunFolder(tmp_path, TrainConfig(student="s", teacher=TeacherConfig("t"), prompts="p", out=str(tmp_path)))
    with pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written \(No space left on device\)[^\n]*--resume$"):
        run.write_metrics({"step": 1})


@pytest.mark.e2e
@pytest.mark.fault(
    "the checkpoint of step 1 does not fit (RLIMIT_FSIZE); then `--resume` without the limit",
    "one line, exit 1, no half checkpoint; the resumed run ends",
)
def test_a_checkpoint_that_does_not_fit(tmp_path):
    run = tmp_path / "run"
    few = flags(steps=1, eval__limit=1, eval__every=0)
    stopped = opsd("train", *few, "--out", run, limits={resource.RLIMIT_FSIZE: (SMALL, SMALL)})
    assert stopped.returncode == 1 and "Traceback" not in stopped.stderr, stopped.stderr
    assert stopped.stderr.count("step_1 cannot be written (File too large)") == 1, stopped.stderr
    assert not list((run / "checkpoints").iterdir())
    resume(run)
    assert (run / "DONE").exists()


@pytest.mark.e2e
@pytest.mark.fault(
    "`opsd eval` cannot write its records, or its result (RLIMIT_FSIZE); then the same command without the limit",
    "exit 2 with one line that names the file; the old files are intact; the result equals the undisturbed "
    "evaluation's",
)
@pytest.mark.parametrize("lacks", ["scores.records.jsonl", "scores.json"])
def test_an_evaluation_that_does_not_fit(lacks, tmp_path, monkeypatch, capsys):
    def evaluate(folder: Path) -> dict[str, str]:
        few = ["--suite", f"pocket={POCKET / 'eval.jsonl'}", "--limit", "4", "--samples", "2", "--grader", "suffix"]
        few += ["--prompt_format", "raw", "--max_new_tokens", "40", "--generate_batch", "2", "--progress", "False"]
        words = ["opsd", "eval", "--model", POCKET / "student", "--out", folder / "scores.json", *few]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        main()
        return {path.name: path.read_text() for path in folder.iterdir()}

    undisturbed = evaluate(tmp_path / "undisturbed")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(undisturbed[lacks]) - 10, limits[1]))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            evaluate(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = f"opsd: {tmp_path / 'out' / lacks} cannot be written (File too large); fix that, then give the same command"
    assert stop.value.code == 2 and capsys.readouterr().err.strip() == f"{line} again"
    assert not (tmp_path / "out" / "scores.json").exists()
    assert evaluate(tmp_path / "out") == undisturbed


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Where a file system in memory is mounted, and what changes its options; it is gone when the test is over."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount("size=64m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs Linux and root: no file system can be mounted here")
    try:
        yield place, lambda option: mount(f"remount,{option}")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.e2e
@pytest.mark.fault(
    "a full file system, at several sizes, so that a different file is the first to run out of space; then "
    "`--resume` with more space",
    "one line names the file; what was saved is intact; the resumed run matches the undisturbed one bit for bit",
)
def test_a_full_file_system(whole, disk, seen):
    place, remount = disk
    lacked = []
    for kib in (8, 24, 400, 2500):
        remount(f"size={kib}k")
        with pytest.raises(RunStopped, match=r"^[^\n]* cannot be written \(No space left on device\)[^\n]*$") as stop:
            begin(place / "run")
        lacked.append(str(stop.value).split(" cannot")[0].removeprefix(f"{place}/run/"))
        remount("size=64m")
        resume(place / "run")
        assert_same(place / "run", whole)
        assert saved(place / "run") == ["step_1", "step_2"]  # no half one, none put aside as damaged
        shutil.rmtree(place / "run")
    assert len(set(lacked)) == len(lacked)
    seen(f"no room for {', '.join(lacked)}")


@pytest.mark.e2e
@pytest.mark.fault(
    "the run's file system becomes read-only, as Linux does when a disk fails; then it is repaired",
    "`--resume` gives one line with the cause; the next resume matches the undisturbed run bit for bit",
)
def test_a_file_system_that_became_read_only(whole, unfinished, disk):
    place, remount = disk
    run = place / "run"
    shutil.move(unfinished, run)
    shutil.rmtree(run / "checkpoints" / "step_2")
    remount("ro")
    with pytest.raises(RunStopped, match=rf"^{run} cannot be written \(Read-only file system\); fix that[^\n]*$"):
        resume(run)
    remount("rw")
    resume(run)
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.fault(
    "a folder without write permission (mode 0555): the parent of `--out`; a run folder to be resumed",
    "exit 2 with one line, before anything is trained; exit 1 with one line, nothing changed",
)
def test_a_folder_that_may_not_be_written_to(whole, unfinished, tmp_path):
    # Modes do not bind root, unless it is without its capabilities.
    bound = () if os.geteuid() else ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    if bound and not shutil.which(bound[0]):
        pytest.skip("needs setpriv (util-linux) where root runs the tests")
    shutil.rmtree(unfinished / "checkpoints" / "step_2")
    locked = tmp_path / "locked"
    locked.mkdir()
    folders = [locked, unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        new = started("train", *flags(steps=1), "--out", locked / "run", through=bound)
        again = started("train", "--resume", unfinished, through=bound)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert (new.returncode, new.stderr.strip()) == (
        2,
        f"opsd: --out {locked / 'run'} cannot be made (Permission denied); give another folder",
    )
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1] == (
        f"opsd: {unfinished} cannot be written (Permission denied); fix that, then continue with --resume"
    )
    assert "Traceback" not in again.stderr and saved(unfinished) == ["step_1"]
    resume(unfinished)
    assert_same(unfinished, whole)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def check_that_the_one_before_is_taken(run: Path, whole: Path, said: str, told: str) -> None:
    """A resume names what was damaged, puts it aside, and ends like the undisturbed run."""
    line = f"checkpoint {run / 'checkpoints' / 'step_2'} is damaged ({said}); renamed to damaged-step_2"
    assert line in told and f"continues from {run / 'checkpoints' / 'step_1'}" in told
    assert saved(run) == ["damaged-step_2", "step_1", "step_2"]
    assert_same(run, whole)


@pytest.mark.e2e
@pytest.mark.fault(
    "a byte flipped, or a file cut in half or removed, in the newest checkpoint's weights, model configuration, "
    "optimiser state and trainer state; then `--resume`",
    "the file is named, the checkpoint set aside and the previous one used; the result matches the undisturbed "
    "run bit for bit",
)
@pytest.mark.parametrize(
    ("damage", "file"),
    [
        *((flip_a_byte, file) for file in FILES),
        *((cut_in_half, file) for file in FILES if file.endswith(".safetensors")),
        (Path.unlink, "model.safetensors"),
        (Path.unlink, "trainer/state.json"),
    ],
)
def test_a_damaged_checkpoint(whole, unfinished, capsys, damage, file):
    damage(unfinished / "checkpoints" / "step_2" / file)
    resume(unfinished)
    said = "is missing" if damage == Path.unlink else "does not match its checksum"
    check_that_the_one_before_is_taken(unfinished, whole, f"{file} {said}", capsys.readouterr().err)


@pytest.mark.e2e
@pytest.mark.fault(
    "the newest checkpoint's list of checksums is missing, cut short, of another kind or not text; then `--resume`",
    "what cannot be checked is not trusted: as above",
)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b'{"kind": "xxh3_128", "fi', "is not a list of checksums"),
        (b'{"kind": "md5", "files": {}}', "holds md5 checksums, this version reads xxh3_128"),
        (b"\xff", "is not a list of checksums"),
    ],
)
def test_damaged_checksums(whole, unfinished, capsys, content, said):
    file = unfinished / "checkpoints" / "step_2" / CHECKSUMS
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    resume(unfinished)
    colon = ":" if content is None else ""
    check_that_the_one_before_is_taken(unfinished, whole, f"{CHECKSUMS}{colon} {said}", capsys.readouterr().err)


@pytest.mark.e2e
@pytest.mark.fault(
    "the last line of metrics.jsonl is cut short, its evaluation and token record are missing or cut short; then "
    "`--resume`",
    "the step is trained again if its records are lost; the result matches the undisturbed run bit for bit",
)
def test_damaged_records(whole, unfinished):
    shutil.rmtree(unfinished / "checkpoints" / "step_2")
    (unfinished / "tokens" / "step_2.parquet").unlink()
    cut_in_half(unfinished / "eval" / "step_2.json")
    metrics = unfinished / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-100])
    resume(unfinished)
    assert_same(unfinished, whole)


@pytest.mark.e2e
@pytest.mark.fault(
    "every checkpoint is damaged, or the checkpoints folder is missing; then `--resume`, twice",
    "exit 2 with a line that names all of them; the run never starts over unasked",
)
def test_all_checkpoints_lost(unfinished):
    for step in (1, 2):
        cut_in_half(unfinished / "checkpoints" / f"step_{step}" / "model.safetensors")
    before = (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"^[^\n]*no intact[^\n]* reach step 2;[^\n]*step_2 is[^\n]*step_1 is[^\n]*$"):
        resume(unfinished)
    with pytest.raises(UserError, match=r"no intact checkpoint is left .* put one back, or start again"):
        resume(unfinished)
    assert saved(unfinished) == ["damaged-step_1", "damaged-step_2"]
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        resume(unfinished)
    assert (unfinished / "metrics.jsonl").read_bytes() == before


def put(folder: Path, step: int, model: torch.nn.Module) -> None:
    """Save checkpoint `step`, of which only the newest is to be kept; its weights are all `step`."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(step)
    state = checkpoint.TrainerState(step, {"moment": torch.full((3,), float(step))}, {})
    checkpoint.save(folder, model, plain_tokenizer(), state, keep=1)


def put_and_die(folder: Path, step: int, model: torch.nn.Module, change: int) -> bool:
    """The same in a fork that kills itself in front of its n-th change of a name or a folder. Whether it lived."""
    pid = os.fork()
    if not pid:
        left = [change]

        def strike(event: str, _: tuple) -> None:
            if event in CHANGES:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(strike)
            put(folder, step, model)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.e2e
@pytest.mark.fault(
    "kill -9 while the only checkpoint (`--checkpoint.keep 1`) is replaced, before every rename and removal",
    "the old or the new one is there, intact: none is removed before its successor is complete",
)
def test_none_is_gone_before_its_successor_is_complete(tmp_path, seen):
    model, found, lived = tiny_model(True, 0), [], False
    put(tmp_path / "first", 1, model)
    while not lived:
        folder = tmp_path / str(len(found))
        shutil.copytree(tmp_path / "first", folder)
        lived = put_and_die(folder, 2, model, len(found) + 1)
        path, skipped = checkpoint.newest(folder)
        assert path is not None and not skipped
        step = checkpoint.load_state(path).step
        weights = load_file(path / "model.safetensors").values()
        assert path.name == f"step_{step}" and all((weight == step).all() for weight in weights)
        found.append(step)
        assert {name.name for name in folder.iterdir()} <= {"step_1", "step_2"}  # no left-over
    assert found == sorted(found) and set(found) == {1, 2}
    seen(f"{len(found) - 1} kills: the old one was found after {found.count(1)}, the new one after the others")

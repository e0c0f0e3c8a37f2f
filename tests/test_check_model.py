"""`opsd check-model`: a line for each check, by the functions that `opsd train` uses; exit code 0 or 2."""

import json
import sys

import pytest

from families import write
from opsd import __main__ as cli
from opsd.check_model import CheckModelConfig, _Found, check_model
from opsd.utils.errors import UserError

LINES = (
    *("tokenizer", "weights", "vocabulary", "template", "end tokens", "positions", "head", "head, served", "rows"),
    *("ZeRO-3", "sampled", "train = eval", "save, reload", "sent to vLLM"),
)


def checked(folder, **options):
    report = check_model(CheckModelConfig(str(folder), vllm=False, device="cpu", **options))
    return report.fine, {what: (fine, said) for fine, what, said in report.lines}


def test_a_model_that_can_be_trained_has_a_line_for_each_check(tmp_path, capsys):
    fine, lines = checked(write(tmp_path / "model", "Mistral"), tokens=40)
    assert fine and tuple(lines) == LINES
    assert lines["rows"] == (True, "sequences are padded and do not affect each other; tried past 16 tokens")
    assert lines["sampled"] == (True, "rows of any length can be decoded in one batch with a cache")
    # Libraries may have said something of their own.
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
    assert len(printed) == len(LINES) and all(line.startswith("ok ") for line in printed)


def test_ends_beyond_the_vocabulary_are_said_to_be_ignored(tmp_path):
    folder = write(tmp_path / "model", "Qwen3")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [10**12, 1]}))
    found = _Found(CheckModelConfig(str(folder), device="cpu"))
    found.tokenizer(), found.weights()
    assert found.ends() == "1000000000000 (not in the vocabulary, ignored), 1 (<eos>)"


def test_what_cannot_be_is_said_and_the_rest_is_checked_all_the_same(tmp_path):
    folder = write(tmp_path / "model", "MiniCPM 3", max_position_embeddings=32)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "eos_token_id": 1}))
    fine, lines = checked(folder, tokens=33)
    assert not fine
    assert [what for what, (well, _) in lines.items() if not well] == ["positions", "head", "head, served"]
    assert "exceed the 32 positions" in lines["positions"][1] and "not hidden·head" in lines["head"][1]
    assert "checkpoints have do_sample true" in lines["save, reload"][1]


def test_a_model_for_which_zero_3_is_too_much_is_fine_otherwise(tmp_path):
    fine, lines = checked(write(tmp_path / "model", "Falcon-H1"), tokens=20)
    assert fine and lines["ZeRO-3"][1].startswith("not with --engine.zero_stage 3 (")


def test_without_weights_nothing_more_is_checked(tmp_path):
    folder = write(tmp_path / "model", "Qwen3")
    (folder / "model.safetensors").unlink()
    fine, lines = checked(folder)
    assert not fine and list(lines) == ["tokenizer", "weights"]
    with pytest.raises(UserError, match="--tokens 0: give a number above 0"):
        checked(folder, tokens=0)


@pytest.mark.parametrize(("family", "code"), [("Qwen3", 0), ("MiniCPM 3", 2)])
def test_the_exit_code_says_it(family, code, tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "model", family)
    monkeypatch.setattr(sys, "argv", ["opsd", "check-model", str(folder), "--tokens", "20", "--vllm", "False"])
    try:
        cli.main()
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    assert ended == code
    assert ("NO  head" in capsys.readouterr().out) is bool(code)

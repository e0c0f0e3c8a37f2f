"""Prompts and settings for tests on the real model."""

import json
from pathlib import Path

import pytest

QUESTIONS = ["What is 2+2?", "Name a colour.", "Say hello to Anna."]


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A prompt file of three short questions."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return path

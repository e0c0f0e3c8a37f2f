"""Objects of the user's own by "module:Name"."""

import pytest

from opsd.utils.errors import UserError
from opsd.utils.plugins import load_path


@pytest.mark.parametrize("module", ["json", "sys", "torch"])
def test_a_file_that_an_installed_module_hides_is_said(module, tmp_path, monkeypatch):
    """Python's own, one without a file, a library."""
    (tmp_path / f"{module}.py").write_text("class Rule: ...\n")
    (tmp_path / f"my_{module}.py").write_text("class Rule: ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_path(f"{module}:Rule", "--select.by", "a selector")
    assert f"{module}.py of this folder is hidden by the installed module '{module}'; rename" in str(caught.value)
    assert load_path(f"my_{module}:Rule", "--select.by", "a selector").__name__ == "Rule"

"""The rule of tolerance.py itself, and that no test leaves it without saying why."""

import ast
from pathlib import Path

import pytest
import torch
from tolerance import MOST, ROUNDOFF, close, rounding, transformer

HERE = Path(__file__).parent
COMPARE = {"approx", "isclose", "allclose", "assert_allclose", "assert_close"}
WIDTHS = {"rel", "abs", "rtol", "atol"}


def unexplained(file: Path) -> list[str]:
    """Comparisons with a tolerance picked by hand in functions that say nothing above or beside them."""
    text = file.read_text()
    lines = text.splitlines()
    found = []
    for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            picked = [k for k in call.keywords if k.arg in WIDTHS and not isinstance(k.value, ast.Call)]
            above = lines[function.lineno : call.end_lineno]
            if name in COMPARE and picked and not any("#" in line or '"""' in line for line in above):
                found.append(f"{file.relative_to(HERE)}:{call.lineno} {lines[call.lineno - 1].strip()}")
    return found


def test_a_tolerance_picked_by_hand_has_its_reason_beside_it():
    found = [line for file in sorted(HERE.rglob("test_*.py")) for line in unexplained(file)]
    assert not found, "use tolerance.close, or say in a comment where the number comes from:\n" + "\n".join(found)


def test_rounding_by_hand():
    # 16 terms: 2·√16 = 8 additions; 12 · 2^-24 · √8
    assert rounding(16) == 12 * 2**-24 * 8**0.5
    # Sums behind one another: 8 + 4 additions, √12.
    assert rounding(16, 4, dtype=torch.float64) == 12 * 2**-53 * 12**0.5
    assert len(transformer(2, 16)) == 22 and len(transformer(2, 16, backward=1)) == 66


@pytest.mark.parametrize("terms", [10, 1000, 100_000])
def test_sums_of_random_terms_stay_within_it_and_use_some_of_it(terms):
    generator = torch.Generator().manual_seed(terms)
    values = torch.randn(200, terms, generator=generator)
    exact = values.double().sum(-1)
    off = float((values.sum(-1).double() - exact).abs().max() / exact.abs().max())
    assert 0 < off <= rounding(terms)


def test_what_could_hide_a_fault_of_1e_4_is_refused():
    with pytest.raises(AssertionError, match="compare sooner"):
        rounding(10**10)
    with pytest.raises(AssertionError, match="compare sooner"):
        rounding(1, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="a fault of 1e-4 would pass"):
        close(0.1, 0.1, 100, size=30.0)
    close(0.1, 0.1, 100, size=30.0, cancels=True)


@pytest.mark.parametrize("fault", [1 + 1e-4, 1 - 1e-4])
def test_a_fault_of_1e_4_is_seen(fault):
    expected = torch.linspace(-3.0, 3.0, 50)
    close(expected * (1 + 1e-7), expected, 1000)
    with pytest.raises(AssertionError, match="is what rounding may cost"):
        close(expected * fault, expected, 1000)
    assert MOST < 1e-4 and ROUNDOFF[torch.float32] == torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("found", [[1.0, float("nan")], [1.0, 2.0, 3.0], [float("-inf"), 2.0]])
def test_what_is_not_finite_or_of_another_shape_is_never_close(found):
    with pytest.raises(AssertionError):
        close(found, [1.0, 2.0], 1)
    close([float("-inf"), 2.0], [float("-inf"), 2.0], 1)

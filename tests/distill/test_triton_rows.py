"""The row kernels without a GPU: they are right in Triton's interpreter, and compile for an H100 without spills."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton (Linux, x86-64): run `make setup`", allow_module_level=True)

pytestmark = pytest.mark.e2e
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_the_kernels_agree_with_fp64_in_tritons_interpreter():
    # Triton reads the variable when it is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = HERE / "interpreted_triton_rows.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def compiled(kernel, constants, narrow=False):
    """The machine code of a kernel for sm_90, as it is made for rows of aligned length."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opsd.distill import triton_kernels

    types = dict.fromkeys(("rows", "W", "V", "stride", "out_stride"), "i32")
    types |= dict.fromkeys(("s_inner", "s_outer", "t_inner", "t_outer", "inv_temp", "logit_beta"), "fp32")
    types |= {"S_AT": "*i64", "T_AT": "*i64", "IDS": "*i64"} | {name: "constexpr" for name in constants}
    names = kernel.arg_names
    signature = {name: types.get(name, "*fp32") for name in names}
    if narrow:
        signature["OUT"] = "*bf16"
    aligned = [name for name in names if signature[name].startswith("*") or name in ("W", "stride", "out_stride")]
    source = ASTSource(
        kernel, signature, constants, {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    )
    options = {"num_warps": triton_kernels.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def variants():
    shared = {"BLOCK": "STATISTICS_BLOCK", "STAGES": "STAGES"}
    for capped in (False, True):
        caps = {"S_CAPPED": capped, "T_CAPPED": capped}
        for teacher, ranked in ((False, False), (True, False), (True, True)):
            yield "statistics_kernel", {"TEACHER": teacher, "RANKED": ranked, **caps, **shared}, False
        yield "norm_kernel", {**caps, **shared}, False
        yield "jsd_kernel", {**caps, **shared}, False
        for divergence in ("reverse_kl", "forward_kl", "jsd", "eopd"):
            for narrow in (True, False):
                yield "gradient_kernel", {"DIVERGENCE": divergence, **caps, "BLOCK": "GRADIENT_BLOCK"}, narrow


@pytest.mark.parametrize(("name", "constants", "narrow"), list(variants()))
def test_a_kernel_compiles_for_an_h100_without_spills(name, constants, narrow, tmp_path, monkeypatch):
    import triton

    from opsd.distill import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    values = {
        key: getattr(triton_kernels, value) if str(value).isupper() else value for key, value in constants.items()
    }
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(getattr(triton_kernels, name), values, narrow))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    # A spill goes to the stack, in local memory. 80 registers: three programs of eight warps per multiprocessor; what
    # few runs take (two soft caps, with ranks or the JSD) has room for two.
    rare = constants.get("S_CAPPED") and (constants.get("RANKED") or constants.get("DIVERGENCE") == "jsd")
    assert usage["STACK"] == usage["LOCAL"] == 0, said
    assert usage["REG"] <= (128 if rare else 80), said
    code = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    # Four logits per read, whether through registers or straight into shared memory.
    assert re.search(r"LDG\S*\.128|LDGSTS\S*\.128", code), "logits are read one by one"


def test_a_loss_on_a_cpu_imports_no_triton():
    program = (
        "import sys, torch; from opsd.distill import distill_loss; x = torch.ones(2, 3, requires_grad=True); "
        "distill_loss(x, x, x.detach(), x.detach()).loss_sum.backward(); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

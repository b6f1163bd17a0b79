"""Run by tests/specforge/test_kl_kernel.py: compiles both loss kernels for a GPU that need not be there, prints differences.

Its argument is the old kernels' file. PTX is compared by its floating-point instructions in order, machine code by how
many there are of each: a fused product or a changed reduction would show in either.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagle3fn.specforge.kl_kernel import _kernels, launch_shape

FLOATS = re.compile(
    r"(?:@!?%p\d+ )?((?:fma|mul|add|sub|div|max|ex2|lg2|cvt|neg|shfl|selp)[\w.]*(?:f32|bf16|b32))\s"
)
MACHINE = re.compile(r"\*/\s+(?:@!?U?P\d+\s+)?((?:F|MUFU|SHFL)[\w.]+)")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


def build(kernel, dtype: str, columns: int, scalars: dict[str, str], ones: tuple[str, ...]):
    """Compile for columns that 16 divides or not; pointers are aligned; `ones` are strides of one."""
    block, warps = launch_shape(columns)
    signature, constants, aligned = {}, {}, []
    for index, name in enumerate(kernel.arg_names):
        if name.startswith("BLOCK") or name in ones:
            signature[name], constants[name] = "constexpr", block if name.startswith("BLOCK") else 1
            continue
        pointer = (
            "*i1"
            if "mask" in name
            else f"*{dtype}"
            if name in ("logits", "logits_ptr")
            else "*fp32"
        )
        signature[name] = scalars.get(name, pointer)
        if signature[name].startswith("*") or (signature[name] == "i32" and columns % 16 == 0):
            aligned.append(index)
    attrs = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    ).asm


def machine(binary: bytes) -> Counter:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        done = subprocess.run(
            [str(TOOL), "-c", file.name], capture_output=True, text=True, check=True
        )
    return Counter(MACHINE.findall(done.stdout))


def main() -> None:
    spec = importlib.util.spec_from_file_location("old_loss", sys.argv[1])
    assert spec and spec.loader
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    strides = {
        "logits_stride": "i32",
        "target_stride": "i32",
        "n_cols": "i32",
        "scaling_factor": "fp32",
    }
    for columns in (100, 16_000):
        for dtype in ("fp32", "bf16"):
            pairs = zip(
                _kernels(),
                (old.log_softmax_forward_kernel, old.log_softmax_backward_kernel),
                strict=True,
            )
            for ours, theirs in pairs:
                mine = build(ours, dtype, columns, {"columns": "i32", "share": "fp32"}, ())
                other = build(
                    theirs, dtype, columns, strides, ("position_mask_stride", "loss_stride")
                )
                lines = FLOATS.findall(mine["ptx"]), FLOATS.findall(other["ptx"])
                same = lines[0] == lines[1] and machine(mine["cubin"]) == machine(other["cubin"])
                print(columns, dtype, len(lines[0]), "same" if same else "different")


if __name__ == "__main__":
    main()

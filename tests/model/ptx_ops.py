"""Compiles our loss kernels and SpecForge's for a GPU that need not be there, and compares them.

Run by tests/specforge/test_kl_kernel.py; its argument is the file of SpecForge's kernels. PTX is
compared by its floating-point instructions in order, machine code by how many there are of each:
a fused product or a changed reduction would show in either.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagle3fn.specforge.kl_kernel import _kernels, launch_shape

FLOATS = re.compile(
    r"(?:@!?%p\d+ )?((?:fma|mul|add|sub|div|max|ex2|lg2|cvt|neg|shfl|selp)[\w.]*(?:f32|bf16|b32))\s"
)
MACHINE = re.compile(r"\*/\s+(?:@!?U?P\d+\s+)?((?:F|MUFU|SHFL)[\w.]+)")
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"

# Scalar arguments, and SpecForge's arguments that are always 1.
OUR_SCALARS = {"columns": "i32", "share": "fp32"}
THEIR_SCALARS = {
    "logits_stride": "i32",
    "target_stride": "i32",
    "n_cols": "i32",
    "scaling_factor": "fp32",
}
THEIR_ONES = ("position_mask_stride", "loss_stride")


def pointer(name: str, dtype: str) -> str:
    """Triton's name of a tensor argument's type."""
    if "mask" in name:
        return "*i1"
    return f"*{dtype}" if name in ("logits", "logits_ptr") else "*fp32"


def build(
    kernel: Any, dtype: str, columns: int, scalars: dict[str, str], ones: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Assembly for rows of `columns`; pointers are aligned, and so are numbers that 16 divides."""
    block, warps = launch_shape(columns)
    signature: dict[str, str] = {}
    constants: dict[str, int] = {}
    aligned: list[int] = []
    for index, name in enumerate(kernel.arg_names):
        if name.startswith("BLOCK") or name in ones:
            signature[name] = "constexpr"
            constants[name] = block if name.startswith("BLOCK") else 1
            continue
        kind = scalars.get(name, pointer(name, dtype))
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and columns % 16 == 0):
            aligned.append(index)

    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm


def machine(binary: bytes) -> Counter:
    """How many of each floating-point instruction the machine code has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        done = subprocess.run(
            [str(DISASSEMBLER), "-c", file.name], capture_output=True, text=True, check=True
        )
    return Counter(MACHINE.findall(done.stdout))


def main() -> None:
    spec = importlib.util.spec_from_file_location("specforge_loss", sys.argv[1])
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    their_kernels = (theirs.log_softmax_forward_kernel, theirs.log_softmax_backward_kernel)

    for columns in (100, 16_000):
        for dtype in ("fp32", "bf16"):
            for our_kernel, their_kernel in zip(_kernels(), their_kernels, strict=True):
                ours = build(our_kernel, dtype, columns, OUR_SCALARS)
                other = build(their_kernel, dtype, columns, THEIR_SCALARS, THEIR_ONES)
                our_lines = FLOATS.findall(ours["ptx"])
                same_lines = our_lines == FLOATS.findall(other["ptx"])
                same = same_lines and machine(ours["cubin"]) == machine(other["cubin"])
                print(columns, dtype, len(our_lines), "same" if same else "different")


if __name__ == "__main__":
    main()

"""Compiles the kernels of the fast head and loss for a GPU that need not be there.

Run by tests/model/test_fast_cuda.py. Prints a line for each kernel and dtype.
"""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from eagle3fn.model.kernels.score import _kernels

NUMBERS = ("V", "D")
INDICES = ("label", "kept", "target_token", "token")
LOGITS = ("logits", "z")


def kind(name: str, dtype: str) -> str:
    """Triton's name of an argument's type."""
    if name == "BLOCK":
        return "constexpr"
    if name in NUMBERS:
        return "i32"
    if name in INDICES:
        return "*i64"
    if name in LOGITS:
        return f"*{dtype}"
    return "*fp32"


for dtype in ("fp32", "bf16"):
    for kernel in _kernels():
        signature = {name: kind(name, dtype) for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {"BLOCK": 4096}, {})
        target = GPUTarget("cuda", 90, 32)
        built = compile(source, target=target, options={"num_warps": 8}).asm
        print(kernel.__name__, dtype, "built" if len(built["cubin"]) else "empty")

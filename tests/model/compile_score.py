"""Run by tests/model/test_fast_cuda.py: compiles the kernels of the fast head and loss for a GPU that need not be there."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from eagle3fn.model.kernels.score import _kernels

INTEGERS = ("steps", "labels", "size", "columns")
LONG = ("kept", "token", "said")


def kind(name: str, dtype: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in LONG:
        return "*i64"
    return f"*{dtype}" if name in ("logits", "z") else "*fp32"


for dtype in ("fp32", "bf16"):
    for kernel in _kernels():
        signature = {
            name: "constexpr" if name == "BLOCK" else kind(name, dtype) for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, {"BLOCK": 4096}, {})
        built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm
        print(kernel.__name__, dtype, "built" if len(built["cubin"]) else "empty")

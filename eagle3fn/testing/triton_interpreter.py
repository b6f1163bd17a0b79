"""Triton's interpreter under a NumPy that is newer than its Triton."""

from importlib.util import find_spec
from typing import Any


def mend_interpreter() -> None:
    """Let Triton 3.6 interpret kernels under NumPy 2.5, where arrays of one element no longer turn into numbers.

    Newer Triton does the same by itself; without Triton nothing happens. Compiled kernels are not touched.
    """
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = getattr(module, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "mended"):
        return

    def mended(tensor: Any, *rest: Any) -> None:
        patch(
            tensor, *rest
        )  # it keeps what stood there before, and puts that back after the kernel
        tensor.__index__ = lambda self: int(self.handle.data.item())

    vars(mended)["mended"] = True
    module._patch_lang_tensor = mended

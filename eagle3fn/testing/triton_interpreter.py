"""Triton's interpreter under a NumPy that is newer than its Triton."""

from importlib.util import find_spec
from typing import Any


def mend_interpreter() -> None:
    """Let Triton 3.6 interpret kernels under NumPy 2.5.

    There an array of one element no longer converts to a number. Newer Triton needs no help, and
    without Triton nothing is done. Compiled kernels are not affected.
    """
    if find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = getattr(module, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "mended"):
        return

    def mended(tensor: Any, *rest: Any) -> None:
        # Triton restores what it replaces, `__index__` too, after the kernel.
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    vars(mended)["mended"] = True
    module._patch_lang_tensor = mended

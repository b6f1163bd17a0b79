"""vLLM's connector of hidden states where tensors are in the CPU's memory.

vLLM's own copies through pinned memory and a CUDA stream, which a CPU does not have. A server on a
CPU names this module: docs/engines.md has its command line.
"""

import fcntl
import os
from functools import partial
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import (  # pyright: ignore[reportMissingImports]
    example_hidden_states_connector as stock,
)


class Copied:
    """In place of the CUDA event of a copy: a copy within the CPU's memory has ended at once."""

    def query(self) -> bool:
        """Whether it has ended."""
        return True

    def synchronize(self) -> None:
        """Wait for its end."""


class CpuHiddenStatesConnector(stock.ExampleHiddenStatesConnector):
    """Writes each request's states as vLLM's own does, without pinned memory."""

    def _submit_async_write(self, pending: Any) -> None:
        """Copy the states out of the cache, `(S, n, Ht)`, and write them in a thread."""
        if not self._is_tp_rank_zero:
            return

        # The cache's slots of the request's tokens.
        blocks = torch.tensor(pending.block_ids, dtype=torch.int64)[:, None]
        slots = (blocks * self._block_size + torch.arange(self._block_size)).flatten()
        count = len(pending.token_ids)
        states = stock.extract_from_kv_cache(self._kv_cache, slots, count)
        tensors = {
            "hidden_states": states.contiguous(),
            "token_ids": pending.token_ids.clone(),
        }

        # A reader waits for this lock until the file is written.
        handle = self._lock_fds.pop(pending.req_id, None)
        if handle is None and self.use_lock:
            handle = os.open(f"{pending.filename}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            fcntl.flock(handle, fcntl.LOCK_EX)

        copied = Copied()
        writing = self._executor.submit(
            self._write_tensors, tensors, copied, pending.filename, handle
        )
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = writing
        writing.add_done_callback(partial(self._on_write_done, pending.req_id))

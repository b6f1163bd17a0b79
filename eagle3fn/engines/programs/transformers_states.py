"""transformers computes hidden states of token ids; run by `engines.transformers_process`.

It runs this package, from the folder that this file is in, on the torch and transformers of its own
Python: what a request gives has the bits of `data.sources` in the process that asked.

    {"rows": [ids, …], "scores": bool, "file": PATH}
        ← {"rows": N, "scores": [[[place, token, log p], …], …]}
    {"write": [ids, …], "sampling": [temperature, top_p, max_new], "stops": […], "seed": …,
     "batch_tokens": …, "file": PATH}
        ← {"rows": N, "scores": []}

The file is written: for each row `n` the tensors `ids.n` `(S,)`, `aux.n` `(S, A, Ht)` and `last.n`
`(S, Ht)`, after the final norm. Scores are of the most probable token after each place.
"""

import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import Answer, serve


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load the target, with the settings of `TransformersProcess`."""
    use_package(Path(__file__).parents[2])

    import torch
    import transformers

    from eagle3fn.base.device import SPREAD, check_device, check_spread, fast_dtype
    from eagle3fn.data.sources import check_extraction
    from eagle3fn.data.target import load_target

    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    device = settings["device"]
    kind = check_spread() if device == SPREAD else check_device(device)
    name = settings["dtype"]
    dtype = fast_dtype(kind) if name is None else getattr(torch, name)
    model, _ = load_target(settings["target"], dtype, device)
    check_extraction(model.config, settings["layers"], settings["max_length"])
    facts = {
        "version": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.device(model.device).type,
    }
    return facts, Target(model, settings["layers"], settings["max_length"]).answer


def use_package(folder: Path) -> None:
    """Let `eagle3fn` be the package in this folder, and take nothing else from beside it."""
    spec = spec_from_file_location(
        "eagle3fn", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    package = module_from_spec(spec)
    sys.modules["eagle3fn"] = package
    spec.loader.exec_module(package)


class Target:
    """The loaded target, which answers requests."""

    def __init__(self, model: Any, layers: list[int], max_length: int) -> None:
        self.model = model
        self.layers = layers
        self.max_length = max_length
        self.pads_checked = False

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write a request's rows to its file."""
        from safetensors.torch import save_file

        from eagle3fn.base.temporary import naming_temporary
        from eagle3fn.data.sources import run_target

        if "write" in request:
            group = self.written(request)
            budget = request["batch_tokens"]
        else:
            group = encoded(request["rows"], self.max_length)
            budget = sys.maxsize  # one run: who asks has cut the rows into batches

        tensors = {}
        for number, sample in enumerate(run_target(self.model, group, self.layers, budget)):
            tensors[f"ids.{number}"] = sample.input_ids
            tensors[f"aux.{number}"] = sample.aux_hidden.unflatten(1, (len(self.layers), -1))
            tensors[f"last.{number}"] = sample.last_hidden
        with naming_temporary(Path(request["file"])):
            save_file(tensors, request["file"])
        scored = group if request.get("scores") else []
        return {"rows": len(group), "scores": [scores(self.model, row.input_ids) for row in scored]}

    def written(self, request: dict[str, Any]) -> list[Any]:
        """The prompts of a request and what the target writes after them."""
        from eagle3fn.data.cache_check import check_batch
        from eagle3fn.data.generate import Sampling
        from eagle3fn.data.sources import ONE_BY_ONE, write_answers

        budget = request["batch_tokens"]
        if budget > 1 and not self.pads_checked:
            check_batch(self.model, ONE_BY_ONE)
            self.pads_checked = True
        sampling = Sampling(*request["sampling"])
        prompts = encoded(request["write"], self.max_length - sampling.max_new)
        stops = request["stops"]
        return write_answers(self.model, prompts, sampling, stops, request["seed"], budget)


def encoded(rows: Sequence[Sequence[int]], most: int) -> list[Any]:
    """Rows of at most so many tokens as samples without a mask.

    Raises:
        UserError: a longer one.
    """
    import torch

    from eagle3fn.base.errors import UserError
    from eagle3fn.data.samples import Encoded

    longest = max(len(row) for row in rows)
    if longest > most:
        raise UserError(f"a row of {longest} tokens: at most {most} fit; cut or drop it")
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return [Encoded("", row, torch.zeros_like(row)) for row in tensors]


def scores(model: Any, ids: Any) -> list[tuple[int, int, float]]:
    """Each place of a row, the most probable token after it, and the log of its probability."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=ids[None].to(model.device)).logits[0].float()  # (S, V)
    best = logits.log_softmax(-1).max(-1)
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(place, token, log_prob) for place, (token, log_prob) in enumerate(found)]


if __name__ == "__main__":
    serve(start)

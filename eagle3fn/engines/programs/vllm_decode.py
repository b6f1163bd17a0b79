"""vLLM decodes token ids, with an EAGLE-3 draft or plainly; run by `engines.decoding`."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import Answer, serve

ROUNDS = "vllm:spec_decode_num_drafts"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load target and draft."""
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    length = settings["draft_length"]
    options: dict[str, Any] = {
        "model": settings["target"],
        "dtype": settings["dtype"],
        "max_model_len": settings["positions"],
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "max_num_seqs": 1,
        "enforce_eager": current_platform.is_cpu(),  # compiling takes minutes there
    }
    if settings["draft"] is not None:
        options["speculative_config"] = {
            "model": settings["draft"],
            "method": "eagle3",
            "num_speculative_tokens": length,
        }
    engine = vllm.LLM(**{**options, **settings["arguments"]})

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return decode(engine, request, settings)

    return {"version": vllm.__version__, "samples": keeps_temperature(current_platform)}, answer


def keeps_temperature(platform: Any) -> bool:
    """Whether a temperature reaches the drafted tokens' rows.

    On a CPU vLLM 0.32 expands it into a copy in int64 that it then drops, and samples by whatever
    the memory held.
    """
    if not platform.is_cpu():
        return True
    import torch  # pyright: ignore[reportMissingImports]

    try:
        from vllm.utils import cpu_triton_utils  # pyright: ignore[reportMissingImports]

        platform.import_kernels()
        rows = torch.zeros(2)
        temperature = torch.tensor([0.5])
        ends = torch.tensor([2], dtype=torch.int32)
        cpu_triton_utils._expand_kernel_impl(rows, temperature, ends, 0, 1)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return True  # another vLLM, of which nothing is known
    return rows.tolist() == [0.5, 0.5]


def decode(engine: Any, request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One prompt's tokens, seconds and counts."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    sampling = SamplingParams(
        temperature=request["temperature"],
        top_p=request["top_p"],
        seed=request["seed"],
        max_tokens=request["max_new"],
        ignore_eos=True,  # the stop ids below are all there are
        stop_token_ids=settings["end_tokens"],
        detokenize=False,
    )
    speculates = settings["draft"] is not None
    before = metrics(engine) if speculates else {}

    begin = time.perf_counter()
    prompt = {"prompt_token_ids": request["prompt"]}
    (output,) = engine.generate([prompt], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin

    counts = None
    if speculates:
        counts = difference(before, metrics(engine), settings["draft_length"])
    return {"tokens": list(output.outputs[0].token_ids), "seconds": seconds, "counts": counts}


def metrics(engine: Any) -> dict[str, Any]:
    """The counters of speculative decoding by name."""
    found = {}
    for metric in engine.get_metrics():
        if metric.name in (ROUNDS, DRAFTED, ACCEPTED):
            found[metric.name] = metric.value
        elif metric.name == BY_POSITION:
            found[metric.name] = list(metric.values)
    missing = {ROUNDS, DRAFTED, ACCEPTED, BY_POSITION} - set(found)
    if missing:
        raise RuntimeError(f"this vLLM has no metric {', '.join(sorted(missing))}")
    return found


def difference(before: dict[str, Any], after: dict[str, Any], length: int) -> dict[str, Any]:
    """What was counted between two readings."""
    rounds = after[ROUNDS] - before[ROUNDS]
    drafted = after[DRAFTED] - before[DRAFTED]
    by_position = [
        new - old for old, new in zip(before[BY_POSITION], after[BY_POSITION], strict=True)
    ]

    # A round drafts at most `length` tokens. Where all of them did, each position is known.
    full = drafted == rounds * length
    return {
        "rounds": rounds,
        "drafted": drafted,
        "accepted": after[ACCEPTED] - before[ACCEPTED],
        "drafted_by_position": [rounds] * length if full else None,
        "accepted_by_position": by_position,
    }


if __name__ == "__main__":
    serve(start)

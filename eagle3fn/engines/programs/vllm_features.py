"""vLLM computes hidden states of token ids; run by `engines.vllm_process`.

It is loaded by a first request, so that its version is read before any weight:

    {"load": OPTIONS}                         ← {"dtype": …, "quantization": …}
    {"rows": [ids, …], "scores": bool}        ← [{"path": …, "scores": SCORES}, …]
    {"write": [ids, …], "sampling": {…}, "seeds": [number, …]}      ← as rows

A path is of vLLM's safetensors file: `hidden_states` `(S, n, Ht)` and `token_ids` `(S,)`. Who asked
deletes it. Scores are `[place, token, log p]` of the most probable token after each place; none,
unless asked for.

What `write` gives are rows of a prompt and what was written after it, but for the last token: no
run has read it, so that it has no state.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from answering import Answer, serve
from vllm_decode import keeps_temperature

CPU_CONNECTOR = {
    "kv_connector": "CpuHiddenStatesConnector",
    "kv_connector_module_path": "vllm_cpu_connector",
}
CONNECTOR = {"kv_connector": "ExampleHiddenStatesConnector"}


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Import vLLM."""
    import vllm  # pyright: ignore[reportMissingImports]
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    device = current_platform.device_type
    loaded: list[Any] = []

    def answer(request: dict[str, Any]) -> Any:
        if "load" in request:
            loaded[:] = [load(device, **request["load"])]
            return facts_of(loaded[0])
        if "write" in request:
            return write(loaded[0], request["write"], request["sampling"], request["seeds"])
        return run(loaded[0], request["rows"], request["scores"])

    # The states come by speculative decoding: rows that are drawn go its way.
    facts = {
        "version": vllm.__version__,
        "device": device,
        "samples": keeps_temperature(current_platform),
    }
    return facts, answer


def load(
    device: str,
    target: str,
    dtype: str,
    max_length: int,
    ids: list[int],
    folder: str,
    arguments: dict[str, Any],
) -> Any:
    """The engine with the target; it writes the streams after `ids` layers to `folder`."""
    import vllm  # pyright: ignore[reportMissingImports]

    # The engine's own processes import the connector.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    options = {
        "model": target,
        "dtype": dtype,
        "max_model_len": max_length + 1,  # with the token that it must write
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
        },
        "kv_transfer_config": {
            **(CPU_CONNECTOR if device == "cpu" else CONNECTOR),
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        },
    }
    return vllm.LLM(**{**options, **arguments})


def facts_of(engine: Any) -> dict[str, Any]:
    """What it computes in."""
    model = engine.llm_engine.model_config
    return {"dtype": str(model.dtype).removeprefix("torch."), "quantization": model.quantization}


def run(engine: Any, rows: list[list[int]], scores: bool) -> list[dict[str, Any]]:
    """Run rows of token ids; each one's file and, if asked for, scores."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    sampling = SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        ignore_eos=True,
        logprobs=1 if scores else None,
        prompt_logprobs=1 if scores else None,
    )
    prompts = [{"prompt_token_ids": row} for row in rows]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    return [answer_of(output, scores) for output in outputs]


def write(
    engine: Any, prompts: list[list[int]], sampling: dict[str, Any], seeds: list[int]
) -> list[dict[str, Any]]:
    """Write on after prompts; each one's file. One pass gives the tokens and their states.

    Args:
        engine: the loaded vLLM.
        prompts: token ids.
        sampling: arguments of `vllm.SamplingParams`, the same for all.
        seeds: one a prompt.
    """
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    of_each = [
        SamplingParams(
            **sampling,
            seed=seed,
            detokenize=False,
            ignore_eos=True,  # the stop ids are all there are
            extra_args={"kv_transfer_params": {"include_output_tokens": True}},
        )
        for seed in seeds
    ]
    rows = [{"prompt_token_ids": row} for row in prompts]
    outputs = engine.generate(rows, of_each, use_tqdm=False)
    return [answer_of(output, False) for output in outputs]


def answer_of(output: Any, scores: bool) -> dict[str, Any]:
    """The answer to one row, once its file is written."""
    parameters = getattr(output, "kv_transfer_params", None) or {}
    path = parameters.get("hidden_states_path")
    if path and os.path.exists(f"{path}.lock"):
        with open(f"{path}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # until it is written
        os.remove(f"{path}.lock")

    written = output.outputs[0]
    places = []
    if scores:
        places = [*output.prompt_logprobs[1:], *written.logprobs]
    return {"path": path, "scores": [score(place, found) for place, found in enumerate(places)]}


def score(place: int, found: dict[int, Any]) -> tuple[int, int, float]:
    """A place, the most probable token after it, and the log of its probability."""
    token = max(found, key=lambda one: found[one].logprob)
    return place, token, found[token].logprob


if __name__ == "__main__":
    serve(start)

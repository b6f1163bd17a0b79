"""A draft in vLLM, for `engines.logits`: its logits after a prompt, and the rows it read.

vLLM runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0). The draft's class is watched: what
features it combines, what token and position each row has, and what logits come out. One prompt is
one request, so the first proposal after its prefill has the prompt's rows.
"""

import os
from typing import Any

from answering import Answer, serve


class Watch:
    """What one draft model did, while `on`: one entry a call."""

    def __init__(self) -> None:
        self.on = False
        self.combined: list[Any] = []  # features that were projected
        self.ids: list[Any] = []  # of the rows of each run
        self.logits: list[Any] = []

    def clear(self) -> None:
        """Forget the calls, and watch."""
        self.combined.clear()
        self.ids.clear()
        self.logits.clear()
        self.on = True


def watched(model: type, watch: Watch) -> None:
    """Let the methods of a draft's class write down what they are given and what they return."""
    combine = model.combine_hidden_states
    forward = model.forward
    compute = model.compute_logits

    def combine_hidden_states(self: Any, hidden_states: Any) -> Any:
        if watch.on:
            watch.combined.append(hidden_states.clone())
        return combine(self, hidden_states)

    def forward_of(self: Any, input_ids: Any, *args: Any, **named: Any) -> Any:
        if watch.on:
            watch.ids.append(input_ids.clone())
        return forward(self, input_ids, *args, **named)

    def compute_logits(self: Any, hidden_states: Any) -> Any:
        logits = compute(self, hidden_states)
        if watch.on:
            watch.logits.append(logits.clone())
        return logits

    model.combine_hidden_states = combine_hidden_states
    model.forward = forward_of
    model.compute_logits = compute_logits


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load `settings["target"]` with `settings["draft"]`, `draft_length` tokens a proposal.

    A request `{"prompt": IDS, "out": FILE}` writes `aux` `(P, A·Ht)`, `next_ids` `(P,)`, `drafted`
    `(K,)` and `logits` `(K, V)`, minus infinity outside the draft's vocabulary.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

    import torch  # pyright: ignore[reportMissingImports]
    import vllm  # pyright: ignore[reportMissingImports]
    from safetensors.torch import save_file  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models import (  # pyright: ignore[reportMissingImports]
        llama_eagle3,
        qwen3_eagle3,
    )

    watch = Watch()
    for model in (llama_eagle3.Eagle3LlamaForCausalLM, qwen3_eagle3.Eagle3Qwen3ForCausalLM):
        watched(model, watch)
    length = settings["draft_length"]
    llm = vllm.LLM(
        model=settings["target"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=settings["positions"],
        max_num_batched_tokens=settings["positions"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config={
            "model": settings["draft"],
            "method": "eagle3",
            "num_speculative_tokens": length,
        },
        **settings["arguments"],
    )

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        watch.clear()
        parameters = vllm.SamplingParams(temperature=0, max_tokens=length + 2, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        watch.on = False

        # The prompt's proposal: one run on its rows, then one on each drafted token but the last.
        rows = len(prompt)
        logits = torch.stack([step[-1] for step in watch.logits[:length]])
        save_file(
            {
                "aux": watch.combined[0][:rows].contiguous(),
                "next_ids": watch.ids[0][:rows].long().contiguous(),
                "drafted": logits.argmax(-1),
                "logits": logits.contiguous(),
            },
            request["out"],
        )
        return {"out": request["out"]}

    return {"version": vllm.__version__}, answer


if __name__ == "__main__":
    serve(start)

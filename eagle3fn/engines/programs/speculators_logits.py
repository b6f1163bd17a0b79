"""A draft in speculators, for `engines.logits`: the logits of its module on rows that are given.

speculators trains drafts and serves none, so there is nothing to decode. A folder in its layout is
loaded by its own loader, another one converted by its own converter first, which knows no switches;
its unroll then gives the logits of one row after another: at step i every row reads the token i
places on, so the last of the given rows reads the chain's.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answering import Answer, serve


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Convert and load `settings["draft"]` of `settings["target"]`; `settings["taps"]` are outputs.

    A request `{"rows": FILE, "out": FILE}` reads `aux` `(R, A·Ht)`, `next_ids` `(R,)` and `drafted`
    `(K,)`, and writes them with `logits` `(K, D)`: of the last row, and of the K - 1 drafted after
    it.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]
    from speculators.convert.eagle import (  # pyright: ignore[reportMissingImports]
        eagle3_converter,
    )
    from speculators.models.eagle3 import (  # pyright: ignore[reportMissingImports]
        Eagle3DraftModel,
        Eagle3SpeculatorConfig,
    )

    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as converted:
        folder = settings["draft"]
        if "speculators_model_type" not in json.loads((Path(folder) / "config.json").read_text()):
            folder = converted
            eagle3_converter.Eagle3Converter().convert(
                settings["draft"],
                folder,
                base_model=settings["target"],
                validate=False,
                eagle_aux_hidden_state_layer_ids=[layer + 1 for layer in settings["taps"]],
            )
        config = Eagle3SpeculatorConfig.from_pretrained(folder)
        config.transformer_layer_config._attn_implementation = "eager"  # for any number of rows
        model = Eagle3DraftModel.from_pretrained(folder, config=config)
    model = model.float().eval()

    logits: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0]))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        given = load_file(request["rows"])
        aux = given["aux"].float()
        rows = len(aux)
        steps = len(given["drafted"])

        # Rows after the last one are there for their tokens alone: attention is causal.
        ids = torch.cat([given["next_ids"], given["drafted"][:-1]])[None]
        padded = torch.cat([aux, aux.new_zeros(steps - 1, aux.shape[1])])[None]
        logits.clear()
        with torch.inference_mode():
            model(
                hidden_states=padded,
                input_ids=ids,
                document_ids=torch.zeros_like(ids),
                ttt_steps=steps,
            )
        found = torch.stack([step[rows - 1] for step in logits])
        save_file({**given, "logits": found.contiguous()}, request["out"])
        return {"out": request["out"]}

    return {"version": version("speculators")}, answer


if __name__ == "__main__":
    serve(start)

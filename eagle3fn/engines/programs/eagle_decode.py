"""SafeAILab's EAGLE decodes token ids, or gives its draft's logits on given rows, on a CPU.

A chain in place of its tree: one candidate a step, so that a round drafts as many tokens as ours.
`settings["arguments"]["source"]` is a checkout, as EAGLE is no package. What its code expects of a
target's folder is put beside the target's files in a temporary one: an index of its tensors, and
RoPE's base where transformers 4 reads it.
"""

import functools
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from answering import Answer, serve

TARGETS = {
    "LlamaForCausalLM": "KVLlamaForCausalLM",
    "Qwen2ForCausalLM": "KVQwen2ForCausalLM",
    "Qwen3ForCausalLM": "KVQwen3ForCausalLM",
}
"""EAGLE's classes by a target's architecture."""

SPARE = 32  # places of the cache beyond the longest answer: EAGLE stops ten and a round before it


def start(settings: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load target and draft.

    A request has a prompt to decode, as those of `engines.decoding`, or `rows` and `out`, as those
    of `engines.logits`.
    """
    source = Path(settings["arguments"]["source"])
    if not (source / "eagle" / "model" / "ea_model.py").is_file():
        raise FileNotFoundError(f"{source} has no eagle/model/ea_model.py; name EAGLE's checkout")
    sys.path.insert(0, str(source))

    import torch  # pyright: ignore[reportMissingImports]
    from eagle.model import ea_model  # pyright: ignore[reportMissingImports]

    without_tokenizer(ea_model, settings["end_tokens"][0])
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(settings["target"]), Path(folder))
        dtype = getattr(torch, settings["dtype"])
        if settings["draft"] is None:
            generate = plain_decoder(ea_model, folder, settings, dtype)
            layer = None
        else:
            model = load(ea_model, folder, settings, dtype)
            generate, layer = model.eagenerate, model.ea_layer
    rounds = watched(ea_model)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            if "rows" in request:
                return logits(layer, request)
            return decode(generate, rounds, request, settings)

    return {"version": commit(source), "transformers": version("transformers")}, answer


def load(module: Any, target: str, settings: dict[str, Any], dtype: Any) -> Any:
    """EAGLE's model of target and draft; a chain of `draft_length` tokens a round."""
    length = settings["draft_length"]
    model = module.EaModel.from_pretrained(
        base_model_path=target,
        ea_model_path=settings["draft"],
        total_token=length + 1,
        depth=length - 1,
        top_k=1,
        torch_dtype=dtype,
    ).eval()
    check_names(model.ea_layer, Path(settings["draft"]))
    return model


def plain_decoder(module: Any, target: str, settings: dict[str, Any], dtype: Any) -> Any:
    """EAGLE's loop without a draft, on its target alone."""
    name = json.loads((Path(target) / "config.json").read_text())["architectures"][0]
    model = getattr(module, TARGETS[name]).from_pretrained(target, torch_dtype=dtype).eval()
    holder = SimpleNamespace(
        base_model=model,
        ea_layer=SimpleNamespace(reset_kv=lambda: None, total_tokens=settings["draft_length"]),
        tokenizer=module.AutoTokenizer.from_pretrained(),
    )
    return functools.partial(module.EaModel.naivegenerate, holder)


# Before it loads


def without_tokenizer(module: Any, end: int) -> None:
    """Let EAGLE's model have an end token in place of a tokenizer, which needs more files."""
    stand_in = SimpleNamespace(eos_token_id=end)
    module.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *args, **named: stand_in)


def prepare(target: Path, folder: Path) -> None:
    """Links to the target's files, with an index of its tensors and a config that it can read."""
    from safetensors import safe_open  # pyright: ignore[reportMissingImports]

    for file in target.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())

    config = json.loads((target / "config.json").read_text())
    rope = config.pop("rope_parameters", None) or {}
    config.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", rope)
    (folder / "config.json").write_text(json.dumps(config))

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        with safe_open(target / "model.safetensors", "pt") as tensors:
            places = dict.fromkeys(tensors.keys(), "model.safetensors")
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def check_names(layer: Any, draft: Path) -> None:
    """Refuse a draft of which EAGLE ignores a tensor, or lacks one; it does not say so itself."""
    from safetensors import safe_open  # pyright: ignore[reportMissingImports]

    with safe_open(draft / "model.safetensors", "pt") as tensors:
        given = set(tensors.keys())
    has = set(layer.state_dict())
    ignored = sorted(given - has)
    absent = sorted(has - given - {"embed_tokens.weight"})  # that one is the target's
    if ignored or absent:
        raise ValueError(f"EAGLE ignores {ignored or 'nothing'} and lacks {absent or 'nothing'}")


def watched(module: Any) -> list[int]:
    """The numbers of accepted tokens of all rounds, as they come."""
    rounds: list[int] = []
    verify = module.evaluate_posterior

    def evaluate_posterior(*args: Any, **named: Any) -> Any:
        found = verify(*args, **named)
        rounds.append(int(found[1]))
        return found

    module.evaluate_posterior = evaluate_posterior
    return rounds


def commit(source: Path) -> str:
    """The checkout's commit, of its file COMMIT or of git; "unknown" without either."""
    file = source / "COMMIT"
    if file.is_file():
        return file.read_text().strip()
    head = source / ".git" / "HEAD"
    if not head.is_file():
        return "unknown"
    text = head.read_text().strip()
    branch = source / ".git" / text.removeprefix("ref: ")
    return branch.read_text().strip() if branch.is_file() else text


# Requests


def decode(
    generate: Any, rounds: list[int], request: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """One prompt's tokens, seconds and counts."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(request["seed"])
    prompt = torch.tensor([request["prompt"]])
    rounds.clear()

    begin = time.perf_counter()
    ids = generate(
        prompt,
        temperature=request["temperature"],
        top_p=request["top_p"],
        max_new_tokens=request["max_new"] - 1,  # it stops when there are more
        max_length=settings["positions"] + settings["draft_length"] + SPARE,
    )
    seconds = time.perf_counter() - begin

    tokens = cut(ids[0, prompt.shape[1] :].tolist(), request["max_new"], settings["end_tokens"])
    counts = None
    if settings["draft"] is not None:
        counts = counted(rounds, tokens, settings["draft_length"])
    return {"tokens": tokens, "seconds": seconds, "counts": counts}


def cut(tokens: list[int], limit: int, ends: list[int]) -> list[int]:
    """The answer: up to the limit, and up to and with the first end token."""
    tokens = tokens[:limit]
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[: place + 1]
    return tokens


def counted(rounds: list[int], tokens: list[int], length: int) -> dict[str, Any]:
    """Counts of the rounds that the answer took.

    EAGLE notices an end one round late, as a round's bonus token is appended by the next.
    """
    emitted = 1  # by the prefill
    kept = []
    for accepted in rounds:
        if emitted >= len(tokens):
            break
        kept.append(accepted)
        emitted += accepted + 1
    by_position = [sum(accepted > place for accepted in kept) for place in range(length)]
    return {
        "rounds": len(kept),
        "drafted": len(kept) * length,
        "accepted": sum(kept),
        "drafted_by_position": [len(kept)] * length,
        "accepted_by_position": by_position,
    }


def logits(layer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The draft's logits `(K, D)` of the last row, and of the K - 1 drafted after it."""
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]

    given = load_file(request["rows"])
    ids = given["next_ids"][None]
    drafted = given["drafted"]
    layer.reset()
    hidden, cache = layer(given["aux"][None].float(), input_ids=ids, use_cache=True)

    found = []
    for step in range(len(drafted)):
        if step:
            hidden, cache = layer(
                hidden[:, -1:],
                input_ids=drafted[step - 1][None, None],
                past_key_values=cache,
                use_cache=True,
            )
        found.append(layer.lm_head(layer.norm(hidden[0, -1])))
    save_file({**given, "logits": torch.stack(found).contiguous()}, request["out"])
    return {"out": request["out"]}


if __name__ == "__main__":
    serve(start)

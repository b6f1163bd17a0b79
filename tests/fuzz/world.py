"""A small whole world of this program's files: a target, conversations, and all made of them.

target, sharded             the same weights in one file and in several
talks.*, prompts.jsonl      conversations in five forms; prompts
features, ckpts, ckpts-gz   features of ours and SpecForge's
vocab.safetensors, map.pt   a vocabulary map of ours and SpecForge's
config.toml, run.toml       settings; draft.json: a draft's shape
run                         a run of six updates that was cut off after the fourth
draft, untrained            exported drafts; foreign-*: of other trainers
plain.json                  the target's kept answers
"""

import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.factories import CHATML, talk, tiny_model, tiny_tokenizer
from tests.fuzz.tasks import TASKS

CONVERSATIONS = 66  # two shards
LAYERS = 7

_COMMON = """
[data]
max_length = 128
global_batch = 2
micro_batch = 1
held_out = 3
prefetch = 0

[objective]
ttt_length = 3
numerics = "fast"

[optimizer]
learning_rate = 1e-3

[train]
dtype = "float32"
seed = 3
eval_every = 2
checkpoint_every = 2
keep_last = 2
"""


def write_world(folder: Path) -> None:
    """Write all of it into a folder that is there. Computes: call it in a fork."""
    os.chdir(folder)
    _write_target()
    _write_texts()
    _write_features()
    _write_run()
    _write_drafts()


def _eagle3fn(command: str) -> None:
    from eagle3fn.cli import main

    code = main(command.split())
    if code:
        raise RuntimeError(f"eagle3fn {command}: exit code {code}")


def _write_target() -> None:
    model = tiny_model(
        num_hidden_layers=LAYERS,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
    )
    model.generation_config.eos_token_id = 1
    model.save_pretrained("target")
    model.save_pretrained("sharded", max_shard_size="40KB")
    for folder in ("target", "sharded"):
        tiny_tokenizer(CHATML).save_pretrained(folder)
        tokens = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        Path(folder, "special_tokens_map.json").write_text(json.dumps(tokens))


def _write_texts() -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for i in range(CONVERSATIONS):
        texts = ["q" * (1 + i % 3), "answer " * (1 + i % 3), "why?", f"so {i}"]
        rows.append({"id": f"row{i}", "conversations": talk(*texts)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)

    Path("talks.jsonl").write_text(lines)
    Path("talks.json").write_text(json.dumps(rows, indent=1))
    Path("talks.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    Path("talks.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    parquet.write_table(pa.Table.from_pylist(rows), "talks.parquet")

    prompts = [{"id": i, "prompt": f"question {i}?"} for i in range(3)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    Path("run.toml").write_text(_COMMON + "steps = 6\n")
    Path("config.toml").write_text(_COMMON + "steps = 2\n")


def _write_features() -> None:
    _eagle3fn(TASKS["extract-on"].command)
    vocab = "--features features --out vocab.safetensors --size 200"
    _eagle3fn(f"vocab --target target {vocab}")

    # SpecForge's, of fewer conversations.
    few = "--conversations talks.jsonl --limit 8 --max-length 128 --threads 1 --dtype bfloat16"
    _eagle3fn(f"extract --target target --out few {few}")
    _eagle3fn("convert --features few --out ckpts --for specforge")
    _eagle3fn("convert --vocab vocab.safetensors --out map.pt --for specforge")
    Path("ckpts-gz").mkdir()
    for path in sorted(Path("ckpts").iterdir()):
        Path("ckpts-gz", f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def _write_run() -> None:
    """A run of six updates, as if it had been killed after its last checkpoint was begun."""
    _eagle3fn(TASKS["resume"].command)
    train = Path("run/train")
    shutil.copytree(train / "draft", "draft")
    shutil.copytree(train / "untrained", "untrained")
    (train / "finished").unlink(missing_ok=True)
    newest = max((train / "checkpoints").iterdir())
    shutil.rmtree(newest)

    _eagle3fn(TASKS["evaluate-plain"].command)
    os.replace("made.json", "run/evaluation.json")
    Path("run/features").symlink_to("../features")
    Path("run/stages.json").write_text(json.dumps({"extract": 1.5, "train": 2.0}))
    Path("run/settings.json").write_text(json.dumps({"seed": 3, "target": "target"}))


def _write_drafts() -> None:
    """A draft's shape, and the trained draft as other trainers write it."""
    import torch
    from safetensors.torch import load_file, save_file

    from eagle3fn.use.layouts import speculators_keys

    tree = json.loads(Path("draft/config.json").read_text())
    Path("draft.json").write_text(json.dumps(tree, indent=2))
    tensors = load_file("draft/model.safetensors")

    def put(name: str, tree: dict[str, Any], save: Callable[[Path], Any]) -> None:
        folder = Path(f"foreign-{name}")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tree))
        save(folder)

    put("hf", tree, lambda folder: save_file(tensors, folder / "model.safetensors"))

    bare = {key: value for key, value in tree.items() if "eagle" not in key and "rope" not in key}
    bare |= {"architectures": ["LlamaForCausalLM"]}
    put("eagle", bare, lambda folder: torch.save(tensors, folder / "pytorch_model.bin"))

    def save_shards(folder: Path) -> None:
        names = list(tensors)
        places = {}
        for file, part in (("a.safetensors", names[:5]), ("b.safetensors", names[5:])):
            save_file({name: tensors[name] for name in part}, folder / file)
            places |= dict.fromkeys(part, file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": places}))

    put("shards", tree, save_shards)

    key = "eagle_aux_hidden_state_layer_ids"
    keys = speculators_keys(tree, "target", ["LlamaForCausalLM"])
    theirs = {"architectures": ["Eagle3Speculator"], "target_hidden_size": None, **keys}
    theirs |= {"draft_vocab_size": tree["draft_vocab_size"]}
    if key in tree:
        theirs[key] = tree[key]
    numbered = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    save = lambda folder: save_file(numbered, folder / "model.safetensors")  # noqa: E731
    put("speculators", theirs, save)

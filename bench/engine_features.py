"""Drafts trained on an engine's features against drafts trained on Hugging Face's.

    python -m bench.engine_features --target FOLDER --conversations FILE --prompts FILE
    --engine-python PYTHON --work FOLDER

Both ways extract the same conversations, in the same dtype; a draft is trained on each for every
seed, by the settings that `eagle3fn train` chooses and so many steps, and decodes the same prompts
greedily in this process. Finished stages in the folder `--work` are kept, so a call that was cut
off goes on. The vocabulary map is made from Hugging Face's samples; the engine's are the same
tokens.

The last line is JSON. For each side: the held-out accepted length after the last step and the
accepted length in decoding, by seed. `difference` is engine minus Hugging Face of the means,
`spread` the larger of the two sides' ranges over seeds, `within` whether the first is at most the
second. `features` compares the two folders: the largest difference of a value over the largest
value.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from statistics import mean
from typing import Any

import torch

from bench import common
from bench.launch import add_arguments
from eagle3fn import cli
from eagle3fn.base.errors import UserError
from eagle3fn.base.provenance import provenance
from eagle3fn.base.read import read_jsonl
from eagle3fn.data.features import open_features, read_sample
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.user_turns import chat_prompt
from eagle3fn.use.counts import accepted_length
from eagle3fn.use.decode import speculate
from eagle3fn.use.export import load_draft
from eagle3fn.use.prompts import read_prompts

HELD_OUT = 24  # samples
DRAFT_LENGTH = 4


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True)
    add("--conversations", required=True)
    add("--prompts", required=True, help="rows with a prompt, which the drafts decode")
    add("--engine", default="vllm")
    add("--engine-python", required=True, help="the Python of the engine's environment")
    add("--work", type=Path, required=True, help="folder of features and runs; stages are kept")
    add("--limit", type=int, default=192, help="conversations (default 192)")
    add("--max-length", type=int, default=1024)
    add("--steps", type=int, default=300)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--tasks", type=int, default=10, help="prompts decoded (default 10)")
    add("--max-new", type=int, default=96)
    add_arguments(parser)
    return parser.parse_args()


def stage(*words: Any) -> None:
    """One command of `eagle3fn`.

    Raises:
        UserError: it failed; it has printed why.
    """
    arguments = [str(word) for word in words]
    print("== eagle3fn", *arguments[:1], flush=True)
    if cli.main(arguments):
        raise UserError(f"eagle3fn {arguments[0]} failed; see above")


def extracted(options: argparse.Namespace) -> dict[str, Path]:
    """The two feature folders, by side."""
    sides = {
        "huggingface": [],
        options.engine: ["--engine", options.engine, "--engine-python", options.engine_python],
    }
    folders = {}
    for side, words in sides.items():
        folders[side] = options.work / f"features-{side}"
        shared = ["--target", options.target, "--conversations", options.conversations]
        shared += ["--out", folders[side], "--limit", options.limit, "--dtype", "float32"]
        shared += ["--max-length", options.max_length, "--threads", options.threads]
        stage("extract", *shared, *words)
    return folders


def trained(options: argparse.Namespace, side: str, features: Path, seed: int) -> Path:
    """The folder of a finished run."""
    run = options.work / f"train-{side}-{seed}"
    words = ["--target", options.target, "--features", features, "--out", run]
    words += ["--vocab", options.work / "vocab.safetensors", "--threads", options.threads]
    settings = {
        "train.seed": seed,
        "train.steps": options.steps,
        "train.eval_every": options.steps,
        "train.dtype": "float32",
        "data.held_out": HELD_OUT,
        "data.max_length": options.max_length,
    }
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    stage("train", *words)
    return run


def distance(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of a value over the largest value, by kind of feature."""
    left, right = open_features(one), open_features(other)
    kinds = ("aux_hidden", "last_hidden")
    off = dict.fromkeys(kinds, 0.0)
    top = dict.fromkeys(kinds, 0.0)
    for number in range(len(left.samples)):
        a, b = read_sample(left, number), read_sample(right, number)
        if not torch.equal(a.input_ids, b.input_ids):
            raise UserError(f"{other}: sample {number} has other tokens than {one}'s")
        for kind in kinds:
            x, y = getattr(a, kind).float(), getattr(b, kind).float()
            off[kind] = max(off[kind], float((x - y).abs().max()))
            top[kind] = max(top[kind], float(x.abs().max()))
    return {kind: off[kind] / top[kind] for kind in kinds}


def decoded_length(options: argparse.Namespace, runs: dict[str, Path]) -> dict[str, float]:
    """The accepted length of each run's last draft on the prompts, by the run's name."""
    model, tokenizer = load_target(options.target, torch.float32, options.device)
    ends = stop_ids(model, tokenizer)
    template = ChatTemplate(tokenizer)
    prompts = []
    for text in read_prompts(options.prompts, first=options.tasks).texts:
        prompt = chat_prompt(template, text)
        prompts.append(tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids)

    found = {}
    for name, run in runs.items():
        draft = load_draft(run / "draft", torch.float32, options.device)
        answers = []
        for ids in prompts:
            answers.append(speculate(model, draft, ids, DRAFT_LENGTH, options.max_new, ends))
        found[name] = accepted_length(answers)
        print(f"{name}: accepted length {found[name]:.3f}", flush=True)
    return found


def summary(rows: dict[str, list[float]]) -> dict[str, Any]:
    """Means, ranges, and whether the sides' difference lies within the seeds' spread."""
    (first, ours), (second, engines) = rows.items()
    difference = mean(engines) - mean(ours)
    spread = max(max(ours) - min(ours), max(engines) - min(engines))
    return {
        "by_seed": rows,
        "mean": {first: mean(ours), second: mean(engines)},
        "difference": difference,
        "spread": spread,
        "within": abs(difference) <= spread,
    }


def main() -> int:
    options = parse()
    folders = extracted(options)
    ours = folders["huggingface"]
    vocab = options.work / "vocab.safetensors"
    words = ["--target", options.target, "--features", ours, "--held-out", HELD_OUT]
    stage("vocab", *words, "--out", vocab)

    # One run for each side and seed, in turns.
    runs: dict[str, Path] = {}
    held_out: dict[str, list[float]] = {side: [] for side in folders}
    for seed in options.seeds:
        for side, folder in folders.items():
            run = trained(options, side, folder, seed)
            runs[f"{side}-{seed}"] = run
            held_out[side].append(read_jsonl(run / "eval.jsonl")[-1]["accepted_length"])

    lengths = decoded_length(options, runs)
    decoded = {side: [lengths[f"{side}-{seed}"] for seed in options.seeds] for side in folders}
    names = ("limit", "max_length", "steps", "seeds", "tasks", "max_new", "engine")
    result = {
        "settings": {name: getattr(options, name) for name in names},
        "engine": open_features(folders[options.engine]).index.get("engine"),
        "samples": len(open_features(ours).samples),
        "tokens": open_features(ours).index["totals"]["tokens"],
        "features": distance(ours, folders[options.engine]),
        "held_out_accepted_length": summary(held_out),
        "decoded_accepted_length": summary(decoded),
        **provenance(),
    }
    common.finish(result, options.out, f"engine-features-{options.engine}")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.engine_features", main))

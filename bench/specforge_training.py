"""Train SpecForge's model on a finished run's samples, and compare its draft with the run's own.

    SPECFORGE_SRC=CHECKOUT python -m bench.specforge_training --target FOLDER --features FOLDER \
        --vocab FILE --run FOLDER --out FOLDER [--prompts JSONL]

Both train on the same features in the same order for the same number of optimizer steps, at the
run's learning rate and warm-up, and are decoded alike. SpecForge's side is its pull request 600:
model, unroll length, loss weights, mask rule, optimizer and schedule, from a random start
(`--init`).

Two things are not SpecForge's: its loss, a Triton kernel, is replaced by the equal eager
expression, and dynamo is off, because this runs on the CPU. So its tokens a second here say nothing
about its speed on a GPU.

`OUT/draft` is the exported draft. `OUT/result.json` has, for each side, the simulated accepted
length on the run's held-out samples under both masks, and the report of decoding.
"""

import os

if __name__ == "__main__":
    # Before torch is loaded; who imports this file has set them.
    os.environ.update(TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")

import argparse
import json
import math
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import common
from bench.sides import DECAY, weighted_sum
from eagle3fn import specforge
from eagle3fn.base.config import Config, load_config
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import write_json
from eagle3fn.base.provenance import provenance
from eagle3fn.base.read import read_jsonl
from eagle3fn.base.sections import require
from eagle3fn.base.types import Batch, Params
from eagle3fn.data.features import open_features, tensors_of
from eagle3fn.data.pipeline import batches
from eagle3fn.data.stages import prefetch
from eagle3fn.data.target_source import config_hashes, target_config
from eagle3fn.data.target_tensors import read_target_tensors
from eagle3fn.data.vocab import load_map
from eagle3fn.model.table import EMBED, init_params
from eagle3fn.specforge.oracle import (
    COMMIT,
    Oracle,
    eager_loss,
    load_oracle,
    specforge_draft,
    specforge_forward,
)
from eagle3fn.train.bind import bind
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.recipe import OURS
from eagle3fn.train.run import Run, prepare
from eagle3fn.use.eval_settings import EvalSettings
from eagle3fn.use.evaluate import evaluate
from eagle3fn.use.export import export, load_draft
from eagle3fn.use.prompts import read_prompts

UNROLL = 7
INIT_STD = 0.02
ALIGN_MASK = {"serving": OURS.align_mask, "specforge": specforge.align_mask}
SHOWN = (  # of the report of decoding
    "tasks",
    "max_new",
    "draft_length",
    "accepted_length",
    "lossless",
    "acceptance_by_position",
)
NOTES = (
    "SpecForge's loss kernel replaced by the equal eager expression; dynamo off (CPU)",
    "SpecForge's draft is the one after its last step, ours the exported one, "
    "best on the held-out samples",
)


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--target", required=True, help="the run's target")
    add("--features", required=True, help="the run's feature folder")
    add("--vocab", required=True, help="the run's vocabulary map")
    add("--run", type=Path, required=True, help="finished run: config.toml, eval.jsonl, draft/")
    add("--out", type=Path, required=True, help="gets draft/ and result.json")
    add("--steps", type=int, help="optimizer steps of SpecForge's side (default: the run's)")
    about = "matrices from normal(0, 0.02), or as SpecForge's layers draw them (default normal)"
    add("--init", choices=("normal", "module"), default="normal", help=about)
    add("--prompts", help="JSONL with a prompt field: also decode with both drafts")
    add("--tasks", type=int, default=10, help="prompts, in order from the first (default 10)")
    add("--max-new", type=int, default=128, help="tokens decoded a prompt (default 128)")
    return parser.parse_args()


def open_run(options: argparse.Namespace, tree: dict[str, Any]) -> Run:
    """The finished run's parts, on the CPU; `tree` is the target's configuration.

    Raises:
        UserError: no finished run, or a draft that SpecForge's module cannot be.
    """
    config = load_config(options.run / "config.toml", ["train.device=cpu"])
    draft = config.draft
    if draft.rope_type != "default" or draft.hidden_size != draft.target_hidden_size:
        raise UserError(
            f"{options.run}: SpecForge's module is built for drafts as wide as their target, "
            "without RoPE scaling, alone"
        )
    done = (options.run / "draft").is_dir() and config.train.steps > 0
    require(done, "--run", str(options.run), "a finished run, with draft/")

    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    hashes = config_hashes(options.target)
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, hashes)
    dtype = getattr(torch, config.train.dtype)
    target = read_target_tensors(options.target, dtype, tensors_of(features))
    return prepare(config, features, vocab, target, options.run)


def under(run: Run, mask: str, unroll: int) -> Run:
    """The same run under a mask, a name of `ALIGN_MASK`, and an unroll length."""
    config = replace(run.config, objective=replace(run.config.objective, ttt_length=unroll))
    recipe = run.recipe._replace(align_mask=ALIGN_MASK[mask])
    fns = bind(config, run.frozen, recipe=recipe)
    return run._replace(config=config, fns=fns, recipe=recipe)


def first_params(config: Config, init: str) -> Params:
    """The random start: seeded, drawn in fp32, then cast."""
    dtype = getattr(torch, config.train.dtype)
    seed = config.train.seed
    params = init_params(replace(config.draft, initializer_range=INIT_STD), seed, dtype)
    if init == "normal":
        return params

    # As the layers of torch.nn draw their matrices.
    torch.manual_seed(seed)
    drawn = {}
    for name, value in params.items():
        if value.ndim == 2:
            rows, columns = value.shape
            layer = torch.nn.Linear(columns, rows, bias=False)
            drawn[name] = layer.weight.detach().to(dtype)
    return params | drawn


def train_specforge(
    oracle: Oracle, run: Run, params: Params, steps: int
) -> tuple[Params, dict[str, Any]]:
    """Its parameters after `steps` updates under their exported names, and what that took."""
    plan = run.config.optimizer
    schedule: dict[str, Any] = {
        "lr": plan.learning_rate,
        "warmup_ratio": plan.warmup_ratio,
        "total_steps": steps,
    }
    draft = specforge_draft(oracle, run.config.draft, params, run.frozen).train()
    optimizer = oracle.optimizer.BF16Optimizer(draft, **schedule)

    loss = 0.0
    tokens = 0
    seconds = 0.0
    updates = batches(
        run.features, run.train, run.config, 0, steps, align_mask=run.recipe.align_mask
    )
    source = prefetch(updates, run.config.data.prefetch)
    bar = tqdm(source, total=steps, unit="step", dynamic_ncols=True)
    with closing(source), eager_loss(oracle), bar:
        for micro in bar:
            begin = time.perf_counter()
            loss = specforge_step(oracle, draft, optimizer, run, micro)
            seconds += time.perf_counter() - begin
            tokens += sum(int(batch.attention_mask.sum()) for batch in micro)
            bar.set_postfix(loss=f"{loss:.3f}")

    trained = {}
    for name, value in draft.state_dict().items():
        if name not in (EMBED, "t2d", "d2t"):
            trained[name] = value
    took = {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "last_loss": loss,
    }
    return trained, schedule | took


def specforge_step(
    oracle: Oracle, draft: torch.nn.Module, optimizer: Any, run: Run, micro: tuple[Batch, ...]
) -> float:
    """One update from a global batch; SpecForge averages the gradients of its micro-batches.

    Raises:
        UserError: the loss is not finite.
    """
    objective = replace(run.config.objective, loss="kl")
    total = 0.0
    for batch in micro:
        found = specforge_forward(oracle, draft, run.frozen, batch, objective)
        loss = weighted_sum(found.losses) / len(micro)
        loss.backward()
        total += float(loss.detach())

    name = "SpecForge's loss"
    require(math.isfinite(total), name, total, "finite; lower the run's optimizer.learning_rate")
    optimizer.step()
    return total


def judge(
    target: str, run: Run, folder: Path, prompts: list[str], settings: EvalSettings
) -> dict[str, Any]:
    """What an exported draft reaches.

    Its simulated accepted length on the held-out samples, by mask and unroll length, and with
    prompts the report of decoding.
    """
    params = load_draft(folder, getattr(torch, run.config.train.dtype)).params
    unrolls = sorted({run.config.objective.ttt_length, UNROLL})
    lengths: dict[str, dict[str, Any]] = {}
    for mask in ALIGN_MASK:
        lengths[mask] = {}
        for unroll in unrolls:
            row = evaluate_held_out(under(run, mask, unroll), params)
            lengths[mask][f"unroll_{unroll}"] = row.get("accepted_length")
    found: dict[str, Any] = {"held_out_accepted_length": lengths}
    if not prompts:
        return found

    with tqdm(bar_format="{desc} {elapsed}") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.set_description(f"{folder}: {stage} {done}/{total}")

        store = folder.parent / "plain.json"
        report = evaluate(
            target, folder, prompts, settings, plain_store=store, on_progress=progress
        )
    found["evaluation"] = {name: report[name] for name in SHOWN}
    return found


def compare(options: argparse.Namespace, oracle: Oracle) -> dict[str, Any]:
    """Train, export and measure; returns the result."""
    tree = target_config(options.target)
    prompts = read_prompts(options.prompts).texts if options.prompts else []
    run = open_run(options, tree)
    folder = options.out / "draft"
    total = run.config.train.steps
    steps = total if options.steps is None else options.steps
    require(steps >= 1, "--steps", steps, "at least 1")
    other = options.out.resolve() != options.run.resolve()
    require(other, "--out", str(options.out), "another folder than --run")

    # SpecForge's side.
    start = first_params(run.config, options.init)
    params, theirs = train_specforge(oracle, under(run, "specforge", UNROLL), start, steps)
    dtype = getattr(torch, run.config.train.dtype)
    export(params, run.frozen, run.config.draft, folder, tree["num_hidden_layers"], dtype)
    theirs |= {
        "steps": steps,
        "init": options.init,
        "unroll": UNROLL,
        "decay": DECAY,
        "mask_alignment": "specforge",
    }

    # Ours, of which the best evaluation was exported; row 0 is the untrained draft's.
    rows = []
    for row in read_jsonl(options.run / "eval.jsonl"):
        if row["step"] and "accepted_length" in row:
            rows.append(row)
    none = {"step": total, "accepted_length": None}
    best = max(rows, key=lambda row: row["accepted_length"], default=none)
    ours = {
        "steps": total,
        "draft_step": best["step"],
        "recorded_accepted_length": best["accepted_length"],
    }

    settings = EvalSettings(tasks=options.tasks, max_new=options.max_new, speed_tasks=1)
    theirs |= judge(options.target, run, folder, prompts, settings)
    ours |= judge(options.target, run, options.run / "draft", prompts, settings)
    return {"same_steps": steps == total, "specforge": theirs, "ours": ours}


def about(oracle: Oracle) -> dict[str, Any]:
    """Who was compared, where and how."""
    identity = {"name": "SpecForge", "kind": oracle.kind, "commit": COMMIT, "hashes": oracle.hashes}
    return {"oracle": identity, "notes": NOTES, **provenance()}


def main() -> None:
    options = parse()
    oracle = load_oracle(commit=True)
    result = about(oracle) | compare(options, oracle)
    write_json(options.out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(common.program("bench.specforge_training", main))

"""Train the old tool's model on a finished run's samples, and hold its draft against the run's own.

Both see the same features in the same order for the same number of optimizer steps, at the run's learning rate and
warm-up, and are decoded alike. The old side is SpecForge at its pull request 600 (`SPECFORGE_SRC`):
its model, unroll length, loss weights, mask rule, optimizer and schedule, from a random start (`--init`).

Two things are not the old tool's: its loss, a Triton kernel, is replaced by the equal eager expression, and dynamo is
off, because this runs on the CPU. So its tokens a second here say nothing about its speed on a GPU.
"""

import os

if __name__ == "__main__":  # before torch is loaded; who imports this has settled it
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

from eagle3fn.base.config import Config, load_config, require
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl, write_json
from eagle3fn.base.types import Batch, Params
from eagle3fn.data.features import open_features
from eagle3fn.data.pipeline import batches, prefetch
from eagle3fn.data.target import config_hash, read_target_tensors, target_config
from eagle3fn.data.vocab import load_map
from eagle3fn.model.table import EMBED, init_params
from eagle3fn.specforge.oracle import (
    COMMIT,
    Oracle,
    OracleMissingError,
    eager_loss,
    load_oracle,
    old_draft,
    old_forward,
)
from eagle3fn.testing.provenance import provenance
from eagle3fn.train.bind import bind
from eagle3fn.train.held_out import evaluate_held_out
from eagle3fn.train.run import Run, prepare
from eagle3fn.use.evaluate import EvalSettings, Progress, evaluate, read_prompts
from eagle3fn.use.export import export, load_draft
from tests.reference import weighted_sum

UNROLL, DECAY, INIT_STD = 7, 0.8, 0.02
ALIGNMENTS = ("serving", "legacy")
SHOWN = (
    "tasks",
    "max_new",
    "draft_length",
    "accepted_length",
    "lossless",
    "acceptance_by_position",
)
NOTES = (
    "loss kernel of the old side replaced by the equal eager expression; dynamo off (CPU)",
    "the old draft is the one after its last step, ours the exported one, best on the held-out samples",
)


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    for name, about in (
        ("target", "target"),
        ("features", "feature folder"),
        ("vocab", "vocabulary map"),
    ):
        add(f"--{name}", required=True, help=f"the run's {about}")
    add("--run", type=Path, required=True, help="finished run: config.toml, eval.jsonl, draft/")
    add("--out", type=Path, required=True, help="gets draft/ and result.json")
    add("--steps", type=int, help="optimizer steps of the old side (default: the run's)")
    start = (
        "matrices from normal(0, 0.02), or as the old module's layers draw them (default normal)"
    )
    add("--init", choices=("normal", "module"), default="normal", help=start)
    add("--prompts", help="JSONL with a prompt field: also decode with both drafts")
    add("--tasks", type=int, default=10, help="prompts, in order from the first (default 10)")
    add("--max-new", type=int, default=128, help="tokens decoded a prompt (default 128)")
    return parser.parse_args()


def open_run(options: argparse.Namespace, tree: dict[str, Any]) -> Run:
    """The finished run's parts, on the CPU; `tree` is the target's configuration."""
    config = load_config(options.run / "config.toml", ["train.device=cpu"])
    draft, done = config.draft, (options.run / "draft").is_dir() and config.train.steps > 0
    if draft.rope_type != "default" or draft.hidden_size != draft.target_hidden_size:
        raise UserError(
            f"{options.run}: the oracle builds drafts as wide as their target, without RoPE scaling, alone"
        )
    require(done, "--run", str(options.run), "a finished run, with draft/")
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, config_hash(tree))
    target = read_target_tensors(options.target, getattr(torch, config.train.dtype))
    return prepare(config, features, vocab, target, options.run)


def under(run: Run, alignment: str, unroll: int) -> Run:
    """The same run under this mask alignment and unroll length."""
    data = replace(run.config.data, mask_alignment=alignment)
    config = replace(
        run.config, data=data, objective=replace(run.config.objective, ttt_length=unroll)
    )
    return run._replace(config=config, fns=bind(config, run.frozen))


def first_params(config: Config, init: str) -> Params:
    """The random start: seeded, drawn in fp32, then cast."""
    dtype, seed = getattr(torch, config.train.dtype), config.train.seed
    params = init_params(replace(config.draft, initializer_range=INIT_STD), seed, dtype)
    if init == "normal":
        return params
    torch.manual_seed(seed)
    drawn = {
        name: torch.nn.Linear(*value.shape[::-1], bias=False)
        for name, value in params.items()
        if value.ndim == 2
    }
    return params | {name: layer.weight.detach().to(dtype) for name, layer in drawn.items()}


def train_old(
    oracle: Oracle, run: Run, params: Params, steps: int
) -> tuple[Params, dict[str, Any]]:
    """Its parameters after `steps` updates under their exported names, and what that took."""
    draft, plan = (
        old_draft(oracle, run.config.draft, params, run.frozen).train(),
        run.config.optimizer,
    )
    schedule = {"lr": plan.learning_rate, "warmup_ratio": plan.warmup_ratio, "total_steps": steps}
    optimizer = oracle.optimizer.BF16Optimizer(draft, **schedule)
    loss, tokens, seconds = 0.0, 0, 0.0
    source = prefetch(
        batches(run.features, run.train, run.config, 0, steps), run.config.data.prefetch
    )
    with (
        closing(source),
        eager_loss(oracle),
        tqdm(source, total=steps, unit="step", dynamic_ncols=True) as bar,
    ):
        for micro in bar:
            begin = time.perf_counter()
            loss = step_old(oracle, draft, optimizer, run, micro)
            seconds += time.perf_counter() - begin
            tokens += sum(int(batch.attention_mask.sum()) for batch in micro)
            bar.set_postfix(loss=f"{loss:.3f}")
    schedule |= {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "last_loss": loss,
    }
    return {
        name: value
        for name, value in draft.state_dict().items()
        if name not in (EMBED, "t2d", "d2t")
    }, schedule


def step_old(
    oracle: Oracle, draft: torch.nn.Module, optimizer: Any, run: Run, micro: tuple[Batch, ...]
) -> float:
    """One update from a global batch; the gradients of its micro-batches are averaged where the old tool keeps them."""
    objective, total = replace(run.config.objective, loss="kl"), 0.0
    for batch in micro:
        loss = weighted_sum(
            old_forward(oracle, draft, run.frozen, batch, objective).losses, DECAY
        ) / len(micro)
        loss.backward()
        total += float(loss.detach())
    require(
        math.isfinite(total),
        "the old side's loss",
        total,
        "finite; lower the run's optimizer.learning_rate",
    )
    optimizer.step()
    return total


def judge(
    target: str, run: Run, folder: Path, prompts: list[str], settings: EvalSettings
) -> dict[str, Any]:
    """The exported draft's simulated length on the held-out samples (alignment, then rows unrolled), and its report."""
    params = load_draft(folder, getattr(torch, run.config.train.dtype)).params
    unrolls = sorted({run.config.objective.ttt_length, UNROLL})
    rows = {
        (a, k): evaluate_held_out(under(run, a, k), params) for a in ALIGNMENTS for k in unrolls
    }
    lengths = {
        a: {f"unroll_{k}": rows[a, k].get("accepted_length") for k in unrolls} for a in ALIGNMENTS
    }
    if not prompts:
        return {"held_out_accepted_length": lengths}
    with tqdm(bar_format="{desc} {elapsed}") as bar:
        show: Progress = lambda stage, done, total: bar.set_description(
            f"{folder}: {stage} {done}/{total}"
        )  # noqa: E731
        report = evaluate(
            target,
            folder,
            prompts,
            settings,
            plain_store=folder.parent / "plain.json",
            on_progress=show,
        )
    return {
        "held_out_accepted_length": lengths,
        "evaluation": {name: report[name] for name in SHOWN},
    }


def compare(options: argparse.Namespace, oracle: Oracle) -> dict[str, Any]:
    """Train, export and measure; returns the result."""
    tree, prompts = (
        target_config(options.target),
        read_prompts(options.prompts) if options.prompts else [],
    )
    run, folder = open_run(options, tree), options.out / "draft"
    total = run.config.train.steps
    steps = total if options.steps is None else options.steps
    require(steps >= 1, "--steps", steps, "at least 1")
    require(
        options.out.resolve() != options.run.resolve(),
        "--out",
        str(options.out),
        "another folder than --run",
    )
    settings = EvalSettings(tasks=options.tasks, max_new=options.max_new, speed_tasks=1, few=0)
    start, dtype = first_params(run.config, options.init), getattr(torch, run.config.train.dtype)
    params, old = train_old(oracle, under(run, "legacy", UNROLL), start, steps)
    export(params, run.frozen, run.config.draft, folder, tree["num_hidden_layers"], dtype)
    rows = [
        row
        for row in read_jsonl(options.run / "eval.jsonl")
        if row["step"] and "accepted_length" in row
    ]
    best = max(
        rows,
        key=lambda row: row["accepted_length"],
        default={"step": total, "accepted_length": None},
    )
    ours = {
        "steps": total,
        "draft_step": best["step"],
        "recorded_accepted_length": best["accepted_length"],
    }
    old |= {
        "steps": steps,
        "init": options.init,
        "unroll": UNROLL,
        "decay": DECAY,
        "mask_alignment": "legacy",
    }
    old |= judge(options.target, run, folder, prompts, settings)
    ours |= judge(options.target, run, options.run / "draft", prompts, settings)
    return {"same_steps": steps == total, "old": old, "ours": ours}


def told(oracle: Oracle) -> dict[str, Any]:
    """Who was compared, where and how."""
    name = {"name": "SpecForge", "kind": oracle.kind, "commit": COMMIT, "hashes": oracle.hashes}
    return {"oracle": name, "notes": NOTES, **provenance()}


def main() -> None:
    options = parse()
    try:
        oracle = load_oracle(commit=True)
        result = told(oracle) | compare(options, oracle)
    except (UserError, OracleMissingError) as error:
        sys.exit(f"bench.specforge_training: {error}")
    write_json(options.out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

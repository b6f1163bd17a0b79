#!/usr/bin/env python3
"""`eagle3fn parity` on very many cases, in shards that a second call does not repeat.

Times a few cases, prints how long all will take, writes each shard's JSON whole as it ends, and
ends with the sum. The cases are those of `eagle3fn parity` with the same number and seed. One
process, one thread.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is loaded; who imports this has done it
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch

import eagle3fn
from eagle3fn.base.files import write_json
from eagle3fn.base.progress import bar
from eagle3fn.specforge import parity
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle, OracleMissingError, load_oracle
from eagle3fn.testing.builders import Case
from eagle3fn.testing.strategies import nth

TIMED = 25  # cases
FOLDERS = ("base", "model", "specforge", "testing")
"""The package's folders that a case runs through."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code as of `eagle3fn parity`.

    0: equal. 1: a difference, or only trivial cases. 3: no SpecForge.
    """
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        oracle = load_oracle()
    except OracleMissingError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return parity.NO_ORACLE

    # Shards whose file has another key, or is damaged, are made.
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / f"shard-{number:04}.json" for number in range(options.shards)]
    keys = [shard_key(oracle, options, number) for number in range(options.shards)]
    left = [number for number in range(options.shards) if finished(paths[number]) != keys[number]]
    estimate(oracle, options, left)
    for number in left:
        write_json(paths[number], run_shard(oracle, keys[number]))

    total = add_up([json.loads(path.read_text()) for path in paths])
    write_json(options.out / "summary.json", total)
    print("\n".join([oracle.describe(), parity.LEVEL, *parity.describe_counts(total["counts"])]))
    print(json.dumps(total))
    all_equal = total["equal"] == total["cases"]
    return 0 if all_equal and total["nontrivial"] else parity.DIFFERENT


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=2000, help="cases of all shards together (default 2000)"
    )
    parser.add_argument(
        "--shards", type=int, default=10, help="parts that are finished one by one (default 10)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="the same cases for the same seed (default 1)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the shards and summary.json"
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.shards <= options.cases:
        parser.error(f"--shards {options.shards}: must be between 1 and --cases {options.cases}")
    return options


# Shards


def shard_key(oracle: Oracle, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """What a finished shard must have to be kept: its cases, both sides' sources, versions."""
    first = options.cases * number // options.shards
    end = options.cases * (number + 1) // options.shards
    return {
        "seed": options.seed,
        "first": first,
        "last": end - 1,
        "sha256": {"oracle": oracle.digest, "eagle3fn": own_digest()},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def own_digest() -> str:
    """One sha256 over names and bytes of the sources that a case runs through."""
    root = Path(str(eagle3fn.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (root / folder).glob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def finished(path: Path) -> dict[str, Any] | None:
    """The key that a shard on the disk was made with; None if there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found.get("key") if isinstance(found, dict) else None


def cases_of(seed: int, numbers: range) -> list[Case]:
    """The drawn cases of these numbers."""
    return [for_specforge(nth(index, seed)) for index in numbers]


def estimate(oracle: Oracle, options: argparse.Namespace, left: list[int]) -> None:
    """Print how long the shards that are left will take, by the time of a few cases."""
    print(f"{options.shards - len(left)} of {options.shards} shards are finished", flush=True)
    if not left:
        return

    # The first case loads what the others find loaded.
    cases = cases_of(options.seed, range(min(TIMED, options.cases)))
    parity.compare(oracle, cases[:1])
    begun = time.perf_counter()
    parity.compare(oracle, cases)
    each = (time.perf_counter() - begun) / len(cases)

    minutes = each * options.cases * len(left) / options.shards / 60
    print(f"{each:.3f} s a case: the others take about {minutes:.1f} minutes", flush=True)


def run_shard(oracle: Oracle, key: dict[str, Any]) -> dict[str, Any]:
    """A shard's result: `eagle3fn parity`'s summary, the counts, and what it was made with."""
    begun = time.perf_counter()
    cases = cases_of(key["seed"], range(key["first"], key["last"] + 1))
    tally = parity.compare(oracle, cases, bar("case"))
    difference = parity.first_difference(oracle, tally, where=True)
    return {
        **parity.summary(oracle, tally, difference),
        "counts": parity.counts(cases),
        "seconds": round(time.perf_counter() - begun, 1),
        "key": key,
    }


def add_up(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over shards in the same form; its difference is the first shard's that has one."""
    counts = {}
    for name in shards[0]["counts"]:
        counts[name] = dict(sum((Counter(shard["counts"][name]) for shard in shards), Counter()))
    differences = [shard["first_difference"] for shard in shards if shard["first_difference"]]
    return {
        "oracle": shards[0]["oracle"],
        **{name: sum(shard[name] for shard in shards) for name in ("cases", "nontrivial", "equal")},
        "first_difference": differences[0] if differences else None,
        "counts": counts,
        "shards": len(shards),
        "seconds": round(sum(shard["seconds"] for shard in shards), 1),
        "key": shards[0]["key"] | {"last": shards[-1]["key"]["last"]},
    }


if __name__ == "__main__":
    sys.exit(main())

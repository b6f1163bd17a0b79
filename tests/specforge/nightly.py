#!/usr/bin/env python3
"""`eagle3fn parity` on very many cases, in shards that a second call need not repeat.

Times a few cases, says how long all will take, writes every shard's JSON whole as it ends, and ends with the sum.
The cases are those of `eagle3fn parity` with the same number and seed. One process, one thread.
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

if __name__ == "__main__":  # before torch is loaded; who imports this has settled it
    os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}

import torch

import eagle3fn
from eagle3fn.base.files import write_json
from eagle3fn.base.progress import bar
from eagle3fn.specforge import parity
from eagle3fn.specforge.cases import for_specforge
from eagle3fn.specforge.oracle import Oracle, OracleMissingError, load_oracle
from eagle3fn.testing.strategies import nth

TIMED = 25
SOURCES = ("base", "model", "testing")


def main() -> int:
    """Exit code as of `eagle3fn parity`: 0 equal; 1 a difference, or only trivial cases; 3 no old tool."""
    options = arguments()
    torch.set_num_threads(1)
    try:
        oracle = load_oracle()
    except OracleMissingError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return parity.NO_ORACLE
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
    return 0 if total["equal"] == total["cases"] and total["nontrivial"] else parity.DIFFERENT


def arguments() -> argparse.Namespace:
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
    options = parser.parse_args()
    if not 1 <= options.shards <= options.cases:
        parser.error(f"--shards {options.shards}: must be between 1 and --cases {options.cases}")
    return options


def shard_key(oracle: Oracle, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """What a finished shard must say to be taken as it is: cases, both sides' sources, torch."""
    first, last = (options.cases * n // options.shards for n in (number, number + 1))
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    sources = {"oracle": oracle.digest, "eagle3fn": own_digest()}
    return {
        "seed": options.seed,
        "first": first,
        "last": last - 1,
        "sha256": sources,
        "versions": versions,
    }


def own_digest() -> str:
    """One sha256 over names and bytes of the rooms that a case runs through."""
    root, seen = Path(str(eagle3fn.__file__)).parent, hashlib.sha256()
    for path in sorted(path for room in SOURCES for path in (root / room).glob("*.py")):
        seen.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return seen.hexdigest()


def finished(path: Path) -> dict[str, Any] | None:
    """The key that a shard on the disk was made with; None if there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found.get("key") if isinstance(found, dict) else None


def estimate(oracle: Oracle, options: argparse.Namespace, left: list[int]) -> None:
    """Say how long the shards that are left will take, by the time of a few cases."""
    print(f"{options.shards - len(left)} of {options.shards} shards are finished", flush=True)
    if left:
        cases = [
            for_specforge(nth(index, options.seed)) for index in range(min(TIMED, options.cases))
        ]
        parity.compare(oracle, cases[:1])  # the first one loads what the others find loaded
        begun = time.perf_counter()
        parity.compare(oracle, cases)
        each = (time.perf_counter() - begun) / len(cases)
        minutes = each * options.cases * len(left) / options.shards / 60
        print(f"{each:.3f} s a case: the others take about {minutes:.1f} minutes", flush=True)


def run_shard(oracle: Oracle, key: dict[str, Any]) -> dict[str, Any]:
    """A shard's result: `eagle3fn parity`'s summary, the counts, and what it was made with."""
    begun = time.perf_counter()
    cases = [
        for_specforge(nth(index, key["seed"])) for index in range(key["first"], key["last"] + 1)
    ]
    tally = parity.compare(oracle, cases, bar("case"))
    found = parity.summary(oracle, tally, parity.first_difference(oracle, tally, where=True))
    seconds = round(time.perf_counter() - begun, 1)
    return found | {"counts": parity.counts(cases), "seconds": seconds, "key": key}


def add_up(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum over shards in the same form; the first shard's difference, if any, is the first."""
    differences = (shard["first_difference"] for shard in shards if shard["first_difference"])
    counts = {
        name: dict(sum((Counter(shard["counts"][name]) for shard in shards), Counter()))
        for name in shards[0]["counts"]
    }
    return {
        "oracle": shards[0]["oracle"],
        **{name: sum(shard[name] for shard in shards) for name in ("cases", "nontrivial", "equal")},
        "first_difference": next(differences, None),
        "counts": counts,
        "shards": len(shards),
        "seconds": round(sum(shard["seconds"] for shard in shards), 1),
        "key": shards[0]["key"] | {"last": shards[-1]["key"]["last"]},
    }


if __name__ == "__main__":
    sys.exit(main())

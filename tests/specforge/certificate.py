"""Result files of the CUDA gate: what a valid one holds, what it says, and README's rows made from them."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import eagle3fn
from eagle3fn.base.files import read_json, read_jsonl
from eagle3fn.specforge.oracle import COMMIT_FILES

CLAIMS = {
    "kernel": "our Triton loss equals SpecForge's, alone",
    "sdpa": "legacy numerics equal SpecForge with `sdpa`, its Triton loss, dynamo off",
    "flex_attention": "legacy numerics equal SpecForge with `flex_attention` (unfused), its Triton loss, dynamo off",
    "dynamo": "distance from SpecForge with dynamo on; no parity",
}
PARITY = ("kernel", "sdpa", "flex_attention")
PATTERN = "*cuda-gate*.json"
TESTS_PATTERN = "*cuda-tests*.jsonl"  # of `scripts/test.sh --device cuda --outcomes=FILE`
KIND = "cuda gate"  # of a result that was got on a card
TITLES = {
    "smoke": "every kernel, numerics, step, decoding and extraction once, tiny and at real widths",
    "tests": "the tests that take a device",
    "bench": "a step's time and memory",
    "profile": "one fast step by kernels, without a wait for the host",
    "updates": "SpecForge's script against ours, update by update",
}
OUTCOMES = ("passed", "failed", "skipped", "left_out")
UNVERIFIED = "| anything else on a card | no result file yet | - | not seen |"
NOT_SEEN = "not seen"
_LEGACY = (
    "base/device.py base/grad.py base/rows.py model/attention.py model/forward.py model/kernels/legacy_kl.py "
    "model/layers.py model/losses.py model/once.py model/rope.py model/table.py model/teacher.py train/optimizer.py "
    "train/reduce.py train/step.py"
)


def sources(every: bool = False) -> dict[str, str]:
    """Sha256 of every file of the legacy path, or of the whole package."""
    root = Path(eagle3fn.__file__).parent
    names = (
        [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))]
        if every
        else _LEGACY.split()
    )
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


def failures(parity: dict[str, Any], claims: tuple[str, ...]) -> list[str]:
    """Why the gate's part `parity` does not certify these claims; empty if it does. What did not run has not passed."""
    found = [] if parity.get("oracle") else ["no oracle: nothing was compared"]
    for name in claims:
        claim = parity["claims"].get(name)
        found += (
            [f"{name}: not run"]
            if claim is None
            else [f"{name}: {reason}" for reason in _faults(name, claim)]
        )
    return found


def _faults(name: str, claim: dict[str, Any]) -> list[str]:
    count = {key: claim[key] for key in ("cases", "undecidable", "nontrivial")}
    faults = [claim["error"]] if claim.get("error") else []
    faults += [f"{claim['raised']} cases ended with an exception"] if claim.get("raised") else []
    if not count["cases"]:
        return [*faults, "zero cases"]
    if name not in PARITY:
        return faults
    decided = count["cases"] - count["undecidable"]
    if not decided:
        faults.append("every case undecidable: SpecForge differs from itself")
    for key in ("equal_old_kernel", "equal_own_kernel"):
        if claim[key] < decided:
            faults.append(f"{key} in {claim[key]} of {decided} decided cases")
    if claim["reordering_seen"] < decided:
        faults.append(
            f"the deliberate reordering was detected in {claim['reordering_seen']} of {decided} cases"
        )
    if count["nontrivial"] < 0.8 * count["cases"]:
        faults.append(f"{count['nontrivial']} of {count['cases']} cases are not trivial")
    return faults


def stale(result: dict[str, Any]) -> list[str]:
    """Files of ours or of SpecForge that are not those the claims of a gate's result were got with."""
    oracle = result["parts"]["parity"]["result"]["oracle"]
    ours, theirs = result["sources"], oracle["hashes"]
    changed = [name for name, digest in sources().items() if ours.get(name) != digest]
    known = theirs if oracle["kind"] == "wheel" else COMMIT_FILES
    return changed + [f"specforge/{name}" for name in known if theirs.get(name) != known[name]]


def rows(folder: str | Path) -> list[str]:
    """README's rows of four cells: the newest of each part and claim in `folder`, or the one that says there is none.

    A rehearsal on the CPU gives none.
    """
    newest: dict[str, str] = {}
    for path in sorted(Path(folder).glob(PATTERN), key=lambda path: read_json(path)["date"]):
        newest |= {
            row.split(":")[0]: row for row in _rows(path)
        }  # of each part and claim the last result
    for path in sorted(
        Path(folder).glob(TESTS_PATTERN), key=lambda path: read_jsonl(path)[0]["run"]["date"]
    ):
        row = _tests_row(path)
        newest[row.split(":")[0]] = row
    return list(newest.values()) or [UNVERIFIED]


def _tests_row(path: Path) -> str:
    head, *outcomes = read_jsonl(path)
    counts = Counter(row["outcome"].replace(" ", "_") for row in outcomes if "outcome" in row)
    said = ", ".join(f"{counts[key]} {key.replace('_', ' ')}" for key in OUTCOMES)
    hardware, versions = head["run"]["hardware"], head["run"]["versions"]
    link = f"[{head['run']['date'][:10]}](bench/results/{path.name}), revision {head['run']['revision'][:12]}"
    where = f"{hardware['gpu']}, torch {versions['torch']}"
    return _row(
        f"`tests`: {TITLES['tests']}", f"{said}; {link}", where, "scripts/test.sh --device cuda"
    )


def _rows(path: Path) -> list[str]:
    result = read_json(path)
    if result.get("kind") != KIND:
        return []
    hardware, versions = result["hardware"], result["versions"]
    where = f"{hardware['gpu']}, torch {versions['torch']}"
    link = f"[{result['date'][:10]}](bench/results/{path.name})"
    lines = []
    for name, part in result["parts"].items():
        if name == "parity":
            lines += _parity_rows(result, link, where)
        else:
            said = f"{_state(part)}; {link}, revision {result['revision'][:12]}"
            lines.append(_row(f"`{name}`: {TITLES.get(name, name)}", said, where))
    return lines


def _parity_rows(result: dict[str, Any], link: str, where: str) -> list[str]:
    """Rows of the claims and, before them, of the tests that ran on the card."""
    part = result["parts"]["parity"]
    parity = part["result"]
    if not isinstance(parity, dict) or "claims" not in parity:
        return [
            _row("`parity`: nothing was compared", f"not passed: {part['state']}; {link}", where)
        ]
    old = stale(result) if parity.get("oracle") else []
    if (parity.get("oracle") or {}).get("kind") == "wheel":
        where += "; in SpecForge's place its wheel specforge"
    lines = []
    if parity.get("tests"):
        counts = ", ".join(f"{parity['tests'][key]} {key.replace('_', ' ')}" for key in OUTCOMES)
        lines.append(_row(f"`tests`: {TITLES['tests']}", f"{counts}; {link}", where))
    for name, title in CLAIMS.items():
        faults = failures(parity, (name,))
        state = f"not passed: {'; '.join(faults)}" if faults else "passed"
        state = f"stale: {', '.join(old)} changed" if old else state
        said = f"{state}{_numbers(parity['claims'].get(name))}; {link}"
        lines.append(_row(f"`{name}`: {title}", said, where))
    return lines


def _row(title: str, said: str, where: str, command: str = "scripts/cuda_gate.sh all") -> str:
    return f"| CUDA, {title} | `{command}` | {where} | {said} |"


class Run(NamedTuple):
    """One run of the tests on a card: of each file's tests how many there are, ended and passed."""

    date: str
    files: dict[str, Counter[str]]
    sources: dict[str, str]
    link: str


def seen(files: set[str], folder: str | Path) -> str:
    """What README's last column says of a row that names these files of tests: by the newest run in which one ended."""
    found = NOT_SEEN
    for run in sorted(_runs(Path(folder)), key=lambda run: run.date):
        ran = [run.files[name] for name in files if name in run.files and run.files[name]["ended"]]
        if not ran:
            continue
        every, good = (sum(counts[key] for counts in ran) for key in ("all", "passed"))
        whole = good == every and len(ran) == len(files)
        found = (
            f"{'passed' if whole else f'{good} of {every} passed'}, [{run.date[:10]}]({run.link})"
        )
        found += (
            ""
            if _package(run.sources) == _package(sources(every=True))
            else ", sources have changed since"
        )
    return found


def _package(hashes: dict[str, str]) -> dict[str, str]:
    """Without the room that only tests."""
    return {name: digest for name, digest in hashes.items() if not name.startswith("testing/")}


def _runs(folder: Path) -> Iterator[Run]:
    """The runs of the tests in results of the gate, and in files of outcomes (tests/devices.py)."""
    for path in folder.glob(PATTERN):
        result = read_json(path)
        told = ((result["parts"].get("parity") or {}).get("result") or {}).get("tests") or {}
        if result.get("kind") == KIND and told.get("files"):
            files = {
                name: Counter({"ended": one["passed"]} | one) for name, one in told["files"].items()
            }
            yield Run(result["date"], files, result["sources"], f"bench/results/{path.name}")
    for path in folder.glob(TESTS_PATTERN):
        head, *rows = read_jsonl(path)
        files: dict[str, Counter[str]] = {}
        for row in rows:
            for name in row.get("collected", ()):
                files.setdefault(name.partition("::")[0], Counter())["all"] += 1
            if row.get("outcome") in ("passed", "failed", "skipped"):
                files[row["test"].partition("::")[0]] += Counter(
                    {"ended": 1, "passed": row["outcome"] == "passed"}
                )
        yield Run(head["run"]["date"], files, head["run"]["sources"], f"bench/results/{path.name}")


def _state(part: dict[str, Any]) -> str:
    """How a part ended, with how many faults and how much left out."""
    found = part["result"] if isinstance(part["result"], dict) else {}
    counts = {"faults": len(found.get("faults", ())), "left out": len(found.get("left_out", ()))}
    shown = "".join(f", {count} {name}" for name, count in counts.items() if count)
    return ("passed" if part["state"] == "passed" else f"not passed: {part['state']}") + shown


def _numbers(claim: dict[str, Any] | None) -> str:
    if claim is None or not claim["cases"]:
        return ""
    if "ulps" in claim:
        return ", at most " + ", ".join(
            f"{value} ulps in {name}" for name, value in claim["ulps"].items()
        )
    decided = claim["cases"] - claim["undecidable"]
    return (
        f", {claim['equal_own_kernel']} of {decided} cases with our loss kernel, {claim['equal_old_kernel']} with "
        f"SpecForge's; {claim['undecidable']} undecidable"
    )


if __name__ == "__main__":
    print("\n".join(rows(sys.argv[1] if len(sys.argv) > 1 else "bench/results")))

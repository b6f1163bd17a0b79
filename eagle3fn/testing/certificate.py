"""Result files of the CUDA gate: what a valid one holds, what it says, and README's rows made from them."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import eagle3fn
from eagle3fn.base.files import read_json
from eagle3fn.testing.oracle import COMMIT_FILES

CLAIMS = {
    "kernel": "our Triton loss equals the old one, alone",
    "sdpa": "legacy numerics equal the old tool with `sdpa`, its Triton loss, dynamo off",
    "flex_attention": "legacy numerics equal the old tool with `flex_attention` (unfused), its Triton loss, dynamo off",
    "dynamo": "distance from the old tool with dynamo on; no parity",
}
PARITY = ("kernel", "sdpa", "flex_attention")
PATTERN = "*cuda-parity*.json"
UNVERIFIED = "| anything else on CUDA | unverified, no result file yet | CUDA |"
_LEGACY = (
    "base/grad.py base/rows.py model/attention.py model/forward.py model/kernels/legacy_kl.py model/layers.py "
    "model/losses.py model/rope.py model/table.py model/teacher.py"
)


def sources() -> dict[str, str]:
    """Sha256 of every file of the legacy path."""
    root = Path(eagle3fn.__file__).parent
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in _LEGACY.split()}


def failures(certificate: dict[str, Any], claims: tuple[str, ...]) -> list[str]:
    """Why it does not certify these claims; empty if it does. What did not run has not passed."""
    found = [] if certificate.get("oracle") else ["no oracle: nothing was compared"]
    for name in claims:
        claim = certificate["claims"].get(name)
        found += [f"{name}: not run"] if claim is None else [f"{name}: {reason}" for reason in _faults(name, claim)]
    return found


def _faults(name: str, claim: dict[str, Any]) -> list[str]:
    count = {key: claim[key] for key in ("cases", "undecidable", "nontrivial")}
    faults = [claim["error"]] if claim.get("error") else []
    if not count["cases"]:
        return [*faults, "zero cases"]
    if name not in PARITY:
        return faults
    decided = count["cases"] - count["undecidable"]
    if not decided:
        faults.append("every case undecidable: the old tool differs from itself")
    for key in ("equal_old_kernel", "equal_own_kernel"):
        if claim[key] < decided:
            faults.append(f"{key} in {claim[key]} of {decided} decided cases")
    if claim["reordering_seen"] < decided:
        faults.append(f"the deliberate reordering was detected in {claim['reordering_seen']} of {decided} cases")
    if count["nontrivial"] < 0.8 * count["cases"]:
        faults.append(f"{count['nontrivial']} of {count['cases']} cases are not trivial")
    return faults


def stale(certificate: dict[str, Any]) -> list[str]:
    """Files of ours or of the old tool that are not those the result was got with."""
    ours, theirs = certificate["sources"], certificate["oracle"]["hashes"]
    changed = [name for name, digest in sources().items() if ours.get(name) != digest]
    known = theirs if certificate["oracle"]["kind"] == "wheel" else COMMIT_FILES
    return changed + [f"specforge/{name}" for name in known if theirs.get(name) != known[name]]


def rows(folder: str | Path) -> list[str]:
    """README's rows: one for each claim of each result file in `folder`, or the row that says there is none."""
    found = [row for path in sorted(Path(folder).glob(PATTERN)) for row in _rows(path)]
    return found or [UNVERIFIED]


def _rows(path: Path) -> list[str]:
    certificate = read_json(path)
    where = (
        f"{certificate['card']}, torch {certificate['torch']}" if certificate["device"] == "cuda" else "dry run, CPU"
    )
    old = stale(certificate) if certificate.get("oracle") else []
    if (certificate.get("oracle") or {}).get("kind") == "wheel":
        where += "; in the old tool's place the wheel specforge"
    lines = []
    for name, title in CLAIMS.items():
        faults = failures(certificate, (name,))
        state = (
            f"stale: {', '.join(old)} changed" if old else f"not passed: {'; '.join(faults)}" if faults else "passed"
        )
        numbers = _numbers(certificate["claims"].get(name))
        link = f"[{certificate['date'][:10]}](bench/results/{path.name})"
        lines.append(f"| CUDA, `{name}`: {title} | {state}{numbers}; {link} | {where} |")
    return lines


def _numbers(claim: dict[str, Any] | None) -> str:
    if claim is None or not claim["cases"]:
        return ""
    if "ulps" in claim:
        return ", at most " + ", ".join(f"{value} ulps in {name}" for name, value in claim["ulps"].items())
    decided = claim["cases"] - claim["undecidable"]
    return (
        f", {claim['equal_own_kernel']} of {decided} cases with our loss kernel, {claim['equal_old_kernel']} with the "
        f"old one; {claim['undecidable']} undecidable"
    )


if __name__ == "__main__":
    print("\n".join(rows(sys.argv[1] if len(sys.argv) > 1 else "bench/results")))

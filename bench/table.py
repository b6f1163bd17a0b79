"""The pages' tables of speed, memory and serving engines, made from the results in bench/results/.

python -m bench.table           # print them
python -m bench.table --pages   # put them into PAGES, each between two marks
"""

import sys
from typing import Any

from bench import engines_table
from bench.common import RESULTS, ROOT
from eagle3fn.base.files import write_text
from eagle3fn.base.read import read_json

BEGIN = "<!-- python -m bench.table -->\n\n"
END = "<!-- end -->\n"
OURS = ("specforge", "plain", "fast")
PEERS = ("specforge_main", "speculators")
AGAINST = ("ratio", "ratio_specforge_main", "ratio_speculators")
NONE = "-"  # a cell of what was not measured
# Options of a command that do not make the case.
HIDDEN = (
    "--out",
    "--json",
    "--rounds",
    "--mesh",
    "--allocator",
    "--no-memory",
    "--peers",
    "--peers-folder",
)


def engines_text() -> str:
    """The tables of drafts in serving engines, as Markdown."""
    found = [result for result in _results("*-engines-*.json") if "drafts" in result]
    return "\n".join(engines_table.table(result) for result in found)


def text() -> str:
    """The tables of speed and memory, as Markdown."""
    steps = sorted(_results("step-*.json"), key=_order)
    blocks = [step_table(steps)]
    blocks += [loss_line(result) for result in _results("loss-*.json")]
    blocks += [attention_line(result) for result in _results("attention-*.json")]
    blocks += [scaling_line(result) for result in _results("scaling-*.json")]
    blocks += [demo_line(result) for result in _results("demo-step-*.json")]
    return "\n".join(blocks) + "\n"


def _results(pattern: str) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(RESULTS.glob(pattern))]


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    """By device and dtype, raised thresholds first, long samples first, little masked first."""
    settings = result["settings"]
    return (
        settings["device"],
        settings["dtype"],
        settings["allocator"] != "raised",
        -settings["seq"],
        settings["masked"],
    )


def step_table(results: list[dict[str, Any]]) -> str:
    """One row a case; a column that no case has a value for is left out."""
    rows = [cells(result) for result in results]
    header = [name for name in rows[0] if any(row[name] != NONE for row in rows)]
    lines = [_row(header), "|---" * len(header) + "|"]
    for row in rows:
        lines.append(_row([row[name] for name in header]))
    return "\n".join(lines) + "\n"


def cells(result: dict[str, Any]) -> dict[str, str]:
    """A case's cells by the names of their columns."""
    settings = result["settings"]
    processor = result["hardware"]["instructions"]
    survivors = result.get("survivors") or {}
    memory = {name: value["step"] / 2**20 for name, value in result["memory"].items()}
    times = {name: 1000 * took for name, took in result["seconds"].items()}
    return {
        "`python -m bench.step …`": f"`{arguments(result['command'], settings['dtype'])}`",
        "allocator, processor, load": (
            f"{settings['allocator']}, {processor}, {result['load_average']:.1f}"
        ),
        "rows needed": f"{result['shares']['needed']:.0%}",
        "SpecForge, plain, fast: ms": _each(times, OURS, ",.0f"),
        "SpecForge / fast": _one(result, "ratio"),
        "plain / fast": _one(result, "ratio_plain"),
        "memory of a step: SpecForge, fast, MiB": _each(memory, ("specforge", "fast"), ",.0f"),
        "fast / SpecForge": _one(result, "memory_ratio"),
        "fast, of the matmul rate": (
            f"{result['mfu']:.0%} of {number(result['matmul_gflops'])} GFLOP/s"
        ),
        "SpecForge main, speculators: ms": _each(times, PEERS, ",.0f"),
        "SpecForge main / fast": _one(result, "ratio_specforge_main"),
        "speculators / fast": _one(result, "ratio_speculators"),
        "their memory, MiB": _each(memory, PEERS, ",.0f"),
        "survivors: ms": _each(times, ("survivors",), ",.0f"),
        "SpecForge, main, speculators / survivors": _each(survivors, AGAINST, ".2f"),
        "survivors, of the matmul rate": _one(survivors, "mfu", ".0%"),
    }


def _one(values: dict[str, Any], name: str, pattern: str = ".2f") -> str:
    """One number of a result."""
    value = values.get(name)
    return NONE if value is None else f"{value:{pattern}}"


def _each(values: dict[str, Any], names: tuple[str, ...], pattern: str) -> str:
    """Several numbers in one cell."""
    found = [_one(values, name, pattern) for name in names]
    return NONE if set(found) == {NONE} else ", ".join(found)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def arguments(command: str, dtype: str) -> str:
    """The options that make the case, of a command `python -m bench.step …`.

    A dtype that was chosen by the device is named where it is not bfloat16.
    """
    kept = []
    hidden = False
    for word in command.split()[3:]:
        if word.startswith("--"):
            hidden = word in HIDDEN
        if not hidden:
            kept.append(word)
    if "--dtype" not in kept and dtype != "bfloat16":
        kept += ["--dtype", dtype]
    return " ".join(kept)


def number(value: float) -> str:
    """Rounded, with thousands apart."""
    return f"{value:,.0f}"


def about(result: dict[str, Any]) -> str:
    """Its dtype and processor."""
    settings = result["settings"]
    dtype = settings.get("dtype") or settings["train"]["dtype"]
    return f"{dtype}, {result['hardware']['instructions']}"


def _pairs(values: dict[str, float], pattern: str) -> str:
    """Each value at its place: `1.92 at 8,192, 1.91 at 32,768`."""
    return ", ".join(f"{value:{pattern}} at {int(place):,}" for place, value in values.items())


def loss_line(result: dict[str, Any]) -> str:
    """Head, teacher and loss alone."""
    return (
        f"- Head, teacher and loss alone (`python -m bench.loss`, {about(result)}), plain / fast "
        f"over D: {_pairs(result['ratio'], '.2f')}; "
        f"of the matmul rate: {_pairs(result['mfu'], '.0%')}."
    )


def attention_line(result: dict[str, Any]) -> str:
    """Attention alone."""
    return (
        f"- Attention alone (`python -m bench.attention`, {about(result)}), plain / fast "
        f"over lengths: {_pairs(result['ratio'], '.2f')}; "
        f"of the matmul rate: {_pairs(result['mfu'], '.0%')}."
    )


def scaling_line(result: dict[str, Any]) -> str:
    """How cost grows."""
    seq = result["sweeps"]["seq"]
    beyond = []
    for row in result["sweeps"]["draft_vocab"]:
        beyond.append(f"{number(row['memory_beyond_state'] / 2**20)} at {row['draft_vocab']:,}")
    growth = seq[-1]["us_per_token"] / seq[0]["us_per_token"]
    return (
        f"- Growth of the fast step (`python -m bench.scaling`, {about(result)}): "
        f"from {seq[0]['seq']:,} to {seq[-1]['seq']:,} tokens a sample, {seq[0]['tokens']:,} "
        f"in all, a token takes {result['seq_growth']:.2f} times as long without attention's "
        f"own time, {growth:.2f} times with it; memory beyond weights, gradients, masters and "
        f"moments, in MiB over draft vocabularies: {', '.join(beyond)}."
    )


def demo_line(result: dict[str, Any]) -> str:
    """The demo's own training steps."""
    rates = result["tokens_per_s"]
    lengths = result.get("accepted_length")
    reached = ""
    if lengths:
        reached = f"; held-out accepted length {lengths['plain']:.4f} and {lengths['fast']:.4f}"
    return (
        f"- The demo's training (`python -m bench.demo`, its settings, {result['tokens']:,} "
        f"tokens, {about(result)}): {number(rates['plain'])} tokens/s under the plain numerics, "
        f"{number(rates['fast'])} under the fast ({result['ratio']:.2f} times{reached})."
    )


PAGES = {"docs/speed.md": text, "docs/engines-check.md": engines_text}


def put(page: str, tables: str) -> str:
    """The page with the tables between its marks."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}{tables}\n{END}{after}"


def main() -> None:
    if "--pages" in sys.argv:
        for name, tables in PAGES.items():
            page = (ROOT / name).read_text(encoding="utf-8")
            write_text(ROOT / name, put(page, tables()))
    print(text(), engines_text(), sep="\n", end="")


if __name__ == "__main__":
    main()

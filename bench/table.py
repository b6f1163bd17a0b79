"""README's tables of speed and memory, made from the results in bench/results/; `--readme` puts them there."""

import sys
from typing import Any

from bench.common import RESULTS, ROOT
from eagle3fn.base.files import read_json, write_text

BEGIN, END = "<!-- python -m bench.table -->\n\n", "\n<!-- end -->\n"
HIDDEN = ("--out", "--json", "--rounds", "--mesh", "--allocator", "--no-memory")


def text() -> str:
    """All tables, as Markdown."""
    steps = sorted((read_json(path) for path in RESULTS.glob("step-*.json")), key=_order)
    blocks = [step_table(steps)]
    for stem, about in (
        ("loss", loss_line),
        ("attention", attention_line),
        ("scaling", scaling_line),
    ):
        blocks += [about(read_json(path)) for path in sorted(RESULTS.glob(f"{stem}-*.json"))]
    blocks += [demo_line(read_json(path)) for path in sorted(RESULTS.glob("demo-step-*.json"))]
    return "\n".join(blocks) + "\n"


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    told = result["settings"]
    return (
        told["device"],
        told["dtype"],
        told["allocator"] != "raised",
        -told["seq"],
        told["masked"],
    )


def step_table(results: list[dict[str, Any]]) -> str:
    """One row a case."""
    lines = [
        "| `python -m bench.step …` | allocator, processor, load | rows needed | old, legacy, fast: ms | old / fast "
        "| legacy / fast | memory of a step: old, fast, MiB | fast / old | fast, of the matmul rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(step_row(result) for result in results)]) + "\n"


def step_row(result: dict[str, Any]) -> str:
    """A case's row; "-": not measured."""
    took = ", ".join(number(1000 * result["seconds"][name]) for name in ("old", "plain", "fast"))
    used = {name: value["step"] / 2**20 for name, value in result["memory"].items()}
    cells = [
        f"`{arguments(result['command'])}`",
        f"{result['settings']['allocator']}, {result['hardware']['instructions']}, {result['load_average']:.1f}",
        f"{result['shares']['needed']:.0%}",
        took,
        f"{result['ratio']:.2f}",
        f"{result['ratio_plain']:.2f}",
        f"{number(used['old'])}, {number(used['fast'])}" if used else "-",
        f"{result['memory_ratio']:.2f}" if used else "-",
        f"{result['mfu']:.0%} of {number(result['matmul_gflops'])} GFLOP/s",
    ]
    return f"| {' | '.join(cells)} |"


def arguments(command: str) -> str:
    """The options that make the case."""
    words, kept = command.split()[3:], []
    options = [i for i, word in enumerate(words) if word.startswith("--")]
    for i, end in zip(options, [*options[1:], len(words)], strict=True):
        kept += words[i:end] if words[i] not in HIDDEN else []
    return " ".join(kept)


def number(value: float) -> str:
    """Rounded, with thousands apart."""
    return f"{value:,.0f}"


def about(result: dict[str, Any]) -> str:
    """Its dtype and processor."""
    told = result["settings"]
    return f"{told.get('dtype') or told['train']['dtype']}, {result['hardware']['instructions']}"


def _pairs(values: dict[str, float], pattern: str) -> str:
    return ", ".join(
        f"{pattern.format(value)} at {int(place):,}" for place, value in values.items()
    )


def loss_line(result: dict[str, Any]) -> str:
    """Head, teacher and loss alone."""
    return (
        f"- Head, teacher and loss alone (`python -m bench.loss`, {about(result)}), legacy / fast over D: "
        f"{_pairs(result['ratio'], '{:.2f}')}; of the matmul rate: {_pairs(result['mfu'], '{:.0%}')}."
    )


def attention_line(result: dict[str, Any]) -> str:
    """Attention alone."""
    return (
        f"- Attention alone (`python -m bench.attention`, {about(result)}), legacy / fast over lengths: "
        f"{_pairs(result['ratio'], '{:.2f}')}; of the matmul rate: {_pairs(result['mfu'], '{:.0%}')}."
    )


def scaling_line(result: dict[str, Any]) -> str:
    """How cost grows."""
    seq, vocab = result["sweeps"]["seq"], result["sweeps"]["draft_vocab"]
    beyond = ", ".join(
        f"{number(row['memory_beyond_state'] / 2**20)} at {row['draft_vocab']:,}" for row in vocab
    )
    return (
        f"- Growth of the fast step (`python -m bench.scaling`, {about(result)}): from {seq[0]['seq']:,} to "
        f"{seq[-1]['seq']:,} tokens a "
        f"sample, {seq[0]['tokens']:,} in all, a token takes {result['seq_growth']:.2f} times as long without "
        f"attention's own time, {seq[-1]['us_per_token'] / seq[0]['us_per_token']:.2f} times with it; memory beyond "
        f"weights, gradients, masters and moments, in MiB over draft vocabularies: {beyond}."
    )


def demo_line(result: dict[str, Any]) -> str:
    """The demo's own training steps."""
    rates, lengths = result["tokens_per_s"], result.get("accepted_length")
    reached = (
        f"; held-out accepted length {lengths['legacy']:.4f} and {lengths['fast']:.4f}"
        if lengths
        else ""
    )
    return (
        f"- The demo's training (`python -m bench.demo`, its settings, {result['tokens']:,} tokens, "
        f"{about(result)}): {number(rates['legacy'])} tokens/s under "
        f"the legacy numerics, {number(rates['fast'])} under the fast ({result['ratio']:.2f} times{reached})."
    )


def put(page: str) -> str:
    """The page with the tables between their two marks."""
    before, rest = page.split(BEGIN, 1)
    return before + BEGIN + text() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    if "--readme" in sys.argv:
        write_text(readme, put(readme.read_text(encoding="utf-8")))
    print(text(), end="")

"""What features lose by being stored in fewer bytes: the teacher's KL, its choices, bytes a token.

    python -m bench.stores compare --target FOLDER --features FOLDER
    python -m bench.stores convert FOLDER OUT --store fp8

`compare` puts the last hidden states of a few hundred supervised tokens, spread over all samples,
through each store of `data.storage` and back, and compares the target's distributions after it with
those before: `KL(p || p_stored)` over the whole vocabulary in nats, mean and largest, and the share
of tokens whose first choice is the same. Of the taps, which no distribution follows from, it gives
the error relative to the state's norm. The last line is JSON.

`convert` writes a feature folder in another store, so that drafts are trained on both and compared
(`bench.choices`). It is as the target's own extraction would have written it, but for its
fingerprint: `extract` doesn't go on with it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench.launch import settle

    settle()

import argparse
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.launch import add_arguments
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import json_sha256, whole_folder
from eagle3fn.base.places import anything, check_out_folder
from eagle3fn.base.provenance import provenance
from eagle3fn.base.types import Sample
from eagle3fn.data.feature_size import bytes_per_token
from eagle3fn.data.feature_writing import write_index, write_shard
from eagle3fn.data.features import FeatureSet, open_features, read_sample, store_of, tensors_of
from eagle3fn.data.storage import STORES, decode, encode, store_entry
from eagle3fn.data.target_tensors import read_target_tensors

BF16 = "bf16"
_ROWS_OF_SAMPLE = 16
_BLOCK = 128  # rows whose logits are held at once


def parse() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    compare = actions.add_parser("compare", help="teacher KL, choices and bytes of each store")
    compare.add_argument("--target", required=True)
    compare.add_argument("--features", required=True, help="a folder whose values are stored whole")
    compare.add_argument("--rows", type=int, default=512, help="supervised tokens (default 512)")
    add_arguments(compare)

    change = actions.add_parser("convert", help="a feature folder in another store")
    change.add_argument("folder")
    change.add_argument("out", help="a new folder")
    change.add_argument("--store", required=True, choices=(BF16, *STORES))
    return parser.parse_args()


# Another store


def convert(folder: str | Path, out: str | Path, store: str) -> dict[str, Any]:
    """Write a feature folder in another store, shard by shard, whole or not at all; its index.

    Raises:
        UserError: `out` is there, or a damaged sample.
    """
    out = Path(out)
    check_out_folder(out, anything)
    features = open_features(folder)
    chosen = store if store in STORES else None
    by_shard: dict[str, list[int]] = {}
    for number, entry in enumerate(features.samples):
        by_shard.setdefault(entry["shard"], []).append(number)

    sidecars = []
    with whole_folder(out, anything) as temporary:
        for place, numbers in enumerate(by_shard.values()):
            samples = {}
            entries = []
            for number in numbers:
                entry = dict(features.samples[number])
                del entry["shard"]
                entries.append(entry)
                samples[entry["key"]] = read_sample(features, number)
            sidecars.append(
                write_shard(temporary, place, samples, {"samples": entries}, store=chosen)
            )
            print(f"{place + 1} of {len(by_shard)} shards", file=sys.stderr, flush=True)
        return write_index(temporary, _head(features, store), sidecars)


def _head(features: FeatureSet, store: str) -> dict[str, Any]:
    """The index without samples, shards and totals, in another store."""
    listed = ("schema", "samples", "table", "shards", "totals", "sha256", "store")
    head = {key: value for key, value in features.index.items() if key not in listed}
    if "fingerprint" in head:
        head["fingerprint"] = json_sha256([head["fingerprint"], "converted to", store])
    return head | store_entry(store if store in STORES else None)


# What is lost


def compare(features: FeatureSet, head: Tensor, rows: int) -> dict[str, Any]:
    """For each store the teacher's KL and choices, the taps' error, and bytes of a token.

    Args:
        features: a folder whose values are stored whole.
        head: the target's, `(V, Ht)`.
        rows: supervised tokens that are looked at, at most 16 of a sample.

    Raises:
        UserError: the folder is in one of the stores.
    """
    if store_of(features) is not None:
        raise UserError(
            f"{features.folder}: stored in {store_of(features)}; name a folder in {BF16}"
        )
    samples = []
    places = []
    for sample in _spread(features, rows):
        supervised = sample.token_mask.nonzero().flatten()
        step = max(1, len(supervised) // _ROWS_OF_SAMPLE)
        samples.append(sample)
        places.append(supervised[::step][:_ROWS_OF_SAMPLE])

    taps = samples[0].aux_hidden.shape[-1] // samples[0].last_hidden.shape[-1]
    sizes = (head.shape[1], taps, torch.bfloat16)
    found = {}
    for store in STORES:
        found[store] = {
            **_teacher_loss(samples, places, head, store),
            "taps_error": _taps_error(samples, places, store),
            "bytes_per_token": bytes_per_token(*sizes, store),
        }
    found[BF16] = {"bytes_per_token": bytes_per_token(*sizes)}
    return {"rows": sum(len(place) for place in places), "samples": len(samples), "stores": found}


def _spread(features: FeatureSet, rows: int) -> list[Sample]:
    """Samples spread over the folder, enough for so many rows."""
    count = min(-(-rows // _ROWS_OF_SAMPLE), len(features.samples))
    numbers = [place * len(features.samples) // count for place in range(count)]
    return [read_sample(features, number) for number in numbers]


def _stored(hidden: Tensor, width: int, store: str) -> Tensor:
    """A hidden tensor `(S, A·W)`, through the store and back."""
    return decode(store, encode(store, hidden, width))


def _teacher_loss(
    samples: list[Sample], places: list[Tensor], head: Tensor, store: str
) -> dict[str, float]:
    """`KL(p || p_stored)` in nats, mean and largest, and the share of equal first choices."""
    # A whole sample is stored at once, as in a shard: its outlier columns are its own.
    exact = []
    stored = []
    for sample, place in zip(samples, places, strict=True):
        last = sample.last_hidden
        exact.append(last[place])
        stored.append(_stored(last, last.shape[-1], store)[place])

    divergences = []
    equal = 0
    blocks = zip(torch.cat(exact).split(_BLOCK), torch.cat(stored).split(_BLOCK), strict=True)
    weight = head.float()
    for before, after in blocks:
        log_p = (before.float() @ weight.T).log_softmax(-1)  # (R, V)
        log_q = (after.float() @ weight.T).log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        equal += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return {
        "kl_mean": float(kl.mean()),
        "kl_largest": float(kl.max()),
        "same_choice": equal / len(kl),
    }


def _taps_error(samples: list[Sample], places: list[Tensor], store: str) -> list[float]:
    """For each tap the mean over tokens of `‖stored - exact‖ / ‖exact‖`."""
    width = samples[0].last_hidden.shape[-1]
    errors = []
    for sample, place in zip(samples, places, strict=True):
        exact = sample.aux_hidden[place].float()
        stored = _stored(sample.aux_hidden, width, store)[place].float()
        apart = (stored - exact).unflatten(-1, (-1, width)).norm(dim=-1)  # (R, A)
        errors.append(apart / exact.unflatten(-1, (-1, width)).norm(dim=-1))
    return torch.cat(errors).mean(0).tolist()


def main() -> int:
    options = parse()
    if options.action == "convert":
        index = convert(options.folder, options.out, options.store)
        before = open_features(options.folder).index["totals"]["bytes"]
        after = index["totals"]["bytes"]
        print(f"{options.out}: {after} bytes in {options.store}, {after / before:.3f} of before")
        return 0

    torch.set_num_threads(options.threads)
    features = open_features(options.features)
    target = read_target_tensors(options.target, torch.bfloat16, tensors_of(features))
    result = {
        "settings": {"rows": options.rows, "threads": options.threads},
        "target": Path(options.target).name,
        **compare(features, target.head, options.rows),
        **provenance(),
    }
    common.finish(result, options.out, "stores")
    return 0


if __name__ == "__main__":
    sys.exit(common.program("bench.stores", main))

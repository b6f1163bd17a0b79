"""Is more accepted of several drafts? Three seeds trained at once by `vmap`, their average judged.

An average runs all of its drafts, so one draft with all of their updates is judged too.
"""

import torch
from problem import open_problem

import eagle3fn as e3

DRAFTS, STEPS = 3, 16


def acceptance(drafts, batch, config, frozen):
    """`Σ min(p, q)` of each drafted token `(K,)`; p is the target's, q the drafts' average."""
    seen = []

    def look(logits, p_draft, p_full):  # a loss sees them, once an unroll step
        seen.append((p_full, logits.softmax(-1), logits.any(-1)))  # without a label they are 0
        return logits.sum(-1)

    for params in drafts:
        e3.forward_loss(params, batch, config=config, frozen=frozen, loss=look)
    by_draft = (torch.stack(x).unflatten(0, (len(drafts), -1)) for x in zip(*seen, strict=True))
    p, q, has_label = (x.float().mean(0) for x in by_draft)  # (K, B, S, …)
    chances = torch.minimum(p, q).sum(-1) * has_label
    return chances.sum((1, 2)) / has_label.sum((1, 2))


def main() -> None:
    """Train on the same batches; compare on the held-out samples."""
    config, frozen, features, kept, held_out, _ = open_problem(
        objective=e3.ObjectiveConfig(ttt_length=3, numerics="plain"),
        optimizer=e3.OptimizerConfig(name="muon"),
        data=e3.DataConfig(max_length=128, held_out=4),
    )
    fns = e3.bind(config, frozen)
    batches = list(e3.batches(features, kept, config, start=0, stop=DRAFTS * STEPS))
    batch = e3.collate([e3.read_sample(features, number) for number in held_out], config)

    def trained(params, steps):
        state = fns.init_state(params)
        for micro_batches in batches[:steps]:
            state, _ = fns.step(state, micro_batches, rate=1e-3)
        return state.params

    first = [fns.init(seed) for seed in range(DRAFTS)]
    stacked = {name: torch.stack([params[name] for params in first]) for name in first[0]}
    together = torch.vmap(lambda params: trained(params, STEPS))(stacked)
    drafts = [{name: leaf[i] for name, leaf in together.items()} for i in range(DRAFTS)]
    compared = {f"draft of seed {seed}": [draft] for seed, draft in enumerate(drafts)}
    compared[f"average of q, {DRAFTS} drafts a token"] = drafts
    compared[f"one draft, {DRAFTS} times the updates"] = [trained(first[0], DRAFTS * STEPS)]
    for name, judged in compared.items():
        print(f"{name}:", acceptance(judged, batch, config, frozen).tolist())


if __name__ == "__main__":
    main()

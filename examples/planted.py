"""Bad conversations are found by the norms of per-sample gradients.

In 4 of 24 conversations the target's states are shuffled, as by a fault of an extraction. The
draft is RUN/train/draft; without one it is trained here, on all 24. A gradient is a mean over rows,
whose noise shrinks with their root: so `√rows · |gradient|` is ranked.
"""

import torch
from problem import Problem, draw, open_problem
from torch.func import grad_and_value, vmap

import eagle3fn as e3

PLANTED = [5, 10, 15, 20]


def draft_of(problem: Problem, functions: e3.Functions, samples: list[e3.Sample]):
    """The parameters of a draft that has learnt something."""
    if (stored := problem.folder / "train" / "draft").is_dir():
        return e3.load_draft(stored, torch.bfloat16).params
    state = functions.init_state(functions.init(problem.config.train.seed))
    for step in range(60):
        batch = e3.collate(samples[step % 6 :: 6], problem.config)
        state, _ = functions.step(state, (batch,), rate=0.01, donate=True)
    return state.params


def main() -> None:
    """Plant, take a gradient for each sample, rank."""
    problem = open_problem(objective=e3.ObjectiveConfig(ttt_length=2))
    samples = [e3.read_sample(problem.features, number) for number in problem.kept[:24]]
    for number in PLANTED:
        last = samples[number].last_hidden
        order = torch.randperm(len(last), generator=torch.Generator().manual_seed(number))
        samples[number] = samples[number]._replace(last_hidden=last[order])
    functions = e3.bind(problem.config, problem.frozen)
    params = draft_of(problem, functions, samples)

    def score(*fields) -> tuple[torch.Tensor, torch.Tensor]:
        one = e3.Batch(*(field[None] for field in fields))
        grads, (loss, aux) = grad_and_value(functions.forward_loss, has_aux=True)(params, one)
        squares = torch.stack([leaf.float().square().sum() for leaf in grads.values()])
        return (squares.sum() * aux.rows[0]).sqrt(), loss

    # Four gradients at a time; of each its norm is kept.
    norms, losses = vmap(score, chunk_size=4)(*e3.collate(samples, problem.config)[:5])
    bad = torch.tensor([number in PLANTED for number in range(len(samples))])
    print("planted", PLANTED, "ranked", norms.argsort(descending=True).tolist())
    for name, scores in {"gradient": norms, "loss": losses}.items():
        area = (scores[bad][:, None] > scores[~bad]).float().mean()
        print(f"area under the ROC curve by {name}: {area:.2f}")
    colours = ["red" if planted else "grey" for planted in bad]
    labels = {"xlabel": "conversation", "ylabel": "√rows · |gradient|", "title": "red: planted"}
    file = problem.folder / "planted.png"
    draw(file, lambda axes: axes.bar(range(24), norms.tolist(), color=colours), **labels)


if __name__ == "__main__":
    main()

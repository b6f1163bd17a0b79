"""What the stages hand to each other, as NamedTuples of tensors.

Shape letters, used in every docstring: `B` batch, `S` sequence, `K` unroll steps, `H` draft hidden,
`Ht` target hidden, `A` taps, `I` inner size of the MLP, `N` heads, `J` key-value heads, `E` head
size, `V` target vocabulary, `D` draft vocabulary, `T` computed rows, `R` those of all steps
together, `P` scored labels, `X` pairs of a row and its label, `C` conversations in packed rows.
"""

from typing import Any, NamedTuple

from torch import Tensor

from eagle3fn.base.rows import RowPlan

Params = dict[str, Tensor]
"""The trainable tensors under their exported names, in `model.table` order."""


class Sample(NamedTuple):
    """One conversation with the target's features.

    The last axis of `aux_hidden` is the three taps, one after another.
    """

    input_ids: Tensor  # (S,) int64
    token_mask: Tensor  # (S,) int64, 1 on assistant tokens
    aux_hidden: Tensor  # (S, A·Ht)
    last_hidden: Tensor  # (S, Ht), after the target's final norm


class Batch(NamedTuple):
    """What `forward_loss` reads, aligned once, by `collate`: nothing after it shifts.

    Row `t` of a sample has the target's features of token `t`. At unroll step `i` it reads the
    embedding of token `t + i + 1`, and is scored against the target's distribution for token
    `t + i + 2`: the label at place `t + i`. Samples are right-padded with zeros; or a row is packed
    with samples one after another (`data.collate.collate_packed`), and `starts` keeps them apart.

    `row_mask` must be 0 on padding, and where the label `t + i` is past the sample's end; that is
    not checked, as it would read values. There the two numerics differ: plain hides padded keys
    from a padded row, fast does not, and counts no row without a label.
    """

    # (B, S + K - 1) int64: row t reads entry t + i, which is token t + i + 1; 0 past the end
    next_ids: Tensor
    attention_mask: Tensor  # (B, S) int64, 1 on real tokens
    row_mask: Tensor  # (B, K, S) int64: 1 where the row is trained at the step
    aux_hidden: Tensor  # (B, S, A·Ht): the A taps of token t
    # (B, S, Ht): the last hidden state of token t + 1, from which the label at t is made; 0 past
    # the end
    label_hidden: Tensor
    position_ids: Tensor | None = None  # (B, S) int64 in [0, S); absent: 0 … S - 1
    # (K,) fp32: rows trained at each unroll step over the *global* batch; absent: over this batch.
    row_counts: Tensor | None = None
    # (B, S) int64: at how many steps each row takes part, drawn by the data pipeline
    # (`objective.survival`); absent: at all K
    survives: Tensor | None = None
    # `base.rows.plan_rows(row_mask, survives, starts)`; absent: made from them. A given one must be
    # theirs: another gives another loss. It has no form under `vmap`.
    plan: RowPlan | None = None
    # (B, S) int64, of packed rows: the first place of the conversation that each place belongs to;
    # absent: one conversation a row. `position_ids` then begin at 0 in each conversation
    starts: Tensor | None = None


class VocabMap(NamedTuple):
    """Which target tokens are in the draft vocabulary. `nonzero(t2d) == d2t + arange(D)`."""

    t2d: Tensor  # (V,) bool
    d2t: Tensor  # (D,) int64, an offset: draft id j is target id j + d2t[j]


class Frozen(NamedTuple):
    """Tensors of the target, and the vocabulary map; never differentiated.

    `embed_tokens` is None when the draft trains its own (Ht != H). `target_norm` is read by the
    start from the target alone (`train.init = "target"`).
    """

    embed_tokens: Tensor | None  # (V, H)
    target_head: Tensor  # (V, Ht)
    t2d: Tensor  # (V,) bool
    d2t: Tensor  # (D,) int64
    target_norm: Tensor | None = None  # (Ht,), the weight of the target's final norm


class Teacher(NamedTuple):
    """The target's distributions at every label, padded by K rows at the end of the sequence."""

    p_draft: Tensor  # (B, S + K, D) fp32: softmax over the draft vocabulary
    p_full: Tensor  # (B, S + K, D) fp32: the same tokens' probabilities under the full vocabulary
    token: Tensor  # (B, S + K) int64: the target's argmax
    # (B, S + K) int32: 1 where that token is in the draft vocabulary. A row whose label is not
    # adds nothing to the loss; under normalization "mask" it counts in the divisor all the same.
    known: Tensor


class Aux(NamedTuple):
    """Metrics of one batch as sums and counts, so that micro-batches add up. fp32 unless said
    otherwise.
    """

    losses: Tensor  # (K,) per-step loss, before the decay
    correct: Tensor  # (K,) int64: trained rows whose draft argmax is the target's argmax
    rows: Tensor  # (K,) int64: trained rows
    # (K,) int64: of these, the rows whose earlier drafted tokens were all trained and right
    chain_rows: Tensor
    chain_correct: Tensor  # (K,) int64: of those, the ones that are right at this step too
    accept: Tensor  # (K,) sum over trained rows with a known label of Σ min(p_full, draft)
    accept_rows: Tensor  # (K,) those rows
    # () sum over rows of Σ_i Π_{j≤i} correct_j: the drafted tokens that a greedy verifier accepts
    greedy: Tensor
    # () the same with Σ min(p_full, draft) in place of correct
    sampled: Tensor


class TrainState(NamedTuple):
    """Everything a step reads and writes, as one pytree of tensors.

    Under a device mesh all but `step` are DTensors.
    """

    params: Params  # compute dtype
    masters: Params  # fp32
    opt: Any  # the optimizer's own pytree (moments, fp32)
    step: Tensor  # () int64, on the CPU: updates made so far

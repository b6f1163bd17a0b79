"""Target, draft and prompts of a check in engines, and what this package computes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle3fn.base.draft_config import aux_layers
from eagle3fn.base.errors import UserError
from eagle3fn.base.sections import require
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.user_turns import chat_prompt
from eagle3fn.engines.logits import Chain
from eagle3fn.use.decode import Decoded, check_pair, check_request, open_target, speculate
from eagle3fn.use.drafter import Drafter
from eagle3fn.use.export import Draft, load_draft


@dataclass(frozen=True)
class CheckSettings:
    """How much is compared.

    `tasks` prompts are decoded, `max_new` tokens each, by rounds of `draft_length`; logits are
    compared after the first `logit_tasks` of them.
    """

    tasks: int = 10
    max_new: int = 48
    draft_length: int = 4
    logit_tasks: int = 5

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("tasks", "draft_length", "logit_tasks"):
            value = getattr(self, name)
            require(value >= 1, f"check.{name}", value, "at least 1")
        require(self.max_new >= 2, "check.max_new", self.max_new, "at least 2")


class Pair(NamedTuple):
    """A target and the prompts, which serve all drafts of it; fp32 on the CPU."""

    folder: Path
    model: Any
    prompts: list[Tensor]  # (1, P) each
    end_tokens: tuple[int, ...]


class Ours(NamedTuple):
    """What a draft does here."""

    folder: Path
    draft: Draft
    taps: tuple[int, ...]
    chains: list[Chain]  # its proposals after the first prompts
    decoded: list[Decoded]


# This side


def load_pair(target: str | Path, prompts: Sequence[str], settings: CheckSettings) -> Pair:
    """The target in fp32, and the first prompts in its chat template.

    Raises:
        UserError: unreadable, or no prompts.
    """
    if not prompts:
        raise UserError("prompts: none given; name a file of rows with a prompt")
    model, tokenizer = load_target(target, torch.float32)
    template = ChatTemplate(tokenizer)
    encoded = []
    for text in prompts[: settings.tasks]:
        prompt = chat_prompt(template, text)
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        encoded.append(ids)
    return Pair(Path(target), model, encoded, stop_ids(model, tokenizer))


def run_ours(
    pair: Pair,
    folder: str | Path,
    settings: CheckSettings,
    on_done: Callable[[int], None] = lambda number: None,
) -> Ours:
    """Proposals and answers of an exported draft; `on_done` gets the number of prompts decoded.

    Raises:
        UserError: unreadable, a draft of another target, or prompts that are too long.
    """
    draft = load_draft(folder, torch.float32)
    text = pair.model.config.get_text_config()
    check_pair(draft.config, text, str(folder), str(pair.folder))
    for prompt in pair.prompts:
        check_request(pair.model, draft, prompt, settings.draft_length, settings.max_new)

    chains = []
    for prompt in pair.prompts[: settings.logit_tasks]:
        chains.append(propose(pair.model, draft, prompt, settings.draft_length))
    decoded = []
    for number, prompt in enumerate(pair.prompts, 1):
        decoded.append(
            speculate(
                pair.model, draft, prompt, settings.draft_length, settings.max_new, pair.end_tokens
            )
        )
        on_done(number)
    return Ours(
        Path(folder), draft, aux_layers(draft.config, text.num_hidden_layers), chains, decoded
    )


@torch.inference_mode()
def propose(model: Any, draft: Draft, prompt: Tensor, count: int) -> Chain:
    """What the draft proposes after a prompt `(1, P)`: `count` tokens, greedily."""
    with open_target(model, draft) as target:
        token = target.read(prompt, keep=1)  # (1, 1)
        aux = target.features(prompt.shape[1])  # (1, P, A·Ht)
    next_ids = torch.cat([prompt[:, 1:], token], dim=1)
    drafter = Drafter(draft, prompt.shape[1] + count, model.get_input_embeddings().weight)
    drafted = drafter.draft(aux, next_ids, count)
    return Chain(aux[0], next_ids[0], drafted[0])


@torch.inference_mode()
def chain_logits(draft: Draft, embed_tokens: Tensor, chain: Chain) -> Tensor:
    """The draft's logits `(K, D)` of the chain's last row, and of the K - 1 drafted after it."""
    count = len(chain.drafted)
    drafter = Drafter(draft, len(chain.aux) + count, embed_tokens)
    hidden = drafter.commit(chain.aux[None], chain.next_ids[None])
    found = [drafter.logits(hidden)[0, 0]]
    for step in range(1, count):
        hidden = drafter.extend(hidden, chain.drafted[None, step - 1 : step], step)
        found.append(drafter.logits(hidden)[0, 0])
    return torch.stack(found)

"""The target's model as the library loads it, checked to be the teacher of a draft.

transformers is imported here inside functions, never when the file is loaded.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eagle3fn.base.device import SPREAD, check_device, check_spread
from eagle3fn.base.errors import UserError
from eagle3fn.data.decoder import check_present
from eagle3fn.data.target_loading import load_tokenizer, load_weights
from eagle3fn.data.target_source import loaded_config, no_fit, source_of, weights_folder
from eagle3fn.data.teacher_check import check_teacher
from eagle3fn.data.weights import check_floating, check_weights, is_finite, weight_files


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    attn: str = "sdpa",
) -> tuple[Any, Any]:
    """The target model, in eval mode and without gradients, and its tokenizer.

    A target that has no `attn` implementation is loaded with "eager". What training will compute is
    compared with the model (`data.teacher_check`). On the device "auto" its layers are spread over
    all cards.

    Raises:
        UserError: as `target_config`; a device that is not there; the weights are not loadable, do
            not fit the target or the cards, or are not all there; a biased head; logits that are
            not `last_hidden @ head.T`.
    """
    from transformers.utils import logging

    spread = device == SPREAD
    if spread:
        check_spread()
    else:
        check_device(device)
    config = loaded_config(path_or_id)
    _, gguf = source_of(path_or_id)
    if not gguf:
        folder = weights_folder(path_or_id)
        files = weight_files(folder)  # training reads them: refused before all else
        if getattr(config, "quantization_config", None) is None:
            check_floating(folder, files)
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(path_or_id)
    try:
        model, loading = load_weights(path_or_id, attn, dtype, spread)
    except UserError:
        # transformers' own message rarely names the damaged file; `check_weights` does.
        if Path(path_or_id).is_dir():
            check_weights(Path(path_or_id))
        raise

    # transformers draws at random what the files lack.
    parameters = {key for key, _ in model.named_parameters()}
    missing = set(loading["missing_keys"]) & parameters
    if missing:
        raise no_fit(path_or_id, f"no tensor {min(missing)}, which config.json asks for")
    check_unbiased(model, path_or_id)
    if spread:
        check_present(model)  # what the cards have no room for is left out
    else:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    if gguf:
        model.config.name_or_path = str(path_or_id)  # the file, not its folder

    # The teacher must be this model.
    with nan_named(model, str(path_or_id)):
        check_teacher(model, str(path_or_id))
    return model, tokenizer


@contextmanager
def nan_named(model: Any, where: str) -> Iterator[None]:
    """Raise a refusal within the block as one of the weights that hold NaN, if some do.

    Raises:
        UserError: names the tensor.
    """
    try:
        yield
    except UserError:
        for name, value in model.named_parameters():
            if not is_finite(value):
                raise UserError(
                    f"{where}: {name} holds NaN or infinity in "
                    f"{str(value.dtype).removeprefix('torch.')}; fetch the target's files again"
                ) from None
        raise


def check_unbiased(model: Any, path_or_id: str | Path, keys: Iterable[str] = ()) -> None:
    """Refuse a target with a biased head: the draft takes no bias from it.

    Args:
        model: the target; its architecture is enough.
        path_or_id: names it in errors.
        keys: of the tensors in its files, where they were listed.

    Raises:
        UserError: a bias in the model or in the files.
    """
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    if biased or any(key.endswith("lm_head.bias") for key in keys):
        raise UserError(
            f"{path_or_id}: lm_head.bias: targets with a biased head are not supported; "
            "choose another target"
        )

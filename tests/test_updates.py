"""Updates of SpecForge's script against ours on random features, and what stands in for what on which device."""

import contextlib
import importlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.utils._python_dispatch import TorchDispatchMode

from bench import launch, old_script, replacements, updates
from bench.old_data import draft_tree
from bench.problem import draft_of
from bench.random_run import target_tree
from bench.recipe_step import DRAFT
from bench.replacements import Replacement
from bench.stages import Stages
from eagle3fn.base.config import OptimizerConfig
from eagle3fn.base.errors import UserError
from eagle3fn.base.files import read_json
from eagle3fn.base.tree import tree_map
from eagle3fn.testing.oracle import Oracle, OracleMissingError
from eagle3fn.train.optimizer import Moments, adamw
from scripts import train_eagle3_fn

ONLY_WITHOUT_CARD = ("Triton loss", "no card", "cuda does nothing", "gloo", "averages", "FullyShardedDataParallel")


def options(out: Path, *more: str) -> Any:
    return updates.parse(["--device", "cpu", "--out", str(out), "--updates", "3", "--seconds", "600", *more])


def test_both_sides_are_equal_and_the_result_tells_how(commit: Oracle, tmp_path: Path) -> None:
    with patch("tempfile.tempdir", str(tmp_path)):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert result["equal"] and result["complete"] and result["nontrivial"] and result["faults"] == []
    assert result["steps"] == [3, 3] and result["level"] == 2 and result["updates"] == 3
    assert result["state_equal"] == dict.fromkeys(("weights", "masters", "mu", "nu"), True)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    said = [chosen.said for chosen in replacements.replacements(commit, "cpu", None)]
    files = [old_script.NOT_SAVED, updates.OUR_FILES]
    assert result["replaced"] == [*said, *files]


@pytest.mark.parametrize(
    "change",
    [["--learning-rate", "1.0000001e-3"], ["--seed", "1"], ["--warmup-ratio", "0.5"]],
)
def test_a_difference_on_one_side_is_seen(commit: Oracle, tmp_path: Path, change: list[str]) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), change)
    assert not result["equal"] and result["faults"] == [] and result["unequal_values"] > 0
    assert not result["state_equal"]["masters"] and not read_json(tmp_path / "r.json")["equal"]


def test_a_fault_of_ours_leaves_the_other_sides_rows(commit: Oracle, tmp_path: Path) -> None:
    result = updates.measure(commit, options(tmp_path / "r.json"), ["--batch-size", "0"])
    assert [fault["where"] for fault in result["faults"]] == ["ours"]
    assert "--batch-size = 0" in result["faults"][0]["traceback"]
    assert (
        result["steps"] == [3, 0]
        and not result["equal"]
        and read_json(tmp_path / "r.json") == json.loads(json.dumps(result))
    )


def test_a_fault_of_specforge_leaves_our_rows(commit: Oracle, tmp_path: Path) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    with patch.object(old_script, "row_of", broken):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert [fault["where"] for fault in result["faults"]] == ["SpecForge"]
    assert "planted" in result["faults"][0]["traceback"] and "its output ends" in result["faults"][0]["traceback"]
    assert result["steps"] == [0, 3] and not result["equal"] and not dist.is_initialized()


class FakeCard:
    """Streams and events of a card that is none, for `FullyShardedDataParallel`."""

    class Stream:
        def __init__(self, **_: Any) -> None:
            self.wait_stream = self.wait_event = self.synchronize = lambda *_: None

    def __init__(self) -> None:
        self.Event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.current_stream = self.Stream
        self.stream = lambda _: contextlib.nullcontext()
        self.current_device = lambda: torch.device("cpu")
        self.is_available, self.device_count = (lambda: True), (lambda: 1)


@contextlib.contextmanager
def card_on_cpu(oracle: Oracle) -> Iterator[list[str]]:
    """What is done with a card, on the CPU: NCCL is gloo, the mesh and FSDP's streams are the CPU's."""
    module = importlib.import_module("torch.distributed.fsdp.fully_sharded_data_parallel")
    init, mesh, from_group = dist.init_process_group, dist.device_mesh.init_device_mesh, dist.DeviceMesh.from_group
    backends: list[str] = []

    def handle(state: Any, *_: Any, **__: Any) -> Any:
        state._device_handle = FakeCard()
        return state

    def join(backend: str, **more: Any) -> None:
        backends.append(backend)
        init("gloo", **more)

    def change(of: Any, name: str, value: Any) -> Replacement:
        return Replacement(name, lambda: patch.object(of, name, value))

    without = replacements._without_card(oracle)
    kept = [chosen for chosen in without if not any(word in chosen.said for word in ("gloo", "averages", "Fully"))]
    fakes = [
        change(dist, "init_process_group", join),
        change(dist.device_mesh, "init_device_mesh", lambda _, *a, **k: mesh("cpu", *a, **k)),
        change(dist.DeviceMesh, "from_group", lambda group, device_type: from_group(group, "cpu")),
        change(torch.cuda, "device_count", lambda: 1),
        change(torch.cuda, "set_device", lambda _: None),
        change(module, "_init_device_handle", handle),
    ]
    found = [*kept, *fakes, *replacements._with_card()]
    with patch.object(replacements, "_without_card", lambda _: found):
        yield backends


def test_with_the_real_fsdp_and_process_group_of_one_rank_state_and_bits_are_the_same(
    commit: Oracle, tmp_path: Path
) -> None:
    """SpecForge's own `init_distributed`, announced as by torchrun, and FSDP around its model."""
    wrapped = []
    real = fsdp.FullyShardedDataParallel.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        wrapped.append(type(self.module).__name__)
        return real(self, *args, **more)

    with card_on_cpu(commit) as backends, patch.object(fsdp.FullyShardedDataParallel, "forward", forward):
        result = updates.measure(commit, options(tmp_path / "r.json"))
    assert result["faults"] == [] and result["equal"]
    assert backends == ["nccl"] and wrapped == 3 * ["OnlineEagle3Model"] and not dist.is_initialized()


def test_with_a_card_nothing_of_the_cards_work_is_replaced(commit: Oracle) -> None:
    distributed = importlib.import_module("specforge.distributed")

    def now() -> list[Any]:
        model = commit.eagle3
        return [
            *(torch.Tensor.cuda, torch.nn.Module.cuda, torch.cuda.is_available, dist.all_reduce),
            *(distributed.init_distributed, fsdp.FullyShardedDataParallel, vars(model)["LogSoftmaxLoss"]),
        ]

    before, announced = now(), {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    with replacements.on_device(commit, "cuda", None) as said:
        assert all(a is b for a, b in zip(now(), before, strict=True)) and announced <= os.environ.keys()
        assert sys.modules["datasets"].Dataset is replacements.Unread
    assert not any(word in line for line in said for word in ONLY_WITHOUT_CARD)
    assert any("torchrun" in line for line in said) and "RANK" not in os.environ
    with replacements.on_device(commit, "cpu", None) as said:
        assert all(a is not b for a, b in zip(now(), before, strict=True)) and "RANK" not in os.environ
    assert all(any(word in line for line in said) for word in ONLY_WITHOUT_CARD)
    assert all(a is b for a, b in zip(now(), before, strict=True))


def test_stand_ins_for_packages_do_what_is_asked_of_them(commit: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accelerate", "datasets.config"):
        monkeypatch.setitem(sys.modules, name, None)
    with replacements.on_device(commit, "cpu", None) as said:
        set_seed = importlib.import_module("accelerate.utils").set_seed
        drawn = []
        for _ in range(2):
            set_seed(7)
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
        assert drawn[0] == drawn[1] and drawn[0][2] == float(torch.rand((), generator=torch.manual_seed(7)))
        with pytest.raises(UserError, match="--cache-dir"):
            replacements.Unread.from_generator(generator=None).shuffle(seed=1).map(len)["input_ids"]
    assert any("accelerate" in line for line in said) and any("datasets" in line for line in said)
    with pytest.raises(OracleMissingError, match="pip install datasets"):
        replacements.replacements(commit, "cpu", Path("cache"))


def test_when_time_is_up_the_result_says_where_it_was(tmp_path: Path) -> None:
    ended, codes, told = threading.Event(), [], []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    (tmp_path / "log").write_text("last words")
    with patch("os._exit", leave):
        stages = Stages(
            tmp_path / "r.json",
            {"device": "cpu"},
            seconds=0.3,
            more=lambda result: {"equal": False},
            at_the_end=lambda: told.append("removed"),
            tell=lambda result: told.append(len(result["faults"])),
            logs={"slow": tmp_path / "log"},
        )
        assert not read_json(tmp_path / "r.json")["complete"]
        with stages.stage("quick"):
            raise ValueError("planted")
        with stages.stage("slow"):
            assert ended.wait(20)
    result = read_json(tmp_path / "r.json")
    assert codes == [1] and told == ["removed", 2] and not result["complete"]
    assert [fault["where"] for fault in result["faults"]] == ["quick", "slow"]
    text = result["faults"][1]["traceback"]
    assert "ended.wait(20)" in text and "not finished within 0.3 s" in text and "last words" in text


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--updates", "0"], "--updates 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--length", "3"], "--length 3"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_without_anything_to_compare_one_line_says_why(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with patch.object(torch.cuda, "is_available", lambda: False):
        assert updates.main(["--device", "cpu", "--out", str(tmp_path / "r.json"), *more]) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_a_missing_checkout_or_script_is_one_line(
    commit: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--device", "cpu", "--out", str(tmp_path / "r.json")]
    other = {"train_eagle3.py": "0" * 64}
    with patch.object(old_script, "SCRIPTS", other):
        assert updates.main(out) == 2
    assert "set SPECFORGE_SRC" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


def test_a_card_with_less_memory_gets_a_smaller_draft(tmp_path: Path) -> None:
    asked = updates.parse(["--device", "cuda", "--out", str(tmp_path / "r.json")])
    with patch.object(updates, "memory_of", lambda _: 80e9):
        assert updates.sizes_of(asked) == (updates.SIZES["cuda"], None)
    with patch.object(updates, "memory_of", lambda _: 24e9):
        sizes, why = updates.sizes_of(asked)
    assert sizes == updates.SMALLER and why is not None and "22 GiB" in why


def test_on_cuda_the_draft_is_the_recipes_and_no_kernel_is_interpreted() -> None:
    draft = draft_of(updates.SIZES["cuda"].shape, None, updates.SIZES["cuda"].length)
    made, recipe = draft_tree(target_tree(draft), draft.draft_vocab_size), read_json(DRAFT)
    free = {"max_position_embeddings", "torch_dtype"}
    assert {name: made[name] for name in recipe.keys() - free} == {name: recipe[name] for name in recipe.keys() - free}
    card, none = (launch.exact(device, 1, "raised") for device in ("cuda", "cpu"))
    assert card["TRITON_INTERPRET"] is None and none["TRITON_INTERPRET"] == "1"
    assert card["TORCHDYNAMO_DISABLE"] == none["TORCHDYNAMO_DISABLE"] == "1"
    assert card["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert launch.environment("cuda", 1, "raised")["TORCHDYNAMO_DISABLE"] is None


def test_our_script_trains_where_it_is_told() -> None:
    places = ["--target-model-path", "t", "--train-data-path", "c", "--output-dir", "o"]
    found = train_eagle3_fn.parser().parse_args(places)
    found.target_batch_size = 1
    draft = draft_of("tiny", None, 40)
    for seen, asked, device in ((True, "cpu", "cpu"), (True, None, "cuda"), (False, None, "cpu")):
        with patch.object(torch.cuda, "is_available", lambda seen=seen: seen):
            assert train_eagle3_fn.config_of(found, draft, 5, 1, asked).train.device == device


def test_exit_codes_tell_equal_from_unequal(commit: Oracle, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    names = {"steps": [3, 3], "unequal_values": 0, "first_difference": None, "seconds": {}}
    out = ["--device", "cpu", "--out", str(tmp_path / "r.json")]
    was = torch.are_deterministic_algorithms_enabled()
    try:
        for equal, faults, code in ((True, [], 0), (False, [{"where": "ours", "traceback": "here"}], 1)):
            found = names | {"equal": equal, "faults": faults}
            with patch.object(updates, "measure", lambda *_, found=found, **__: found):
                assert updates.main(out) == code
            shown = capfd.readouterr()
            summary = json.loads(shown.out.splitlines()[-1])
            assert summary["equal"] == equal and summary["faults"] == len(faults)
            assert ("here" in shown.err) == bool(faults)
    finally:
        torch.use_deterministic_algorithms(was)


class Seen(TorchDispatchMode):
    """Operations on lists, with their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach_" in str(func):
            numbers = [part for part in args if not (isinstance(part, list) and torch.is_tensor(part[0]))]
            self.calls.append((str(func).removesuffix("_"), numbers))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_makes_the_operations_that_torchs_makes_on_a_card(decay: float) -> None:
    """Its bits on CUDA are those of lists of leaves, which is what `foreach` chooses there."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=decay)
    leaf, grad = torch.randn(6, 4), torch.randn(6, 4)
    theirs = torch.optim.AdamW([leaf.clone().requires_grad_()], lr=1e-2, weight_decay=decay, foreach=True)
    master = theirs.param_groups[0]["params"][0]
    state, masters = Moments({"a": torch.zeros(6, 4)}, {"a": torch.zeros(6, 4)}), {"a": leaf.clone()}
    for step in range(3):
        master.grad = grad * (step + 1)
        with Seen() as expected:
            theirs.step()
        for donate in (False, True):
            with Seen() as seen:
                after, moments = adamw(
                    {"a": grad * (step + 1)}, tree_map(torch.clone, state), tree_map(torch.clone, masters), step,
                    1e-2, config, donate,
                )  # fmt: skip
            steps_counted = [call for call in expected.calls if call[1] and not torch.is_tensor(call[1][0])]
            assert [call for call in seen.calls if call[1]] == steps_counted
            assert len(seen.calls) == len(expected.calls) - 1  # theirs counts its step in a list too
            assert torch.equal(after["a"], master.detach())
        state, masters = moments, after

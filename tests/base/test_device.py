"""What a device multiplies fast, from the flags of processors and cards that are not here."""

import platform

import pytest
import torch

from eagle3fn.base.device import SPREAD, check_device, multiplies_bf16
from eagle3fn.base.errors import UserError
from eagle3fn.cli import main


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "amx", "onednn", "expected"),
    [
        ("x86_64", False, False, False, False),  # AVX2
        ("x86_64", False, False, True, False),  # AVX512 without bf16: oneDNN converts
        ("x86_64", True, False, True, True),
        ("AMD64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("arm64", False, False, False, False),
    ],
)
def test_processor_multiplies_bf16_by_instructions_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    avx512_bf16: bool,
    amx: bool,
    onednn: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert multiplies_bf16("cpu") is expected
    assert multiplies_bf16(torch.device("cpu", 0)) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_card_multiplies_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_bf16("cuda:1") is expected


def test_other_devices_do_not() -> None:
    assert not multiplies_bf16("meta")


ABSENT = ["auto", "gpu", "meta", "hpu", "xla", "vulkan", "cuda:99", ""]
if not torch.cuda.is_available():
    ABSENT.append("cuda")


@pytest.mark.parametrize("name", ABSENT)
def test_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    assert check_device("cpu") == "cpu"
    with pytest.raises(
        UserError, match=rf"device '{name}': not usable here .*; name cpu or cuda"
    ) as it:
        check_device(name)
    assert len(str(it.value)) < 220


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize(
    "command",
    [
        ["extract", "--conversations", "c", "--out", "f"],
        ["synthesize", "--out", "c"],
        ["regenerate", "--conversations", "c", "--out", "d"],
        ["evaluate", "--draft", "d", "--prompts", "p", "--out", "r"],
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_a_device_in_one_line(
    command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--target", "none", "--device", name]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    expected = f"device {name!r}: not usable here" if name else "--device: is empty; name one"
    if name == SPREAD and command[0] == "extract":
        expected = f"device {SPREAD!r}: no card to spread the target over; name cpu"
    assert expected in line

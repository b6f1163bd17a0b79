"""A tiny pair in real engines: the counts are those of this package's own decoding."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from eagle3fn.cli import main
from eagle3fn.data.target import load_target
from eagle3fn.use.counts import accepted_length
from eagle3fn.use.decode import Decoded, speculate
from eagle3fn.use.engine_evaluate import EngineEvalSettings, encode_prompts
from eagle3fn.use.export import load_draft
from tests.factories import tiny_tokenizer
from tests.serving import python_of, source_of

pytestmark = pytest.mark.engines

LENGTH = 3
NEW = 24
PROMPTS = ["how many?", "list them", "hello"]


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target, nearly a function of the newest token, and a draft trained for seconds."""
    root = tmp_path_factory.mktemp("pair")
    write_target(root / "target")
    rows = [json.dumps({"prompt": f"{chr(97 + i % 26)} {i}"}) + "\n" for i in range(40)]
    (root / "prompts.jsonl").write_text("".join(rows))

    answers = ("--out", root / "talks.jsonl", "--max-new", 40, "--temperature", 0)
    run(root, "regenerate", "--conversations", root / "prompts.jsonl", *answers)
    talks = ("--conversations", root / "talks.jsonl", "--max-length", 128)
    run(root, "extract", *talks, "--out", root / "features")
    data = ("--features", root / "features")
    run(root, "vocab", *data, "--out", root / "map", "--size", 200)
    settings = ["train.steps=30", "train.eval_every=30", "data.held_out=4", "data.global_batch=8"]
    settings += ["objective.ttt_length=3", "optimizer.learning_rate=3e-3"]
    named = [word for text in settings for word in ("--set", text)]
    run(root, "train", *data, "--vocab", root / "map", "--out", root / "run", *named)
    return root / "target", root / "run/draft"


def write_target(folder: Path) -> None:
    """Eight layers with heads of 32: vLLM has none of 16 on a CPU."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=300,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                value.normal_(0, 1)
            elif value.ndim == 2:
                value.normal_(0, 0.1)

        # Letters alone, so that an answer's text has the same tokens again.
        spoken = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz0123456789"))
        others = torch.ones(model.config.vocab_size, dtype=torch.bool)
        others[spoken] = False
        model.lm_head.weight[others] = 0
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pieces(folder / "tokenizer.model", tokenizer, model.config.vocab_size)


def write_pieces(path: Path, tokenizer: Any, count: int) -> None:
    """The tokens as a SentencePiece file, for llama.cpp's converter.

    It takes a BPE tokenizer by a checksum of known ones alone. Prompts are token ids: what matters
    are the pieces' number and the texts of end tokens.
    """

    def field(tag: bytes, content: bytes) -> bytes:
        return tag + bytes([len(content)]) + content

    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += [f"unused{number}" for number in range(len(tokenizer), count)]
    pieces = b""
    for number, token in enumerate(tokens):
        kind = 2 if number == count - 1 else 1  # unknown, normal
        score = b"\x15" + struct.pack("<f", 0.0)
        content = field(b"\x0a", token.encode()) + score + b"\x18" + bytes([kind])
        pieces += field(b"\x0a", content)
    path.write_bytes(pieces + field(b"\x12", b"\x18\x02"))  # the kind of model: BPE


def run(root: Path, command: str, *arguments: object) -> None:
    """A command that must succeed; with one thread where it takes threads."""
    words = [command, "--target", str(root / "target"), *map(str, arguments)]
    assert main(words if command == "vocab" else [*words, "--threads", "1"]) == 0


def ours(folders: tuple[Path, Path]) -> list[Decoded]:
    """The same prompts by this package."""
    target, draft = folders
    settings = EngineEvalSettings("vllm", "", max_new=NEW, draft_length=LENGTH)
    prompts, ends = encode_prompts(target, draft, PROMPTS, settings)
    model, _ = load_target(target, torch.float32)
    loaded = load_draft(draft, torch.float32)
    return [speculate(model, loaded, torch.tensor([ids]), LENGTH, NEW, ends) for ids in prompts]


def evaluated(
    folders: tuple[Path, Path], out: Path, engine: str, *arguments: object
) -> dict[str, Any]:
    """The report of the command."""
    prompts = out.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    options = ["--target", folders[0], "--draft", folders[1], "--prompts", prompts, "--out", out]
    options += ["--engine", engine, "--engine-python", python_of(engine)]
    options += ["--max-new", NEW, "--draft-length", LENGTH, *arguments]
    assert main(["evaluate", *map(str, options)]) == 0
    return json.loads(out.read_text())


def check_counts(report: dict[str, Any], decoded: list[Decoded]) -> None:
    """The engine's rounds and accepted tokens are ours."""
    assert report["lossless"] is True
    assert report["verifications"] == sum(one.verifications for one in decoded)
    accepted = sum(sum(one.accepted_by_position) for one in decoded)
    assert report["accepted_within_answers"] == accepted > 10
    assert report["accepted_length"] == accepted_length(decoded)


def test_vllm_counts_are_ours(folders, tmp_path):
    report = evaluated(folders, tmp_path / "out.json", "vllm")
    check_counts(report, ours(folders))

    # It drafts whole rounds up to the end, and counts what is cut off there.
    assert report["drafted"] == report["rounds"] * LENGTH
    assert sum(report["accepted_by_position"]) == report["accepted"]
    assert report["accepted"] >= report["accepted_within_answers"]


def test_vllm_samples_or_says_that_it_cannot(folders, tmp_path, capsys):
    """On a CPU vLLM 0.32 loses the temperature of drafted rows."""
    try:
        report = evaluated(folders, tmp_path / "out.json", "vllm", "--temperature", 0.7)
    except AssertionError:
        said = capsys.readouterr().err.splitlines()[-1]
        assert "samples wrongly with a draft on this device" in said
        return
    assert report["lossless"] is None
    assert report["accepted"] > 0


def test_vllm_refuses_a_damaged_draft_in_one_line(folders, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text((folders[1] / "config.json").read_text())
    tensors = load_file(folders[1] / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:, :100].contiguous()
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(AssertionError):
        evaluated((folders[0], draft), tmp_path / "out.json", "vllm")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("eagle3fn evaluate: vllm: ")
    assert "100" in said or "shape" in said or "size" in said


def test_llamacpp_counts_are_ours(folders, tmp_path):
    converter = ("--converter", source_of("llamacpp"), "--engine-arg", "cpuparams.n_threads=1")
    report = evaluated(folders, tmp_path / "out.json", "llamacpp", *converter)
    decoded = ours(folders)
    check_counts(report, decoded)

    # It drafts less near the limit, as we do.
    assert report["drafted"] == sum(sum(one.drafted_by_position) for one in decoded)
    by_position = [one.accepted_by_position for one in decoded]
    assert report["accepted_by_position"] == [
        sum(column) for column in zip(*by_position, strict=True)
    ]


def test_llamacpp_samples(folders, tmp_path):
    options = ("--converter", source_of("llamacpp"), "--engine-arg", "cpuparams.n_threads=1")
    report = evaluated(
        folders, tmp_path / "out.json", "llamacpp", *options, "--temperature", 0.7, "--seed", 5
    )
    assert report["lossless"] is None
    assert report["accepted"] > 0

"""Hostile and damaged files of a target: no code runs, nobody is asked, one line names the file."""

import builtins
import copy
import json
import math
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle3fn.base.draft_keys import draft_config_from_target
from eagle3fn.base.errors import UserError
from eagle3fn.base.thread_timing import sizes_of
from eagle3fn.data import target_loading
from eagle3fn.data.cache_check import check_batch, check_roll_back
from eagle3fn.data.generate import Sampling, generate
from eagle3fn.data.samples import SampleMaker
from eagle3fn.data.stored_config import gguf_config
from eagle3fn.data.target import load_target, stop_ids
from eagle3fn.data.target_loading import load_tokenizer
from eagle3fn.data.target_source import check_supported, config_hashes, target_config
from eagle3fn.data.template import ChatTemplate
from eagle3fn.data.turns import conversation_of
from tests.data.gguf_file import write_gguf
from tests.factories import talk, tiny_model, tiny_tokenizer

CASES = int(os.environ.get("EAGLE3FN_TARGET_CASES", "25"))
"""Mutations of each file; the whole of them are some hundreds."""

VALUES = {
    "missing": None,
    "null": None,
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "float": 0.5,
    "true": True,
    "text": "x",
    "list": [],
    "dict": {},
    "nested": [{"a": [1]}],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32, "beta_slow": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A target's folder, with RoPE that is scaled, and merges of its tokenizer."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("whole") / "target"
    tiny_model(rope_parameters=YARN | {"original_max_position_embeddings": 128}).save_pretrained(
        folder
    )
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"] |= {"he": 258, "hel": 259}
    tree["model"]["merges"] = [["h", "e"], ["he", "l"]]
    path.write_text(json.dumps(tree))
    assert Tokenizer.from_file(str(path)).encode("hel").ids == [259]
    return folder


@pytest.fixture
def target(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "target"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Values of every type, in every place


def places(tree, inside=(), depth=3):
    """The places of a JSON tree; of a list the first alone, and of a vocabulary two."""
    items = list(tree.items()) if isinstance(tree, dict) else []
    if isinstance(tree, list) and tree:
        items = [(0, tree[0])]
    for key, value in items[:2] if len(items) > 100 else items:
        yield (*inside, key)
        if depth:
            yield from places(value, (*inside, key), depth - 1)


def mutated(tree, place, name):
    """A copy with another value in a place."""
    tree = copy.deepcopy(tree)
    *path, last = place
    node = tree
    for key in path:
        node = node[key]
    if name == "missing":
        del node[last]
    else:
        node[last] = VALUES[name]
    return tree


def use(folder):
    """All that is done with a target."""
    tree = target_config(folder)
    config_hashes(folder)
    sizes_of(tree)
    draft_config_from_target(tree, str(folder / "config.json"))
    check_supported(folder)
    model, tokenizer = load_target(folder, torch.float32)
    template = ChatTemplate(tokenizer, stop_ids(folder, tokenizer))
    row = {"messages": talk("hello <|im_end|>", "yes é")}
    SampleMaker(template, 64).samples("a", conversation_of(row, "row"), "row")
    generate(model, tokenizer, ["a b"], Sampling(0, 1, 1), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_value_of_any_type_is_taken_or_refused_in_one_line(target, name):
    """Which of them are taken is the library's choice: a traceback, a hang and an abort are not."""
    path = target / name
    tree = json.loads(path.read_text())
    cases = [(place, value) for place in places(tree) for value in VALUES]
    for place, value in random.Random(15).sample(cases, min(CASES, len(cases))):
        path.write_text(json.dumps(mutated(tree, place, value)))
        try:
            use(target)
        except UserError as error:
            assert str(error).startswith(f"{target}"), (place, value)
            assert "\n" not in str(error), (place, value)
        except BaseException as error:
            error.add_note(f"{name}: {'.'.join(map(str, place))} {value}")
            raise


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("config.json", {"num_hidden_layers": 10**6}, r"num_hidden_layers = 1e\+06: must be in"),
        ("config.json", {"num_hidden_layers": -1}, r"num_hidden_layers = -1: must be in \[1, "),
        ("config.json", {"hidden_size": 2**70}, "hidden_size = .*larger than any size"),
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads = 0: must be in"),
        ("config.json", {"pad_token_id": "x"}, "pad_token_id = 'x': must be a token id;"),
        ("config.json", {"pad_token_id": 10**9}, "not loadable|must be|no causal"),
        ("config.json", {"is_encoder_decoder": True}, "is an encoder with a decoder"),
        ("config.json", {"model_type": "nix", "auto_map": {}}, "'nix' brings code of its own"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id = 'x': must be a token id"),
        ("generation_config.json", {"eos_token_id": [1, 2.5]}, r"eos_token_id = \[1, 2.5\]"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id = True: must be"),
        ("generation_config.json", {"eos_token_id": 2**64}, "eos_token_id = 18446744073709551616"),
        ("generation_config.json", {"pad_token_id": [1]}, r"pad_token_id = \[1\]"),
        ("tokenizer.json", {"added_tokens": 3}, "not loadable as a target"),
        ("tokenizer.json", {"model": None}, "not loadable as a target"),
    ],
)
def test_impossible_value_is_named_with_its_file(target, name, changes, named):
    edit(target / name, **changes)
    with pytest.raises(UserError, match=rf"{name}: .*({named})") as it:
        use(target)
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("prefix", ["x", "é", "##"])
def test_prefix_that_would_abort_the_process_is_refused(target, prefix, capfd):
    """The library cuts it off each merge, whether it is there or not."""
    path = target / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["continuing_subword_prefix"] = prefix
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer.json: model.continuing_subword_prefix = "):
        load_tokenizer(target)
    assert capfd.readouterr().err == ""


def test_panic_of_the_library_is_one_line_without_its_noise(target, monkeypatch, capfd):
    """Its exception is no `Exception`, and it prints past `sys.stderr`."""
    panic = type("PanicException", (BaseException,), {})

    def panics(_tokenizer):
        os.write(2, b"thread panicked\nstack backtrace:\n")
        raise panic("slice index starts at 2 but ends at 1")

    monkeypatch.setattr(target_loading, "_try", panics)
    with pytest.raises(UserError, match=r"tokenizer.json: not loadable as a target \(slice index"):
        load_tokenizer(target)
    assert capfd.readouterr().err == ""

    # What is printed where nothing fails is not lost; an interrupt is no fault of the target.
    monkeypatch.setattr(target_loading, "_try", lambda _tokenizer: os.write(2, b"a warning\n"))
    load_tokenizer(target)
    assert capfd.readouterr().err == "a warning\n"

    def interrupted(_tokenizer):
        raise KeyboardInterrupt

    monkeypatch.setattr(target_loading, "_try", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(target)


# Numbers that are none


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", YARN | {"rope_theta": math.nan}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"full_attention": {"rope_theta": math.inf}}),
        ("rope_theta", -10000.0),
        ("text_config", {"rope_theta": -1}),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", 1.5),
    ],
)
def test_a_base_or_an_epsilon_that_gives_no_numbers_is_refused(target, name, value):
    edit(target / "config.json", **{name: value})
    message = r"config.json: \S*(rope_theta|rms_norm_eps) = \S+: must be "
    for reader in (target_config, load_target):
        with pytest.raises(UserError, match=message):
            reader(target)


def change_weights(target, change):
    path = target / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


WEIGHTS = ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_target_whose_weights_are_no_numbers_is_refused_as_that(target, key, value):
    def change(tensors):
        tensors[key].view(-1)[0] = value

    change_weights(target, change)
    with pytest.raises(UserError, match=rf"{key} holds NaN or infinity"):
        load_target(target, torch.float32)


@pytest.mark.parametrize("check", [check_roll_back, check_batch])
def test_a_cache_that_fails_by_nan_is_not_blamed(check):
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj.weight holds NaN or infinity"):
        check(model)


@pytest.mark.parametrize("key", WEIGHTS)
def test_weights_stored_as_whole_numbers_are_refused(target, key):
    def change(tensors):
        tensors[key] = tensors[key].mul(100).to(torch.int32)

    change_weights(target, change)
    with pytest.raises(UserError, match=rf"model.safetensors: {key} is stored as I32"):
        load_target(target, torch.float32)


# No code runs


@pytest.fixture
def nobody_asked(monkeypatch):
    """Nothing is read from the terminal, and the folder's code does not run."""

    asked = []
    monkeypatch.setattr(builtins, "input", lambda *_args: asked.append(1) or "y")
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.delenv("EAGLE3FN_RAN", raising=False)
    yield
    assert not asked, "stdin was read"
    assert "EAGLE3FN_RAN" not in os.environ, "code of the folder has run"


CODE = "import os\nos.environ['EAGLE3FN_RAN'] = '1'\n"
MAPPED = {
    "AutoConfig": "code.Config",
    "AutoModelForCausalLM": "code.Model",
    "AutoTokenizer": ["code.Tokenizer", None],
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "both"])
def test_code_of_a_targets_folder_is_never_run(target, nobody_asked, name):
    (target / "code.py").write_text(CODE)
    if name != "tokenizer_config.json":
        edit(target / "config.json", model_type="mine", auto_map=MAPPED)
        for reader in (target_config, load_target, check_supported):
            with pytest.raises(UserError, match=r"config.json: model_type 'mine' brings code of"):
                reader(target)
    if name != "config.json":
        edit(target / "tokenizer_config.json", tokenizer_class="Mine", auto_map=MAPPED)
        with pytest.raises(
            UserError, match=r"tokenizer.json: .*code of its own, which is never run"
        ):
            load_tokenizer(target)


def test_code_beside_a_type_that_the_library_has_is_not_run(target, nobody_asked):
    """As folders have it whose type was added to the library later."""
    (target / "code.py").write_text(CODE)
    edit(target / "config.json", auto_map=MAPPED)
    edit(target / "tokenizer_config.json", auto_map=MAPPED)
    model, _ = load_target(target, torch.float32)
    assert type(model).__module__.startswith("transformers.")


class Runs:
    """Pickled, it runs a function where it is loaded."""

    def __reduce__(self):
        return os.putenv, ("EAGLE3FN_RAN", "1")


def test_pickled_weights_are_not_read(target, nobody_asked):
    """Neither alone nor where the library would choose them before files of other names."""
    weights = target / "model.safetensors"
    torch.save(load_file(weights), target / "pytorch_model.bin")
    weights.rename(target / "other.safetensors")
    with pytest.raises(UserError, match=r"target: not loadable as a target"):
        load_target(target, torch.float32)

    (target / "other.safetensors").unlink()
    (target / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UserError, match=r"no \*.safetensors; pytorch_model.bin is there"):
        load_target(target, torch.float32)


def test_every_call_of_the_library_is_in_one_file():
    """The programs of engines load classes that they name, by their own environment's library."""
    root = Path(target_loading.__file__).parents[1]
    calls = [
        path.relative_to(root)
        for path in root.rglob("*.py")
        if "Auto" in path.read_text() and "from_pretrained(" in path.read_text()
    ]
    assert [path for path in calls if path.parts[:2] != ("engines", "programs")] == [
        Path("data/target_loading.py")
    ]


# A GGUF file's header


@pytest.mark.parametrize("place", ["key", "text", "list"])
def test_length_beyond_a_gguf_file_is_refused(tmp_path, place):
    """Without taking as much memory."""
    path = tmp_path / "t.gguf"
    write_gguf(path, tiny_model(), tiny_tokenizer())
    data = path.read_bytes()
    at = {"key": 24, "text": data.index(b"llama"), "list": data.index(b"tokens") + 6 + 4 + 4}[place]
    at -= 8 if place == "text" else 0
    path.write_bytes(data[:at] + (2**62).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(UserError, match=r"t.gguf: missing or damaged .*; fetch"):
        gguf_config(path)

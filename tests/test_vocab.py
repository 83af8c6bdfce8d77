"""Reading checkpoints: tokenizer metadata, config.json's old and new spellings, refusals, damaged files."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halo.checkpoint import open_checkpoint
from halo.checkpoint.hashing import source_hash
from halo.checkpoint.safetensors_file import read_safetensors
from halo.errors import HaloError, SourceError, UnsupportedError
from halo.gguf_file import Entry, Field, header_bytes, read_header, write_tensor
from tests.test_exactness import smollm2_gguf, write_f32
from tests.tiny import make_hf, write_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "Tiny-Llama", "llama", shard="100KB")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("source") / "Tiny-Gemma", "gemma3")


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def rewrite_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def message(error: type[HaloError], folder: Path) -> str:
    with pytest.raises(error) as caught:
        checkpoint = open_checkpoint(folder)
        for tensor in checkpoint.tensors.values():
            tensor.read()
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what a good checkpoint gives


def test_order_and_metadata(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    names = list(checkpoint.tensors)
    assert names[0] == "token_embd.weight" and names[-2:] == ["output_norm.weight", "output.weight"]
    assert names[1:4] == ["blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert checkpoint.kind == "huggingface" and checkpoint.architecture == "llama" and checkpoint.name == "Tiny-Llama"
    assert (checkpoint.hyper.n_blocks, checkpoint.hyper.n_kv_heads, checkpoint.hyper.head_dim) == (2, 2, 16)
    value = {key: field.value for key, field in checkpoint.metadata.items()}
    assert value["general.type"] == "model" and "general.file_type" not in value
    assert value["tokenizer.ggml.pre"] == "llama-bpe" and value["tokenizer.ggml.add_bos_token"] is True
    assert len(value["tokenizer.ggml.tokens"]) == checkpoint.tensors["token_embd.weight"].shape[0]
    tokens = dict(zip(value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"], strict=True))
    assert (tokens["<|im_start|>"], tokens["<tool_call>"], tokens["a"]) == (3, 4, 1)


@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.weight", "blk.1.attn_k.weight", "token_embd.weight", "output_norm.weight"]
)
def test_row_ranges(llama: Path, name: str) -> None:
    tensor = open_checkpoint(llama).tensors[name]
    whole = tensor.read()
    assert whole.dtype == np.float32 and whole.shape == tensor.shape
    for start, stop in [(0, 1), (3, 4), (5, 29), (16, 32), (tensor.shape[0] - 1, tensor.shape[0])]:
        if stop <= tensor.shape[0]:
            assert np.array_equal(tensor.reader(start, stop), whole[start:stop])


def test_license_name_and_template_list(llama: Path, copy) -> None:
    folder = copy(llama)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}]
    edit(folder / "tokenizer_config.json", lambda d: d.update(chat_template=templates))
    edit(folder / "config.json", lambda d: d.update(_name_or_path="someone/Nice-Model"))
    metadata = open_checkpoint(folder).metadata
    assert metadata["general.license"].value == "apache-2.0" and metadata["general.name"].value == "Nice-Model"
    assert (
        metadata["tokenizer.chat_template"].value == "A" and metadata["tokenizer.chat_template.tool_use"].value == "B"
    )
    assert metadata["tokenizer.chat_templates"].value == ["tool_use"]


def test_padding_and_dropped_tokens(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", "llama", extra_rows=3)
    tokens = open_checkpoint(folder).metadata["tokenizer.ggml.tokens"].value
    assert tokens[-3:] == [f"[PAD{i}]" for i in range(len(tokens) - 3, len(tokens))]
    folder = make_hf(tmp_path / "n", "llama", extra_rows=-1)
    assert any("left out" in note for note in open_checkpoint(folder).notes)


def test_real_vocabulary_is_the_converters(tmp_path: Path) -> None:
    """SmolLM2's vocabulary through tokenizer.json gives what llama.cpp's converter wrote."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from halo.checkpoint.vocab import read_vocab

    original = read_header(smollm2_gguf()).metadata
    tokens, types = original["tokenizer.ggml.tokens"].value, original["tokenizer.ggml.token_type"].value
    merges = [tuple(line.split(" ", 1)) for line in original["tokenizer.ggml.merges"].value]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    found = read_vocab(tmp_path, {}, len(tokens)).metadata
    for key, field in found.items():
        if key in original:
            assert field == original[key], key
    assert found["tokenizer.ggml.pre"].value == "smollm"
    assert {k for k in original if k.startswith("tokenizer.ggml")} - {"tokenizer.ggml.add_space_prefix"} <= set(found)


@pytest.mark.parametrize(
    "style,name", [("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("smollm", "smollm"), ("gpt2", "gpt-2")]
)
def test_pretokenizer_by_structure(style: str, name: str, tmp_path: Path) -> None:
    from halo.checkpoint.vocab import read_vocab

    size = write_tokenizer(tmp_path, style)
    assert read_vocab(tmp_path, {}, size).metadata["tokenizer.ggml.pre"].value == name
    # One added token more changes the hash and nothing else.
    entry = {
        "id": size,
        "content": "<|new|>",
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    edit(tmp_path / "tokenizer.json", lambda d: d["added_tokens"].append(entry))
    assert read_vocab(tmp_path, {}, size + 1).metadata["tokenizer.ggml.pre"].value == name


def test_ignore_merges_that_changes_nothing(tmp_path: Path) -> None:
    from halo.checkpoint.vocab import read_vocab

    size = write_tokenizer(tmp_path, "qwen2")
    edit(tmp_path / "tokenizer.json", lambda d: d["model"].update(ignore_merges=True))
    assert read_vocab(tmp_path, {}, size).metadata["tokenizer.ggml.pre"].value == "qwen2"
    edit(tmp_path / "tokenizer.json", lambda d: d["model"].update(merges=d["model"]["merges"][:-1]))
    with pytest.raises(UnsupportedError, match="ignore_merges"):
        read_vocab(tmp_path, {}, size)


def test_sentencepiece_model_only(tmp_path: Path) -> None:
    import sentencepiece

    from halo.checkpoint.vocab import read_vocab

    write_tokenizer(tmp_path, "llama2", files="model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = processor.vocab_size()
    metadata = read_vocab(tmp_path, {"vocab_size": size}, size).metadata
    assert metadata["tokenizer.ggml.tokens"].value == [processor.id_to_piece(i) for i in range(size)]
    scores = metadata["tokenizer.ggml.scores"].value
    assert np.allclose(scores, [processor.get_score(i) for i in range(size)])
    types = metadata["tokenizer.ggml.token_type"].value
    assert [t == 6 for t in types] == [processor.is_byte(i) for i in range(size)]
    assert (
        metadata["tokenizer.ggml.add_space_prefix"].value is True
        and metadata["tokenizer.ggml.add_bos_token"].value is True
    )


# --- config.json, old and new


def old_style(config: dict[str, Any]) -> None:
    """What transformers 4 wrote for the same model."""
    ropes = config.pop("rope_parameters")
    if "full_attention" in ropes:
        config["rope_theta"], config["rope_local_base_freq"] = (
            ropes[k]["rope_theta"] for k in ("full_attention", "sliding_attention")
        )
        scaling = ropes["full_attention"]
        config["sliding_window_pattern"] = 6
        config.pop("layer_types", None)
    else:
        config["rope_theta"], scaling = ropes["rope_theta"], ropes
    if scaling["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in scaling.items() if k != "rope_theta"}


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 7000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 7000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_old_config_of_llama(rope: str, llama: Path, copy) -> None:
    folder = copy(llama)
    edit(folder / "config.json", lambda d: d.update(rope_parameters=ROPES[rope]))
    new = open_checkpoint(folder)
    edit(folder / "config.json", old_style)
    old = open_checkpoint(folder)
    assert old.metadata == new.metadata and list(old.tensors) == list(new.tensors)
    assert old.metadata["llama.rope.freq_base"].value == 7000.0
    assert ("rope_freqs.weight" in old.tensors) == (rope == "llama3")


def test_old_config_of_gemma(gemma: Path, copy) -> None:
    folder = copy(gemma)
    new = open_checkpoint(folder)
    edit(folder / "config.json", old_style)
    assert open_checkpoint(folder).metadata == new.metadata
    assert new.metadata["gemma3.rope.freq_base_swa"].value == 10000.0
    assert new.metadata["gemma3.rope.freq_base"].value == 1_000_000.0
    assert new.metadata["gemma3.attention.sliding_window"].value == 16


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_text_part_of_a_vision_model(gemma: Path, copy, prefix: str) -> None:
    folder = copy(gemma)
    plain = open_checkpoint(gemma)

    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config.update(
            architectures=["Gemma3ForConditionalGeneration"], text_config=text, vision_config={"hidden_size": 8}
        )

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model." if prefix.startswith("model.") else "")] = tensors.pop(name)
        tensors["vision_tower.x.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.multi_modal_projector.y.weight"] = np.zeros((2, 2), np.float32)

    edit(folder / "config.json", nest)
    rewrite_weights(folder, rename)
    found = open_checkpoint(folder)
    assert list(found.tensors) == list(plain.tensors) and found.metadata == plain.metadata
    assert np.array_equal(
        found.tensors["blk.0.attn_q_norm.weight"].read(), plain.tensors["blk.0.attn_q_norm.weight"].read()
    )
    assert any("2 tensors of the vision part" in note for note in found.notes)


def test_window_shorter_than_the_context(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_hf(tmp_path / "m", "mistral", sliding_window=64))
    assert checkpoint.hyper.context_length == 64 and any("sliding-window" in note for note in checkpoint.notes)


# --- refusals


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "without architectures"),
    "experts": ({"num_local_experts": 8}, "mixture of experts"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "yarn beta": ({"rope_parameters": {**ROPES["yarn"], "beta_fast": 16}}, "beta_fast"),
    "softcap": ({"final_logit_softcapping": 30.0}, "softcapping"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "already quantised .gptq"),
    "qwen2 bias": ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "attention_bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(case: str, llama: Path, copy) -> None:
    change, expected = REFUSED[case]
    folder = copy(llama)
    edit(folder / "config.json", lambda d: d.update(change))
    with pytest.raises(UnsupportedError, match=expected):
        open_checkpoint(folder)


IMPOSSIBLE = [
    ("hidden_size", "64"),
    ("hidden_size", None),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**9),
    ("rms_norm_eps", -1),
    ("vocab_size", True),
    ("num_key_value_heads", 3),
    ("tie_word_embeddings", 1),
    ("rope_parameters", {"rope_theta": "x"}),
]


@pytest.mark.parametrize("key,value", IMPOSSIBLE)
def test_impossible_numbers(key: str, value: Any, llama: Path, copy) -> None:
    folder = copy(llama)
    edit(folder / "config.json", lambda d: d.update({key: value}))
    message(SourceError, folder)


def test_gemma_scale_and_bidirectional(gemma: Path, copy) -> None:
    folder = copy(gemma)
    edit(folder / "config.json", lambda d: d.update(query_pre_attn_scalar=50))
    assert "query_pre_attn_scalar 50" in message(UnsupportedError, folder)
    edit(folder / "config.json", lambda d: d.update(query_pre_attn_scalar=32, use_bidirectional_attention=True))
    assert "bidirectional" in message(UnsupportedError, folder)


# --- damaged weights


def test_missing_shard(llama: Path, copy) -> None:
    folder = copy(llama)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    text = message(SourceError, folder)
    assert shard.name in text and "missing" in text and "model." in text


def test_index_names_a_missing_tensor(llama: Path, copy) -> None:
    folder = copy(llama)
    index = folder / "model.safetensors.index.json"
    shard = sorted(folder.glob("model-*.safetensors"))[0].name
    edit(index, lambda d: d["weight_map"].update({"model.layers.9.x.weight": shard}))
    text = message(SourceError, folder)
    assert "model.layers.9.x.weight" in text and shard in text
    edit(index, lambda d: d["weight_map"].update({"x": "../../secret"}))
    assert "not a file of this folder" in message(SourceError, folder)
    index.unlink()
    assert "model.safetensors.index.json" in message(SourceError, folder)


@pytest.mark.parametrize("cut", [0, 4, 9, 200, -1])
def test_truncated_safetensors(cut: int, llama: Path, copy) -> None:
    folder = copy(llama)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:cut])
    text = message(SourceError, folder)
    assert shard.name in text and ("cut off" in text or "missing" in text)


def test_wrong_missing_and_extra_tensors(llama: Path, copy) -> None:
    folder = copy(llama)
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite_weights(folder, lambda t: t.update({name: np.zeros((64, 161), np.float32)}))
    text = message(SourceError, folder)
    assert name in text and "[64, 161]" in text and "[64, 160]" in text
    rewrite_weights(folder, lambda t: t.pop(name))
    text = message(SourceError, folder)
    assert name in text and "[64, 160]" in text
    rewrite_weights(
        folder,
        lambda t: t.update({name: np.zeros((64, 160), np.float32), "model.layers.0.extra": np.zeros(3, np.float32)}),
    )
    assert "model.layers.0.extra" in message(UnsupportedError, folder)
    rewrite_weights(
        folder,
        lambda t: (t.pop("model.layers.0.extra"), t.update({"model.rotary_emb.inv_freq": np.zeros(3, np.float32)})),
    )
    open_checkpoint(folder)
    rewrite_weights(folder, lambda t: t.update({name: np.zeros((64, 160), np.int8)}))
    assert "already quantised" in message(UnsupportedError, folder) and name in message(UnsupportedError, folder)


def test_tied_model_with_a_stored_head(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", "llama", tie_word_embeddings=True)
    rewrite_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    checkpoint = open_checkpoint(folder)
    assert "output.weight" not in checkpoint.tensors and any(
        "lm_head.weight is left out" in n for n in checkpoint.notes
    )


def test_pickles_and_empty_folders(llama: Path, copy) -> None:
    folder = copy(llama)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert "no model.safetensors" in message(SourceError, folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "convert them to safetensors" in message(SourceError, folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in message(SourceError, folder)
    (folder / "config.json").unlink()
    assert "no config.json and no GGUF" in message(SourceError, folder)
    assert "does not exist" in message(SourceError, folder / "nowhere")
    assert "neither a folder nor a GGUF" in message(SourceError, folder / "pytorch_model.bin")


# --- damaged tokenizers


def test_tokenizer_refusals(llama: Path, copy) -> None:
    folder = copy(llama)
    path = folder / "tokenizer.json"
    good = path.read_text(encoding="utf-8")
    edit(path, lambda d: d.update(normalizer={"type": "Lowercase"}))
    assert "Lowercase" in message(UnsupportedError, folder)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = [{"type": "Punctuation", "behavior": "Isolated"}, byte_level]
    edit(path, lambda d: d.update(normalizer=None, pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
    assert "neither its hash nor its structure" in message(UnsupportedError, folder)
    path.write_text(good, encoding="utf-8")
    edit(path, lambda d: d["model"].update(vocab={"a": 0}, type="WordLevel"))
    assert "WordLevel" in message(UnsupportedError, folder)
    path.write_text(good[: len(good) // 2], encoding="utf-8")
    assert "tokenizer.json" in message(SourceError, folder)
    path.unlink()
    assert "no tokenizer.json and no tokenizer.model" in message(SourceError, folder)
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    assert "no SentencePiece model" in message(SourceError, folder)


def test_vocabulary_of_another_model(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", "llama", extra_rows=-30)
    assert "not of one model" in message(SourceError, folder)


# --- the safetensors reader by itself


def safetensors_bytes(header: Any, data: bytes = b"\0" * 64) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe", b"[1]", b"[" * 100000, {"a": 3}, {"a": {**GOOD, "dtype": "F31"}},
        {"a": {**GOOD, "dtype": ["F32"]}},
        {"a": {**GOOD, "shape": [2, 3]}}, {"a": {**GOOD, "shape": [-2, -2]}}, {"a": {**GOOD, "shape": [2**62, 4]}},
        {"a": {**GOOD, "data_offsets": [0, 16, 32]}}, {"a": {**GOOD, "data_offsets": [56, 72]}},
        {"a": {**GOOD, "data_offsets": [16, 0]}}, {"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}},
        {"a": {**GOOD, "data_offsets": [0.0, 16]}}, {"a": {**GOOD, "shape": None}},
    ],
)  # fmt: skip
def test_bad_safetensors_headers(header: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header))
    with pytest.raises(SourceError):
        read_safetensors(path)


@pytest.mark.parametrize("kind,array", [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2"), ("BF16", None)])
def test_stored_types(kind: str, array: str | None, tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [0.25, 3.0], [1e-3, -7.0]], np.float32)
    data = values.astype(array) if array else (values.view(np.uint32) >> 16).astype("<u2")
    expected = data.astype(np.float32) if array else ((values.view(np.uint32) >> 16) << 16).view(np.float32)
    header = {"a": {"dtype": kind, "shape": [3, 2], "data_offsets": [0, data.nbytes]}, "__metadata__": {"format": "pt"}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data.tobytes()))
    rows = read_safetensors(path)["a"].rows()
    assert np.array_equal(rows(0, 3), expected) and np.array_equal(rows(1, 2), expected[1:2])


# --- GGUF sources


def small_gguf(
    path: Path, extra: dict[str, Field] | None = None, names: tuple[str, ...] = ("a.weight", "b.weight"), kind: int = 0
) -> Path:
    metadata = {
        "general.architecture": Field.string("llama"),
        "tokenizer.ggml.tokens": Field.strings(["a", "b"]),
        **(extra or {}),
    }
    entries = [Entry(name, (4, 32), kind) for name in names]
    with path.open("wb") as file:
        file.write(header_bytes(metadata, entries))
        for i, entry in enumerate(entries):
            write_tensor(file, [np.full(entry.nbytes, i, np.uint8)], entry.nbytes)
    return path


def test_gguf_drops_what_quantisation_writes(tmp_path: Path) -> None:
    extra = {
        "general.file_type": Field.uint32(2),
        "quantize.imatrix.file": Field.string("x"),
        "mystery.key": Field.boolean(True),
    }
    checkpoint = open_checkpoint(small_gguf(tmp_path / "model.gguf", extra))
    assert set(checkpoint.metadata) == {"general.architecture", "tokenizer.ggml.tokens", "mystery.key"}
    assert checkpoint.kind == "gguf" and checkpoint.notes == []
    assert open_checkpoint(tmp_path).path == tmp_path / "model.gguf"


def test_gguf_of_integers_is_refused(tmp_path: Path) -> None:
    text = message(UnsupportedError, small_gguf(tmp_path / "m.gguf", kind=26))
    assert "a.weight" in text and "I32" in text


def test_gguf_without_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header_bytes({"x": Field.uint32(1)}, []))
    assert "general.architecture" in message(SourceError, path)


def test_split_gguf(tmp_path: Path) -> None:
    extra = {"split.count": Field.uint32(2)}
    first = small_gguf(tmp_path / "m-00001-of-00002.gguf", extra, ("a.weight",))
    second = small_gguf(tmp_path / "m-00002-of-00002.gguf", extra, ("b.weight",))
    for given in (first, second, tmp_path):
        checkpoint = open_checkpoint(given)
        assert list(checkpoint.tensors) == ["a.weight", "b.weight"] and checkpoint.files == [first, second]
        assert "split.count" not in checkpoint.metadata
    small_gguf(second, extra, ("a.weight",))
    assert "another shard" in message(SourceError, first)
    second.unlink()
    assert second.name in message(SourceError, first)


def test_gguf_shape_that_wraps_round(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "m.gguf", names=("a.weight",))
    data = bytearray(path.read_bytes())
    at = data.index(b"a.weight") + 8
    big = struct.pack("<I4Q", 4, 1 << 14, 1 << 14, 1 << 14, 1 << 14)  # a product of 2**56; 2**58 bytes
    path.write_bytes(data[:at] + big + data[at + 4 + 16 :] + b"\0" * 4096)
    message(SourceError, path)


def fuzz(path: Path, good: bytes, change: Callable[[random.Random, bytearray], bytearray], rounds: int) -> None:
    """Every damaged file is read or refused in one line, within a second."""
    generator = random.Random(7)
    for _ in range(rounds):
        path.write_bytes(change(generator, bytearray(good)))
        started = time.monotonic()
        try:
            open_checkpoint(path)
        except SourceError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - started < 1


def flip(generator: random.Random, data: bytearray) -> bytearray:
    for _ in range(generator.randint(1, 3)):
        data[generator.randrange(min(len(data), 400))] = generator.choice(
            [0, 1, 127, 128, 255, generator.randrange(256)]
        )
    return data


def huge(generator: random.Random, data: bytearray) -> bytearray:
    at = generator.randrange(4, 392)
    data[at : at + 8] = struct.pack("<Q", generator.choice([2**63, 2**64 - 1, 2**40, 2**32, 2**31]))
    return data


def test_gguf_fuzz(tmp_path: Path) -> None:
    path = small_gguf(
        tmp_path / "m.gguf", {"general.alignment": Field.uint32(32), "llama.block_count": Field.uint32(1)}
    )
    good = path.read_bytes()
    for cut in range(0, len(good), 7):
        fuzz(path, good, lambda _, data, cut=cut: data[:cut], 1)
    fuzz(path, good, flip, 600)
    fuzz(path, good, huge, 300)


def test_safetensors_fuzz(llama: Path, copy) -> None:
    folder = copy(llama)
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    good = shard.read_bytes()
    generator = random.Random(3)
    for _ in range(150):
        shard.write_bytes(flip(generator, bytearray(good)))
        try:
            open_checkpoint(folder)
        except SourceError as error:
            assert "\n" not in str(error)


JUNK: list[Any] = [None, 0, -1, 2**40, 1.5, "", "x", True, [], {}, [1], {"a": 1}, [[]]]


def mutate(generator: random.Random, node: Any) -> Any:
    """A copy of parsed JSON with one node replaced by junk."""
    if not isinstance(node, dict | list) or not node or generator.random() < 0.15:
        return generator.choice(JUNK)
    key = generator.choice(list(node)) if isinstance(node, dict) else generator.randrange(len(node))
    copied = dict(node) if isinstance(node, dict) else list(node)
    copied[key] = mutate(generator, node[key])
    return copied


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
def test_json_fuzz(family: str, file: str, tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "m", family, shard="100KB", num_hidden_layers=2)
    good = json.loads((folder / file).read_text(encoding="utf-8"))
    generator = random.Random(11)
    for _ in range(120):
        (folder / file).write_text(json.dumps(mutate(generator, good)), encoding="utf-8")
        started = time.monotonic()
        try:
            open_checkpoint(folder)
        except SourceError as error:
            assert "\n" not in str(error)
        assert time.monotonic() - started < 1


def test_source_hash(llama: Path, copy, tmp_path: Path) -> None:
    folder = copy(llama)
    first = source_hash(open_checkpoint(llama))
    assert len(first) == 64 and source_hash(open_checkpoint(folder)) == first
    assert {"config.json", "tokenizer.json"} <= {f.name for f in open_checkpoint(folder).files}
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert source_hash(open_checkpoint(folder)) != first
    path = write_f32(open_checkpoint(llama), tmp_path / "x.gguf")
    assert source_hash(open_checkpoint(path)) != first


def test_import_is_light() -> None:
    import subprocess
    import sys

    heavy = ("torch", "transformers", "llama_cpp", "tokenizers")
    code = f"import sys, halo.checkpoint.huggingface; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

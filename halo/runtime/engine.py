"""llama.cpp itself, through its C interface. Imported by the worker process and by nothing else.

The low-level interface instead of ``llama_cpp.Llama``: that class cannot set ``use_extra_bufts`` and keeps only the
last row of logits.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as llama

from halo.errors import RuntimeFailure
from halo.runtime.crash_hook import CrashHook
from halo.runtime.native_log import NativeLog
from halo.runtime.records import Buffers, Generation, LoadOptions, ModelInfo, StopReason

_KV_TYPES = {"f16": llama.GGML_TYPE_F16, "f32": llama.GGML_TYPE_F32}
_FLASH = {"off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, "auto": llama.LLAMA_FLASH_ATTN_TYPE_AUTO}


class Engine:
    """One model in one context. Every method raises RuntimeFailure with llama.cpp's own words when it refuses."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self._log = NativeLog()
        self._log.install(llama)
        llama.llama_backend_init()
        self._hook = CrashHook()
        self._model: Any = None
        self._context: Any = None
        self._vocab: Any = None
        self._batch: Any = None
        self._n_vocab = self._n_ctx = self._n_batch = 0
        self._options = LoadOptions()

    def load(self, path: str, options: LoadOptions) -> ModelInfo:
        """Load a GGUF in place of the one before it."""
        self.close()
        self._log.clear()
        self._options = options
        start = time.perf_counter()
        try:
            self._open(path, options)
        except RuntimeFailure:
            self.close()
            raise
        return self._describe(path, time.perf_counter() - start)

    def close(self) -> None:
        """Free the context and the model; harmless when there is none."""
        if self._batch is not None:
            llama.llama_batch_free(self._batch)
        if self._context is not None:
            llama.llama_free(self._context)
        if self._model is not None:
            llama.llama_model_free(self._model)
        self._model = self._context = self._vocab = self._batch = None

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        self._need_model()
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        for _ in range(2):
            ids = (llama.llama_token * room)()
            n = llama.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            room = -n
        raise RuntimeFailure("llama.cpp could not tokenize the text")

    def detokenize(self, ids: list[int], special: bool) -> str:
        """Text of token ids; ``special`` writes control tokens out."""
        self._check_ids(ids)
        tokens = (llama.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            n = llama.llama_detokenize(self._vocab, tokens, len(ids), buffer, room, False, special)
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            room = -n
        raise RuntimeFailure("llama.cpp could not turn the tokens into text")

    def generate(
        self,
        ids: list[int],
        max_tokens: int,
        ignore_end: bool,
        sampling: dict[str, float],
        emit: Callable[[str], None],
    ) -> Generation:
        """Continue ``ids``; ``emit`` gets whole characters as they come."""
        self._check_prompt(ids)
        start = time.perf_counter()
        self._forget()
        row = -1
        for first in range(0, len(ids), self._n_batch):
            if self._cancelled():
                return Generation("", [], len(ids), time.perf_counter() - start, 0.0, "cancelled")
            chunk = ids[first : first + self._n_batch]
            row = len(chunk) - 1
            self._decode(chunk, first, all_rows=False)
        llama.llama_synchronize(self._context)
        prefilled = time.perf_counter()
        with self._sampler(sampling) as sampler:
            text, new, stop, first_sampled = self._decode_loop(sampler, row, len(ids), max_tokens, ignore_end, emit)
        decode_seconds = time.perf_counter() - (first_sampled or prefilled)
        return Generation(text, new, len(ids), prefilled - start, decode_seconds, stop)

    def logits(self, ids: list[int]) -> Iterator[np.ndarray]:
        """Rows of float32 logits for every position, at most a batch at a time; each is valid until the next."""
        self._check_prompt(ids)
        self._forget()
        for first in range(0, len(ids), self._n_batch):
            if self._cancelled():
                return
            chunk = ids[first : first + self._n_batch]
            self._decode(chunk, first, all_rows=True)
            rows = llama.llama_get_logits(self._context)
            yield np.ctypeslib.as_array(rows, shape=(len(chunk), self._n_vocab))

    def _open(self, path: str, options: LoadOptions) -> None:
        params = llama.llama_model_default_params()
        params.use_extra_bufts = options.use_extra_bufts
        params.n_gpu_layers = options.n_gpu_layers
        params.vocab_only = options.vocab_only
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if self._model is None:
            raise RuntimeFailure(self._log.reason() or "the model could not be loaded")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self._n_vocab = llama.llama_vocab_n_tokens(self._vocab)
        if options.vocab_only:
            self._n_ctx = options.n_ctx
            return
        if llama.llama_model_has_encoder(self._model) or not llama.llama_model_has_decoder(self._model):
            raise RuntimeFailure("only decoder models can generate; this one has an encoder")
        self._context = llama.llama_init_from_model(self._model, self._context_params(options))
        if self._context is None:
            raise RuntimeFailure(self._log.reason() or "the context could not be made")
        self._n_ctx = llama.llama_n_ctx(self._context)
        self._n_batch = llama.llama_n_batch(self._context)
        self._batch = llama.llama_batch_init(self._n_batch, 0, 1)

    def _context_params(self, options: LoadOptions) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = options.n_batch
        params.n_ubatch = min(options.n_ubatch, options.n_batch)
        params.n_threads = params.n_threads_batch = options.n_threads or os.cpu_count() or 1
        params.type_k = params.type_v = _KV_TYPES[options.kv_type]
        params.flash_attn_type = _FLASH[options.flash_attn]
        return params

    def _describe(self, path: str, seconds: float) -> ModelInfo:
        template = llama.llama_model_chat_template(self._model, None)
        return ModelInfo(
            path=path,
            description=self._string(llama.llama_model_desc),
            architecture=self._meta("general.architecture"),
            n_params=llama.llama_model_n_params(self._model),
            size_bytes=llama.llama_model_size(self._model),
            n_vocab=self._n_vocab,
            n_layer=llama.llama_model_n_layer(self._model),
            n_ctx_train=llama.llama_model_n_ctx_train(self._model),
            n_ctx=self._n_ctx,
            n_batch=self._n_batch,
            n_threads=llama.llama_n_threads(self._context) if self._context else 0,
            use_extra_bufts=self._options.use_extra_bufts,
            bos=llama.llama_vocab_bos(self._vocab),
            eos=llama.llama_vocab_eos(self._vocab),
            add_bos=llama.llama_vocab_get_add_bos(self._vocab),
            chat_template=template.decode("utf-8", "replace") if template else None,
            system_info=llama.llama_print_system_info().decode("utf-8", "replace").strip(),
            llama_cpp_version=f"llama-cpp-python {llama_cpp.__version__}",
            load_seconds=seconds,
            buffers=self._buffers(),
        )

    def _buffers(self) -> Buffers:
        totals = dict.fromkeys(("model", "kv", "compute", "output"), 0)
        for (kind, _), size in self._log.buffers.items():
            totals[kind] += size
        return Buffers(**totals, detail={f"{name} {kind}": size for (kind, name), size in self._log.buffers.items()})

    def _string(self, call: Callable[..., int], *args: Any) -> str:
        buffer = ctypes.create_string_buffer(1024)
        n = call(self._model, *args, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else ""

    def _meta(self, key: str) -> str:
        return self._string(llama.llama_model_meta_val_str, key.encode())

    def _need_model(self) -> None:
        if self._model is None:
            raise RuntimeFailure("no model is loaded")

    def _check_ids(self, ids: list[int]) -> None:
        self._need_model()
        if bad := [i for i in ids if not 0 <= i < self._n_vocab]:
            raise RuntimeFailure(f"token {bad[0]} is outside the vocabulary of {self._n_vocab}")

    def _check_prompt(self, ids: list[int]) -> None:
        self._check_ids(ids)
        if not ids:
            raise RuntimeFailure("the prompt is empty")
        if len(ids) > self._n_ctx:
            raise RuntimeFailure(f"{len(ids)} tokens do not fit the context of {self._n_ctx}; load with a larger n_ctx")

    def _forget(self) -> None:
        memory = llama.llama_get_memory(self._context)
        if memory:
            llama.llama_memory_clear(memory, True)

    def _decode(self, ids: list[int], position: int, all_rows: bool) -> None:
        n = len(ids)
        batch = self._batch
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_rows or i == n - 1
        batch.n_tokens = n
        self._hook.before_batch(n, self._options.use_extra_bufts)
        self._log.clear()
        code = llama.llama_decode(self._context, batch)
        if code:
            raise RuntimeFailure(self._log.reason() or f"llama_decode returned {code}")

    @contextmanager
    def _sampler(self, sampling: dict[str, float]) -> Iterator[Any]:
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        add = llama.llama_sampler_chain_add
        try:
            if sampling["temperature"] <= 0:
                add(chain, llama.llama_sampler_init_greedy())
            else:
                add(chain, llama.llama_sampler_init_top_k(int(sampling["top_k"])))
                add(chain, llama.llama_sampler_init_top_p(sampling["top_p"], 1))
                add(chain, llama.llama_sampler_init_min_p(sampling["min_p"], 1))
                add(chain, llama.llama_sampler_init_temp(sampling["temperature"]))
                add(chain, llama.llama_sampler_init_dist(int(sampling["seed"]) & 0xFFFFFFFF))
            yield chain
        finally:
            llama.llama_sampler_free(chain)

    def _decode_loop(
        self,
        sampler: Any,
        row: int,
        position: int,
        max_tokens: int,
        ignore_end: bool,
        emit: Callable[[str], None],
    ) -> tuple[str, list[int], StopReason, float]:
        # A character can span tokens: the decoder holds its first bytes back until the rest is there.
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        new: list[int] = []
        pieces: list[str] = []
        first_sampled = 0.0
        stop: StopReason = "length"
        while len(new) < max_tokens:
            if self._cancelled():
                stop = "cancelled"
                break
            token = llama.llama_sampler_sample(sampler, self._context, row)
            first_sampled = first_sampled or time.perf_counter()
            new.append(token)
            if llama.llama_vocab_is_eog(self._vocab, token) and not ignore_end:
                stop = "end"
                break
            if piece := characters.decode(self._piece(token)):
                pieces.append(piece)
                emit(piece)
            if len(new) == max_tokens:
                break
            if position == self._n_ctx:
                stop = "context"
                break
            self._decode([token], position, all_rows=False)
            row, position = 0, position + 1
        if rest := characters.decode(b"", final=True):
            pieces.append(rest)
            emit(rest)
        return "".join(pieces), new, stop, first_sampled

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:n]

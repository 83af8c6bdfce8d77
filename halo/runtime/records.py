"""The values that cross between HALO and llama.cpp's process. Standard library only: both sides import this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

Prompt = str | Sequence[int]
OnPiece = Callable[[str], bool | None]
StopReason = Literal["end", "length", "context", "cancelled"]


@dataclass(frozen=True)
class LoadOptions:
    """How llama.cpp holds a model.

    Attributes:
        n_ctx: context in tokens; 0 takes the model's own training length.
        n_batch: most tokens handed to llama.cpp at once.
        n_ubatch: most tokens it computes at once.
        n_threads: threads; None takes the physical cores this process may use.
        use_extra_bufts: repack weights for special CPU kernels (AMX, repacked Q4), as llama.cpp does by default.
        kv_type: number format of the key-value cache.
        flash_attn: attention kernel; ``auto`` leaves the choice to llama.cpp.
        n_gpu_layers: layers on a GPU; -1 for all.
        vocab_only: only the tokenizer; nothing can be run then, and ``n_ctx`` is the one asked for.
    """

    n_ctx: int = 2048
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    use_extra_bufts: bool = True
    kv_type: Literal["f16", "f32"] = "f16"
    flash_attn: Literal["off", "auto"] = "auto"
    n_gpu_layers: int = 0
    vocab_only: bool = False


@dataclass(frozen=True)
class Buffers:
    """Bytes llama.cpp says it allocated, rounded by its log to 0.01 MiB; ``detail`` has each buffer by name."""

    model: int = 0
    kv: int = 0
    compute: int = 0
    output: int = 0
    detail: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model, as llama.cpp describes it; sizes in bytes, times in seconds."""

    path: str
    description: str
    architecture: str
    n_params: int
    size_bytes: int
    n_vocab: int
    n_layer: int
    n_ctx_train: int
    n_ctx: int
    n_batch: int
    n_threads: int
    use_extra_bufts: bool
    bos: int
    eos: int
    add_bos: bool
    chat_template: str | None
    system_info: str
    llama_cpp_version: str
    load_seconds: float
    buffers: Buffers


@dataclass(frozen=True)
class Generation:
    """What the model wrote and how long it took.

    Attributes:
        text: the new text, control tokens left out.
        ids: every new token, an end token included.
        n_prompt: tokens in the prompt.
        prefill_seconds: from the first batch to the prompt's last logits.
        decode_seconds: for the ``len(ids) - 1`` tokens after the first, sampling included.
        stop: ``end`` (the model ended), ``length`` (max_tokens), ``context`` (n_ctx full) or ``cancelled``.
    """

    text: str
    ids: list[int]
    n_prompt: int
    prefill_seconds: float
    decode_seconds: float
    stop: StopReason

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second."""
        return self.n_prompt / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tps(self) -> float:
        """New tokens per second after the first; 0 when there was only one."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Memory:
    """Resident memory of llama.cpp's process in bytes, mapped model pages included; None where the system hides it."""

    peak_rss: int | None
    rss: int | None
    anonymous: int | None
    source: str


class Runner(Protocol):
    """What a loaded ``Worker`` and a ``GuardedWorker`` have in common."""

    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str: ...

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 64,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        ignore_end: bool = False,
        parse_special: bool = False,
        on_piece: OnPiece | None = None,
    ) -> Generation: ...

    def logits(self, ids: Sequence[int]) -> np.ndarray: ...

    def logits_chunks(self, ids: Sequence[int]) -> Iterator[np.ndarray]: ...

    def memory(self) -> Memory: ...

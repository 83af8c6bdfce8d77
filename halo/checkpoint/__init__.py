"""One view of Hugging Face folders and GGUF files: architecture, hyper-parameters, tokenizer, tensors by GGUF name."""

from halo.checkpoint.base import Checkpoint, Hyperparameters, Tensor
from halo.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "Hyperparameters", "Tensor", "open_checkpoint"]

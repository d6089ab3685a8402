"""A compact Nemotron 3 forward pass on the operators of ``torch.ops.n3``: prefill, decode, speculative decoding.

It reads ``config.json`` and ``*.safetensors`` in the Hugging Face ``nemotron_h`` layout. It serves the demo, the
end-to-end tests and the end-to-end benchmarks; it is not a serving engine.
"""

from .cache import Cache
from .checkpoint import load, save
from .config import CheckpointError, Config
from .generate import Result, generate
from .model import Nemotron

__all__ = ["Cache", "CheckpointError", "Config", "Nemotron", "Result", "generate", "load", "save"]

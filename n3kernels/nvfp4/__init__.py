"""NVFP4: quantise, dequantise, and multiply with 4-bit weights.

A value is ``e2m1 * block_scale * global_scale``: a 4-bit code, one e4m3 scale per 16 consecutive elements of the last
dimension, one float32 per tensor. Scales are decode scales (multiply).
"""

from .dequantize import dequantize
from .embedding import embedding
from .linear import linear
from .loaders import from_compressed_tensors, from_modelopt
from .quantize import quantize
from .swizzle import swizzle_scale, unswizzle_scale
from .tensor import NVFP4Tensor

__all__ = [
    "NVFP4Tensor", "dequantize", "embedding", "from_compressed_tensors", "from_modelopt", "linear", "quantize",
    "swizzle_scale", "unswizzle_scale",
]  # fmt: skip

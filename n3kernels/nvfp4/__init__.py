"""NVFP4: quantise, dequantise, and multiply with 4-bit weights.

A value is ``e2m1 * block_scale * global_scale``: a 4-bit code, one e4m3 scale per 16 consecutive elements of the last
dimension, one float32 per tensor. Scales are decode scales (multiply).
"""

from . import linear_fp8, linear_packed  # noqa: F401  register operators
from .dequantize import dequantize
from .embedding import embedding
from .fake_quantize import fake_quantize
from .gemm import gemm, grouped_gemm
from .gemm_quantize import gemm_quantize
from .linear import linear
from .loaders import from_compressed_tensors, from_modelopt
from .producers import NormedNVFP4, relu2_quantize, rms_norm_quantize, silu_mul_quantize
from .quantize import quantize
from .repack import PackedNVFP4, prepack
from .swizzle import swizzle_scale, unswizzle_scale
from .tensor import NVFP4Tensor
from .training import Recipe, TrainingLinear, training_linear

__all__ = [
    "NVFP4Tensor", "NormedNVFP4", "PackedNVFP4", "Recipe", "TrainingLinear", "dequantize", "embedding", "fake_quantize",
    "from_compressed_tensors", "from_modelopt", "gemm", "gemm_quantize", "grouped_gemm", "linear", "prepack",
    "quantize", "relu2_quantize", "rms_norm_quantize", "silu_mul_quantize", "swizzle_scale", "training_linear",
    "unswizzle_scale",
]  # fmt: skip

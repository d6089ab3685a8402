"""Published sizes, stated once: the matrix products of the Nemotron 3 models, as N x K (output x input features)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["EXPERTS", "GEMMS", "LAYERS", "MIXERS", "TOKENS", "Experts", "Gemm", "Layer", "Mixer"]


class Gemm(NamedTuple):
    n: int
    k: int


# Source: config.json of the three models; in_proj = z, x, B, C and dt of the Mamba-2 mixer side by side.
GEMMS = {
    "nano-in_proj": Gemm(10304, 2688),
    "nano-out_proj": Gemm(2688, 4096),
    "nano-expert_up": Gemm(1856, 2688),
    "nano-expert_down": Gemm(2688, 1856),
    "nano-shared_up": Gemm(3712, 2688),
    "nano-shared_down": Gemm(2688, 3712),
    "nano-lm_head": Gemm(131072, 2688),
    "super-in_proj": Gemm(18560, 4096),
    "super-out_proj": Gemm(4096, 8192),
    "super-expert_up": Gemm(2688, 1024),
    "super-expert_down": Gemm(1024, 2688),
    "super-shared_up": Gemm(5376, 4096),
    "super-shared_down": Gemm(4096, 5376),
    "ultra-in_proj": Gemm(35072, 8192),
    "ultra-out_proj": Gemm(8192, 16384),
    "ultra-expert_up": Gemm(5120, 2048),
    "ultra-expert_down": Gemm(2048, 5120),
    "ultra-shared_up": Gemm(10240, 8192),
    "ultra-shared_down": Gemm(8192, 10240),
}


class Experts(NamedTuple):
    k: int  # experts per token
    width: int  # in and out: hidden, or latent
    inner: int


# Source: config.json of the three models; demo is the model of `n3kernels demo`, latent-small a layer of Super's kind
# with 128 experts that fits a laptop.
EXPERTS = {
    "demo": Experts(6, 64, 128),
    "latent-small": Experts(22, 256, 672),
    "nano": Experts(6, 2688, 1856),
    "super": Experts(22, 1024, 2688),
    "ultra": Experts(22, 2048, 5120),
}

class Layer(NamedTuple):
    experts: int
    top_k: int
    hidden: int
    latent: int | None  # None: the experts work on the hidden width
    inner: int
    shared: int
    scale: float


# Source: config.json of the models; latent-small has Super's proportions in a layer that fits a laptop.
LAYERS = {
    "demo": Layer(32, 6, 192, 64, 128, 384, 2.5),
    "latent-small": Layer(128, 22, 1024, 256, 672, 1344, 5.0),
    "nano": Layer(128, 6, 2688, None, 1856, 3712, 2.5),
    "super": Layer(512, 22, 4096, 1024, 2688, 5376, 5.0),
}


class Mixer(NamedTuple):
    heads: int
    head_dim: int
    groups: int
    d_state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv(self) -> int:  # channels of x, B and C side by side
        return self.inner + 2 * self.groups * self.d_state

    @property
    def projected(self) -> int:  # features of in_proj: z, x, B, C, dt
        return self.inner + self.conv + self.heads


# Source: config.json of the three models; the convolution has 4 taps, a norm group is inner / groups wide.
MIXERS = {
    "nano": Mixer(64, 64, 8, 128),
    "super": Mixer(128, 64, 8, 128),
    "ultra": Mixer(256, 64, 8, 128),
}

# One sequence, a small batch, a batch, a chunk of prefill.
TOKENS = (1, 8, 32, 256)

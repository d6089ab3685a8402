"""Triton kernels of the mamba family: causal convolution, state space duality, gated norm, and the mixer of them."""

"""Integer kernels for CUDA devices, written in Triton: exact, fused, and optional.

=========================  =========================================================================================
:mod:`nasq.cuda.support`   whether the kernels can run here, and if not, why
:mod:`nasq.cuda.kernels`   matrix products and convolutions of int8 with fused bias, requantization and activation
:mod:`nasq.cuda.thin`      products with few rows, with 8-bit or packed 4-bit weights (W4A8)
:mod:`nasq.cuda.pointwise` the sum of two quantized tensors
:mod:`nasq.cuda.ops`       the kernels as operators of torch
:mod:`nasq.cuda.rounding`  fake quantization in one pass forward and one backward
:mod:`nasq.cuda.products`  exact accumulators of a network's integer evaluation
=========================  =========================================================================================

Nothing here is imported before a CUDA tensor asks for it: without triton, without a device, or on a device older than
compute capability 8.0 everything runs on torch's own operators, with the same integers.
"""

"""Triton's kernels on a CPU, for tests: its interpreter, and what stands between it and them.

    import support.interpreted_triton  # before what defines kernels: liger_kernel, axolotl.kernels

The interpreter runs a kernel as Python on numpy arrays. Triton asks for it where a kernel is
defined, which is why the import comes first. What it does otherwise than a GPU is repaired here.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.language.extra.cuda.libdevice as cuda_libdevice
from triton.language.extra import libdevice
from triton.runtime import interpreter

_convert, _empty = interpreter._implicit_cvt, torch.empty


def _scalar(argument):
    """Turn a float argument into a float32 scalar, as a GPU does; it would stay a float."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(argument)


def _empty_here(*size, device=None, **options):
    """Make a tensor on the CPU where a kernel's caller names "cuda", as Axolotl's do."""
    return _empty(*size, device="cpu" if device == "cuda" else device, **options)


def _rsqrt(x):
    """Compute a function of the GPU's library, which gives None here."""
    return 1.0 / tl.sqrt(x)


interpreter._implicit_cvt = _scalar
torch.empty = _empty_here
libdevice.rsqrt = cuda_libdevice.rsqrt = _rsqrt

"""Run Triton kernels on a CPU with Triton's interpreter, corrected where it differs from a GPU.

    import support.interpreted_triton  # before liger_kernel and axolotl.kernels define kernels

The interpreter runs a kernel as Python on numpy arrays. Triton chooses it when a kernel is defined,
so this module must be imported first.
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
    """Convert a float argument to a float32 scalar, as on a GPU; the interpreter does not."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(argument)


def _empty_here(*size, device=None, **options):
    """Make a tensor on the CPU if a kernel's caller asks for "cuda", as Axolotl's do."""
    return _empty(*size, device="cpu" if device == "cuda" else device, **options)


def _rsqrt(x):
    """Compute 1/√x; the interpreter's stub of libdevice returns None."""
    return 1.0 / tl.sqrt(x)


interpreter._implicit_cvt = _scalar
torch.empty = _empty_here
libdevice.rsqrt = cuda_libdevice.rsqrt = _rsqrt

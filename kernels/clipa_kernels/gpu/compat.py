"""The parts of JAX that are made for GPU kernels, in one place.

Pallas is experimental, and its Triton backend deprecated since jax 0.11, with a warning at each lowering: that one is
silenced here. Only this backend takes every length and head size without padding in memory. Every other file of
this package imports from here, so that a move to another backend (BUILD.md, "GPU") starts here.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

DEPRECATION = "The Pallas Triton backend is deprecated"
warnings.filterwarnings("ignore", message=DEPRECATION, category=DeprecationWarning)

load = plt.load
store = plt.store
program_id = pl.program_id
ds = pl.ds


def kernel_call(
    kernel: Callable[..., None],
    name: str,
    operands: Any,
    results: Any,
    *,
    programs: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> Any:
    """Runs kernel(operands, results), both trees of references to whole arrays, once for each of `programs`.

    The grid has one dimension: `vmap` adds one each time, and Triton has three. Inside of a shard_map, results differ
    along the mesh axes that the first operand differs along.
    """
    varying = jax.typeof(jax.tree.leaves(operands)[0]).mat
    results = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying), results)
    call = pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=(results,),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )
    return call(operands)[0]


def float32_product(interpret: bool) -> Any:
    """The precision of float32 matrix products: three TF32 products on tensor cores, which keep float32's digits.

    The interpreter runs on a CPU, where plain float32 is the same to rounding.
    """
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


__all__ = ["DEPRECATION", "ds", "float32_product", "jax", "kernel_call", "load", "program_id", "store"]

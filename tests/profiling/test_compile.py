"""Compiles for TPU without one: times and bytes of programs whose cost is known beforehand, and wrong input."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import clipa_kernels
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from clipa_fast import profiling
from clipa_fast.cli.profile import profile_command
from clipa_fast.errors import UserError
from clipa_fast.profiling import compile_for_tpu

needs_libtpu = pytest.mark.skipif(not profiling.is_available(), reason="libtpu is not installed")
P = PartitionSpec


def bf16(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@functools.cache
def profile_of(function, *shapes, **options):
    return compile_for_tpu(function, *(bf16(*shape) for shape in shapes), **options)


def copy_kernel(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    block = pl.BlockSpec((512, 1024), lambda i: (i, 0))
    return pl.pallas_call(
        kernel, out_shape=x, grid=(x.shape[0] // 512,), in_specs=[block], out_specs=block, name="copy_kernel"
    )(x)


def matmul_kernel(a, b):
    """512 x 1024 x 512 blocks; the accumulator is cleared at the first and stored at the last step of k."""

    def kernel(a_ref, b_ref, o_ref, accumulator):
        @pl.when(pl.program_id(2) == 0)
        def _():
            accumulator[...] = jnp.zeros_like(accumulator)

        accumulator[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            o_ref[...] = accumulator[...].astype(o_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((a.shape[0], b.shape[1]), a.dtype),
        grid=(a.shape[0] // 512, b.shape[1] // 512, a.shape[1] // 1024),
        in_specs=[pl.BlockSpec((512, 1024), lambda i, j, k: (i, k)), pl.BlockSpec((1024, 512), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((512, 512), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((512, 512), jnp.float32)],
        name="matmul_kernel",
    )(a, b)


def scan(x, weights):
    return jax.lax.scan(lambda carry, weight: (jnp.tanh(carry @ weight), None), x, weights)[0]


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", *(pytest.param(c, marks=pytest.mark.slow) for c in ("v5p", "v6e", "tpu7x"))])
def test_model_agrees_with_theory(chip):
    matmul, copy = profiling.self_check(chip)
    # No program is faster than the matrix units; XLA's large matmul is known to come within a few percent.
    assert 0 <= matmul.deviation < 0.05
    assert abs(copy.deviation) < 0.01
    assert "static estimate" in profiling.format_checks(chip, (matmul, copy))


@needs_libtpu
def test_pallas_copy_moves_each_byte_twice_and_takes_the_bandwidth():
    profile = profile_of(copy_kernel, (65536, 1024))
    (op,) = profile.select("pallas")
    assert op.name.startswith("copy_kernel")
    assert op.hbm_bytes == 2 * 65536 * 1024 * 2
    assert profile.time_us == pytest.approx(op.hbm_bytes / 819e9 * 1e6)
    assert op.bundle_us < op.time_us
    assert profile.copies == ()


@needs_libtpu
def test_pallas_matmul_counts_refetched_blocks_matrix_work_and_conditional_bodies():
    profile = profile_of(matmul_kernel, (1024, 2048), (2048, 1024))
    (op,) = profile.select("pallas")
    steps = 2 * 2 * 2
    fetched = steps * (512 * 1024 + 1024 * 512) * 2
    assert op.hbm_bytes == fetched + 1024 * 1024 * 2  # the output block leaves once
    assert op.mxu_us == pytest.approx(2 * 1024 * 2048 * 1024 / 196.6e12 * 1e6, rel=0.01)
    assert op.time_us < 1.25 * op.mxu_us
    assert op.vmem_bytes >= 512 * 512 * 4
    assert op.source.endswith("pallas_call")


@needs_libtpu
def test_scan_over_layers_is_multiplied():
    profile = profile_of(scan, (512, 512), (12, 512, 512))
    assert {op.count for op in profile.select("matmul")} == {12}
    assert profile.mxu_us == pytest.approx(12 * 2 * 512**3 / 196.6e12 * 1e6, rel=0.02)
    # Each layer reads its own weights, not the whole stack.
    assert sum(op.hbm_bytes for op in profile.ops) < 2 * 12 * 512 * 512 * 2


@needs_libtpu
def test_transposes_show_as_copies():
    profile = compile_for_tpu(jnp.transpose, bf16(4096, 1024))
    (copy,) = profile.copies
    assert copy.hbm_bytes == 2 * 4096 * 1024 * 2
    assert copy.time_us == profile.time_us >= copy.hbm_bytes / 819e9 * 1e6


@needs_libtpu
def test_collectives_are_named_with_their_bytes():
    def mean(x):
        return x.sum(0)

    profile = compile_for_tpu(mean, bf16(1024, 4096), devices=4, in_specs=P("data"))
    (collective,) = profile.collectives
    assert collective.opcode == "all-reduce"
    assert collective.num_bytes >= 4096 * 2
    assert profile.devices == 4


@needs_libtpu
def test_shardings_on_a_tpu_mesh_are_kept():
    mesh = profiling.tpu_mesh("v6e", {"data": 2, "model": 2})
    row, column = (NamedSharding(mesh, P(*axes)) for axes in (("data", None), (None, "model")))
    a = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=row)
    b = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16, sharding=column)
    profile = compile_for_tpu(jnp.matmul, a, b, chip="v6e", mesh=mesh)
    assert profile.argument_bytes == 2 * 256 * 256 * 2
    assert profile.collectives == ()


@needs_libtpu
def test_kernels_see_the_chip_while_traced():
    def kernel(x_ref, o_ref):
        rows = jax.lax.broadcasted_iota(jnp.int32, o_ref.shape, 0)
        o_ref[...] = x_ref[...] + (rows // 3).astype(jnp.float32)  # asks for the TPU generation

    def function(x):
        return pl.pallas_call(kernel, out_shape=x)(x)

    profile = compile_for_tpu(function, jax.ShapeDtypeStruct((64, 128), jnp.float32), chip="v6e")
    assert profile.select("pallas")


@needs_libtpu
def test_compiling_again_gives_the_same_profile():
    first, second = (compile_for_tpu(copy_kernel, bf16(4096, 1024)) for _ in range(2))
    assert first.ops == second.ops
    assert first.ops[0].basis == "bundles"


@needs_libtpu
def test_output_says_that_it_is_an_estimate():
    profile = profile_of(copy_kernel, (65536, 1024))
    assert "static estimate" in profile.table()
    data = json.loads(profile.to_json())
    assert "static estimate" in data["basis"]
    assert data["time_us"] == profile.time_us
    assert data["ops"][0]["name"] == profile.ops[0].name
    assert dataclasses.asdict(profile.ops[0]) in data["ops"]


@needs_libtpu
def test_arrays_numbers_and_trees_are_accepted():
    def function(tree, factor):
        return tree["x"] * factor

    profile = compile_for_tpu(function, {"x": jnp.ones((256, 1024))}, 2.0, in_specs=({"x": P()}, P()))
    assert profile.argument_bytes >= 256 * 1024 * 4


@needs_libtpu
def test_python_numbers_widen_nothing():
    profile = compile_for_tpu(lambda x, factor: x * factor, bf16(256, 1024), 2.0)
    assert profile.output_bytes == 256 * 1024 * 2


@needs_libtpu
def test_a_program_that_names_no_implementation_takes_that_of_a_tpu():
    """Not that of the machine that compiles."""

    def attend(x):
        return clipa_kernels.flat_attention(x, x, x, num_heads=2, seq_len=16)

    profile = compile_for_tpu(attend, bf16(256, 128))
    assert len(profile.select("pallas")) == 1
    assert profile.within("attention") == ()

    def scoped(x):
        with jax.named_scope("attention"):
            return attend(x).sum()

    profile = compile_for_tpu(jax.grad(scoped), bf16(256, 128))
    assert {op.kind for op in profile.within("attention")} >= {"pallas"}
    assert profile.within("atten") == ()


@needs_libtpu
def test_a_program_too_large_for_the_chip_is_refused_in_one_line():
    def outer(x):
        return jnp.sort(x[:, None] * x[None, :], axis=0)

    with pytest.raises(
        UserError, match=r"^the program does not fit into the memory of v5e: RESOURCE_EXHAUSTED"
    ) as seen:
        compile_for_tpu(outer, jax.ShapeDtypeStruct((100_000,), jnp.float32))
    assert "\n" not in str(seen.value)


@needs_libtpu
def test_what_the_kernels_cannot_serve_is_said_in_one_line():
    with pytest.raises(UserError, match="implementation='tpu' cannot serve this call: head_dim must be"):
        profile_command("attention", head_dim=8, batch=8)


@needs_libtpu
def test_arguments_that_are_no_arrays_are_refused():
    with pytest.raises(UserError, match=r"^args: got 'mean', accepted are trees of arrays, numbers and structs"):
        compile_for_tpu(lambda x, how: x, bf16(8, 128), "mean")


@needs_libtpu
def test_command_profiles_attention_and_writes_json(tmp_path):
    file = tmp_path / "profile.json"
    text = profile_command(
        "attention", "v5e", implementation="xla", seq_len=16, num_heads=2, batch=8, backward=False, output=file
    )
    assert "static estimate" in text
    assert json.loads(file.read_text())["chip"] == "v5e"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chip": "v4"}, "chip: got 'v4', accepted are v5e, v5p, v6e, tpu7x"),
        ({"devices": 0}, "devices: got 0, accepted for v5e is a whole number from 1 to 256"),
        ({"devices": 512}, "devices: got 512"),
        ({"devices": True}, "devices: got True"),
        ({"in_specs": (P(), P())}, "in_specs: got 2 for 1 arguments"),
    ],
)
def test_wrong_input(options, message):
    if "in_specs" in options and not profiling.is_available():
        pytest.skip("libtpu is not installed")
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(")):
        compile_for_tpu(jnp.sin, bf16(8, 128), **options)


@needs_libtpu
def test_a_mesh_of_other_devices_is_refused():
    with pytest.raises(UserError, match=r"^mesh: got devices of kind 'TPU v6 lite', accepted for chip 'v5e'"):
        compile_for_tpu(jnp.sin, bf16(8, 128), mesh=profiling.tpu_mesh("v6e"))
    here = jax.sharding.Mesh(jax.devices("cpu")[:1], ("data",))
    with pytest.raises(UserError, match=r"^mesh: got devices of kind 'cpu'"):
        compile_for_tpu(jnp.sin, bf16(8, 128), mesh=here)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"function": "mlp"},
            "function: got 'mlp', accepted are attention, block, contrastive, train-step, self-check",
        ),
        ({"implementation": "torch"}, "implementation: got 'torch', accepted are tpu, xla, jax, none"),
        ({"seq_len": 0}, "seq_len: got 0, accepted is a whole number from 1"),
        ({"dtype": "int8"}, "dtype: got 'int8', accepted are bfloat16, float32"),
        ({"devices": 2}, "devices: got 2, accepted for attention is 1"),
        ({"rows": -1}, "rows: got -1, accepted is a whole number from 0"),
        ({"output": Path("no/such/folder/profile.json")}, "output: the folder no/such/folder does not exist"),
        ({"function": "contrastive", "devices": 0}, "devices: got 0, accepted for v5e is a whole number from 1 to 256"),
        ({"function": "contrastive", "width": 0, "implementation": "xla"}, "width: got 0, accepted is a whole number"),
        ({"function": "train-step", "preset": "Z/16"}, "model.preset: unknown preset 'Z/16'"),
        ({"function": "train-step", "image_size": 100}, "image_size: 100 px is not a positive multiple of the patch"),
        ({"function": "train-step", "text_length": 0}, "text_length: got 0, accepted is a whole number from 1"),
        (
            {"function": "train-step", "batch": 9, "devices": 2},
            r"batch: got 9, accepted is a multiple of devices \(2\)",
        ),
        ({"function": "train-step", "dtype": "int8"}, "dtype: got 'int8', accepted are bfloat16, float32"),
        (
            {"function": "train-step", "implementation": "none"},
            "implementation: got 'none', accepted for train-step are",
        ),
        ({"function": "contrastive", "batch": 9, "devices": 2, "implementation": "xla"}, "batch: got 9"),
    ],
)
def test_wrong_input_to_the_command(options, message):
    with pytest.raises(UserError, match="^" + message):
        profile_command(**options)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    from clipa_fast.profiling.static import libtpu

    libtpu.dump_folder.cache_clear()
    libtpu.topology_devices.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install clipa-fast\[tpu\]"):
            compile_for_tpu(jnp.sin, bf16(8, 128))


@needs_libtpu
def test_libtpu_loaded_by_someone_else_is_refused():
    """In a process of its own, since libtpu is loaded once."""
    code = (
        "import jax\n"
        "from jax.experimental import topologies\n"
        "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')\n"
        "from clipa_fast.profiling import compile_for_tpu\n"
        "compile_for_tpu(jax.numpy.sin, 1.0)\n"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "libtpu was loaded in this process before" in done.stderr

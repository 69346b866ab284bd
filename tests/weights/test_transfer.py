"""Import and export: bitwise round trips, deltas, dtypes, donation, subsets, any mesh."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh

from jaxft.core import sharding
from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.transformers import open_source
from jaxft.weights.transfer import Part

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Opened:
    """A folder's part, leaves and shardings on a mesh."""

    def __init__(self, folder, sizes=(2, 2, 2)):
        self.source = open_source(str(folder))
        self.cfg = registry.read_decoder(self.source.config)
        self.template = jax.eval_shape(lambda: Decoder(self.cfg, key=jax.random.key(0)))
        self.leaves = describe(self.template)
        drop = ("lm_head.weight",) if self.cfg.tied else ()
        names = llama.RULES, llama.sizes(self.cfg), llama.ignore(self.cfg), drop
        self.part = Part("", self.source.name, self.source.tensors, *names)
        mesh = sharding.make_mesh(*sizes) if sizes else one_device_mesh()
        self.shardings = sharding.shardings(self.leaves, mesh)

    def load(self, dtype=jnp.float32, wanted=None):
        wanted = set(self.leaves) if wanted is None else wanted
        return transfer.load(self.part, self.leaves, self.shardings, dtype, wanted)

    def export(self, trained, changes=None, dtype=None):
        made = transfer.export(self.part, self.leaves, trained, changes or {}, dtype)
        tensors = {key: array.copy() for key, array in made.tensors}
        assert {k: (a.shape, a.dtype) for k, a in tensors.items()} == made.infos
        return tensors


def one_device_mesh():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def contents(folder):
    files = TensorFiles.open(folder)
    return dict(zip(files.keys(), map(files.read, files.keys()), strict=True))


def assert_same_bits(got, want):
    assert list(got) == list(want)
    for key, array in want.items():
        assert got[key].dtype == array.dtype and got[key].shape == array.shape, key
        assert got[key].tobytes() == array.tobytes(), key


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder()


@pytest.mark.parametrize(
    ("tied", "dtype", "shard", "sizes"),
    [
        (False, "float32", "1GB", (2, 2, 2)),
        (True, "bfloat16", "20KB", (1, 8, 1)),
        (False, "float16", "20KB", None),
    ],
)
def test_t31_w8_an_untrained_round_trip_is_the_source_bit_for_bit(
    make_folder, tmp_path, tied, dtype, shard, sizes
):
    folder = make_folder(tied=tied, dtype=dtype, shard=shard)
    # What a careless cast loses: subnormals, negative zero, the largest values.
    files = contents(folder)
    first = files["model.layers.1.self_attn.o_proj.weight"]
    info = ml_dtypes.finfo(first.dtype)
    first.flat[:5] = [info.smallest_subnormal, -0.0, info.max, info.min, info.tiny]
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    infos = {key: (array.shape, array.dtype) for key, array in files.items()}
    write_sharded(
        folder, files.items(), infos, max_shard_bytes=20_000 if shard == "20KB" else 10**9
    )
    assert len(list(folder.glob("model-*.safetensors"))) == 0 or shard == "20KB"
    opened = Opened(folder, sizes)
    params = opened.load()
    assert all(x.dtype == jnp.float32 for x in params.values())
    want = contents(folder)
    assert ("lm_head.weight" in want) != tied
    assert_same_bits(opened.export(params), want)  # through the device
    assert_same_bits(opened.export({}), want)  # untouched tensors are copied


def test_a_mesh_of_eight_loads_what_one_device_loads(folder):
    one, eight = Opened(folder, None), Opened(folder, (2, 2, 2))
    ours = eight.load()
    for path, array in one.load().items():
        np.testing.assert_array_equal(ours[path], array)
        assert ours[path].sharding.is_equivalent_to(eight.shardings[path], array.ndim)
    q = ours["layers.self_attn.q_proj.kernel"]
    assert q.shape == (2, 32, 4, 8) and q.addressable_shards[0].data.shape == (2, 16, 2, 8)


def test_values_are_those_of_the_file(folder):
    params, want = Opened(folder).load(), contents(folder)
    q = want["model.layers.1.self_attn.q_proj.weight"].reshape(4, 8, 32).transpose(2, 0, 1)
    np.testing.assert_array_equal(params["layers.self_attn.q_proj.kernel"][1], q)
    down = want["model.layers.0.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(params["layers.mlp.down_proj.kernel"][0], down)


def test_only_the_wanted_are_loaded_in_the_asked_dtype(folder):
    wanted = {"norm.scale", "layers.mlp.up_proj.kernel"}
    opened = Opened(folder)
    read = []
    spy = type("Spy", (), {"read": lambda self, key: read.append(key) or tensors.read(key)})()
    tensors = opened.part.tensors
    spy.keys, spy.info = tensors.keys, tensors.info
    opened.part = opened.part._replace(tensors=spy)
    params = opened.load(jnp.bfloat16, wanted)
    assert params.keys() == wanted and all(x.dtype == jnp.bfloat16 for x in params.values())
    up = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert sorted(read) == sorted([*up, "model.norm.weight"])


@pytest.mark.parametrize("sizes", [None, (1, 8, 1)])
def test_t20_imported_buffers_can_be_donated(folder, sizes):
    params = Opened(folder, sizes).load()
    before = {path: np.array(x) for path, x in params.items()}
    step = jax.jit(
        lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0, compiler_options=QUICK
    )
    after = step(params)
    assert all(x.is_deleted() for x in params.values())
    for path, value in after.items():
        np.testing.assert_array_equal(value, 2 * before[path])


def test_only_trained_tensors_change(folder):
    opened, want = Opened(folder), contents(folder)
    path = "layers.self_attn.k_proj.kernel"
    trained = {path: opened.load(wanted={path})[path] + 1}
    got = opened.export(trained)
    changed = {key for key in want if got[key].tobytes() != want[key].tobytes()}
    assert changed == {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)}
    for key in changed:
        np.testing.assert_array_equal(got[key], want[key] + 1)


def test_a_delta_is_added_in_fp32_to_the_source(make_folder):
    folder = make_folder(dtype="bfloat16")
    opened, want = Opened(folder), contents(folder)
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(2, 4, 8, 32)).astype(np.float32) * 0.01
    changes = {"layers.self_attn.o_proj.kernel": lambda i, kernel: kernel + delta[i]}
    for dtype in (None, np.dtype(np.float32)):
        got = opened.export({}, changes, dtype)
        for i in (0, 1):
            key = f"model.layers.{i}.self_attn.o_proj.weight"
            merged = want[key].astype(np.float32) + delta[i].reshape(32, 32).T
            np.testing.assert_array_equal(got[key], merged.astype(got[key].dtype))
            assert got[key].dtype == (dtype or ml_dtypes.bfloat16)
        key = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_array_equal(got[key], want[key].astype(got[key].dtype))


def test_a_delta_on_a_trained_kernel_adds_to_what_was_trained(folder):
    opened, path = Opened(folder), "lm_head.kernel"
    trained = {path: opened.load(wanted={path})[path] * 0 + 5}
    got = opened.export(trained, {path: lambda i, kernel: kernel + 2})
    np.testing.assert_array_equal(got["lm_head.weight"], 7)


def test_a_dtype_is_for_floats_only(tmp_path, folder):
    files = contents(folder) | {"model.rotary_emb.inv_freq": np.arange(3)}
    infos = {key: (array.shape, array.dtype) for key, array in files.items()}
    write_sharded(tmp_path, files.items(), infos)
    opened = Opened(folder)
    opened.part = opened.part._replace(tensors=TensorFiles.open(tmp_path))
    got = opened.export({}, dtype=np.dtype(ml_dtypes.bfloat16))
    assert got["model.rotary_emb.inv_freq"].dtype == np.int64
    assert got["lm_head.weight"].dtype == ml_dtypes.bfloat16


def test_float16_overflow_is_an_error_that_names_the_tensor(make_folder):
    opened = Opened(make_folder(dtype="float16"))
    path = "norm.scale"
    trained = {path: opened.load(wanted={path})[path] * 1e6}
    with pytest.raises(UserError, match=r"model\.norm\.weight overflows float16; .*bfloat16"):
        opened.export(trained)
    assert opened.export(trained, dtype=np.dtype(np.float32))["model.norm.weight"][0] == 1e6


def test_stale_tensors_are_dropped_and_others_copied(tmp_path, make_folder):
    folder = make_folder(tied=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    files = contents(folder) | extra | {"lm_head.weight": np.ones((320, 32), np.float32)}
    infos = {key: (array.shape, array.dtype) for key, array in files.items()}
    write_sharded(tmp_path, files.items(), infos)
    opened = Opened(folder)
    opened.part = opened.part._replace(tensors=TensorFiles.open(tmp_path))
    got = opened.export(opened.load())
    assert_same_bits(got, {key: files[key] for key in got})
    assert "lm_head.weight" not in got and set(files) - set(got) == {"lm_head.weight"}


def test_a_part_without_a_source_exports_its_parameters(folder):
    opened, want = Opened(folder), contents(folder)
    trained = opened.load()
    opened.part = opened.part._replace(tensors=None)
    got = opened.export(trained)
    assert_same_bits({key: got[key] for key in want}, want)
    assert got.keys() == want.keys()
    half = opened.export(trained, dtype=np.dtype(ml_dtypes.bfloat16))
    assert {array.dtype for array in half.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_prefix_separates_parts(folder):
    """As in a pipeline: each part sees only its own parameters, exported under its own keys."""
    opened = Opened(folder)
    leaves = {f"text.{path}": leaf for path, leaf in opened.leaves.items()}
    leaves["unet.kernel"] = opened.leaves["norm.scale"]
    part = opened.part._replace(prefix="text.")
    places = {f"text.{path}": where for path, where in opened.shardings.items()}
    params = transfer.load(part, leaves, places, jnp.float32, {"text.norm.scale", "unet.kernel"})
    assert params.keys() == {"text.norm.scale"}
    made = dict(transfer.export(part, leaves, params, {}, None).tensors)
    assert_same_bits(made, contents(folder))


def test_a_checkpoint_of_another_model_is_named(make_folder, folder):
    opened, other = Opened(folder), Opened(make_folder(intermediate_size=48))
    opened.part = opened.part._replace(tensors=other.part.tensors, name="folder X")
    with pytest.raises(UserError, match=r"folder X does not fit the model: .*mlp"):
        opened.load()


EDGES = (0.0, 1e-9, -1e-8, 5e-8, 6.0e-5, -6.2e-5, 0.1, 65504.0, -65504.0)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_float16_is_that_of_torch_bit_for_bit(make_folder, stored, capsys):
    """Zeros and subnormal numbers are counted, all that were 0 before left out."""
    folder = make_folder(dtype=stored)
    opened = Opened(folder)
    values = np.resize(np.array(EDGES, np.float32), 32)
    trained = {"norm.scale": jnp.asarray(values)}
    got = opened.export(trained, dtype=np.dtype(np.float16))
    sources = {**contents(folder), "model.norm.weight": values}
    zeros = subnormal = 0
    for key, array in sources.items():
        wide = torch.tensor(array.astype(np.float32))
        half = wide.half()
        assert got[key].tobytes() == half.numpy().tobytes(), key
        small = (half.abs() < torch.finfo(torch.float16).tiny) & (wide != 0)
        zeros += int((small & (half == 0)).sum())
        subnormal += int((small & (half != 0)).sum())
    assert zeros >= 6 and subnormal >= 6
    line = f"float16 makes {zeros} numbers 0, and {subnormal} subnormal"
    assert capsys.readouterr().out.count(line) == 1


@pytest.mark.parametrize("number", [65505.0, -65519.0, 7e4, 3e38])
def test_float16_refuses_numbers_beyond_its_range(make_folder, number):
    opened = Opened(make_folder())
    trained = {"norm.scale": opened.load(wanted={"norm.scale"})["norm.scale"].at[3].set(number)}
    with pytest.raises(UserError, match=r"model\.norm\.weight overflows float16; .*bfloat16"):
        opened.export(trained, dtype=np.dtype(np.float16))

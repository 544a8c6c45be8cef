"""What is written is read again to the bit, and what does not fit is refused by name."""

import dataclasses
import io
import json
import pickle
import shutil
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clipa_fast.config import TowerSize
from clipa_fast.errors import UserError
from clipa_fast.interop.clipa_npz import npz_places
from clipa_fast.interop.open_clip_config import Described, from_open_clip, to_open_clip
from clipa_fast.interop.open_clip_export import export_open_clip
from clipa_fast.interop.parameter_names import expected_tensors, model_shapes, open_clip_places, paths, write_tensors
from clipa_fast.interop.pretrained import open_pretrained
from clipa_fast.interop.tensors import open_tensors
from clipa_fast.model.positions import sincos_2d
from clipa_fast.model.presets import TEXT, VISION

from .small_model import LENGTH, SIDE, random_params, small


def assert_equal_bits(ours, theirs):
    ours, theirs = paths(ours), paths(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert np.asarray(value).dtype == np.float32
        assert np.shape(value) == np.shape(theirs[path])
        assert np.asarray(value).tobytes() == np.asarray(theirs[path]).tobytes(), path


@pytest.mark.parametrize("convention", ["open_clip", "openai"])
def test_an_exported_model_is_read_again_to_the_bit(exported, convention):
    model = open_pretrained(exported[convention])
    assert model.config == small(convention)
    assert (model.image_size, model.text_length) == (SIDE, LENGTH)
    assert_equal_bits(model.read_params(), random_params(model.config))


def test_computed_positions_are_written_out(exported):
    model = open_pretrained(exported["clipa"])
    assert model.config == small("clipa", image_positions="stored")
    params = model.read_params()
    table = params["vision"].pop("position_table")
    np.testing.assert_array_equal(table, sincos_2d(SIDE // 8, 32))
    assert_equal_bits(params, random_params(small("clipa")))


def test_the_tokenizer_comes_along(exported, tokenizer):
    captions = ["a red dog", "", "the the the the the the the the the the", "[SEP] boat"]
    model = open_pretrained(exported["clipa"])
    np.testing.assert_array_equal(model.tokenizer(captions, LENGTH), tokenizer(captions, LENGTH))
    assert open_pretrained(exported["open_clip"]).tokenizer.rule == "open_clip"


@pytest.mark.parametrize("preset", list(VISION))
@pytest.mark.parametrize("convention", ["open_clip", "openai"])
def test_every_preset_survives_the_json(preset, convention):
    config = dataclasses.replace(
        small(convention), preset=f"{preset}/14", vision=None, text=None, embed_dim=None, vocab_size=32_000
    )
    described = Described(config, 336, 32)
    content = json.loads(json.dumps(to_open_clip(described, "bert-base-uncased")))
    again = from_open_clip(content, "json")
    assert dataclasses.replace(again, config=dataclasses.replace(again.config, preset=config.preset)) == described
    assert (VISION[preset], TEXT[preset]) == (
        VISION[again.config.preset.split("/")[0]],
        again.config.text or TEXT[again.config.preset.split("/")[0]],
    )


@pytest.mark.parametrize(("preset", "image_size"), [(p, s) for p in ("L/14", "H/14", "bigG/14") for s in (224, 336)])
def test_names_and_shapes_of_the_released_models(preset, image_size):
    """As open_clip lists them; `make test-interop` compares them with open_clip itself."""
    config = small("open_clip", preset=preset, vision=None, text=None, embed_dim=None, vocab_size=32_000)
    shapes = model_shapes(config, image_size, 32)
    names = expected_tensors(shapes, open_clip_places(shapes))
    vision, text = VISION[preset.split("/")[0]], TEXT[preset.split("/")[0]]
    expected = {
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": (1 + (image_size // 14) ** 2, vision.width),
        "visual.conv1.weight": (vision.width, 3, 14, 14),
        "visual.proj": (vision.width, text.width),
        "positional_embedding": (32, text.width),
        "token_embedding.weight": (32_000, text.width),
        "text_projection": (text.width, text.width),
        "logit_scale": (),
    }
    for prefix, norm, size in (("visual.", "visual.ln_post", vision), ("", "ln_final", text)):
        expected |= {f"{norm}.weight": (size.width,), f"{norm}.bias": (size.width,)}
        for layer in range(size.depth):
            block = f"{prefix}transformer.resblocks.{layer}"
            for name, rows, columns in (
                ("attn.in_proj_", 3 * size.width, size.width),
                ("attn.out_proj.", size.width, size.width),
                ("mlp.c_fc.", size.mlp_dim, size.width),
                ("mlp.c_proj.", size.width, size.mlp_dim),
            ):
                expected |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
            for name in ("ln_1", "ln_2"):
                expected |= {f"{block}.{name}.weight": (size.width,), f"{block}.{name}.bias": (size.width,)}
    assert names == expected
    if preset == "H/14":
        assert len(names) == 684
        total = sum(int(np.prod(shape)) for shape in names.values())
        assert total == {224: 968_235_009, 336: 968_644_609}[image_size]


def npz_arrays(config, params):
    tensors = write_tensors(params, npz_places(config, params))
    return {name: tensor.read() for name, tensor in tensors.items()}


def test_a_picture_size_of_zero_is_none(tmp_path):
    config = small("clipa")
    np.savez(tmp_path / "model.npz", **npz_arrays(config, random_params(config)))
    with pytest.raises(UserError, match="image_size: 0 px"):
        open_pretrained(tmp_path / "model.npz", image_size=0).read_params()


@pytest.mark.parametrize("layout", ["params/", "opt/target/", ""])
def test_an_npz_in_any_of_its_layouts(tmp_path, layout):
    config = small("clipa")
    params = random_params(config)
    arrays = {f"{layout}{name}": value for name, value in npz_arrays(config, params).items()}
    np.savez(tmp_path / "model.npz", **arrays, **{"opt/state/0/count": np.zeros(()), "chrono/accum_pause_time": 1.0})
    model = open_pretrained(tmp_path / "model.npz", image_size=SIDE)
    assert model.config == config
    assert model.text_length == LENGTH
    assert_equal_bits(model.read_params(), params)


def test_names_and_shapes_of_an_npz(tmp_path):
    config = small("clipa", preset="H/14", vision=None, text=None, embed_dim=None, vocab_size=32_000)
    shapes = model_shapes(config, 84, 8)
    names = expected_tensors(shapes, npz_places(config, shapes))
    # CLIPA's own H/14 has 907 leaves.
    assert len(names) == 907
    block = "img/Transformer/encoderblock_31"
    given = {
        "img/cls": (1, 1, 1280),
        "img/embedding/kernel": (14, 14, 3, 1280),
        f"{block}/LayerNorm_1/scale": (1280,),
        f"{block}/MultiHeadDotProductAttention_0/query/kernel": (1280, 16, 80),
        f"{block}/MultiHeadDotProductAttention_0/query/bias": (16, 80),
        f"{block}/MultiHeadDotProductAttention_0/out/kernel": (16, 80, 1280),
        f"{block}/MultiHeadDotProductAttention_0/out/bias": (1280,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (1280, 5120),
        f"{block}/MlpBlock_0/Dense_1/bias": (1280,),
        "img/encoder_norm/bias": (1280,),
        "img/head/kernel": (1280, 1024),
        "txt/Embed_0/embedding": (32_000, 1024),
        "txt/pos_embedding": (1, 8, 1024),
        "txt/Transformer/encoderblock_23/MlpBlock_0/Dense_0/kernel": (1024, 4096),
        "t": (1,),
    }
    assert {name: names[name] for name in given} == given


def test_bfloat16_as_two_bytes_of_no_type(tmp_path):
    config = small("clipa")
    arrays = npz_arrays(config, random_params(config))
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in arrays.items()}
    np.savez(tmp_path / "model.npz", **{name: value.view("V2") for name, value in rounded.items()})
    read = open_pretrained(tmp_path / "model.npz", image_size=SIDE).read_params()
    again = npz_arrays(config, read)
    for name, value in rounded.items():
        np.testing.assert_array_equal(again[name], value.astype(np.float32))


class Unpickled:
    """Tells when it is made."""

    made = False

    def __reduce__(self):
        return setattr, (Unpickled, "made", True)


def torch_zip(path, content, storages):
    """A file as torch.save writes it, from a pickle and the bytes of its storages."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", value)


def test_a_pickle_is_never_executed(tmp_path):
    torch_zip(tmp_path / "evil.bin", pickle.dumps({"a": Unpickled()}, protocol=2), {})
    with pytest.raises(UserError, match="only tensors are accepted"):
        open_tensors(tmp_path / "evil.bin")
    assert not Unpickled.made
    for harmful in (eval, exec, io.open, np.load, shutil.rmtree):
        torch_zip(tmp_path / "evil.bin", pickle.dumps({"a": harmful}, protocol=2), {})
        with pytest.raises(UserError, match="only tensors are accepted"):
            open_tensors(tmp_path / "evil.bin")


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"epoch": 3})])
def test_a_broken_torch_file(tmp_path, content):
    torch_zip(tmp_path / "broken.bin", content, {})
    with pytest.raises(UserError, match=r"broken\.bin"):
        open_tensors(tmp_path / "broken.bin")


def test_files_of_other_kinds(tmp_path):
    for name in ("a.bin", "b.safetensors", "c.npz"):
        (tmp_path / name).write_bytes(b"nothing of the kind, but some bytes" * 9)
        with pytest.raises(UserError, match=name):
            open_tensors(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        open_tensors(tmp_path / "absent.bin")
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"accepted: \.safetensors"):
        open_tensors(tmp_path / "weights.ckpt")


def change_weights(folder, change):
    path = folder / "open_clip_model.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)


def test_keys_that_do_not_fit_are_all_named(exported, tmp_path):
    folder = shutil.copytree(exported["open_clip"], tmp_path / "changed")

    def change(arrays):
        arrays["visual.extra"] = arrays.pop("visual.proj")
        arrays["ln_final.weight"] = np.zeros(25, np.float32)
        del arrays["transformer.resblocks.1.ln_2.bias"]

    change_weights(folder, change)
    with pytest.raises(UserError) as raised:
        open_pretrained(folder).read_params()
    message = str(raised.value)
    assert "2 missing: " in message
    for told in (
        "transformer.resblocks.1.ln_2.bias",
        "1 unknown: visual.extra",
        "ln_final.weight [25] instead of [24]",
    ):
        assert told in message
    assert "\n" not in message


def test_state_dicts_of_wrapped_and_custom_models(exported, tmp_path):
    folder = shutil.copytree(exported["open_clip"], tmp_path / "changed")
    expected = open_pretrained(folder).read_params()

    def custom(arrays):
        for name in list(arrays):
            if not name.startswith("visual.") and name != "logit_scale":
                arrays[f"text.{name}"] = arrays.pop(name)
        for name in list(arrays):
            arrays[f"module.{name}"] = arrays.pop(name)

    change_weights(folder, custom)
    assert_equal_bits(open_pretrained(folder).read_params(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"ls_init_value": 1e-4}}, "vision_cfg.ls_init_value: 0.0001 is not supported"),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "vision_cfg.layers"),
        ({"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": False}}, "final_ln_after_pool"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs differ between the towers"),
        ({"text_cfg": {"pool_type": "eos"}}, "text_cfg.pool_type: 'eos'"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name"),
        ({"text_cfg": {"colour": "red"}}, "text_cfg.colour: unknown field"),
        ({"multimodal_cfg": {"width": 3}}, "multimodal_cfg is not supported"),
        ({"embed_dim": None}, "no embed_dim"),
    ],
)
def test_models_of_parts_that_are_not_here(change, message):
    content = to_open_clip(Described(small("openai", activation="gelu"), SIDE, LENGTH), None)
    model = content["model_cfg"]
    for name, value in change.items():
        model[name] = {**model[name], **value} if name in ("vision_cfg", "text_cfg") else value
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        from_open_clip(content, "json")


def test_a_folder_that_holds_a_model_is_left_alone(exported, tokenizer):
    folder = exported["clipa"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="holds a model already"):
        export_open_clip(random_params(small()), Described(small(), SIDE, LENGTH), tokenizer, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_that_is_a_model(tmp_path):
    with pytest.raises(UserError, match="is no model; accepted: a run's folder"):
        open_pretrained(tmp_path)
    with pytest.raises(UserError, match="accepted: hf://ORG/NAME"):
        open_pretrained("hf://name")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"none of open_clip_model\.safetensors"):
        open_pretrained(tmp_path)


def peak_memory(function):
    """Result and peak of traced allocations, in bytes."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_holds_a_model_once(tmp_path):
    """Reading and writing need a layer or two beside the parameters, whatever the format."""
    config = small("open_clip", vision=TowerSize(128, 16, 512, 2))
    params = random_params(config)
    size = sum(leaf.nbytes for leaf in paths(params).values())
    layer = size / 16
    described = Described(config, SIDE, LENGTH)
    _, written = peak_memory(lambda: export_open_clip(params, described, None, tmp_path / "new"))
    assert written < 2 * layer
    model = open_pretrained(tmp_path / "new")
    read, peak = peak_memory(model.read_params)
    assert size <= peak < size + 3 * layer
    assert_equal_bits(read, params)
    computed = dataclasses.replace(config, convention="clipa")
    own = dict(params, vision={name: leaf for name, leaf in params["vision"].items() if name != "position_table"})
    np.savez(tmp_path / "model.npz", **npz_arrays(computed, own))
    model = open_pretrained(tmp_path / "model.npz", image_size=SIDE)
    read, peak = peak_memory(model.read_params)
    assert size * 0.9 <= peak < size + 3 * layer
    assert_equal_bits(read, own)

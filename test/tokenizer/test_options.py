"""The design's choices, each against timm's own modules or another library's operations."""

import argparse
import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
import checkpoints  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional  # noqa: E402

from vla_perception import cli  # noqa: E402
from vla_perception.cli import main  # noqa: E402
from vla_perception.tokenizer import PRESETS, EncoderConfig, TokenizerConfig, VisualTokenizer  # noqa: E402
from vla_perception.tokenizer.network import empty_network  # noqa: E402
from vla_perception.tokens import VisualTokens, tokenize  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(timm's models, projector weights, a checkpoint of them)"""
    # Both give a cls token: DINOv2 its class token, test_vit3 (a small one of SigLIP's kind) by attention pooling.
    models = checkpoints.towers()
    weights = checkpoints.projector(sum(model.embed_dim for model in models))
    folder = checkpoints.write(tmp_path_factory.mktemp("model") / "dual", checkpoints.openvla_tensors(models, weights))
    return models, weights, folder


def project(weights, values):
    values = functional.linear(values, weights["fc1.weight"], weights["fc1.bias"])
    for index in (2, 3):
        values = functional.linear(functional.gelu(values), weights[f"fc{index}.weight"], weights[f"fc{index}.bias"])
    return values


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["cls", "cls+patch"])
def test_summaries_are_what_timm_pools(model, strategy):
    models, weights, folder = model
    tokenizer = VisualTokenizer.from_checkpoint(folder, token_strategy=strategy)
    pixel_values = tokenizer.preprocess([checkpoints.image(0), checkpoints.image(1)])
    with torch.inference_mode():
        # A timm model without a classifier returns what it was trained to give, pooled by its own head.
        features = torch.cat([tower(pixels) for tower, pixels in zip(models, pixel_values)], dim=-1)[:, None]
    if strategy == "cls+patch":
        features = torch.cat([features, checkpoints.reference(models, weights, pixel_values)[0]], dim=1)
    output = tokenizer.encode(pixel_values, features=True)
    close(output.features, features)
    close(output.tokens, project(weights, features))
    assert tokenizer.tokens_per_view == features.shape[1] and tokenizer.grid == (7, 7)
    assert tokenizer.fingerprint != VisualTokenizer.from_checkpoint(folder).fingerprint
    tokens = tokenize(tokenizer, {"front": checkpoints.image(0)}, features=True)
    assert tokens.token_strategy == strategy and VisualTokens.from_bytes(tokens.to_bytes()).shape == tokens.shape
    if strategy == "cls+patch":
        assert np.array_equal(tokens.as_grid()[0, 2, 3], tokens.data[0, 1 + 2 * 7 + 3])


@pytest.mark.parametrize("name", ["dinov2", "test_vit3"])
def test_one_encoder_alone_gives_its_features(model, name):
    models, _, folder = model
    index = ("dinov2", "test_vit3").index(name)
    alone = VisualTokenizer.from_checkpoint(folder, encoders=[name], projector="none")
    assert alone.channels == models[index].embed_dim
    pixel_values = alone.preprocess(checkpoints.image())
    with torch.inference_mode():
        expected = models[index].get_intermediate_layers(pixel_values[0], n={len(models[index].blocks) - 2})[0]
    close(alone.encode(pixel_values).tokens, expected)
    both = VisualTokenizer.from_checkpoint(folder)
    assert torch.equal(both.preprocess(checkpoints.image())[index], pixel_values[0])
    tokens = tokenize(alone, {"front": checkpoints.image()})
    assert np.array_equal(tokens.encoder(name), tokens.numpy())


def test_features_without_the_projector(model):
    models, weights, folder = model
    tokenizer = VisualTokenizer.from_checkpoint(folder, projector="none")
    pixel_values = tokenizer.preprocess(checkpoints.image())
    close(tokenizer.encode(pixel_values).tokens, checkpoints.reference(models, weights, pixel_values)[0])


@pytest.mark.parametrize("strategy", ["patch", "cls+patch"])
def test_pooling_is_torchs_average_of_projected_patches(strategy):
    choices = {"image_size": [112, 128], "token_strategy": strategy}  # 8 × 8 patches each
    whole = VisualTokenizer.from_preset("tiny-random", **choices)
    pooled = VisualTokenizer.from_preset("tiny-random", pool=4, **choices)
    image = checkpoints.image()
    before, after = (tokenizer(image, features=True) for tokenizer in (whole, pooled))
    in_front = whole.tokens_per_view - 64
    for full, small in ((before.tokens, after.tokens), (before.features, after.features)):
        planes = full[:, in_front:].transpose(1, 2).unflatten(2, (8, 8))
        expected = functional.avg_pool2d(planes, 4).flatten(2).transpose(1, 2)
        close(small, torch.cat([full[:, :in_front], expected], dim=1))
    assert pooled.grid == (2, 2) and pooled.tokens_per_view == 4 + in_front
    # A token's place: the same image coordinates, k times as coarse.
    assert pooled.affine(90, 130) == pytest.approx([value / 4 for value in whole.affine(90, 130)])


@pytest.mark.parametrize(
    "kind, widths",
    [
        ("linear", [768, 256]),
        ("gelu-mlp", [768, 256, 256]),
        ("fused-gelu-mlp", [768, 3072, 256, 256]),
        ("none", [768]),
    ],
)
def test_projectors(kind, widths):
    tokenizer = VisualTokenizer.from_preset("tiny-random", projector=kind)
    layers = [module for module in tokenizer.network.projector.modules() if isinstance(module, torch.nn.Linear)]
    chain = []
    for layer in layers:
        chain += [layer, torch.nn.GELU(approximate="none")]
    output = tokenizer(checkpoints.image(), features=True)
    with torch.inference_mode():
        close(output.tokens, torch.nn.Sequential(*chain[:-1])(output.features))
    assert [layer.in_features for layer in layers] + [tokenizer.channels] == widths
    assert all(layer.bias is not None for layer in layers)


@pytest.mark.parametrize(
    "name, choices, tokens, channels",
    [
        ("base", {}, 196, 768 + 768),
        ("prism-dinosiglip-384px", {}, 27 * 27, 1024 + 1152),
        ("openvla-7b", {}, 256, 2176),
        ("openvla-7b", {"image_size": 384}, 729, 2176),
        ("openvla-7b", {"pool": 2, "token_strategy": "cls+patch"}, 1 + 64, 2176),
        ("openvla-7b", {"encoders": ["siglip"]}, 256, 1152),
        ("siglip-vit-so400m-384px", {}, 729, 1152),
        ("dinov2-vit-l", {}, 256, 1024),
    ],
)
def test_shapes_without_weights(name, choices, tokens, channels):
    config = PRESETS[name].with_options(trained=False, **choices)
    network = empty_network(config)
    with torch.device("meta"):
        pixels = [torch.empty(2, 3, encoder.image_size, encoder.image_size) for encoder in config.encoders]
        features, projected = network(pixels)
    assert features.shape == (2, tokens, channels) and projected.shape == (2, tokens, config.output_channels)


def test_a_locked_model_locks_all_that_it_is_loaded_with():
    pytest.importorskip("rclpy")
    from vla_perception.nodes.parameters import Changes
    from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS
    from vla_perception.tokenizer import VisualTokenizer

    taken = {
        *inspect.signature(VisualTokenizer.load).parameters,
        *inspect.signature(TokenizerConfig.with_options).parameters,
    }
    locked = {name for name, spec in PARAMETERS.items() if spec.locked}
    assert locked - {"max_image_pixels"} == taken - {"self", "seed", "options", "trained"}
    assert all(PARAMETERS[name].changes is Changes.UNCONFIGURED for name in locked - {"max_image_pixels"})


def test_the_node_and_the_command_offer_what_the_tokenizer_takes():
    """What can be chosen stands in options.py; what torch and arithmetic make of it, beside them."""
    pytest.importorskip("rclpy")
    from vla_perception import options
    from vla_perception.nodes.visual_tokenizer.parameters import PARAMETERS
    from vla_perception.tokenizer.cost import DTYPE_BYTES
    from vla_perception.tokenizer.devices import TORCH_DTYPES

    taken = {
        "token_strategy": options.TOKEN_STRATEGIES,
        "projector": options.PROJECTORS,
        "runtime": options.RUNTIMES,
        "compute_dtype": options.COMPUTE_DTYPES,
    }
    assert options.COMPUTE_DTYPES == ("auto", *TORCH_DTYPES) and options.TOKEN_DTYPES == tuple(DTYPE_BYTES)
    node = {name: tuple(filter(None, PARAMETERS[name].choices)) for name in taken}  # "" is the model's own
    assert node == taken
    commands = argparse.ArgumentParser().add_subparsers()
    for add in (cli._add_tokenize, cli._add_describe, cli._add_bench):
        add(commands)
    offered = {
        (command, action.dest): tuple(action.choices)
        for command, parser in commands.choices.items()
        for action in parser._actions
        if action.dest in (*taken, "dtype") and action.choices
    }
    assert offered == {
        ("tokenize", "token_strategy"): taken["token_strategy"],
        ("tokenize", "projector"): taken["projector"],
        ("tokenize", "compute_dtype"): taken["compute_dtype"],
        ("tokenize", "runtime"): taken["runtime"],
        ("tokenize", "dtype"): options.TOKEN_DTYPES,
        ("describe", "token_strategy"): taken["token_strategy"],
        ("describe", "projector"): taken["projector"],
        ("describe", "dtype"): options.TOKEN_DTYPES,
        ("bench", "compute_dtype"): taken["compute_dtype"],
        ("bench", "runtime"): taken["runtime"],
    }


@pytest.mark.parametrize(
    "given, sizes",
    [
        (None, [196, 224]),
        ([], [196, 224]),
        (0, [196, 224]),
        ([0], [196, 224]),
        ([200, 0], [200, 224]),
        ([0, 230], [196, 230]),
        ([200, 230], [200, 230]),
        (384, [384, 384]),
        ([384], [384, 384]),
    ],
)
def test_an_image_size_of_0_is_the_models_own(given, sizes):
    config = PRESETS["tiny-random"].with_options(trained=False, image_size=given)
    assert [encoder.image_size for encoder in config.encoders] == sizes


def test_a_trained_model_takes_its_own_image_sizes(model):
    for given in ([0, 112], [98, 0], 0):
        chosen = VisualTokenizer.load(model[2], image_size=given)
        assert [encoder.image_size for encoder in chosen.config.encoders] == [98, 112]


@pytest.mark.parametrize(
    "choices, words",
    [
        ({"encoders": ["clip"]}, "no encoder 'clip'; it has dinov2, test_vit3"),
        ({"encoders": ["dinov2"]}, "would not fit. Set projector to none"),
        ({"projector": "linear"}, "no trained weights"),
        ({"projector": "mlp"}, "projector"),
        ({"token_strategy": "mean"}, "choose one of patch, cls, cls"),
        ({"token_strategy": "cls", "pool": 7}, "averages neighbouring patches"),
        ({"pool": 2}, "does not divide the grid of 7 × 7: .* choose one of 1, 7"),
        ({"pool": 0}, "from 1 on"),
        ({"image_size": 224}, "was trained at 98, 112 pixels"),
        ({"image_size": [112, 0]}, "was trained at 98, 112 pixels"),
        ({"image_size": [98, 112, 112]}, "one or 2 whole numbers"),
        ({"image_size": [98, -1]}, "one or 2 whole numbers"),
        ({"image_transforms": ["mirror"]}, "unknown image transform 'mirror'; choose from rotate180"),
        ({"image_transforms": ["crop:1,2,3"]}, "x,y,width,height in pixels"),
        ({"image_transforms": ["crop:1,2,3,-4"]}, "x,y,width,height in pixels"),
        ({"image_transforms": ["lanczos3"]}, "take images of 98, 112 pixels, so say which size"),
        ({"image_transforms": ["jpeg:0"]}, "1 to 100"),
    ],
)
def test_choices_that_make_no_sense_say_why(model, choices, words):
    with pytest.raises(ValueError, match=words):
        VisualTokenizer.load(model[2], **choices)


def test_a_cls_token_from_an_encoder_that_has_none():
    encoder = EncoderConfig("siglip", "vit_base_patch16_siglip_gap_224", 224, (0.5,) * 3, (0.5,) * 3)  # pools by mean
    config = TokenizerConfig("gap", (encoder,), "none", 0, token_strategy="cls")
    with pytest.raises(ValueError, match="has neither a class token that is used nor an attention-pooling head"):
        empty_network(config)


def test_grids_that_differ_are_refused():
    with pytest.raises(ValueError, match="dinov2 16 × 16, siglip 14 × 14"):
        VisualTokenizer.from_preset("tiny-random", image_size=224)


# Image transforms


def test_image_transforms_are_per_camera_and_part_of_the_fingerprint(model):
    _, _, folder = model
    plain = VisualTokenizer.from_checkpoint(folder)
    tokenizer = VisualTokenizer.from_checkpoint(folder, image_transforms=["rotate180", "wrist=crop:10,20,60,50"])
    front, wrist = checkpoints.image(0), checkpoints.image(1)
    with_cameras = tokenizer.preprocess([front, wrist], ["front", "wrist"])
    by_hand = plain.preprocess([np.rot90(front, 2), np.rot90(wrist, 2)[20:70, 10:70]])
    assert all(torch.equal(a, b) for a, b in zip(with_cameras, by_hand))
    with pytest.raises(ValueError, match="transformed differently per camera"):
        tokenizer([front])
    same = VisualTokenizer.from_checkpoint(
        folder, image_transforms={"": ["rotate180"], "wrist": ["rotate180", "crop:10,20,60,50"]}
    )
    others = [
        VisualTokenizer.from_checkpoint(folder, image_transforms=steps)
        for steps in (
            ["rotate180"],
            ["wrist=rotate180"],
            ["jpeg"],
            ["jpeg:90"],
            ["lanczos3:224"],
            ["crop:10,20,60,50"],
        )
    ]
    assert same.fingerprint == tokenizer.fingerprint
    assert len({plain.fingerprint, tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 8
    with pytest.raises(ValueError, match="does not lie within an image of 30 × 30"):
        tokenizer.preprocess([np.zeros((30, 30, 3), np.uint8)], ["wrist"])
    tokens = tokenize(tokenizer, {"front": front, "wrist": wrist})
    close(tokens.torch(), plain.encode(by_hand).tokens)


@pytest.mark.parametrize(
    "steps",
    [
        ["rotate180"],
        ["crop:40,30,200,120"],
        ["lanczos3:224"],
        ["center_crop_pil"],
        ["center_crop_tf:224"],
        ["rotate180", "lanczos3:224", "center_crop_tf:224"],
        ["crop:40,30,200,120", "rotate180", "center_crop_pil"],
    ],
)
@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_the_affine_map_follows_every_step(model, steps, strategy):
    """A spot in the source image is found again, in the encoder's input, where the map says."""
    from dataclasses import replace

    _, _, folder = model
    loaded = VisualTokenizer.from_checkpoint(folder, image_transforms=steps)
    config = replace(
        loaded.config, encoders=tuple(replace(encoder, resize_strategy=strategy) for encoder in loaded.config.encoders)
    )
    tokenizer = VisualTokenizer(
        config, loaded.network, weights="checkpoint", weights_digest="", compute_dtype="float32"
    )
    height, width, found = 240, 320, 0
    for y, x in np.random.default_rng(0).uniform((40, 50), (140, 230), (12, 2)):
        rows, columns = np.mgrid[:height, :width] + 0.5
        spot = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 6.0**2))
        image = np.repeat(spot.astype(np.uint8)[:, :, None], 3, axis=2)
        # From normalised pixels back to brightness, and its centre of mass in pixels of DINOv2's input.
        encoder = config.encoders[0]
        pixels = tokenizer.preprocess(image)[0][0, 0].numpy() * encoder.std[0] + encoder.mean[0]
        light = np.where(pixels > 0.55, pixels, 0)  # a letterbox is 0.48
        if not light.any() or any(edge.any() for edge in (light[0], light[-1], light[:, 0], light[:, -1])):
            continue
        rows, columns = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
        centre = ((light * columns).sum() / light.sum() / 14, (light * rows).sum() / light.sum() / 14)
        a, b, c, d, e, f = tokenizer.affine(height, width)
        assert (a * x + b * y + c, d * x + e * y + f) == pytest.approx(centre, abs=0.06)
        found += 1
    assert found >= 4


def test_steps_equal_other_formulations():
    """Against PIL; what TensorFlow does is in test_image_transforms_reference.py."""
    from vla_perception.tokenizer.image_transforms import parse_step

    pil = Image.fromarray(checkpoints.image(0, 15, 20)).resize((200, 150), Image.Resampling.BICUBIC)
    image = np.asarray(pil)
    assert np.array_equal(parse_step("rotate180").run(image), np.asarray(pil.transpose(Image.Transpose.ROTATE_180)))
    assert np.array_equal(parse_step("crop:3,4,50,60").run(image), np.asarray(pil.crop((3, 4, 53, 64))))


def test_center_crop_pil_is_minivlas():
    """Written as its code is: sides scaled by the root of 0.9 and truncated, the middle, PIL's bilinear."""
    from vla_perception.tokenizer.image_transforms import parse_step

    for size in ((224, 224), (256, 256), (131, 97)):
        image = Image.fromarray(checkpoints.image(2, size[1], size[0]))
        kept = (int(0.9**0.5 * size[0]), int(0.9**0.5 * size[1]))
        left, top = int((size[0] - kept[0]) / 2), int((size[1] - kept[1]) / 2)
        expected = image.crop((left, top, left + kept[0], top + kept[1])).resize(size, Image.Resampling.BILINEAR)
        assert np.array_equal(parse_step("center_crop_pil").run(np.asarray(image)), np.asarray(expected))


def test_the_command_takes_the_choices(model, tmp_path):
    from safetensors.torch import load_file

    _, _, folder = model
    file, out = tmp_path / "image.png", tmp_path / "out.safetensors"
    Image.fromarray(checkpoints.image()).save(file)
    options = ["--encoders", "dinov2", "--projector", "none", "--pool", "7", "--token-strategy", "cls+patch"]
    options += ["--image-transforms", "rotate180", "crop:1,2,80,80"]
    assert main(["tokenize", str(file), "--model", str(folder), *options, "--out", str(out)]) == 0
    expected = VisualTokenizer.from_checkpoint(
        folder,
        encoders=["dinov2"],
        projector="none",
        pool=7,
        token_strategy="cls+patch",
        image_transforms=["rotate180", "crop:1,2,80,80"],
    )(checkpoints.image())
    close(load_file(out)["tokens"], expected.tokens)
    assert expected.tokens.shape == (1, 2, 384)


def test_a_view_has_the_source_images_size(model):
    tokenizer = VisualTokenizer.from_checkpoint(model[2], image_transforms=["crop:10,20,60,50"])
    (view,) = tokenize(tokenizer, {"front": checkpoints.image(0, 90, 130)}).views
    assert (view.height, view.width) == (90, 130)

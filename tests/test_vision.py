"""vision.py: pixels equal the original's bit for bit, and the tower equals transformers' CLIP."""

import numpy as np
import pytest
import torch
from PIL import Image

from model import LlamaConfig, Llava, LlavaConfig
from vision import ClipVision, ClipVisionConfig, ImageProcessor, open_picture, selected_depth

SIZES = [(56, 56), (40, 80), (81, 40), (57, 200), (333, 17), (20, 20), (1, 9)]


def noise(width, height, seed=0):
    """A picture of random colours, smooth enough that resizing matters."""
    small = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(small)


def reference_pixels(picture, size, aspect):
    """The published way in NumPy: LLAVA.md 3.1 and 3.2, written once more with float64 where NumPy had float64."""
    width, height = picture.size
    if aspect == "pad" and width != height:
        square = Image.new("RGB", (max(width, height),) * 2, (122, 116, 104))
        square.paste(picture, ((max(width, height) - width) // 2, (max(width, height) - height) // 2))
        picture, (width, height) = square, square.size
    short, long = sorted((width, height))
    new = (size, int(size * long / short))
    picture = picture.resize(new if width <= height else new[::-1], resample=3)
    array = np.array(picture)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    array = array[top: top + size, left: left + size]
    scaled = (array.astype(np.float64) * 0.00392156862745098).astype(np.float32)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    return ((scaled - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_published_arithmetic(size, aspect):
    picture = noise(*size)
    pixels = ImageProcessor(56)(picture, aspect)
    assert pixels.shape == (1, 3, 56, 56) and pixels.dtype == torch.float32
    assert np.array_equal(pixels[0].numpy(), reference_pixels(picture, 56, aspect))


def test_pixels_equal_the_recorded_means():
    """LLAVA.md 3.2: recorded from the original on a 500 x 300 picture of counting numbers."""
    array = (np.arange(450000) % 251).astype(np.uint8).reshape(300, 500, 3)
    pad, square = (ImageProcessor(336)(Image.fromarray(array), aspect)[0] for aspect in ("pad", "square"))
    assert pad.mean().item() == pytest.approx(0.0881734, abs=1e-6)
    assert pad[:, 0, 0].tolist() == pytest.approx([-0.0112545, -0.0111960, -0.0013329], abs=1e-6)
    assert square.mean().item() == pytest.approx(0.1511232, abs=1e-6)


@pytest.mark.parametrize("size", SIZES[:5])
def test_square_equals_transformers(size):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = clip.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = theirs(noise(*size), return_tensors="np")["pixel_values"][0]
    assert np.abs(ImageProcessor(56)(noise(*size), "square")[0].numpy() - expected).max() < 1e-6


def test_pixels_of_the_gold_batch(gold):
    from safetensors.torch import load_file
    images = load_file(gold / "forward/lm_mha.safetensors")["images"]
    for index, name in ((0, "train_00.png"), (2, "train_01.png"), (3, "train_02.png"), (4, "train_100.png")):
        pixels = ImageProcessor(56)(open_picture(gold / "data/images" / name), "pad")[0]
        assert torch.equal(pixels, images[index]), name


def test_every_mode_becomes_rgb(tmp_path):
    rgb = noise(30, 20)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.new("L", rgb.size, 0))  # fully transparent: the colours stay all the same
    sixteen = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))
    pictures = {"alpha.png": alpha, "grey.png": rgb.convert("L"), "palette.png": rgb.quantize(16),
                "cmyk.jpg": rgb.convert("CMYK"), "sixteen.png": sixteen, "one_bit.png": rgb.convert("1")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        opened = open_picture(tmp_path / name)
        with Image.open(tmp_path / name) as again:
            assert opened.mode == "RGB" and np.array_equal(opened, again.convert("RGB")), name
    assert np.array_equal(open_picture(tmp_path / "alpha.png"), rgb)


def test_exif_is_ignored_unless_asked_for(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise(30, 20).save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (30, 20)
    assert open_picture(tmp_path / "turned.png", exif=True).size == (20, 30)


def test_bad_pictures_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.png does not exist"):
        open_picture(tmp_path / "none.png")
    noise(30, 20).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            open_picture(tmp_path / name)
    with pytest.raises(ValueError, match="image_aspect_ratio 'wide' is not known"):
        ImageProcessor(56)(noise(30, 20), "wide")


@pytest.mark.parametrize("values, expected", [
    ({"size": 56, "crop_size": 48}, (48, 56)),
    ({"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}}, (48, 56)),
    ({"size": {"shortest_edge": 48}}, (48, 48))])
def test_preprocessor_configs_old_and_new(values, expected):
    processor = ImageProcessor.from_dict(values)
    assert (processor.crop_size, processor.shortest_edge) == expected
    assert ImageProcessor.from_dict(processor.to_dict()) == processor


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_tower_equals_transformers(act, layer):
    transformers = pytest.importorskip("transformers")
    numbers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                   patch_size=7, hidden_act=act)
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**numbers)).eval()
    compare_towers(theirs, ClipVisionConfig(**numbers), layer, torch.randn(2, 3, 28, 28))


@pytest.mark.slow
def test_tower_equals_transformers_at_its_true_shape():
    """ViT-L/14-336 with random weights: 577 tokens, 24 layers of which 23 are built."""
    transformers = pytest.importorskip("transformers")
    numbers = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   image_size=336, patch_size=14)
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**numbers)).eval()
    compare_towers(theirs, ClipVisionConfig(**numbers), -2, torch.randn(1, 3, 336, 336))


@torch.no_grad()
def compare_towers(theirs, config, layer, pixels):
    ours = ClipVision(config, selected_depth(config.num_hidden_layers, layer))
    names = {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor
             in theirs.state_dict().items()}
    loaded = ours.load_state_dict(names, strict=False)
    assert not loaded.missing_keys
    expected = theirs(pixels, output_hidden_states=True).hidden_states[layer]
    assert (ours(pixels) - expected).abs().max() < 5e-5


def test_tower_refuses_pictures_of_another_size():
    with pytest.raises(ValueError, match="expects pictures of 3x28x28, not"):
        ClipVision(ClipVisionConfig(32, 64, 2, 4, 3, 28, 7))(torch.zeros(1, 3, 56, 56))
    with pytest.raises(ValueError, match="does not exist in a tower of 3 layers"):
        selected_depth(3, -6)


def test_an_unknown_aspect_is_refused_before_any_picture():
    with pytest.raises(ValueError, match="image_aspect_ratio 'wide' is not known; use anyres, pad or square"):
        Llava(LlavaConfig(LlamaConfig(8, 8, 8, 1, 1), ClipVisionConfig(8, 8, 2, 1, 3, 8, 4), image_aspect_ratio="wide"))

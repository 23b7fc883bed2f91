"""anyres, LLaVA 1.6's way with pictures: pixels, token counts, features, training and files equal the original's and
transformers' LlavaNext, on tiny random models."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import clip_config, copy_tokenizer, llama_config, randomized
from drawn import record, run_train, write
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import sample
from formats import layouts
from model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, LlavaConfig
from sampling import looking
from vision import (
    NEWLINE,
    ClipVisionConfig,
    ImageProcessor,
    best_resolution,
    check_views,
    fit,
    join_tiles,
    unpad,
)
from weights import load, save

ORIGINAL = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA 1.6's config, (width, height)
SMALL = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # (height, width), for a tower of 28 pixels
SIDE = 7  # patches
TOWER = {"patch_size": 28 // SIDE, "hidden_size": 64, "num_attention_heads": 1}  # heads of 64, as all of CLIP's
IMAGE_ID = 400  # of `<image>` in transformers' tiny model
SIZES = {"wide.png": (70, 30), "high.png": (20, 60), "square.png": (28, 28), "large.png": (111, 97),
         "line.png": (150, 12)}  # (width, height)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def vit_l(**changes):
    """The numbers of LLaVA 1.6 with its tower at 336 pixels."""
    vision = ClipVisionConfig(1024, 4096, 24, 16, 3, 336, 14)
    return LlavaConfig(vision=vision, **{"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                                         "unpad_rounded": False, **changes})


# ------------------------------------------------------------------------------------------------------- token counts

TABLE = [  # LLAVA.md 3.4: (width, height), best (W, H), resized, rows and columns kept, tokens
    ((336, 336), (336, 672), (336, 336), (24, 24), 1176),
    ((640, 480), (672, 672), (672, 504), (36, 48), 2340),
    ((1024, 899), (672, 672), (672, 590), (42, 48), 2634),
    ((672, 672), (672, 672), (672, 672), (48, 48), 2928),
    ((1000, 500), (672, 336), (672, 336), (24, 48), 1752),
    ((500, 1000), (336, 672), (336, 672), (48, 24), 1776),
    ((1920, 1080), (672, 672), (672, 378), (28, 48), 1948),
    ((1080, 1920), (672, 672), (378, 672), (48, 28), 1968),
    ((3000, 200), (1008, 336), (1008, 68), (4, 72), 868),
    ((200, 3000), (336, 1008), (68, 1008), (72, 4), 936),
    ((50, 400), (336, 672), (84, 672), (48, 6), 912),
]


@pytest.mark.parametrize("pinpoints", [None, layouts.read_pinpoints(ORIGINAL), layouts.read_pinpoints(str(ORIGINAL))])
@pytest.mark.parametrize("picture, best, resized, kept, tokens", TABLE)
def test_token_counts_of_the_original(picture, best, resized, kept, tokens, pinpoints):
    config, size = vit_l(image_grid_pinpoints=pinpoints), picture[::-1]
    assert best_resolution(size, config.pinpoints) == best[::-1] and fit(size, best[::-1]) == resized[::-1]
    grid = torch.empty(best[1] // 14, best[0] // 14)
    assert unpad(grid, size, rounded=False).shape == kept
    assert config.tokens_of(size) == tokens == 576 + kept[0] * (kept[1] + 1)
    assert config.views_of(size) == 1 + math.prod(best) // 336**2
    assert vit_l(mm_patch_merge_type="flat").tokens_of(size) == 576 * config.views_of(size)
    assert vit_l(image_aspect_ratio="pad").tokens_of(size) == 576


def random_sizes(count, seed=0):
    draw = random.Random(seed)
    return [(draw.randint(1, 1500), draw.randint(1, 1500)) for _ in range(count)]


def test_token_counts_equal_transformers():
    """Over random sizes, with llava_next's order of the canvases and its rounding."""
    processing = pytest.importorskip("transformers.models.llava_next.processing_llava_next")
    theirs = object.__new__(processing.LlavaNextProcessor)
    theirs.patch_size, theirs.num_additional_image_tokens = 14, 1
    theirs.image_processor = ImageProcessor(image_grid_pinpoints=ORIGINAL)  # read as (height, width) there
    config = vit_l(image_grid_pinpoints=ORIGINAL, unpad_rounded=True)
    for height, width in [*random_sizes(300), (748, 352), (336, 336), (1, 1500), (1500, 1)]:
        assert config.tokens_of((height, width)) == theirs._get_number_of_features(height, width, 336, 336) - 1


def test_the_two_orders_of_pinpoints_part_at_ties():
    size = (336, 336)
    assert best_resolution(size, layouts.read_pinpoints(ORIGINAL)) == (672, 336)  # upright, as the original
    assert best_resolution(size, ORIGINAL) == (336, 672)  # lying, as llava_next's published folders


def test_the_rounding_of_the_original_may_lose_two_rows():
    """748 * (24 / 352) is 51, but 50.999… in floating point."""
    size = (748, 352)
    assert [vit_l(unpad_rounded=rounded).tokens_of(size) for rounded in (False, True)] == [
        576 + 50 * 25, 576 + 52 * 25]


def their_unpad(rows, columns, height, width):
    """The original's cut, on (C, H, W) as published, written once more."""
    x = torch.arange(rows * columns).view(1, rows, columns)
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return x[:, pad: rows - pad][0]
    pad = (columns - int(width * (rows / height))) // 2
    return x[:, :, pad: columns - pad][0]


def test_reading_order():
    """Line by line across the tiles, a newline behind each line; the squashed whole first."""
    config, tower = vit_l(image_grid_pinpoints=SMALL), ClipVisionConfig(24, 40, 3, 2, 3, 28, 4)
    config.vision = tower
    for size in [(30, 70), (60, 20), (28, 28), (97, 111), *random_sizes(20)]:
        rows, columns = config.tiles_of(size)
        order = config.reading_order(size)
        grid = order[SIDE**2:].view(-1, 1 + their_unpad(rows * SIDE, columns * SIDE, *size).shape[1])
        assert torch.equal(order[: SIDE**2], torch.arange(SIDE**2)) and (grid[:, -1] == NEWLINE).all()
        patch = their_unpad(rows * SIDE, columns * SIDE, *size)
        y, x = patch // (columns * SIDE), patch % (columns * SIDE)
        tile = 1 + y // SIDE * columns + x // SIDE
        assert torch.equal(grid[:, :-1], tile * SIDE**2 + y % SIDE * SIDE + x % SIDE)
        config.mm_patch_merge_type = "spatial"
        assert len(config.reading_order(size)) == (1 + rows * columns) * SIDE**2
        assert torch.equal(config.reading_order(size).sort().values, torch.arange((1 + rows * columns) * SIDE**2))
        config.mm_patch_merge_type = "spatial_unpad"
    assert join_tiles(torch.arange(6).view(6, 1, 1), (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("changes, sentence", [
    ({"image_grid_pinpoints": [[336, 500]]}, "height 336 and width 500 is no whole number of tiles"),
    ({"mm_vision_select_feature": "cls_patch"}, "class token has no place"),
    ({"mm_patch_merge_type": "maxpool"}, "'maxpool' is not known; use flat, spatial, spatial_unpad")])
def test_what_anyres_cannot_do_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config = vit_l(**changes)
        check_views("anyres", config.mm_patch_merge_type, config.mm_vision_select_feature)
        config.tokens_of((400, 500))
    for wrong in ("(1x1),...,(6x6)", [336, 672], "[[1, 2, 3]]"):
        with pytest.raises(ValueError, match="expected pairs of width and height"):
            layouts.read_pinpoints(wrong)


# ------------------------------------------------------------------------------------------------------------- pixels


def reference_views(picture, size, pinpoints):
    """The published way (LLAVA.md 3.3) in its own terms: (width, height) everywhere, every tile resized and cropped."""
    w, h = picture.size
    best, most, least = None, 0, float("inf")
    for width, height in pinpoints:
        scale = min(width / w, height / h)
        effective = min(int(w * scale) * int(h * scale), w * h)
        wasted = width * height - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = (width, height), effective, wasted
    scale_w, scale_h = best[0] / w, best[1] / h
    new = (best[0], min(math.ceil(h * scale_w), best[1])) if scale_w < scale_h else (
        min(math.ceil(w * scale_h), best[0]), best[1])
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(picture.resize(new), ((best[0] - new[0]) // 2, (best[1] - new[1]) // 2))
    tiles = [canvas.crop((x, y, x + size, y + size)) for y in range(0, best[1], size) for x in range(0, best[0], size)]
    processor = ImageProcessor(size)
    return torch.cat([processor(view, "square") for view in [picture.resize((size, size)), *tiles]])


@pytest.mark.parametrize("size", [*SIZES.values(), (7, 5), (1, 90), (57, 55)])
def test_pixels_equal_the_original_and_transformers(size):
    llava_next = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    picture = noise(*size)
    pixels = ImageProcessor(28, image_grid_pinpoints=SMALL)(picture, "anyres")
    assert pixels.dtype == torch.float32 and pixels.shape[1:] == (3, 28, 28)
    assert torch.equal(pixels, reference_views(picture, 28, [canvas[::-1] for canvas in SMALL]))
    theirs = llava_next.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=SMALL)
    assert torch.equal(pixels, theirs(picture, return_tensors="pt")["pixel_values"][0])


def test_pixels_equal_the_recorded_mean():
    """LLAVA.md 3.2: recorded from the original on a 500 x 300 picture of counting numbers."""
    array = (np.arange(450000) % 251).astype(np.uint8).reshape(300, 500, 3)
    pixels = ImageProcessor(336, image_grid_pinpoints=vit_l().pinpoints)(Image.fromarray(array), "anyres")
    assert pixels.shape == (3, 3, 336, 336) and pixels.mean().item() == pytest.approx(-0.0507825, abs=1e-6)


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.fixture(scope="session")
def tiny_next(tmp_path_factory, tiny_tokenizer):
    """Folder of a LlavaNextForConditionalGeneration with 49 patches per view, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("next")
    config = transformers.LlavaNextConfig(
        text_config=llama_config(vocab_size=464, num_key_value_heads=2, max_position_embeddings=2048),
        vision_config=clip_config(**TOWER), image_token_index=IMAGE_ID, image_grid_pinpoints=SMALL)
    randomized(transformers.LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    copy_tokenizer(tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with a picture of every size, and records that show none, one, several, one twice."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, (name, size) in enumerate(SIZES.items()):
        noise(*size, seed).save(folder / name)
    write(folder / "talks.json", [
        record("one", "wide.png", ("human", "<image>\nWhat is it?"), ("gpt", "Red.")),
        record("text", None, ("human", "How many colors are there?"), ("gpt", "Many.")),
        record("three", ["high.png", "square.png", "large.png"], ("human", "A <image> b <image>"), ("gpt", "Two."),
               ("human", "<image> c?"), ("gpt", "A third.")),
        record("line", "line.png", ("human", "<image>\nDescribe."), ("gpt", "A line."))])
    return folder


def talks(folder):
    return data.read_records(folder / "talks.json")


def their_inputs(batch, folder, names):
    """A packed batch as transformers wants it: one padded row per sequence, pictures through its own processor."""
    llava_next = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    processor = llava_next.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=SMALL)
    lengths = batch.cu_seqlens.diff().tolist()
    ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_INDEX, IMAGE_ID).split(lengths)
    rows = {"input_ids": (ids, 0), "labels": (batch.labels.split(lengths), IGNORE_INDEX),
            "attention_mask": ([torch.ones(n, dtype=torch.int64) for n in lengths], 0)}
    padded = {name: torch.nn.utils.rnn.pad_sequence(parts, True, value) for name, (parts, value) in rows.items()}
    return padded | dict(processor([Image.open(folder / name) for name in names], return_tensors="pt"))


NAMES = ["wide.png", "high.png", "square.png", "large.png", "line.png"]  # in the order of the records


def test_logits_loss_and_gradients_equal_transformers(tiny_next, pictures):
    """A batch of different picture sizes, several pictures in one conversation, and a record without any."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tiny_next).eval()
    loaded = load(tiny_next, dtype="float32", device="cpu")
    batch = data.collate(talks(pictures), loaded, pictures)
    assert len({loaded.config.tokens_of(size) for size in batch.image_sizes}) == 5
    expected = theirs(**their_inputs(batch, pictures, NAMES))
    expected.loss.backward()
    real = [row[:n] for row, n in zip(expected.logits, batch.cu_seqlens.diff().tolist())]
    assert (loaded.model.logits(batch) - torch.cat(real)).abs().max() < 5e-5
    loss = loaded.model.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    gradients = {layouts.our_name(name): p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, p in loaded.model.named_parameters():
        if p.grad is not None:
            assert (p.grad - gradients[name]).abs().max() < 2e-5 * gradients[name].abs().max() + 2e-7, name
            compared += 1
    assert compared > 60 and loaded.model.image_newline.grad.abs().max() > 0


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@torch.no_grad()
def test_mixed_batches_equal_one_by_one_in_one_call_of_the_tower(tiny_next, pictures, merge):
    loaded = load(tiny_next, device="cpu")
    loaded.model.config.mm_patch_merge_type = merge
    if merge != "spatial_unpad":
        loaded.model.image_newline = None
    calls = []
    loaded.model.vision_tower.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    batch = data.collate(talks(pictures), loaded, pictures)
    together = loaded.model.logits(batch)
    assert calls == [len(batch.pixel_values)] == [sum(map(loaded.config.views_of, batch.image_sizes))]
    alone = [loaded.model.logits(data.collate([talk], loaded, pictures)) for talk in talks(pictures)]
    assert (together - torch.cat(alone)).abs().max() < 1e-5


def test_a_batch_without_pictures_still_gives_the_newline_a_zero_gradient(tiny_next, pictures):
    loaded = load(tiny_next, device="cpu")
    loaded.model.loss(data.collate([talks(pictures)[1]], loaded)).backward()
    assert loaded.model.image_newline.grad.abs().max() == 0


def test_answers_equal_transformers_in_a_batch(tiny_next, pictures):
    """Greedy, requests with different pictures together; and the attention map of each."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tiny_next).eval()
    loaded = load(tiny_next, dtype="float32", device="cpu")
    loaded.model.language_model.lm_head.weight.data[2].zero_()  # so that no answer ends early
    theirs.lm_head.weight.data[2].zero_()
    shown = [["wide.png"], [], ["high.png", "large.png"]]
    requests = [sample.Request([("human", "What is it?")], [pictures / name for name in names], max_new_tokens=6)
                for names in shown]
    for names, request, answer in zip(shown, requests, sample.generate(loaded, requests)):
        batch = data.pack([sample.encode(loaded, request)], loaded.config)
        inputs = their_inputs(batch, pictures, names or ["wide.png"])
        inputs = {k: v for k, v in inputs.items() if k != "labels" and (names or k in ("input_ids", "attention_mask"))}
        tokens = theirs.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
                                 suppress_tokens=list(range(400, 464)))
        assert answer.token_ids == tokens[0, len(batch.input_ids):].tolist()
        if names:
            maps = looking.picture_attention(loaded, sample.encode(loaded, request), answer.token_ids)
            assert [m.shape for m in maps] == [(6, loaded.config.tokens_of(size)) for size in batch.image_sizes]


def test_heat_maps_put_every_place_where_it_is(tiny_next):
    config = load(tiny_next, device="cpu").config
    size = (97, 111)
    order, attention = config.reading_order(size), torch.zeros(config.tokens_of(size))
    attention[3 * SIDE + 2] = 1.0  # row 3, column 2 of the squashed whole
    attention[SIDE**2 + 5 * (2 * SIDE + 1) + 9] = 2.0  # row 5, column 9 across the tiles, a newline behind each row
    attention[order == NEWLINE] = 9.0  # attention to a newline is nowhere in the picture
    whole, tiles = looking.heat_maps(config, size, attention)
    assert whole[3, 2] == SIDE**2 and (whole > 0).sum() == 1
    assert tiles.shape == (12, 14) and tiles[5, 9] == 2 * 12 * 14 and (tiles > 0).sum() == 1


def test_a_mere_line_is_shown_as_one(tiny_next):
    loaded, line = load(tiny_next, device="cpu"), Image.new("RGB", (2000, 3))
    seen = looking.as_seen(loaded, line, 160)
    lit, = looking.light_up(loaded.config, [seen], [line], [torch.ones(loaded.config.tokens_of((3, 2000)))])
    assert lit.size == (160, 1)


def test_a_lit_tile_stands_where_it_is_in_the_picture(tiny_next):
    loaded = load(tiny_next, device="cpu")
    wide, attention = Image.new("RGB", (168, 40), "white"), torch.zeros(loaded.config.tokens_of((40, 168)))
    attention[SIDE**2 + 3 * (3 * SIDE + 1) + 15] = 1.0  # row 3 of 5 (20 of 28 pixels), column 15 of three tiles' 21
    seen = looking.as_seen(loaded, wide, 336)
    lit, = looking.light_up(loaded.config, [seen], [wide], [attention])
    assert seen.size == lit.size == (336, 80)  # not squashed
    left, top, right, bottom = lit.convert("L").point(lambda value: 255 * (value > 200)).getbbox()
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((336 * 15.5 / 21, 80 * 3.5 / 5), abs=2)


# -------------------------------------------------------------------------------------------------------------- files


def same_tensors(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


GENERATIONS = {
    "published": layouts.WRITE["llava-hf"],
    "in memory of 4.52": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
                          "mm_projector.0.": "model.multi_modal_projector.linear_1.",
                          "mm_projector.2.": "model.multi_modal_projector.linear_2.",
                          "image_newline": "model.image_newline", "vision_tower.": "model.vision_tower."},
    "in memory of 5": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
                       "mm_projector.0.": "model.multi_modal_projector.linear_1.",
                       "mm_projector.2.": "model.multi_modal_projector.linear_2.",
                       "image_newline": "model.image_newline", "vision_tower.vision_model.": "model.vision_tower."},
    "original": layouts.WRITE["llava"],
}


def renamed(folder, out, prefixes):
    """A copy of a folder whose tensors carry the names of another generation. -> out"""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        ours = layouts.our_name(name)
        prefix = next(prefix for prefix in prefixes if ours.startswith(prefix))
        tensors[prefixes[prefix] + ours[len(prefix):]] = tensor
    assert len(tensors) == len(load_file(folder / "model.safetensors"))
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("generation", GENERATIONS)
def test_llava_next_in_every_generation_of_names(tiny_next, tmp_path, generation):
    again = load(renamed(tiny_next, tmp_path / "out", GENERATIONS[generation]), device="cpu")
    assert same_tensors(again.model, load(tiny_next, device="cpu").model)
    config = again.config
    assert (config.image_aspect_ratio, config.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert config.pinpoints == SMALL and config.unpad_rounded


def original_folder(tiny_next, out, **changes):
    """tiny_next as an original LLaVA 1.6 checkpoint: its key names, its config.json (LLAVA.md 6.3, 6.5). -> out"""
    renamed(tiny_next, out, layouts.WRITE["llava"])
    text = load(tiny_next, device="cpu").config.text.to_dict()
    values = text | {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [canvas[::-1] for canvas in SMALL], "image_crop_resolution": 224,
        "image_split_resolution": 224, "mm_patch_merge_type": "spatial_unpad", "mm_vision_tower_lr": 2e-6,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 64, "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_resampler_type": None,
        "tokenizer_model_max_length": 4096, "tokenizer_padding_side": "left"} | changes
    (out / "config.json").write_text(json.dumps(values))
    return out


@pytest.mark.parametrize("changes", [
    {}, {"image_grid_pinpoints": str([tuple(canvas[::-1]) for canvas in SMALL])},
    {"model_type": "llava_mistral", "sliding_window": None, "architectures": ["LlavaMistralForCausalLM"]}])
@torch.no_grad()
def test_original_1_6_checkpoints(tiny_next, tmp_path, pictures, changes):
    loaded = load(original_folder(tiny_next, tmp_path / "original", **changes), device="cpu")
    same = load(tiny_next, device="cpu")
    config = loaded.config
    assert same_tensors(loaded.model, same.model)
    assert config.pinpoints == SMALL and not config.unpad_rounded and config.tokenizer_model_max_length == 4096
    assert (config.image_aspect_ratio, config.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    batches = [data.collate(talks(pictures), x, pictures, "v1") for x in (loaded, same)]
    assert torch.equal(loaded.model.logits(batches[0]), same.model.logits(batches[1]))


@pytest.mark.parametrize("source", ["llava_next", "original"])
@torch.no_grad()
def test_both_layouts_out(tiny_next, tmp_path, pictures, source):
    """llava_next goes into transformers with its processor, and both come back here, with identical logits."""
    transformers = pytest.importorskip("transformers")
    folder = tiny_next if source == "llava_next" else original_folder(tiny_next, tmp_path / "original")
    loaded = load(folder, device="cpu", dtype="float32", conv_mode="v1")
    batch = data.collate(talks(pictures), loaded, pictures)
    expected = loaded.model.logits(batch)
    save(loaded, tmp_path / "next")
    config = json.loads((tmp_path / "next" / "config.json").read_text())
    assert config["model_type"] == "llava_next" and config["image_grid_pinpoints"] == SMALL
    assert "image_newline" in load_file(tmp_path / "next" / "model.safetensors")
    theirs = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "next").eval()
    real = theirs(**their_inputs(batch, pictures, NAMES)).logits
    real = torch.cat([row[:n] for row, n in zip(real, batch.cu_seqlens.diff().tolist())])
    assert (real[:, : expected.shape[1]] - expected).abs().max() < 5e-5
    save(loaded, tmp_path / "llava", layout="llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [canvas[::-1] for canvas in SMALL]
    assert "model.image_newline" in load_file(tmp_path / "llava" / "model.safetensors")
    for layout in ("next", "llava"):
        again = load(tmp_path / layout, device="cpu")
        found = again.model.logits(data.collate(talks(pictures), again, pictures))
        assert torch.equal(found, expected[:, : found.shape[1]]), layout
        assert again.config.unpad_rounded == (layout == "next") and again.config.pinpoints == SMALL


def test_their_processor_reads_our_folder(tiny_next, tmp_path, pictures):
    transformers = pytest.importorskip("transformers")
    loaded = load(tiny_next, device="cpu", conv_mode="v1")
    save(loaded, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    assert type(processor).__name__ == "LlavaNextProcessor"
    for name in NAMES[:4]:
        with Image.open(pictures / name) as picture:
            inputs = processor(images=picture, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
            assert torch.equal(inputs.pixel_values[0], loaded.image_processor(picture, "anyres"))
            assert inputs.image_sizes.tolist() == [[*picture.size[::-1]]]
            assert int((inputs.input_ids == IMAGE_ID).sum()) == loaded.config.tokens_of(picture.size[::-1])


def test_what_llava_next_cannot_say(tiny_next, tmp_path, capsys):
    loaded = load(tiny_next, device="cpu", image_aspect_ratio="pad")
    with pytest.raises(ValueError, match="no words for pad pictures merged spatial_unpad"):
        save(loaded, tmp_path / "out", layout="llava-hf")
    save(loaded, tmp_path / "out")
    assert "written is the original's layout" in capsys.readouterr().err
    assert same_tensors(load(tmp_path / "out", device="cpu").model, loaded.model)
    flat = load(tiny_next, device="cpu", mm_patch_merge_type="flat")
    assert flat.model.image_newline is None
    assert f"image_newline of {tiny_next} (1 tensors)" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="session")
def parts(tiny_llama, tmp_path_factory):
    """Flags of a language model and a tower of 49 patches that train anyres from scratch."""
    transformers = pytest.importorskip("transformers")
    tower = tmp_path_factory.mktemp("tower")
    randomized(transformers.CLIPVisionModel(clip_config(**TOWER))).save_pretrained(tower)
    return {"model_name_or_path": tiny_llama("gqa"), "vision_tower": tower}


def test_both_stages_train_the_newline(parts, pictures, tmp_path):
    common = dict(data_path=pictures / "talks.json", image_folder=pictures, model_max_length=1024, max_steps=2,
                  per_device_train_batch_size=4, learning_rate=1e-2, image_aspect_ratio="anyres", version="v1",
                  lr_scheduler_type="constant")
    rows = run_train(tmp_path / "one", **common, **parts, mm_projector_type="mlp2x_gelu", tune_mm_mlp_adapter=True)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    one = load(tmp_path / "one", device="cpu")
    assert (one.config.image_aspect_ratio, one.config.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert one.config.pinpoints == [[56, 28], [28, 56], [56, 56], [28, 84], [84, 28]]  # 1.6's, for this tower
    batch = data.collate(talks(pictures), one, pictures)
    assert rows[0]["tokens"] == len(batch.input_ids)
    anyres = dict(device="cpu", vision_tower=parts["vision_tower"], image_aspect_ratio="anyres",
                  mm_patch_merge_type="spatial_unpad")
    new = load(parts["model_name_or_path"], **anyres, projector_seed=42).model.image_newline
    projector = torch.load(tmp_path / "one" / "mm_projector.bin", weights_only=True)
    assert projector.keys() == {"model.image_newline", *(f"model.mm_projector.{i}.{leaf}" for i in (0, 2)
                                                         for leaf in ("weight", "bias"))}
    assert torch.equal(projector["model.image_newline"], one.model.image_newline)
    assert (new - one.model.image_newline).abs().max() > 1e-3  # it has learned

    assembled = load(parts["model_name_or_path"], **anyres,
                     pretrain_mm_mlp_adapter=tmp_path / "one" / "mm_projector.bin")
    assert same_tensors(assembled.model, one.model)
    run_train(tmp_path / "two", **common | {"model_name_or_path": tmp_path / "one", "mm_projector_lr": 1e-3})
    two = load(tmp_path / "two", device="cpu")
    assert (two.model.image_newline - one.model.image_newline).abs().max() > 1e-3
    assert json.loads((tmp_path / "two" / "config.json").read_text())["model_type"] == "llava_next"


def test_a_1_5_model_goes_on_with_anyres(parts, pictures, tmp_path, capsys):
    """It has a projector and no newline; one is drawn from the seed, and without a seed its lack is said."""
    five = load(parts["model_name_or_path"], vision_tower=parts["vision_tower"], device="cpu", projector_seed=0,
                mm_projector_type="mlp2x_gelu")
    save(five, tmp_path / "five")
    with pytest.raises(ValueError, match="has no image_newline, which mm_patch_merge_type spatial_unpad needs"):
        load(tmp_path / "five", device="cpu", image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad")
    run_train(tmp_path / "out", model_name_or_path=tmp_path / "five", data_path=pictures / "talks.json", version="v1",
              image_folder=pictures, max_steps=1, model_max_length=1024, image_aspect_ratio="anyres")
    assert "a new one is made, untrained, from seed 42" in capsys.readouterr().err
    again = load(tmp_path / "out", device="cpu").config
    assert (again.image_aspect_ratio, again.mm_patch_merge_type) == ("anyres", "spatial_unpad")


def test_an_anyres_model_trained_with_pad_is_warned_about(tiny_next, pictures, tmp_path, capsys):
    """--stage finetune sets pad, as the original's script for 1.5 does."""
    run_train(tmp_path / "out", stage="finetune", model_name_or_path=tiny_next, data_path=pictures / "talks.json",
              version="v1", image_folder=pictures, max_steps=1, model_max_length=1024, bf16=False, tf32=False)
    assert "has learned anyres, but trains with --image_aspect_ratio pad" in capsys.readouterr().err


def test_the_record_of_a_picture_that_breaks_is_replaced(tiny_next, pictures, tmp_path):
    loaded = load(tiny_next, device="cpu")
    talk = record("r", ["gone.png", "wide.png"], ("human", "<image> or <image> ?"), ("gpt", "One."))
    (tmp_path / "gone.png").write_bytes(b"")
    (tmp_path / "wide.png").write_bytes((pictures / "wide.png").read_bytes())
    path = write(tmp_path / "r.json", [talk, talk | {"id": "s", "image": ["wide.png"] * 2}])
    records = data.Records(path, tmp_path, loaded, "v1", on_bad_image="skip")
    batch = records.pack([records[0]])
    assert batch.ids == ["s"] and batch.notes == [(data.REPLACED, "r")] and len(batch.image_sizes) == 2


def test_flat_and_own_pinpoints_in_training(parts, pictures, tmp_path):
    """The flag's pinpoints are (width, height), as the original's; llava_next has no `flat`."""
    run_train(tmp_path / "out", **parts, data_path=pictures / "talks.json", image_folder=pictures, max_steps=1,
              model_max_length=1024, image_aspect_ratio="anyres", mm_patch_merge_type="flat", version="v1",
              mm_projector_type="mlp2x_gelu", image_grid_pinpoints="[(84, 28), (28, 56)]")
    again = load(tmp_path / "out", device="cpu")
    assert again.config.pinpoints == [[28, 84], [56, 28]] and again.config.mm_patch_merge_type == "flat"
    assert again.model.image_newline is None and again.config.tokens_of((30, 70)) == 4 * SIDE**2


def test_show_and_check_count_places(tiny_next, pictures, capsys, monkeypatch):
    config = load(tiny_next, device="cpu").config
    common = ["--data_path", pictures / "talks.json", "--image_folder", pictures, "--model_name_or_path", tiny_next]

    def run(*words):
        monkeypatch.setattr("sys.argv", ["data.py", *map(str, words)])
        capsys.readouterr()
        return data.main(), capsys.readouterr().out

    status, out = run("check", *common, "--json")
    batch = data.collate(talks(pictures), load(tiny_next, device="cpu"), pictures)
    lengths = [2 ** max(5, math.ceil(math.log2(n))) for n in batch.cu_seqlens.diff().tolist()]
    assert not status and json.loads(out)["tokens_up_to"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}
    length = int(batch.cu_seqlens[1])
    assert f"one: {length} tokens" in run("show", *common)[1]
    assert f"1 pictures of {config.tokens_of((30, 70))} tokens" in run("show", *common, "--index", 0)[1]


def test_a_cut_takes_pictures_whole(tiny_next, pictures):
    loaded = load(tiny_next, device="cpu")
    record = talks(pictures)[2]
    whole = data.collate([record], loaded, pictures)
    tokens = [loaded.config.tokens_of(size) for size in whole.image_sizes]
    first = int((whole.input_ids == IMAGE_TOKEN_INDEX).nonzero()[0])
    cut = data.collate([record], loaded, pictures, model_max_length=first + tokens[0] + tokens[1] // 2)
    assert cut.image_sizes == whole.image_sizes[:1] and (cut.input_ids == IMAGE_TOKEN_INDEX).sum() == tokens[0]
    assert len(cut.pixel_values) == loaded.config.views_of(cut.image_sizes[0])

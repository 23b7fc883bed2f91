"""The eyes: a picture file -> pixels -> the hidden states of a CLIP vision transformer (Radford et al. 2021).

LLaVA reads the output of a layer before the last (`mm_vision_select_layer` -2): the last one has been trained to sum
the picture up, the one before still says what is where. Later layers are neither built nor loaded here.

A tower sees small squares only. LLaVA 1.5 makes a picture one square view. LLaVA 1.6 (`anyres`) looks several times: at
the whole picture, squashed to a square, and at the tiles of a larger copy of it, so that small things stay readable.

Legend: P views, S side of a view in pixels, N patches (tokens) of a view, D width of the tower, H heads, K head dim.
Sizes are (height, width) in pixels everywhere but in Pillow's own calls.
"""

import math
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from kernels.attention import Packing, attention


@dataclass
class ClipVisionConfig:
    """The numbers of a CLIP vision tower, named as in its config.json; defaults are CLIP's own."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, values):
        """Read a `clip_vision_model` config, or the `vision_config` of a `clip` or `llava` one."""
        values = values.get("vision_config", values)
        config = cls(**{f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None})
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"vision tower: hidden_act {config.hidden_act!r} is not known; use {sorted(ACTIVATIONS)}")
        return config

    @property
    def num_patches(self):
        """N: 576 for ViT-L/14 at 336 pixels."""
        return (self.image_size // self.patch_size) ** 2


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


# ---------------------------------------------------------------------------------------------------- the transformer


class ClipAttention(nn.Module):
    """Every patch looks at every patch of its own picture; unlike LLaMA's, all four maps have biases."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x, packing):  # (P*(1+N), D)
        q, k, v = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, packing, causal=False).flatten(1))


class ClipMlp(nn.Module):
    """Two maps with an activation between them."""

    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with LayerNorms that have biases."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = ClipMlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x, packing):
        x = x + self.self_attn(self.layer_norm1(x), packing)
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """Cut the picture into patches, map each to a vector, put the class token first, add what stands where."""

    def __init__(self, config):
        super().__init__()
        self.class_embedding = nn.init.normal_(nn.Parameter(torch.empty(config.hidden_size)), std=0.02)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + config.num_patches, config.hidden_size)

    def forward(self, pixel_values):  # (P, 3, S, S)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (P, N, D)
        classes = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([classes, patches], 1) + self.position_embedding.weight  # (P, 1+N, D)


class ClipVision(nn.Module):
    """The first `num_layers` layers of a CLIP vision tower (None: all); parameters under `vision_model` as in CLIP."""

    def __init__(self, config, num_layers=None):
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers if num_layers is None else num_layers
        self.vision_model = nn.ModuleDict({
            "embeddings": ClipEmbeddings(config),
            "pre_layrnorm": nn.LayerNorm(config.hidden_size, config.layer_norm_eps),  # the published spelling
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(ClipLayer(config) for _ in range(depth))}),
        })

    def forward(self, pixel_values):
        """(P, 3, S, S) -> (P, 1+N, D): what leaves the last layer built, class token first."""
        side = self.config.image_size
        if pixel_values.shape[1:] != (3, side, side):
            found = tuple(pixel_values.shape[1:])
            raise ValueError(f"the vision tower expects pictures of 3x{side}x{side}, not {found}")
        model = self.vision_model
        x = model["pre_layrnorm"](model["embeddings"](pixel_values.to(model["embeddings"].class_embedding.dtype)))
        count, length, _ = x.shape
        packing = Packing.equal(count, length, x.device)
        x = x.flatten(0, 1)  # (P*(1+N), D)
        for layer in model["encoder"]["layers"]:
            x = layer(x, packing)
        return x.unflatten(0, (count, length))


def selected_depth(num_hidden_layers, select_layer):
    """How many layers `mm_vision_select_layer` needs: hidden state 0 is the embedding, i the output of layer i, and
    negative numbers count from the last: -2 of 24 layers is the output of layer 23."""
    depth = select_layer if select_layer >= 0 else num_hidden_layers + 1 + select_layer
    if not 0 <= depth <= num_hidden_layers:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} does not exist in a tower of {num_hidden_layers} layers")
    return depth


# ------------------------------------------------------------------------------------------------- where anyres looks

GRIDS = [(2, 1), (1, 2), (2, 2), (1, 3), (3, 1)]  # LLaVA 1.6's canvases in tiles: (rows, columns)
MERGES = ("flat", "spatial", "spatial_unpad")
NEWLINE = -1  # in a reading order: no feature of the picture, but the learned vector `image_newline`


def canvases(pinpoints, side):
    """image_grid_pinpoints [[height, width], …], None for LLaVA 1.6's five shapes -> the same, for tiles of `side`."""
    pinpoints = pinpoints or [[rows * side, columns * side] for rows, columns in GRIDS]
    for height, width in pinpoints:
        if min(height, width) < side or height % side or width % side:
            raise ValueError(f"image_grid_pinpoints: a canvas of height {height} and width {width} is no whole number "
                             f"of tiles; the vision tower takes {side} x {side} pixels")
    return [list(canvas) for canvas in pinpoints]


def best_resolution(size, pinpoints):
    """The canvas (height, width) of `pinpoints` on which most of a picture's pixels survive; of equals the one with
    the least empty area, then the first (LLAVA.md 3.3, its truncations kept: they decide between near equals)."""
    (height, width), best = size, []
    for rows, columns in pinpoints:
        scale = min(columns / width, rows / height)
        kept = min(int(width * scale) * int(height * scale), width * height)  # enlarging gains nothing
        best.append((kept, kept - rows * columns))
    return tuple(pinpoints[best.index(max(best))])


def fit(size, canvas):
    """A picture's size once it is scaled to just fit into a canvas; broken pixels count as whole ones."""
    (height, width), (rows, columns) = size, canvas
    if columns / width < rows / height:
        return min(math.ceil(height * (columns / width)), rows), columns
    return rows, min(math.ceil(width * (rows / height)), columns)


def join_tiles(tiles, grid):
    """(tiles, n, n), row by row -> (rows * n, columns * n): what stands side by side in the picture does so again."""
    return tiles.unflatten(0, grid).transpose(1, 2).flatten(2).flatten(0, 1)


def unpad(patches, size, rounded=True):
    """Cut off, of the (rows, columns) patches of a canvas, those that lie around a picture of `size`. The two sides are
    always cut alike, so that a row of padding may stay. The original takes the whole part of a quotient that floating
    point may put just below a whole number; llava-hf rounds it first (`rounded`). (LLAVA.md 3.4)"""
    (height, width), (rows, columns) = size, patches.shape
    whole = (lambda quotient: int(round(quotient, 7))) if rounded else int
    if width / height > columns / rows:
        y = (rows - whole(height * (columns / width))) // 2
        return patches[y: rows - y]
    x = (columns - whole(width * (rows / height))) // 2
    return patches[:, x: columns - x]


def reading_order(size, grid, tokens, merge, rounded=True):
    """The features of a picture of (height, width) in the order that the language model reads, (places,) int64.

    Features are counted through its views, `tokens` each: the squashed whole, then a grid (rows, columns) of tiles.
    `flat` reads view by view. `spatial` reads the whole, then all tiles as one large picture, line by line across them;
    `spatial_unpad` leaves the padding out and ends each line with NEWLINE (LLaVA 1.6; LLAVA.md 3.4)."""
    order = torch.arange((1 + math.prod(grid)) * tokens)
    if merge == "flat" or len(order) == tokens:
        return order
    whole, tiles = order[:tokens], join_tiles(order[tokens:].view(-1, math.isqrt(tokens), math.isqrt(tokens)), grid)
    if merge == "spatial_unpad":
        tiles = F.pad(unpad(tiles, size, rounded), (0, 1), value=NEWLINE)
    return torch.cat([whole, tiles.flatten()])


def check_views(aspect, merge="flat", feature="patch"):
    """ValueError for an image_aspect_ratio or an mm_patch_merge_type that is not known, or that cannot be had with this
    mm_vision_select_feature."""
    if aspect not in ("anyres", "pad", "square", None):
        raise ValueError(f"image_aspect_ratio {aspect!r} is not known; use anyres, pad or square")
    if merge not in MERGES:
        raise ValueError(f"mm_patch_merge_type {merge!r} is not known; use {', '.join(MERGES)}")
    if merge != "flat" and feature != "patch":
        raise ValueError(f"mm_patch_merge_type {merge} lays patches side by side, and a class token has no place; use "
                         "mm_vision_select_feature patch")


# ------------------------------------------------------------------------------------------------- pictures to pixels


def limit_pixels(count):
    """From here on `open_picture` refuses what has more pixels, by its header, before anything is decoded. Until then
    Pillow's own limit counts, 179 million or 0.5 GB; from half of a limit on it would warn, too."""
    Image.MAX_IMAGE_PIXELS = count / 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_picture(file, exif=False, name=None, formats=None):
    """A picture file -> PIL picture in RGB, whatever its mode was: transparency is dropped, not blended; and turned as
    the camera was held (EXIF) only with `exif`, as in the original. file: a path, or an open file that is called
    `name`; formats: Pillow's names of those allowed. ValueError names a missing, broken or too large file."""
    name = name or file
    try:
        with Image.open(file, formats=formats) as picture:
            return (ImageOps.exif_transpose(picture) if exif else picture).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"picture {name} does not exist; check --image_folder and the record's `image`") from None
    except Image.DecompressionBombError:
        raise ValueError(f"picture {name} has more than {2 * Image.MAX_IMAGE_PIXELS:,.0f} pixels and was not decoded; "
                         "make it smaller, or raise sample.py's --max_pixels") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, OSError … for broken files
        raise ValueError(f"picture {name} cannot be read ({error}); replace it or leave its record out") from None


def check_growth(picture, width, height):
    """ValueError if a picture, a mere line, would fill the memory once it is padded or enlarged to this size."""
    if width * height > max(10**9, picture.width * picture.height):
        raise ValueError(f"picture of {picture.width} x {picture.height} pixels would become one of {width} x {height},"
                         f" {3e-9 * width * height:.0f} GB; cut off what is not needed")


def centred(picture, width, height, colour):
    """The picture in the middle of a larger one; odd rests go below or right."""
    canvas = Image.new("RGB", (width, height), colour)
    canvas.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return canvas


@dataclass
class ImageProcessor:
    """Picture -> the tower's pixels, equal bit for bit to the original's way through PIL and CLIPImageProcessor.

    shortest_edge, crop_size: pixels; image_mean, image_std: CLIP's, per channel; image_grid_pinpoints: the canvases
    (height, width) of anyres. LLAVA.md 3.1 to 3.3 in the field's words: resize the short side (bicubic on 8-bit
    values), crop the centre, scale to 0..1, normalise."""

    crop_size: int = 224
    shortest_edge: int | None = None
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)
    image_grid_pinpoints: list | None = None

    @classmethod
    def from_dict(cls, values):
        """Read a preprocessor_config.json, old (`"size": 224`) or new (`"size": {"shortest_edge": 224}`)."""
        crop, size = values.get("crop_size", values.get("size", 224)), values.get("size")
        if isinstance(crop, dict):
            crop = crop.get("height", crop.get("shortest_edge"))
        if isinstance(size, dict):
            size = size.get("shortest_edge", size.get("height"))
        return cls(crop, size, tuple(values.get("image_mean", cls.image_mean)),
                   tuple(values.get("image_std", cls.image_std)))

    def to_dict(self):
        """The preprocessor_config.json that transformers' CLIPImageProcessor reads."""
        return {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
            "size": {"shortest_edge": self.shortest_edge or self.crop_size}, "do_center_crop": True,
            "crop_size": {"height": self.crop_size, "width": self.crop_size}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.image_mean), "image_std": list(self.image_std),
        }

    def __call__(self, picture, aspect="pad"):
        """PIL picture -> float32 (views, 3, S, S); aspect as in `views`."""
        pixels = np.stack([self.resize_and_crop(view) for view in self.views(picture, aspect)])  # (views, S, S, 3) u8
        shades = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]  # in float64 first, as for the original
        shades = (shades - np.float32(self.image_mean)) / np.float32(self.image_std)  # (256, 3): all there are
        return torch.from_numpy(np.stack([shades[:, c].take(pixels[..., c], mode="clip") for c in range(3)], 1))

    def views(self, picture, aspect="pad"):
        """The PIL pictures that the tower is shown for one. `pad`: made square on the mean colour; `square`: to be cut
        to one; `anyres`: the whole, squashed, then, row by row, the tiles of the canvas it fits best, on black."""
        check_views(aspect)
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        if aspect == "pad":
            side, colour = max(picture.size), tuple(int(mean * 255) for mean in self.image_mean)  # (122, 116, 104)
            check_growth(picture, side, side)
            return [centred(picture, side, side, colour)]
        if aspect != "anyres":
            return [picture]
        edge, tile, size = self.shortest_edge or self.crop_size, self.crop_size, picture.size[::-1]
        height, width = best_resolution(size, self.image_grid_pinpoints)
        fitted = picture.resize(fit(size, (height, width))[::-1], Image.Resampling.BICUBIC)
        canvas = centred(fitted, width, height, "black")
        corners = [(x, y) for y in range(0, height, tile) for x in range(0, width, tile)]
        return [picture.resize((edge, edge), Image.Resampling.BICUBIC),
                *(canvas.crop((x, y, x + tile, y + tile)) for x, y in corners)]

    def resize_and_crop(self, picture):
        """Short side -> shortest_edge, the long side rounded down; then the middle crop_size x crop_size."""
        width, height = picture.size
        edge = self.shortest_edge or self.crop_size
        size = (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)
        check_growth(picture, *size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.crop_size) // 2, (size[1] - self.crop_size) // 2
        return picture.crop((left, top, left + self.crop_size, top + self.crop_size))

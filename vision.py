"""The eyes: a picture file -> pixels -> the hidden states of a CLIP vision transformer (Radford et al. 2021).

LLaVA reads the output of a layer before the last (`mm_vision_select_layer` -2): the last one has been trained to sum
the picture up, the one before still says what is where. Later layers are neither built nor loaded here.

Legend: P pictures, S side of a picture in pixels, N patches (tokens) of a picture, D width of the tower, H heads,
K head dim.
"""

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
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
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


# ------------------------------------------------------------------------------------------------- pictures to pixels


def open_picture(path, exif=False):
    """A picture file -> PIL picture in RGB, whatever its mode was: transparency is dropped, not blended.

    The original ignores the camera's orientation (EXIF); `exif=True` honours it. A missing or broken file is a
    ValueError that names it.
    """
    try:
        with Image.open(path) as picture:
            return (ImageOps.exif_transpose(picture) if exif else picture).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"picture {path} does not exist; check --image_folder and the record's `image`") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, OSError … for broken files
        raise ValueError(f"picture {path} cannot be read ({error}); replace it or leave its record out") from None


@dataclass
class ImageProcessor:
    """Picture -> the tower's pixels, equal bit for bit to the original's way through PIL and CLIPImageProcessor.

    shortest_edge, crop_size: pixels; image_mean, image_std: CLIP's, per channel. LLAVA.md 3.1 and 3.2 in the field's
    words: resize the short side (bicubic on 8-bit values), crop the centre, scale to 0..1, normalise.
    """

    crop_size: int = 224
    shortest_edge: int | None = None
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

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
        """PIL picture -> float32 (1, 3, S, S). `pad`: to a square on the mean colour; `square`: cut to one."""
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        if aspect == "pad":
            picture = self.pad_to_square(picture)
        elif aspect not in ("square", None):
            raise ValueError(f"image_aspect_ratio {aspect!r} is not known; use pad or square")
        pixels = np.asarray(self.resize_and_crop(picture))  # (S, S, 3) uint8
        pixels = (pixels * (1 / 255)).astype(np.float32)  # product in float64, as numpy does it for the original
        pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]

    def pad_to_square(self, picture):
        """Centre the picture on a square of the mean colour, (122, 116, 104) for CLIP; odd rests go below or right."""
        width, height = picture.size
        if width == height:
            return picture
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.image_mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        return square

    def resize_and_crop(self, picture):
        """Short side -> shortest_edge, the long side rounded down; then the middle crop_size x crop_size."""
        width, height = picture.size
        edge = self.shortest_edge or self.crop_size
        if width <= height:
            size = (edge, int(edge * height / width))
        else:
            size = (int(edge * width / height), edge)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.crop_size) // 2, (size[1] - self.crop_size) // 2
        return picture.crop((left, top, left + self.crop_size, top + self.crop_size))

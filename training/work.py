"""The work of a training step in floating-point operations (FLOP), and what the device could do at most.

A product of n rows with a matrix of m numbers takes 2nm FLOP. Backward takes as many for the gradient of the rows, if
something before them learns, and as many for that of the matrix, if it is trained: a frozen tower costs its forward
pass alone, a frozen language model behind a trained projector two thirds of a trained one. Attention over n places
takes 4n^2 per channel and layer, half of it under a causal mask, and twice that backward. Only labelled rows meet the
vocabulary. What is computed again to save memory is not counted, nor what is no product: that is little.
"""

import re
import time
from collections import Counter
from functools import cache

import torch

PEAKS = {  # TFLOP/s in 16 bits, TF32 and float32 by the makers' data sheets, without sparsity; the first that fits
    "B200": (2250, 1125, 75), "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 418, 60), "G?H[12]00": (989, 494, 67),
    "A100": (312, 156, 19.5), "L40S": (362, 183, 91.6), "L40": (181, 90.5, 90.5), "L4": (121, 60, 30.3),
    "A40": (150, 75, 37.4), "A10": (125, 62.5, 31.2), "RTX 6000 Ada": (364, 182, 91.1), "A6000": (155, 77.4, 38.7),
    "5090": (210, 105, 105), "4090": (165, 82.6, 82.6), "3090": (71, 35.6, 35.6), "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1)}


class Work:
    """Counts the FLOP of micro-batches for `model`, a Llava whose requires_grad says what is trained."""

    def __init__(self, model):
        self.config, self.flop, self.passes, back = model.config, Counter(), {}, False
        for name, module in list(model.named_modules())[1:]:  # in the order of the forward pass
            part = "head" if name.endswith("lm_head") else name.split(".")[0]
            own = dict(module.named_parameters(recurse=False))
            size = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            if isinstance(module, torch.nn.Conv2d):
                size = module.weight.numel()
            self.flop[part] += 2 * size * (1 + back + getattr(own.get("weight"), "requires_grad", False))
            self.flop[part] += 6 * sum(p.numel() for key, p in own.items() if "lora_" in key)
            back = back or any(p.requires_grad for p in own.values())
            self.passes[part] = 1 + 2 * back  # of attention
        self.depth = len(model.vision_tower.vision_model["encoder"]["layers"]) if model.vision_tower else 0

    def of(self, batch, learned):
        """FLOP of a micro-batch of which `learned` rows carry a label, forward and backward."""
        text, vision, lengths = self.config.text, self.config.vision, batch.cu_seqlens.diff().tolist()
        wide = text.num_hidden_layers * text.num_attention_heads * text.head_dim
        found = sum(lengths) * self.flop["language_model"] + learned * self.flop["head"]
        found += 2 * sum(n * n for n in lengths) * wide * self.passes["language_model"]
        if vision:
            views, places = len(batch.pixel_values), 1 + vision.num_patches
            found += views * self.config.image_tokens * self.flop["mm_projector"]
            if batch.pixel_values.dim() == 4:  # pixels, not what --cache_features has of them
                found += views * places * self.flop["vision_tower"]
                found += views * 4 * places**2 * vision.hidden_size * self.depth * self.passes["vision_tower"]
        return found


def peak(device, args):
    """The most that the device could do -> (TFLOP/s or None, a line that says where that is from)."""
    if device.type == "cpu":
        best = measure(getattr(torch, args.dtype))
        return best, f"peak {best:.3g} TFLOP/s: {args.dtype} products, measured on {torch.get_num_threads()} threads"
    name, kind = torch.cuda.get_device_name(device), 2 - args.tf32 if args.dtype == "float32" else 0
    best = next((rates[kind] for key, rates in PEAKS.items()
                 if re.search(rf"\b{key}\b(?! (Ti|SUPER|D|Laptop)\b)", name)), None)
    return best, f"peak {best:g} TFLOP/s: {name} by its data sheet" if best else f"peak of {name}: not known here"


@cache
def measure(dtype):
    """The best rate of square products, larger and larger ones, within a fifth of a second; in TFLOP/s."""
    best, side, end = 0.0, 128, time.perf_counter() + 0.2
    while time.perf_counter() < end:
        x = torch.full((side, side), 0.5, dtype=dtype)  # no random numbers: the run's course may depend on them
        began = time.perf_counter()
        x @ x
        took = time.perf_counter() - began
        best, side = max(best, 2 * side**3 / took / 1e12), side * 2 if took < 0.01 and side < 4096 else side
    return best

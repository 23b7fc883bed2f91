"""Quantised matrices in files, as transformers with bitsandbytes writes and reads them; legend as in kernels/nf4.py.

    X.weight                                codes: (n / 2, 1) uint8, in 8 bits (out, in) int8
    X.weight.absmax                         (b,) uint8, or float32 without double quantisation
    X.weight.nested_absmax                  (ceil(b / 256),) float32
    X.weight.quant_map, .nested_quant_map   the levels: (16,) and (256,) float32
    X.weight.quant_state.bitsandbytes__nf4  (or __fp4) JSON as bytes: shape, dtype, blocksize, nested_offset …
    X.SCB, X.weight_format                  in 8 bits: (out,) float32, the largest of each row; 0, a layout

Folded, such a matrix is one LazyTensor: the model takes its codes (weights.fill), others read decoded numbers.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from formats.files import LazyTensor
from kernels import nf4
from quant import quantised

LAST = r"(.+\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)|(.+\.)SCB"  # a key that only a quantised matrix has
BLOCKS = {"blocksize": nf4.BLOCK, "nested_blocksize": nf4.BLOCK2}
SKIP = ["lm_head", *(prefix + part for prefix in ("", "model.") for part in (
    "multi_modal_projector", "mm_projector", "vision_tower"))]  # transformers 4 looks within a name, 5 at its start


@dataclass(frozen=True)
class Folded(LazyTensor):
    """A quantised matrix. kind: nf4, fp4, int8; parts: () -> what kernels.nf4.encode gave; size: bytes in the file."""

    kind: str = None
    parts: Callable = None
    size: int = 0


def fold(tensors):
    """{name in a file: LazyTensor} -> the same, quantised matrices as one each. ValueError: a part is missing."""
    tensors = dict(tensors)
    for match in filter(None, [re.fullmatch(LAST, key) for key in tensors]):
        name, kind, where = match[1] or match[3] + "weight", match[2] or "int8", tensors[match[0]].file
        own = name + "." if match[1] else match[3]  # in 8 bits, a bias is among them
        keys = {key.removeprefix(own): tensors.pop(key) for key in list(tensors)
                if key.startswith(own) and not key.endswith((".weight", ".bias"))}
        try:
            tensors[name] = folded(kind, tensors[name], keys)
        except KeyError as error:
            raise ValueError(f"{where}: {name} is quantised as {kind} and lacks {error}; copy it again") from None
        except ValueError as error:
            raise ValueError(f"{where}: {name} {error}; load the model that it was made from") from None
    return tensors


def folded(kind, codes, keys):
    """codes: LazyTensor; keys: {key behind its name: LazyTensor} -> Folded"""
    shape, dtype, state, nested = codes.shape, torch.float32, {}, keys.get("nested_absmax")
    absmax = keys["SCB" if kind == "int8" else "absmax"]
    if kind != "int8":
        state = json.loads(bytes(keys[f"quant_state.bitsandbytes__{kind}"].read().tolist()))
        if wrong := [f"{key} {state[key]}" for key, size in BLOCKS.items() if state.get(key, size) != size]:
            raise ValueError(f"has {', '.join(wrong)}; known are {BLOCKS}")
        shape, dtype = torch.Size(state["shape"]), getattr(torch, state["dtype"])
        if codes.nbytes != -(-shape.numel() // 2):
            raise ValueError(f"has {codes.nbytes} bytes of codes for {tuple(shape)} weights")

    def parts():
        packed, scales = codes.read().reshape(-1).view(torch.uint8), None
        if nested:
            scales = torch.cat([nested.read(), torch.tensor([state["nested_offset"]])]).view(torch.uint8)
        if state and len(packed) % 32:  # else they stay the file's own pages
            packed = F.pad(packed, (0, -len(packed) % 32))
        return packed, absmax.read().view(torch.uint8), scales

    return Folded(shape, dtype, codes.file, lambda: nf4.decode(kind, *parts(), torch.empty(shape, dtype=dtype)),
                  kind=kind, parts=parts, size=codes.nbytes + sum(tensor.nbytes for tensor in keys.values()))


def unfold(model, tensors):
    """Give the quantised matrices among {our name: tensor} the keys above, in place; outside the LLM's layers, where
    transformers is told to keep 16 bits, they are decoded. -> quantization_config for config.json, {} without any"""
    settings = {}
    for name, module in quantised(model).items():
        kind, parts = module.kind, [tensors.pop(f"{name}.{part}", None) for part in ("codes", "absmax", "nested")]
        dtype, shape = str(module.dtype).removeprefix("torch."), module.shape
        if ".layers." not in name or name.startswith("vision_tower."):
            room = torch.empty(shape, dtype=module.dtype, device=parts[0].device)
            tensors[f"{name}.weight"] = room if room.is_meta else nf4.decode(kind, *parts, room)
            continue
        if kind == "int4":
            raise ValueError("int4 is made while a model is loaded and has no format for files; save it in nf4 or fp4")
        settings = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": SKIP} | (
            {"load_in_8bit": True} if kind == "int8" else
            {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": parts[2] is not None,
             "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8"})
        codes, absmax, nested = parts
        if kind == "int8":
            tensors |= {f"{name}.weight": codes.view(torch.int8).view(shape), f"{name}.SCB": absmax.view(torch.float32),
                        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
            continue
        state = {"quant_type": kind, "blocksize": nf4.BLOCK, "dtype": dtype, "shape": shape}
        keys = {"absmax": absmax if nested is not None else absmax.view(torch.float32), "quant_map": nf4.levels(kind)}
        if nested is not None:
            scales = nested.view(torch.float32)
            keys |= {"nested_absmax": scales[:-1], "nested_quant_map": nf4.dynamic_levels()}
            state |= {"nested_blocksize": nf4.BLOCK2, "nested_dtype": "float32",
                      "nested_offset": 0.0 if scales.is_meta else scales[-1].item()}
        keys[f"quant_state.bitsandbytes__{kind}"] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
        tensors[f"{name}.weight"] = codes[: -(-shape[0] * shape[1] // 2), None]
        tensors |= {f"{name}.weight.{key}": tensor for key, tensor in keys.items()}
    return settings

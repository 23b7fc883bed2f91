"""Quantising: hold each weight of a frozen matrix in 4 bits, or in 8, and decode a matrix when it is used.

A 7B model in 16 bits is 13 GB, most of it matrices that QLoRA (Dettmers et al. 2023) never changes: they can be held as
codes, as long as what is computed with them is precise. Three ideas (section 3 of the paper):

Blocks. 64 neighbours share a scale, the largest of their magnitudes, absmax; w / absmax lies in [-1, 1], and a code
says which of 16 levels is nearest. One outlier spoils its own block alone.

    w' = level[code] * absmax[block]

NormalFloat. Trained weights are distributed about normally. NF4's levels are the quantiles of a normal distribution,
scaled to [-1, 1]: every code is about equally frequent, so that none is wasted, and 0 is a level of its own. `fp4` is
the other choice: a sign, two bits of exponent, one of mantissa. `int4` has even steps from a block's least weight to
its largest, a scale and a zero in 16 bits each, 4.5 bits a weight: for inference on a CPU, which multiplies it fastest.

Double quantisation. A float32 scale costs 32/64 = 0.5 bits a weight. The scales are themselves coded, in 8 bits: their
mean is taken off, 256 of them share a second scale, and the levels are Dettmers' dynamic ones (2016), finest near 0.

    absmax' = level8[code8] * absmax2[256 blocks] + mean        4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight

Eight numbers, as if a block were that short (kernels/nf4.py fills it up with zeros):

>>> from kernels.nf4 import dequantise_4bit, levels, quantise_4bit
>>> w = torch.tensor([0.02, -0.10, 0.05, 0.00, -0.03, 0.08, 0.01, -0.07])
>>> codes, absmax, _ = quantise_4bit(w, "nf4", double_quant=False)
>>> absmax  # the scale: 0.02 becomes 0.2, -0.10 becomes -1
tensor([0.1000])
>>> levels("nf4")[:4], levels("nf4")[8:12]
(tensor([-1.0000, -0.6962, -0.5251, -0.3949]), tensor([0.0796, 0.1609, 0.2461, 0.3379]))
>>> [f"{byte:02x}" for byte in codes[:4].tolist()]  # two weights a byte: 0.2 is nearest to level 9, -1 is level 0
['90', 'c7', '4e', '81']
>>> dequantise_4bit(codes, absmax, None, torch.empty(8), "nf4")
tensor([ 0.0161, -0.1000,  0.0441,  0.0000, -0.0284,  0.0723,  0.0080, -0.0696])

8 bits are simpler: a scale per row, code = round(127 w / absmax). LLM.int8 (Dettmers et al. 2022) also multiplies the
columns of large activations apart, in 16 bits; that is not done here, since activations are never quantised.

Backward. The matrix is frozen: y = x W'^T needs only dx = dy W', so nothing is kept, and W' is decoded a second time,
into the same workspace: one matrix's room for the whole model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels import nf4

WORKSPACE = {}  # (device, dtype) -> where matrices are decoded; holds one at a time


@dataclass(frozen=True)
class Quantisation:
    """What `--bits`, `--quant_type`, `--double_quant` and `--quant_also` ask for. ValueError: what there is not."""

    bits: int = 16
    quant_type: str = "nf4"
    double_quant: bool = True
    also: str = ""  # lm_head, mm_projector: what is quantised besides the layers of the language model

    def __post_init__(self):
        for flag, value, known in (("bits", self.bits, (4, 8, 16)),
                                   ("quant_type", self.quant_type, ("nf4", "fp4", "int4")),
                                   *(("quant_also", word, ("lm_head", "mm_projector")) for word in self.words)):
            if value not in known:
                raise ValueError(f"--{flag} {value} is not known; use {', '.join(map(str, known))}")

    words = property(lambda self: [word for word in self.also.split(",") if word])
    kind = property(lambda self: {4: self.quant_type, 8: "int8"}.get(self.bits))  # None: not quantised

    def wants(self, name, module):
        """Whether the module of this name is a linear that is to be quantised."""
        part = {"layers", *self.words} & set(name.split(".")) and not name.startswith("vision_tower")
        return bool(self.kind and part and isinstance(module, nn.Linear))

    def linear(self, weight, dtype):
        """A matrix (out, in) -> QuantisedLinear."""
        return QuantisedLinear(weight.shape, self.kind, nf4.encode(weight, self.kind, self.double_quant), dtype)


class QuantisedLinear(nn.Module):
    """A linear whose frozen matrix is held as codes. kind: nf4, fp4, int4 or int8; parts: what kernels.nf4.encode gave.

    codes, absmax, nested: parameters of bytes, even where they are float32: FSDP2 cuts and gathers them without caring,
    and no cast of a model touches them. dtype: what the model computes in.
    """

    def __init__(self, shape, kind, parts, dtype):
        super().__init__()
        self.out_features, self.in_features = self.shape = shape
        self.kind, self.dtype = kind, dtype
        for name, part in zip(("codes", "absmax", "nested", "bias"), (*parts, None)):
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    @property
    def weight(self):
        """The matrix (out, in), decoded: good until the next one is, so not for keeping."""
        return self.decode(self.dtype)

    def decode(self, dtype):
        """The same in another dtype."""
        key, size = (self.codes.device, dtype), self.out_features * self.in_features
        if key not in WORKSPACE or len(WORKSPACE[key]) < size:
            WORKSPACE.pop(key, None)  # before a larger one is made
            with torch.inference_mode(False):  # training may need it after an answer
                WORKSPACE[key] = torch.empty(size, dtype=dtype, device=self.codes.device)
        return nf4.decode(self.kind, self.codes, self.absmax, self.nested, WORKSPACE[key][:size].view(self.shape))

    def forward(self, x):
        y = nf4.few_rows(x, self.kind, self.codes, self.absmax, self.nested, self.shape)
        y = FrozenLinear.apply(x, self.decode) if y is None else y
        return y if self.bias is None else y + self.bias


class FrozenLinear(torch.autograd.Function):
    """y = x W^T for a W that is decoded when it is needed, here and in backward. x (…, in) -> (…, out)"""

    @staticmethod
    def forward(ctx, x, decode):
        ctx.decode = decode
        return F.linear(x, decode(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.decode(dy.dtype), None


def quantised(model):
    """{name: QuantisedLinear} of a model, also of those that a lora.LoraLinear wraps."""
    modules = {name: getattr(module, "linear", module) for name, module in model.named_modules()}
    return {name: module for name, module in modules.items() if isinstance(module, QuantisedLinear)}


def arrange(model):
    """Lay codes in planes, in place, where kernels/nf4.py has a kernel for that and was asked for it."""
    for module in quantised(model).values():
        if module.codes is None or getattr(module, "takes_turns", False):  # kernels/linear.py, sampling/turns.py
            continue
        if type(module.codes.data) is torch.Tensor and nf4.wants_planes(module.codes, module.kind, module.shape):
            module.codes = nn.Parameter(nf4.planar(module.codes), requires_grad=False)


def compute_in(model, dtype):
    """Have quantised matrices decoded to `dtype`."""
    for module in quantised(model).values():
        module.dtype = dtype


def count(model, part=""):
    """How many numbers a model, or its part of a name, stands for, those in codes included."""
    return (sum(p.numel() for name, p in model.named_parameters() if name.startswith(part) and p.is_floating_point())
            + sum(m.out_features * m.in_features for name, m in quantised(model).items() if name.startswith(part)))


def describe(model):
    """Its quantised matrices in words; "" without any."""
    modules = list(quantised(model).values())
    size = sum(p.numel() for module in modules for p in (module.codes, module.absmax, module.nested) if p is not None)
    weights = sum(module.out_features * module.in_features for module in modules)
    return f", {len(modules)} matrices in {modules[0].kind}, {8 * size / weights:.3f} bits a weight" if modules else ""

"""y = x W^T on a CPU for matrices that are only read: arranged once, so that each product takes no longer than memory.

Every word of an answer multiplies one row with every matrix of the model. The arithmetic is nothing; what takes the
time is reading the matrices, and all that delays it. `pack` changes how they lie in memory, not what they say:

    joined   q, k and v have one input, and so have gate and up: the rows of their matrices become one matrix, and one
             product takes the place of three, of two
    packed   oneDNN multiplies bfloat16 in blocks. From a plain matrix F.linear gathers the blocks anew at every call;
             here that is done once, and the result is the same bit for bit
    int8     codes are multiplied as they are, a row's scale is applied to its sum: half the bytes are read
    int4     groups of 64 codes, decoded in registers while they are read: a quarter of the bytes

(Many rows are another matter: then arithmetic counts, and codes are decoded first.)

One row, one thread, EPYC Zen 4, in microseconds, and the same for 16 rows:

    matrix         F.linear    packed      int8        int4            F.linear    packed      int8        int4
    960 x 576      214         110         94          38              240         144         250         225
    3072 x 576     588         271         286         111             786         487         677         736
    49152 x 576    6986        4144        3917        1763            11194       6174        11066       12306
    4096 x 4096    3332        2158        1458        918             5061        3081        6100        6478

On a GPU matrices, and codes of nf4 and fp4, are joined and nothing else: a step of decoding there is a matter of how
many kernels are launched, too (PyTorch's product and kernels/nf4.py's run on them as they are).

The functions are torch's own but private, and may go: each is asked for, and where one is missing, or a shape or a
dtype does not suit it, the linear stays as it was. float32 does: there packing gains little and changes the last bit.

Legend: T rows, in and out the widths of a matrix (out, in).
"""

import contextlib
import ctypes
import sys
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from kernels import nf4
from kernels.nf4 import BLOCK, halves

GPU = ("cuda",)
CODED = "codes", "absmax", "nested"
JOINED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # linears of one input
PAGE, COLLAPSE = 2**21, 25  # bytes; MADV_COLLAPSE of Linux's madvise
FEW = {"int8": 8, "int4": 96}  # rows up to which multiplying codes is faster than decoding them, some at a time
PIECE, BLOCKS = 2**21, 4  # int8's codes, and int4's blocks of 64 rows, that are decoded together, to stay in the cache:
#                           115 rows of 22016 x 4096 take 114 and 174 ms so; all at once, 191 and 435


def together(x, *linears):
    """What linears of one input say of it, x (T, in) -> a tuple of (T, out): one product where `pack` has joined
    them."""
    if isinstance(linears[0], PackedLinear):
        return linears[0].product.forward(x)
    return tuple(linear(x) for linear in linears)


def pack(model):
    """Arrange the bfloat16, int8 and int4 linears of a model on a CPU, to be read only. -> how many now are

    They are replaced one after the other: besides the model, memory holds two matrices more while this runs. One whose
    numbers are the embeddings', too, a tied head, stays in memory twice. `unpack` restores all, bit for bit.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    count = 0
    for module in list(model.modules()):
        before = count
        alone = [(name,) for name in module._modules if not any(name in names for names in JOINED)]
        for names in () if getattr(module, "takes_turns", False) else (*JOINED, *alone):  # sampling/turns.py
            linears = [getattr(module, name, None) for name in names]
            kind = _kind(linears)
            if kind is None:
                continue
            product = PRODUCTS[kind](linears)
            for i, (name, linear) in enumerate(zip(names, linears)):
                setattr(module, name, PackedLinear(product, i, linear))
                for key, p in linear._parameters.items():
                    linear._parameters[key] = p if owners[id(p)] > 1 else None
            count += len(linears)
        if count > before:
            _give_back()
    for module in model.modules():
        if isinstance(module, Product):
            _into_large_pages(module.parameters())
        # as plain attributes, too, parts are found at once, not by nn.Module's search: 27.6 instead of 28.7 ms a token
        vars(module).update(module._parameters | module._modules)
    return count


def _give_back():
    """Return what is free to the system. C's library keeps it for later, in holes between what is still used, which no
    packed matrix fits into: SmolLM2-135M, 269 MB, would take 245 MB more; it takes 39, less than its tied head."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has this
        ctypes.CDLL(None).malloc_trim(0)


def _into_large_pages(tensors):
    """Have Linux (from 6.1 on) move tensors on a CPU to pages of 2 MB, which are read through with fewer stops: a token
    of SmolLM2-135M takes 36 instead of 42 ms in bfloat16, 31.5 instead of 34 in int8. What it cannot move stays."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for x in tensors:
            if x.device.type == "cpu" and sys.platform == "linux":
                begin = torch.ops.mkldnn.data_ptr(x) if x.is_mkldnn else x.data_ptr()
                first = begin // PAGE * PAGE
                advise(first, begin + x.nbytes - first, COLLAPSE)


def unpack(model):
    """Undo `pack`: the linears come back as they were."""
    for module in list(model.modules()):
        for name in (*module._parameters, *module._modules):
            vars(module).pop(name, None)
        for name, packed in list(module._modules.items()):
            if isinstance(packed, PackedLinear):
                setattr(module, name, packed.restore())


class PackedLinear(nn.Module):
    """What stands in the model in a packed linear's place: the i-th part of a product. x (T, in) -> (T, out)"""

    def __init__(self, product, i, linear):
        super().__init__()
        self.product, self.i = product, i
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.__dict__["linear"] = linear  # without its numbers, and not as a child
        self.learns = {key: p.requires_grad for key, p in linear._parameters.items() if p is not None}

    def forward(self, x):
        return self.product.forward(x)[self.i]

    def restore(self):
        """-> the linear with its numbers"""
        for key, part in self.product.parts(self.i).items():
            if self.linear._parameters[key] is None:
                self.linear._parameters[key] = nn.Parameter(part, self.learns[key])
        return self.linear


# ---------------------------------------------------------------------------------------------------------- products
#
# Each is made of linears of one input, and is called with x (T, in) -> a tuple of (T, out), one for each of them.
# parts(i): the parameters of the i-th, as it came.


class Product(nn.Module):
    """What they share: widths, the out of each linear; multiply(x): all of them side by side."""

    def __init__(self, linears):
        super().__init__()
        self.widths = [linear.out_features for linear in linears]

    def forward(self, x):
        y = self.multiply(x)
        return y.split_with_sizes(self.widths, -1) if len(self.widths) > 1 else (y,)


class OneDnn(Product):
    """A bfloat16 matrix in oneDNN's blocks, which only oneDNN knows."""

    def __init__(self, linears):
        super().__init__(linears)
        matrix = _cat([linear.weight.detach() for linear in linears])
        self.matrix = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(matrix), requires_grad=False)

    def multiply(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.matrix, None, "none", [], "")

    def parts(self, i):
        return {"weight": self.matrix.to_dense().split(self.widths)[i].clone()}


class Int8(Product):
    """codes (out, in) int8, absmax (out,) float32; y = (x codes^T) absmax / 127, the scale in x's dtype."""

    def __init__(self, linears):
        super().__init__(linears)
        width = linears[0].in_features
        self.codes, self.absmax = (nn.Parameter(_cat(parts), requires_grad=False) for parts in (
            [linear.codes.detach().view(torch.int8).view(-1, width) for linear in linears],
            [linear.absmax.detach().view(torch.float32) for linear in linears]))
        self.scales = (self.absmax / 127).bfloat16()

    def multiply(self, x):
        if len(x) <= FEW["int8"]:
            return torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scales)
        parts = self.codes.split(max(1, PIECE // x.shape[1]))
        return torch.cat([F.linear(x, part.to(x.dtype)) for part in parts], -1).mul_(self.scales)  # codes are exact

    def parts(self, i):
        split = {"codes": self.codes, "absmax": self.absmax}
        return {key: p.split(self.widths)[i].clone().view(-1).view(torch.uint8) for key, p in split.items()}


class Int4(Product):
    """codes (out / 64, in, 32) uint8, scales (in / 64, out, 2) bfloat16: kernels/nf4.py's int4 in the order in which
    the processor reads it: 64 rows side by side, the k-th and the 32 + k-th of them in one byte."""

    def __init__(self, linears):
        super().__init__(linears)
        width = linears[0].in_features
        codes = _cat([halves(linear.codes.detach()).view(-1, width) for linear in linears])
        scales = torch.cat([linear.absmax.detach().view(torch.bfloat16).view(-1, width // BLOCK, 2)
                            for linear in linears])
        self.codes = nn.Parameter(torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1), requires_grad=False)
        self.scales = nn.Parameter(scales.transpose(0, 1).contiguous(), requires_grad=False)

    def multiply(self, x):
        if len(x) <= FEW["int4"]:
            return torch._weight_int4pack_mm_for_cpu(x.contiguous(), self.codes, BLOCK, self.scales)
        groups = len(self.scales)
        codes = self.codes.view(-1, groups, BLOCK, 32)  # (out / 64, in / 64, 64, 32)
        scales = self.scales.view(groups, -1, 1, BLOCK, 2).permute(4, 1, 0, 2, 3).contiguous()
        parts = zip(*(y.split(BLOCKS) for y in (codes, *scales)))
        return torch.cat([torch.mm(x, _int4_columns(*part)) for part in parts], -1)

    def parts(self, i):
        codes = _int4_codes(self.codes).split(self.widths)[i].reshape(-1, 2)
        scales = self.scales.transpose(0, 1).split(self.widths)[i]
        return {"codes": codes[:, 0] << 4 | codes[:, 1], "absmax": scales.reshape(-1).view(torch.uint8)}


class Joined(Product):
    """Plain matrices below each other."""

    def __init__(self, linears):
        super().__init__(linears)
        self.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)

    def multiply(self, x):
        return F.linear(x, self.weight)

    def parts(self, i):
        return {"weight": self.weight.split(self.widths)[i].clone()}


class JoinedCodes(Product):
    """The same of nf4 or fp4, in planes where these are wanted; decoded while they are multiplied, or for many rows
    before."""

    def __init__(self, linears):
        super().__init__(linears)
        self.kind = linears[0].kind
        self.shape = sum(self.widths), linears[0].in_features
        codes, absmax, nested = nf4.join([tuple(
            part if part is None else part.detach() for part in (linear.codes, linear.absmax, linear.nested))
            for linear in linears])
        codes = nf4.planar(codes) if nf4.wants_planes(codes, self.kind, self.shape) else codes
        for name, part in zip(CODED, (codes, absmax, nested)):
            self.register_parameter(name, None if part is None else nn.Parameter(part, requires_grad=False))

    def multiply(self, x):
        parts = self.codes, self.absmax, self.nested
        y = nf4.few_rows(x, self.kind, *parts, self.shape)
        return F.linear(x, nf4.decode(self.kind, *parts, x.new_empty(self.shape))) if y is None else y

    def parts(self, i):
        parts = zip(CODED, nf4.part_of((self.codes, self.absmax, self.nested), self.widths, i))
        return {name: part for name, part in parts if part is not None}


def _cat(parts):
    """torch.cat, but one part is no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


PRODUCTS = {"bf16": OneDnn, "int8": Int8, "int4": Int4, "joined": Joined, "nf4": JoinedCodes, "fp4": JoinedCodes}


def _side_by_side(codes):
    """Blocks of 64 rows as torch packs them, (…, 32) -> (…, 64), a code a byte."""
    return torch.cat([codes & 15, codes >> 4], -1)


def _int4_codes(packed):
    """Codes as torch packs them -> (out, in) uint8."""
    rows, width = len(packed), packed.numel() * 2 // len(packed)
    return _side_by_side(packed.view(-1, width, 32)).transpose(1, 2).reshape(rows, width)  # (out / 64, 64, in)


def _int4_columns(codes, scale, zero):
    """Some blocks of 64 rows -> their numbers, (in, rows). codes (blocks, in / 64, 64, 32), scale and zero (blocks, in /
    64, 1, 64)"""
    codes = _side_by_side(codes).view(torch.int8).sub_(8).to(scale.dtype)
    numbers = torch.addcmul(zero, codes, scale).flatten(1, 2)  # (blocks, in, 64)
    return numbers.transpose(0, 1).flatten(1)


def _kind(linears):
    """How linears can be packed as one: a key of PRODUCTS, or None."""
    kinds = {_kind_of(linear) for linear in linears}
    kind = kinds.pop() if len(kinds) == 1 else None
    return None if kind in ("joined", "nf4", "fp4") and len(linears) == 1 else kind


def _kind_of(linear):
    """The same of one module, or of None."""
    kind = getattr(linear, "kind", "bf16" if type(linear) is nn.Linear else None)
    if kind not in PRODUCTS or linear.bias is not None:
        return None
    held = linear.weight if kind == "bf16" else linear.codes
    dtype = linear.weight.dtype if kind == "bf16" else linear.dtype
    if held.device.type in GPU and dtype in (torch.float16, torch.bfloat16):
        whole = kind == "bf16" or kind in ("nf4", "fp4") and held.dtype == torch.uint8 and nf4.joins(
            (linear.out_features, linear.in_features), linear.nested)
        return ("joined" if kind == "bf16" else kind) if whole else None
    if kind in ("nf4", "fp4"):
        return None
    unit = {"bf16": 1, "int8": 16, "int4": BLOCK}[kind]  # int8 computes nonsense with another number of columns
    suits = linear.in_features % unit == 0 and linear.out_features % unit == 0
    fits = dtype == torch.bfloat16 and held.device.type == "cpu" and suits
    return kind if fits and kind in _available() else None


@cache
def _available():
    """What the torch and the processor that are here can pack."""
    found = set()
    if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.add("bf16")
    if hasattr(torch, "_weight_int8pack_mm"):
        found.add("int8")
    if hasattr(torch, "_weight_int4pack_mm_for_cpu"):
        codes = torch.arange(2 * BLOCK * BLOCK, dtype=torch.int32).mul_(7919).remainder_(16).view(-1, BLOCK)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        if _int4_codes(packed).equal(codes.byte()):  # another processor may have another order
            found.add("int4")
    return found

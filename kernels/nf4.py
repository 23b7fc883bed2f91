"""Weights in 4 bits (NF4, fp4: blocks of 64, their scales in 8 bits) and in 8 bits (rows): codes and back.

What the formats are and why is told in quant.py; here stand the exact steps, those of bitsandbytes on a CPU, bit for
bit:

    4 bits   scaled = w * (1 / absmax of its block)           float32, whatever dtype w has
             code   = the nearest of 16 levels                 a tie takes the lower level
             byte   = code of an even place << 4 | code of the odd one behind it
             w'     = level * absmax                           float32, then rounded once to the dtype that is wanted
    scales   centred = absmax - mean(absmax)                   the mean is the tensor's offset
             scaled  = centred * (1 / largest of 256)          rounded to 65,536 even steps of [-1, 1]
             code    = the nearest of 256 levels
             absmax' = level * largest of 256 + offset
    8 bits   code = round(w * (127 / absmax of its row))       w' = code * absmax * (1 / 127), both products in float32

Legend: n weights of a matrix in row order, b = ceil(n / 64) blocks (the last one padded with zeros).
"""

from functools import cache
from statistics import NormalDist

import torch

from kernels.choice import INTERPRETED, jit, tl, triton, use_triton

BLOCK, BLOCK2 = 64, 256  # weights that share a scale, scales that share a second one
TURN, CHUNK = 2048, 16384  # blocks that are coded at a time, that are decoded: both take a few megabytes


@cache
def levels(kind, device="cpu"):
    """The 16 levels of a kind, (16,) float32; a weight's code is the place of its level here.

    nf4: quantiles of a normal distribution, scaled to [-1, 1], with 0 among them: eight above, seven below (Dettmers et
    al. 2023, section 3 and appendix E). The outermost, which would be infinite, are taken at 0.9677083, the mean of
    1 - 1/32 and 1 - 1/30. fp4: sign, 2 bits of exponent, 1 of mantissa, scaled to a largest of 1.
    """
    if kind == "fp4":
        positive = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
        return torch.cat([positive, -positive]).to(device)
    above, below = (torch.tensor([NormalDist().inv_cdf(p) for p in torch.linspace(0.9677083, 0.5, count)[:-1].tolist()])
                    for count in (9, 8))
    return (torch.cat([-below, torch.zeros(1), above.flip(0)]) / above.max()).to(device)


@cache
def dynamic_levels(device="cpu"):
    """The 256 levels of the scales, (256,) float32, rising: seven decades from 1e-7 to 1, each with twice as many steps
    as the one below (Dettmers 2016, section 2.1), the same below zero, zero itself, and 1."""
    decades = []
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2**k + 1)
        decades.append(10.0 ** (k - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)]).to(device)


def quantise_4bit(weight, kind="nf4", double_quant=True):
    """A weight of any shape and float dtype -> codes (32 b,) uint8, absmax (b,) float32 or uint8, nested or None.

    nested: with double_quant, (ceil(b / 256) + 1,) float32, the second scales and at the end the offset. Some
    blocks at a time are made float32: memory holds the weight once.
    """
    flat, (order, bounds) = weight.reshape(-1), _borders(kind, weight.device)
    blocks = -(-len(flat) // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, device=flat.device)
    for first in range(0, blocks, TURN):
        part = flat[first * BLOCK: (first + TURN) * BLOCK].float()
        part = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        largest = torch.amax(part.abs(), 1, out=absmax[first: first + TURN])
        scaled = (part * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
        places = torch.zeros(scaled.shape, dtype=torch.uint8, device=flat.device)
        for bound in bounds:  # counting the borders below: 2.7 times as fast as torch.bucketize
            places += scaled > bound
        places = places if order is None else order.index_select(0, places.int())
        codes[first * BLOCK // 2: (first + TURN) * BLOCK // 2] = places[::2] << 4 | places[1::2]
    return codes, *(quantise_scales(absmax) if double_quant else (absmax, None))


@cache
def _borders(kind, device):
    """What lies between neighbouring levels -> (code of the k-th level from below, or None if it is k; 15 floats)."""
    rising, order = levels(kind).sort(stable=True)
    return None if kind == "nf4" else order.to(device, torch.uint8), ((rising[1:] + rising[:-1]) / 2).tolist()


def quantise_scales(absmax):
    """(b,) float32 -> codes (b,) uint8, nested (ceil(b / 256) + 1,) float32."""
    offset, table = absmax.mean(), dynamic_levels(absmax.device)
    centred = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % BLOCK2)).view(-1, BLOCK2)
    largest = centred.abs().amax(1)
    scaled = (centred * (1 / largest)[:, None]).nan_to_num(-1).clamp(-1, 1)  # nothing but zeros: any code will do
    steps = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    codes = torch.bucketize(steps * 2 / 65535 - 1, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.view(-1)[: len(absmax)].clone(), torch.cat([largest, offset[None]])


def dequantise_scales(codes, nested):
    """(b,) uint8 and what goes with them -> absmax (b,) float32."""
    numbers = dynamic_levels(codes.device).index_select(0, codes.int())
    return numbers.mul_(nested[:-1].repeat_interleave(BLOCK2)[: len(codes)]).add_(nested[-1])


@cache
def _pairs(kind, device):
    """Both levels of each byte: (256,) "float64", each really two float32. Half as many look-ups of twice the size."""
    table, byte = levels(kind), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).to(device).view(torch.float64).view(-1)


@cache
def _scratch(device):
    """What is used of a chunk while it is decoded: its bytes as numbers, and the levels that they mean."""
    return tuple(torch.empty(CHUNK * BLOCK // 2, dtype=dtype, device=device) for dtype in (torch.int32, torch.float64))


def dequantise_4bit(codes, absmax, nested, out, kind="nf4"):
    """Fill `out`, contiguous, any shape and float dtype, from what quantise_4bit gave. -> out

    A 4096 x 4096 matrix in 8 ms on one thread, half of them for the look-ups (EPYC Zen 5).
    """
    if use_triton("nf4", out, None if out.is_contiguous() and out.numel() < 2**31 else f"out {tuple(out.shape)}"):
        return _dequantise_in_triton(codes, absmax, nested, out, kind)
    scales = absmax if nested is None else dequantise_scales(absmax, nested)
    table, flat = _pairs(kind, codes.device), out.view(-1)
    direct = out.dtype == torch.float32 and len(flat) % BLOCK == 0  # else by way of some megabytes of float32
    index, numbers = _scratch(codes.device)
    for first in range(0, len(scales), CHUNK):
        part = codes[first * BLOCK // 2: (first + CHUNK) * BLOCK // 2]
        scale, place = scales[first: first + CHUNK, None], flat[first * BLOCK: (first + CHUNK) * BLOCK]
        found = place.view(torch.float64) if direct else numbers[: len(part)]
        torch.index_select(table, 0, index[: len(part)].copy_(part), out=found)
        found = found.view(torch.float32).view(-1, BLOCK).mul_(scale)  # (blocks, 64)
        if not direct:
            place.copy_(found.view(-1)[: len(place)])
    return out


def quantise_rows(weight):
    """(out, in) of any float dtype -> codes (out, in) int8, absmax (out,) float32."""
    codes, absmax = torch.empty(weight.shape, dtype=torch.int8, device=weight.device), []
    rows = max(1, TURN * BLOCK // weight.shape[1])
    for part, place in zip(weight.split(rows), codes.split(rows)):
        largest = part.float().abs().amax(1)
        place.copy_((part * (127 / largest.clamp(min=1e-38))[:, None]).round_())
        absmax.append(largest)
    return codes, torch.cat(absmax)


def dequantise_rows(codes, absmax, out):
    """Fill `out` (out, in) of any float dtype from what quantise_rows gave. -> out"""
    rows = max(1, TURN * BLOCK // codes.shape[1])
    for part, scale, place in zip(codes.split(rows), absmax.split(rows), out.split(rows)):
        place.copy_((part * scale[:, None]).mul_(1 / 127))
    return out


def encode(weight, kind, double_quant=True):
    """A matrix (out, in) of any float dtype -> codes, absmax, nested (None unless doubly quantised), as bytes: uint8.
    kind: nf4, fp4 or int8."""
    parts = (*quantise_rows(weight), None) if kind == "int8" else quantise_4bit(weight, kind, double_quant)
    return tuple(part if part is None else part.view(-1).view(torch.uint8) for part in parts)


def decode(kind, codes, absmax, nested, out):
    """Fill `out` (out, in), contiguous and of any float dtype, from what `encode` gave. -> out"""
    if kind == "int8":
        return dequantise_rows(codes.view(torch.int8).view(out.shape), absmax.view(torch.float32), out)
    if nested is None:
        return dequantise_4bit(codes, absmax.view(torch.float32), None, out, kind)
    return dequantise_4bit(codes, absmax, nested.view(torch.float32), out, kind)


def few_rows(x, kind, codes, absmax, nested, shape):
    """x W^T for W (out, in) of what `encode` gave, decoded block by block while it is multiplied: the matrix never
    exists. x (…, in), at most 128 rows -> (…, out); None where decoding the whole matrix is the better way, or the only
    one: more rows, a gradient, 8 bits, no Triton."""
    rows = x.numel() // x.shape[-1]
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a matrix {tuple(shape)}")
    if kind == "int8" or not 0 < rows <= FEW or x.requires_grad and torch.is_grad_enabled():
        return None
    fits = shape[1] % BLOCK == 0 and x.dtype in DTYPES
    if not use_triton("nf4", x, None if fits else f"x {tuple(x.shape)} {x.dtype}, matrix {tuple(shape)}"):
        return None
    if INTERPRETED and x.dtype == torch.bfloat16:  # with which the interpreter computes nonsense
        return few_rows(x.float(), kind, codes, absmax, nested, shape).to(x.dtype)
    return _multiply(x.reshape(rows, -1), kind, codes, absmax, nested, shape).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# Levels and scales are looked up in tables that stay in the nearest cache, double quantisation inside: a weight is read
# as half a byte and an eighth of a scale. Decoding writes what the reference writes, bit for bit. `few_rows` rounds the
# level instead of the weight to x's dtype and applies the scale in float32, block by block.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 128  # rows; with more, decoding once and a large matrix product is faster
PROGRAMS = 264  # two for each multiprocessor of a large GPU


@jit
def _scale(absmax, nested, dynamic, block, last, inside, NESTED: tl.constexpr):
    """The scales of some blocks."""
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        return tl.load(dynamic + code) * tl.load(nested + block // 256, mask=inside, other=0.0) + tl.load(nested + last)
    else:
        return tl.load(absmax + block, mask=inside, other=0.0)


@jit
def _decode(codes, absmax, nested, levels, dynamic, out, count, last, NESTED: tl.constexpr, BLOCKS: tl.constexpr):
    """Some blocks of 64 numbers, of `count` in all."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 64 < count
    scale = _scale(absmax, nested, dynamic, block, last, inside, NESTED)
    pair = tl.load(codes + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    even, odd = tl.load(levels + (pair >> 4)) * scale[:, None], tl.load(levels + (pair & 15)) * scale[:, None]
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + place, tl.interleave(even, odd).to(out.dtype.element_ty), mask=place < count)


@jit
def _few_rows(x, codes, absmax, nested, levels, dynamic, out, rows, width, last, K: tl.constexpr, STEPS: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NESTED: tl.constexpr):
    """BLOCK_N columns of the result, from STEPS blocks of each of these rows of W. out (splits, rows, width)"""
    column, row, half = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, 32)
    inside, wanted = column < width, row[None, :] < rows
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(1) * STEPS
    for step in range(first, tl.minimum(first + STEPS, K // 64)):
        block = column * (K // 64) + step
        scale = _scale(absmax, nested, dynamic, block, last, inside, NESTED)
        pair = tl.load(codes + block[:, None] * 32 + half[None, :], mask=inside[:, None], other=0).to(tl.int32)
        place = x + row[None, :] * K + step * 64 + 2 * half[:, None]  # what the high halves of the bytes belong to
        even, odd = tl.load(place, mask=wanted, other=0.0), tl.load(place + 1, mask=wanted, other=0.0)
        part = tl.dot(tl.load(levels + (pair >> 4)).to(even.dtype), even, input_precision="tf32x3")
        part = tl.dot(tl.load(levels + (pair & 15)).to(odd.dtype), odd, part, input_precision="tf32x3")
        sums += part * scale[:, None]
    place = (tl.program_id(1) * rows + row[None, :]) * width + column[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=wanted & inside[:, None])


def _dequantise_in_triton(codes, absmax, nested, out, kind):
    """`dequantise_4bit` by `_decode`."""
    wide = torch.empty_like(out, dtype=torch.float32) if INTERPRETED else out  # the interpreter does not round, it cuts
    constants, options = decode_of(nested is not None)
    with torch.cuda.device_of(out):
        _decode[triton.cdiv(out.numel(), constants["BLOCKS"] * BLOCK),](
            codes, absmax, absmax if nested is None else nested, levels(kind, out.device), dynamic_levels(out.device),
            wide, out.numel(), 0 if nested is None else len(nested) - 1, **constants, **options)
    return out.copy_(wide) if INTERPRETED else out


def decode_of(nested):
    """-> the constants of `_decode`, and the options that it is launched with."""
    return {"NESTED": nested, "BLOCKS": 64}, {"num_warps": 4, "enable_fp_fusion": False}  # fused is not bit for bit


def _multiply(x, kind, codes, absmax, nested, shape):
    """`_few_rows`, launched; with too few columns for the whole GPU, their rows are split and the parts added up."""
    (rows, inner), width = x.shape, shape[0]
    constants, options = few_rows_of(rows, width, inner, nested is not None)
    splits = triton.cdiv(inner // BLOCK, constants["STEPS"])
    out = x.new_empty(splits, rows, width, dtype=x.dtype if splits == 1 else torch.float32)
    scales = absmax if nested is not None else absmax.view(torch.float32)
    second = scales if nested is None else nested.view(torch.float32)
    with torch.cuda.device_of(x):
        _few_rows[triton.cdiv(width, constants["BLOCK_N"]), splits](
            x.contiguous(), codes, scales, second, levels(kind, x.device), dynamic_levels(x.device), out, rows, width,
            0 if nested is None else len(second) - 1, **constants, **options)
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def few_rows_of(rows, width, inner, nested):
    """-> the constants of `_few_rows`, and the options that it is launched with."""
    block_n = 64
    splits = max(1, min(PROGRAMS // triton.cdiv(width, block_n), inner // BLOCK // 8))
    block_m = max(16, triton.next_power_of_2(rows))
    return {"K": inner, "STEPS": triton.cdiv(inner // BLOCK, splits), "BLOCK_M": block_m, "BLOCK_N": block_n,
            "NESTED": nested}, {"num_warps": 4 if block_m < 128 else 8, "num_stages": 3}

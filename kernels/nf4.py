"""Weights in 4 bits (NF4, fp4: blocks of 64, their scales in 8 bits; int4) and in 8 bits (rows): codes and back.

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

int4 is nobody's format, and is not written to files: its levels are evenly spaced between the least and the largest
weight of a block, which is what CPUs have instructions for (kernels/linear.py).

    int4     scale = (largest - least) / 15, zero = least + 8 * scale        both rounded to bfloat16
             code = round((w - zero) / scale) + 8, from 0 to 15              w' = (code - 8) * scale + zero, float32

Legend: n weights of a matrix in row order, b = ceil(n / 64) blocks (the last one padded with zeros).
"""

from functools import cache
from statistics import NormalDist

import torch

from kernels.choice import INTERPRETED, jit, rules, tl, triton, use_triton

BLOCK, BLOCK2 = 64, 256  # weights that share a scale, scales that share a second one
UNIT = 128  # weights that lie in planes together
TURN, CHUNK = 2048, 16384  # blocks that are coded at a time, that are decoded: both take a few megabytes
MORE = 64  # times TURN on a GPU: 7 billion weights are then coded by some 30,000 launches instead of 2 million


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


def _turn(device):
    """Blocks that go through all steps together."""
    return TURN if device.type == "cpu" else MORE * TURN


def quantise_4bit(weight, kind="nf4", double_quant=True):
    """A weight of any shape and float dtype -> codes (32 b,) uint8, absmax (b,) float32 or uint8, nested or None.

    nested: with double_quant, (ceil(b / 256) + 1,) float32, the second scales and at the end the offset. Some
    blocks at a time are made float32: memory holds the weight once.
    """
    flat, (order, bounds) = weight.reshape(-1), _borders(kind, weight.device)
    blocks, turn = -(-len(flat) // BLOCK), _turn(weight.device)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, device=flat.device)
    for first in range(0, blocks, turn):
        part = flat[first * BLOCK: (first + turn) * BLOCK].float()
        part = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        largest = torch.amax(part.abs(), 1, out=absmax[first: first + turn])
        scaled = (part * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
        places = torch.zeros(scaled.shape, dtype=torch.uint8, device=flat.device)
        for bound in bounds:  # counting the borders below: 2.7 times as fast as torch.bucketize
            places += scaled > bound
        places = places if order is None else order.index_select(0, places.int())
        codes[first * BLOCK // 2: (first + turn) * BLOCK // 2] = places[::2] << 4 | places[1::2]
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
    numbers, groups = dynamic_levels(codes.device).index_select(0, codes.int()), -(-len(codes) // BLOCK2)
    offset = nested[groups:]  # one, or of joined matrices one for each group
    offset = offset if len(offset) == 1 else offset.repeat_interleave(BLOCK2)[: len(codes)]
    return numbers.mul_(nested[:groups].repeat_interleave(BLOCK2)[: len(codes)]).add_(offset)


@cache
def _pairs(kind, device):
    """Both levels of each byte: (256,) "float64", each really two float32. Half as many look-ups of twice the size."""
    table, byte = levels(kind), torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).to(device).view(torch.float64).view(-1)


@cache
@torch.inference_mode(False)  # or what answers made could not be written to when training comes
def _scratch(device):
    """What is used of a chunk while it is decoded: its bytes as numbers, and the levels that they mean."""
    return tuple(torch.empty(CHUNK * BLOCK // 2, dtype=dtype, device=device) for dtype in (torch.int32, torch.float64))


def dequantise_4bit(codes, absmax, nested, out, kind="nf4"):
    """Fill `out`, contiguous, any shape and float dtype, from what quantise_4bit gave; codes may be `planar`. -> out

    A 4096 x 4096 matrix in 8 ms on one thread, half of them for the look-ups (EPYC Zen 5).
    """
    if use_triton("nf4", out, None if out.is_contiguous() and out.numel() < 2**31 else f"out {tuple(out.shape)}"):
        return _dequantise_in_triton(codes, absmax, nested, out, kind)
    codes = codes if codes.dtype == torch.uint8 else public(codes)
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
    rows = max(1, _turn(weight.device) * BLOCK // weight.shape[1])
    for part, place in zip(weight.split(rows), codes.split(rows)):
        largest = part.float().abs().amax(1)
        place.copy_((part * (127 / largest.clamp(min=1e-38))[:, None]).round_())
        absmax.append(largest)
    return codes, torch.cat(absmax)


def dequantise_rows(codes, absmax, out):
    """Fill `out` (out, in) of any float dtype from what quantise_rows gave. -> out"""
    rows = max(1, _turn(codes.device) * BLOCK // codes.shape[1])
    for part, scale, place in zip(codes.split(rows), absmax.split(rows), out.split(rows)):
        place.copy_((part * scale[:, None]).mul_(1 / 127))
    return out


def quantise_groups(weight):
    """A weight of any shape and float dtype -> int4's codes (32 b,) uint8, scale and zero of each block (b, 2)
    bfloat16."""
    flat, turn = weight.reshape(-1), _turn(weight.device)
    blocks = -(-len(flat) // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, 2, dtype=torch.bfloat16, device=flat.device)
    for first in range(0, blocks, turn):
        part = flat[first * BLOCK: (first + turn) * BLOCK].float()
        part = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        least, largest = part.aminmax(dim=1, keepdim=True)
        scale = ((largest - least) / 15).bfloat16()
        zero = (least + 8 * scale.float()).bfloat16()
        scales[first: first + turn] = torch.cat([scale, zero], 1)
        places = ((part - zero.float()) / scale.float().clamp(min=1e-38)).round_().add_(8).clamp_(0, 15).byte().view(-1)
        codes[first * BLOCK // 2: (first + turn) * BLOCK // 2] = places[::2] << 4 | places[1::2]
    return codes, scales


def halves(codes):
    """Two codes a byte -> one a byte, (2 n,) uint8."""
    return torch.stack([codes >> 4, codes & 15], 1).view(-1)


def decode_groups(codes, scales, out):
    """Fill `out`, contiguous, any shape and float dtype, from codes, one a byte, 64 b uint8, and scales (b, 2). The
    last block may be longer than what is left of `out`. -> out"""
    flat, codes, turn = out.view(-1), codes.reshape(-1), _turn(codes.device)
    for first in range(0, len(scales), turn):
        scale, zero = scales[first: first + turn].float().split(1, 1)
        part = codes[first * BLOCK: (first + turn) * BLOCK].view(-1, BLOCK).float().sub_(8).mul_(scale).add_(zero)
        place = flat[first * BLOCK: (first + turn) * BLOCK]
        place.copy_(part.view(-1)[: len(place)])
    return out


def planar(codes):
    """Codes of 4 bits, of rows of whole units of 128 weights, in planes: (bytes,) uint8 -> (bytes / 4,) int32.

    A unit is 64 bytes, and seen as 8 x 8 of them it is transposed, no more: byte p of row j, which holds the weights
    16 j + 2 p and 16 j + 2 p + 1, becomes byte j of row p. So word 2 p + h holds, of four planes of 16 weights (j = 4 h
    and the next three), the weights 2 p and 2 p + 1. `public` undoes it.
    """
    return codes.view(-1, 8, 8).transpose(1, 2).contiguous().view(-1).view(torch.int32)


def public(words):
    """`planar` words -> the codes that they were, (bytes,) uint8."""
    return words.view(torch.uint8).view(-1, 8, 8).transpose(1, 2).contiguous().view(-1)


def join(parts):
    """What `encode` gave of matrices of one width -> the same of the one matrix that they are, below each other.

    Each must suit (`joins`). Behind the second scales of all stand their offsets, one for each of them."""
    codes, absmax, nested = zip(*parts)
    if nested[0] is None:
        return torch.cat(codes), torch.cat(absmax), None
    nested = [numbers.view(torch.float32) for numbers in nested]
    offsets = [numbers[-1:].expand(len(numbers) - 1) for numbers in nested]
    return torch.cat(codes), torch.cat(absmax), torch.cat([*(x[:-1] for x in nested), *offsets]).view(torch.uint8)


def joins(shape, nested):
    """Whether a matrix can be joined to others: its rows are whole blocks, and with second scales its blocks whole
    groups of 256."""
    return shape[1] % BLOCK == 0 and (nested is None or shape[0] * shape[1] % (BLOCK * BLOCK2) == 0)


def part_of(joined, widths, i):
    """The i-th of the matrices that were joined -> codes, absmax, nested as they came. widths: the rows of each."""
    codes, absmax, nested = joined
    codes = codes if codes.dtype == torch.uint8 else public(codes)

    def own(numbers):
        begin, end = (sum(widths[:k]) * len(numbers) // sum(widths) for k in (i, i + 1))
        return numbers[begin: end]

    if nested is not None:
        largest, offsets = (own(half) for half in nested.view(torch.float32).chunk(2))
        nested = torch.cat([largest, offsets[:1]]).view(torch.uint8)
    return own(codes).clone(), own(absmax).clone(), nested


def wants_planes(codes, kind, shape):
    """Whether the codes of a matrix (out, in) are to be laid in planes: where PUMICE_KERNELS says nf4=planar, and rows
    are whole units. No GPU has timed their kernel yet, so that nobody gets it unasked."""
    return rules()["nf4"] == "planar" and kind in ("nf4", "fp4") and shape[1] % UNIT == 0 and codes.dtype == torch.uint8


def encode(weight, kind, double_quant=True):
    """A matrix (out, in) of any float dtype -> codes, absmax, nested (None unless doubly quantised), as bytes: uint8.
    kind: nf4, fp4, int4 (absmax: scales and zeros) or int8."""
    if kind in ("int4", "int8"):
        parts = *(quantise_groups if kind == "int4" else quantise_rows)(weight), None
    else:
        parts = quantise_4bit(weight, kind, double_quant)
    return tuple(part if part is None else part.view(-1).view(torch.uint8) for part in parts)


def decode(kind, codes, absmax, nested, out):
    """Fill `out` (out, in), contiguous and of any float dtype, from what `encode` gave. -> out"""
    if kind == "int8":
        return dequantise_rows(codes.view(torch.int8).view(out.shape), absmax.view(torch.float32), out)
    if kind == "int4":
        return decode_groups(halves(codes), absmax.view(torch.bfloat16).view(-1, 2), out)
    if nested is None:
        return dequantise_4bit(codes, absmax.view(torch.float32), None, out, kind)
    return dequantise_4bit(codes, absmax, nested.view(torch.float32), out, kind)


def few_rows(x, kind, codes, absmax, nested, shape):
    """x W^T for W (out, in) of what `encode` gave, decoded block by block while it is multiplied: the matrix never
    exists. x (…, in), at most 128 rows -> (…, out); None where decoding the whole matrix is the better way, or the only
    one: more rows, a gradient, 8 bits, int4, no Triton."""
    rows = x.numel() // x.shape[-1]
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a matrix {tuple(shape)}")
    if kind in ("int4", "int8") or not 0 < rows <= FEW or x.requires_grad and torch.is_grad_enabled():
        return None
    fits = shape[1] % BLOCK == 0 and x.dtype in DTYPES
    if not use_triton("nf4", x, None if fits else f"x {tuple(x.shape)} {x.dtype}, matrix {tuple(shape)}"):
        return None
    if INTERPRETED and x.dtype == torch.bfloat16:  # with which the interpreter computes nonsense
        return few_rows(x.float(), kind, codes, absmax, nested, shape).to(x.dtype)
    multiply = _multiply if codes.dtype == torch.uint8 else _multiply_planar
    return multiply(x.reshape(rows, -1).contiguous(), kind, codes, absmax, nested, shape).view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------- in Triton
#
# Levels and scales are looked up in tables that stay in the nearest cache, double quantisation inside: a weight is read
# as half a byte and an eighth of a scale. Decoding writes what the reference writes, bit for bit. `few_rows` rounds the
# level instead of the weight to x's dtype and applies the scale in float32, block by block.

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 128  # rows; with more, decoding once and a large matrix product is faster
PROGRAMS = 264  # two for each multiprocessor of a large GPU
SUMS = 256  # numbers that a program adds up


@jit
def _scale(absmax, nested, dynamic, block, last, inside, NESTED: tl.constexpr):
    """The scales of some blocks; inside: which of them there are, None for all. NESTED: 1, second scales and an offset
    in nested[last]; 2, an offset for each of them from there on."""
    if NESTED == 2:
        last += block // 256
    if NESTED:
        code = tl.load(absmax + block, mask=inside).to(tl.int32)
        offset = tl.load(nested + last, mask=inside if NESTED == 2 else None)
        return tl.load(dynamic + code) * tl.load(nested + block // 256, mask=inside) + offset
    else:
        return tl.load(absmax + block, mask=inside)


@jit
def _decode(codes, absmax, nested, levels, dynamic, out, count, last, NESTED: tl.constexpr, PLANAR: tl.constexpr,
            BLOCKS: tl.constexpr):
    """Some blocks of 64 numbers, of `count` in all."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 64 < count
    scale = _scale(absmax, nested, dynamic, block, last, inside, NESTED)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    if PLANAR:  # byte p of row j of a unit is byte j of row p
        byte = byte // 64 * 64 + byte % 8 * 8 + byte % 64 // 8
    pair = tl.load(codes + byte, mask=inside[:, None], other=0).to(tl.int32)
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
    second, last, kept = _second(absmax, nested)
    constants, options = decode_of(kept, codes.dtype == torch.int32)
    with torch.cuda.device_of(out):
        _decode[triton.cdiv(out.numel(), constants["BLOCKS"] * BLOCK),](
            codes.view(torch.uint8), absmax, second, levels(kind, out.device), dynamic_levels(out.device), wide,
            out.numel(), last, **constants, **options)
    return out.copy_(wide) if INTERPRETED else out


def _second(absmax, nested):
    """-> the second scales (anything where there are none), where the first offset stands, and NESTED"""
    if nested is None:
        return absmax, 0, 0
    groups, nested = -(-len(absmax) // BLOCK2), nested.view(torch.float32)
    return nested, groups, 1 + (len(nested) > groups + 1)


def decode_of(nested, planar=False):
    """-> the constants of `_decode`, and the options that it is launched with."""
    sizes = {"NESTED": nested, "PLANAR": planar, "BLOCKS": 64}
    return sizes, {"num_warps": 4, "enable_fp_fusion": False}  # fused is not bit for bit


def _multiply(x, kind, codes, absmax, nested, shape):
    """`_few_rows`, launched; with too few columns for the whole GPU, their rows are split and the parts added up."""
    (rows, inner), width = x.shape, shape[0]
    scales = absmax if nested is not None else absmax.view(torch.float32)
    second, last, kept = _second(scales, nested)
    constants, options = few_rows_of(rows, width, inner, kept)
    splits = triton.cdiv(inner // BLOCK, constants["STEPS"])
    out = x.new_empty(splits, rows, width, dtype=x.dtype if splits == 1 else torch.float32)
    with torch.cuda.device_of(x):
        _few_rows[triton.cdiv(width, constants["BLOCK_N"]), splits](
            x, codes, scales, second, levels(kind, x.device), dynamic_levels(x.device), out, rows, width, last,
            **constants, **options)
    return out[0] if splits == 1 else _added_up(out, x.dtype)


@jit
def _add_up(parts, out, count, splits, BLOCK: tl.constexpr):
    """Sums of what lies `count` numbers apart, in their order. parts (splits, count), out (count,)"""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in range(splits):
        sums += tl.load(parts + i * count + place, mask=place < count, other=0.0)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=place < count)


def _added_up(parts, dtype):
    """(splits, rows, width) float32 -> (rows, width): `_add_up`, launched; torch would add and round in two kernels."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    with torch.cuda.device_of(out):
        _add_up[triton.cdiv(out.numel(), SUMS),](parts, out, out.numel(), len(parts), BLOCK=SUMS, num_warps=4)
    return out


def few_rows_of(rows, width, inner, nested):
    """-> the constants of `_few_rows`, and the options that it is launched with."""
    block_n = 64
    splits = max(1, min(PROGRAMS // triton.cdiv(width, block_n), inner // BLOCK // 8))
    block_m = max(16, triton.next_power_of_2(rows))
    return {"K": inner, "STEPS": triton.cdiv(inner // BLOCK, splits), "BLOCK_M": block_m, "BLOCK_N": block_n,
            "NESTED": nested}, {"num_warps": 4 if block_m < 128 else 8, "num_stages": 3}


# ------------------------------------------------------------------------------------------------- in Triton: in planes
#
# Reading 4 bits at the rate of an H200's memory leaves 3.5 to 4 instructions to a weight, and a look-up in memory takes
# 11.5 (static count of `_few_rows` for sm_90). The PRMT instruction picks four bytes out of eight by four indices, each
# in four bits of a register. With the high bytes of the 16 levels in four registers and the low bytes in four more, two
# PRMT (levels 0 to 7, levels 8 to 15) and a LOP3, which takes either by a code's highest bit, find four bytes at once.
# What comes out is two neighbours of a plane in one register, as the matrix product wants its left side: that is what
# the order in planes is for. Compiled for sm_90, with double quantisation and split rows, a weight takes 4.58
# instructions for up to 16 rows of x, 4.83 for 32, 6.62 for 64; for sm_80 4.28, 4.82 and 7.14 (tests/test_kernels.py
# prints them). BLOCK_N = 256 would take 4.12, but runs half as many warps.
#
# Wherever the interpreter runs it, and for float32, the codes are looked up in memory instead: the same numbers.


def prmt_text(table=tuple(f"${10 + 2 * i}" for i in range(8))):
    """The PTX that looks up two words: $8 and $9 -> $0 to $7, of each plane its two weights, the even one low.

    table: the registers with the levels' high bytes, then the low bytes, four levels each. Triton hands each over
    twice, once for either word. Bit 3 of an index means "repeat the sign": the codes' highest bits are taken out for
    the look-up, and by the same means spread to a byte each, for the choice between both halves of the table.
    """
    lines = ["{", ".reg .b32 i, j, s, m, n, a, b, h, l;"]
    for word, out in (("$8", ("$0", "$1", "$2", "$3")), ("$9", ("$4", "$5", "$6", "$7"))):
        lines += [f"and.b32 i, {word}, 0x77777777;", "shr.u32 j, i, 16;", f"shl.b32 s, {word}, 4;",
                  f"prmt.b32 m, {word}, s, 0x9D8C;", f"prmt.b32 n, {word}, s, 0xBFAE;"]
        for codes, highest, first, second in (("i", "m", *out[:2]), ("j", "n", *out[2:])):
            for byte, part in (("h", table[:4]), ("l", table[4:])):
                lines += [f"prmt.b32 a, {part[0]}, {part[1]}, {codes};", f"prmt.b32 b, {part[2]}, {part[3]}, {codes};",
                          f"lop3.b32 {byte}, a, b, {highest}, 0xD8;"]  # 0xD8: b where the mask is set, else a
            lines += [f"prmt.b32 {first}, l, h, 0x4051;", f"prmt.b32 {second}, l, h, 0x6273;"]
    return "\n".join([*lines, "}"])


PRMT = triton and tl.constexpr(prmt_text())
PRMT_REGISTERS = triton and tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 18))  # &: written before all is read
# To what is the same in all lanes the assembler gives a uniform register, which PRMT cannot read two of: it would copy
# them for each use, an instruction more to a weight. Of what has the lane's number in it, it does not know that.
KEPT = triton and tl.constexpr("{ .reg .b32 a; mov.u32 a, %laneid; shr.u32 a, a, 5; add.u32 $0, a, $1; }")


@jit
def _kept(table, i: tl.constexpr, ASSEMBLED: tl.constexpr):
    """A word of the table, in a register of each lane."""
    word = tl.load(table + i)
    if ASSEMBLED:
        word = tl.inline_asm_elementwise(KEPT, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)
    return word


@jit
def _few_rows_planar(x, words, absmax, nested, levels, dynamic, table, out, rows, width, last, K: tl.constexpr,
                     STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NESTED: tl.constexpr,
                     ASSEMBLED: tl.constexpr):
    """BLOCK_N columns of BLOCK_M rows of the result, from STEPS units of each row of W. out (splits, rows, width)

    Grid: blocks of columns, splits, blocks of rows. Beyond the edges the last row and column are computed again.
    """
    column, i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 16)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.minimum(column, width - 1)
    inputs = x + tl.minimum(row, rows - 1)[None, :] * K + i[:, None]
    t0, t1, t2, t3 = (_kept(table, 0, ASSEMBLED), _kept(table, 1, ASSEMBLED), _kept(table, 2, ASSEMBLED),
                      _kept(table, 3, ASSEMBLED))
    t4, t5, t6, t7 = (_kept(table, 4, ASSEMBLED), _kept(table, 5, ASSEMBLED), _kept(table, 6, ASSEMBLED),
                      _kept(table, 7, ASSEMBLED))
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(1) * STEPS
    for step in range(first, tl.minimum(first + STEPS, K // 128)):
        place = words + own[:, None] * (K // 8) + step * 16
        if ASSEMBLED:
            planes = tl.inline_asm_elementwise(
                PRMT, PRMT_REGISTERS, [tl.load(place + i[None, :]), t0, t1, t2, t3, t4, t5, t6, t7],
                dtype=(x.dtype.element_ty,) * 8, is_pure=True, pack=2)
        for half in tl.static_range(2):  # of 64 weights, which share a scale
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for j in tl.static_range(4):
                if ASSEMBLED:
                    plane = planes[4 * half + j]
                else:
                    code = tl.load(place + (i // 2 * 2 + half)[None, :]) >> (8 * j + 4 - i % 2 * 4)[None, :] & 15
                    plane = tl.load(levels + code).to(x.dtype.element_ty)
                part = tl.dot(plane, tl.load(inputs + step * 128 + half * 64 + j * 16), part, input_precision="tf32x3")
            block = own * (K // 64) + 2 * step + half
            sums += part * _scale(absmax, nested, dynamic, block, last, None, NESTED)[:, None]
    place = (tl.program_id(1) * rows + row[None, :]) * width + column[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=(row[None, :] < rows) & (column[:, None] < width))


@cache
def _level_bytes(kind, dtype, device):
    """The levels in a dtype of 16 bits: the high bytes of all, then the low ones, (8,) int32."""
    low, high = levels(kind).to(dtype).view(torch.uint8).view(16, 2).unbind(1)
    return torch.cat([high, low]).view(torch.int32).to(device)


def _multiply_planar(x, kind, words, absmax, nested, shape):
    """`_few_rows_planar`, launched; the parts of split rows are added up in their order."""
    (rows, inner), width, narrow = x.shape, shape[0], x.dtype != torch.float32
    scales = absmax if nested is not None else absmax.view(torch.float32)
    second, last, kept = _second(scales, nested)
    constants, options = planar_of(rows, width, inner, kept, x.is_cuda and narrow)
    splits = triton.cdiv(inner // UNIT, constants["STEPS"])
    out = x.new_empty(splits, rows, width, dtype=x.dtype if splits == 1 else torch.float32)
    table = _level_bytes(kind, x.dtype if narrow else torch.float16, x.device)
    grid = triton.cdiv(width, constants["BLOCK_N"]), splits, triton.cdiv(rows, constants["BLOCK_M"])
    with torch.cuda.device_of(x):
        _few_rows_planar[grid](x, words, scales, second, levels(kind, x.device), dynamic_levels(x.device), table, out,
                               rows, width, last, **constants, **options)
    return out[0] if splits == 1 else _added_up(out, x.dtype)


def planar_of(rows, width, inner, nested, assembled):
    """-> the constants of `_few_rows_planar`, and the options that it is launched with."""
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    block_n = 128 if block_m < 64 and assembled else 64
    programs = triton.cdiv(width, block_n) * triton.cdiv(rows, block_m)
    splits = max(1, min(PROGRAMS // programs, inner // UNIT // 4))
    return {"K": inner, "STEPS": triton.cdiv(inner // UNIT, splits), "BLOCK_M": block_m, "BLOCK_N": block_n,
            "NESTED": nested, "ASSEMBLED": assembled}, {"num_warps": 4, "num_stages": 2}

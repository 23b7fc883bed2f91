"""Compile every Triton kernel as it is launched, for a GPU that need not be here, and print what it takes of one.

    PUMICE_KERNELS=triton python tests/compiled_kernels.py 90|80

The types of the arguments are told from their names, as the kernels' files use them throughout.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels import attention, cross_entropy, elementwise, lora, nf4  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WORDS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOATS = {"lse", "delta", "parts", "losses", "inverse", "partial", "nested", "levels", "dynamic"}
BYTES = {"codes", "absmax"}
INTEGERS = {"cu_seqlens", "starts", "lengths", "cells", "labels"}
WORDS32 = {"words", "table"}
COUNTS = {"total", "heads", "count", "rows", "F", "last", "width", "rank", "floor", "splits"}
EVEN = {"F", "width", "rank"}  # multiples of 16 in the models that matter


def compiled(kernel, dtype, arch, constants, options):
    """-> registers, bytes of registers spilled per thread, bytes of shared memory, instructions of the longest loop"""
    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in INTEGERS:
            return "*i64"
        if name in BYTES:
            return "*u8"
        if name in WORDS32:
            return "*i32"
        if name in ("scale", "scale2", "eps"):
            return "fp32"
        if name == "seed":
            return "i64"
        if name.endswith(("_row", "_stride")) or name in COUNTS:
            return "i32"
        return "*fp32" if name in FLOATS else WORDS[dtype]

    names = kernel.arg_names
    signature = {name: type_of(name) for name in names}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
            if signature[name].startswith("*") or name.endswith(("_row", "_stride")) or name in EVEN}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, even)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if "prmt" in binary.asm["ttgir"]:
        check_pairs(binary.asm["ttgir"], binary.asm["ptx"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, word, file.name], capture_output=True, text=True, check=True).stdout
                       for word in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), binary.metadata.shared, longest_loop(code)


def check_pairs(ttgir, ptx):
    """nf4's assembly looks two words up together: they must be neighbours in a row, in registers of one thread, which
    it loads four at a time."""
    layout, = set(re.findall(r"elementwise_inline_asm .* -> tensor<\d+x16xbf16, (#\w+)>", ttgir))
    blocked = re.search(rf"^{layout} = .*sizePerThread = \[(\d+), (\d+)\].*order = \[1, 0\]", ttgir, re.M)
    assert blocked and int(blocked[2]) % 2 == 0, f"{layout} does not keep neighbours together: {ttgir[:2000]}"
    fours = [re.findall(r"%r\d+", loaded) for loaded in re.findall(r"ld\.shared\.v4\.b32\s+\{(.*?)\}", ptx)]
    pairs = [pair for four in fours for pair in (four[:2], four[2:])]
    blocks = [text for text in re.findall(r"begin inline asm(.*?)end inline asm", ptx, re.S) if "prmt" in text]
    assert blocks and all(re.findall(r"and\.b32 i, (%r\d+)", text) in pairs for text in blocks), ptx


def longest_loop(code):
    """How many instructions lie between the target of a backward jump and the jump; 0 without a loop."""
    places = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)]
    jumps = [(int(found[1], 16), at) for at, text in places if (found := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text))]
    spans = [sum(target <= at <= jump for at, _ in places) for target, jump in jumps if target < jump]
    return max(spans, default=0)


def launches():
    """(kernel, dtype, constants, options) of everything that is launched."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128):
            for name in attention.BLOCKS:
                for causal, group in ((True, 1), (True, 4), (False, 1)):
                    constants, options = attention.blocks(name, dim, dtype)
                    yield (getattr(attention, f"_{name}"), dtype,
                           {"GROUP": group, "K": dim, "CAUSAL": causal, **constants}, options)
            for group in (1, 4):
                part, join = attention.parts_of(dim, group, 128, 8, dtype)
                yield attention._part, dtype, *part
                yield attention._join, dtype, *join
    for vocabulary in (32000, 32064, 49152):
        yield cross_entropy._row, torch.bfloat16, *cross_entropy.block_of(vocabulary)
    for width in (576, 4096, 5120):
        constants, options = elementwise.norm_of(width)
        yield elementwise._norm, torch.bfloat16, {**constants, "ADDED": True}, options
        yield elementwise._norm_backward, torch.bfloat16, {**constants, "TRAINED": True, "ADDED": True}, options
    for heads in ((32, 32, 128), (40, 40, 128), (9, 3, 64)):
        constants, options = elementwise.turn_of(*heads)
        for stored in (False, True):
            yield elementwise._turn, torch.bfloat16, {**constants, "BACK": False, "STORED": stored}, options
    for kernel in (elementwise._gate, elementwise._gate_backward):
        yield kernel, torch.bfloat16, {"BLOCK": elementwise.COLUMNS}, {"num_warps": 4}
    for name, rank, dtype in itertools.product(("narrow", "outer", "widen"), (16, 64, 128, 256), (torch.bfloat16,
                                                                                                 torch.float32)):
        constants, options = lora.blocks(name, rank, dtype)
        yield getattr(lora, f"_{name}"), dtype, constants | ({"STEPS": 50} if name == "outer" else {}), options
    for planar in (False, True):
        yield nf4._decode, torch.bfloat16, *nf4.decode_of(True, planar)
    yield nf4._add_up, torch.bfloat16, {"BLOCK": nf4.SUMS}, {"num_warps": 4}
    for rows in (1, 32, 64, 128):
        yield nf4._few_rows, torch.bfloat16, *nf4.few_rows_of(rows, 4096, 4096, True)
        yield nf4._few_rows_planar, torch.bfloat16, *nf4.planar_of(rows, 4096, 4096, True, True)


def main(arch):
    """A line for each kernel."""
    limit = {90: 232448, 80: 166912}[arch]  # bytes of shared memory that a program may have
    for kernel, dtype, constants, options in launches():
        registers, stack, shared, loop = compiled(kernel, dtype, arch, constants, options)
        assert shared <= limit, (kernel, constants, shared)
        threads, words = 32 * options["num_warps"], " ".join(f"{name}={value}" for name, value in constants.items())
        if kernel is nf4._few_rows_planar:
            each = loop * threads / constants["BLOCK_N"] / nf4.UNIT
            assert each < (5 if constants["BLOCK_M"] < 64 else 7.5), f"{each:.2f} instructions a weight"
            words += f" ({each:.2f} instructions a weight)"
        programs = min(limit // max(shared, 1024), 65536 // (registers * threads), 2048 // threads)
        print(f"sm_{arch} {kernel.__name__} {str(dtype).removeprefix('torch.')} {words}: {registers} registers, "
              f"{shared / 1024:.0f} KB shared, {programs} to a multiprocessor, spills {stack}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""The kernel instances whose code is checked: at most 30, and what is expected of each."""

from typing import NamedTuple


class Instance(NamedTuple):
    """One kernel, with its template arguments, and bounds of its code."""

    name: str
    argument: str
    registers: dict[str, int]  # at most, by architecture; it is not compiled for others
    sass: dict[str, int]  # instructions, by the start of their name, and how many of each at least

    @property
    def declaration(self) -> str:
        return f"template __global__ void {self.name}({self.argument});" if "<" in self.name else ""


def gather(storage: str, height: int, width: int, channels: int, samples: int, kernel: int) -> Instance:
    tile = f"GatherTile<{height},{width},{channels},{samples},{kernel}>"
    # Each target needs each tap of each sample once, and a window is loaded by whole vectors.
    products = height * width * channels * samples * kernel**2
    bits = (32 if storage == "float" else 16) * samples
    load = "LDG.E" if bits == 32 else f"LDG.E.{bits if bits > 32 else f'U{bits}'}"
    window = (height + kernel - 1) * (width + kernel - 1)
    return Instance(
        f"conv_gather<{storage},{tile}>",
        f"const GatherArguments<{storage}>",
        {"sm_70": 184, "sm_80": 168, "sm_90": 168},
        {"FFMA": products, load: window},
    )


def weight_grad(storage: str, channels: int, rows: int, samples: int) -> Instance:
    return Instance(
        f"conv_weight_grad<{storage},WeightGradTile<{channels},{rows},{samples}>>",
        f"const WeightGradArguments<{storage}>",
        {"sm_70": 208, "sm_80": 168, "sm_90": 168},
        {"FFMA": channels * rows * samples},
    )


def matrix(storage: str, channel_tiles: int) -> Instance:
    pixels = 8
    multiply = "HMMA.16816.F32" + (".BF16" if storage == "BFloat16" else "")
    return Instance(
        f"conv_gather_matrix<{storage},MatrixTile<{channel_tiles},Sm80>>",
        f"const MatrixGatherArguments<{storage}>",
        dict.fromkeys(("sm_80", "sm_90"), 168),
        {multiply: pixels * channel_tiles, "LDSM.16.MT88.4": pixels},
    )


def matrix_of_sm_70(channel_tiles: int) -> Instance:
    # Two instructions for 4 of the 8 pixels.
    return Instance(
        f"conv_gather_matrix<Half,MatrixTile<{channel_tiles},Sm70>>",
        "const MatrixGatherArguments<Half>",
        {"sm_70": 208},
        {"HMMA.884.F32.F32.STEP0": 4 * channel_tiles},
    )


def matrix_grad(storage: str, channel_tiles: int) -> Instance:
    # 32 samples of a position at once, in four tiles of rows; the other factor is loaded for two tiles of channels.
    multiply = "HMMA.16816.F32" + (".BF16" if storage == "BFloat16" else "")
    return Instance(
        f"conv_weight_grad_matrix<{storage},MatrixGradTile<{channel_tiles}>>",
        f"const MatrixWeightGradArguments<{storage}>",
        dict.fromkeys(("sm_80", "sm_90"), 168),
        {multiply: 2 * 4 * channel_tiles, "LDSM.16.M88.4": 2 * (4 + (channel_tiles + 1) // 2)},
    )


def sample_grad(storage: str, channels: int, rows: int) -> Instance:
    return Instance(
        f"conv_sample_grad<{storage},SampleGradTile<{channels},{rows}>>",
        f"const SampleGradArguments<{storage}>",
        dict.fromkeys(("sm_70", "sm_80", "sm_90"), 168),
        {"FFMA": channels * rows},
    )


STORAGE = ("float", "Half", "BFloat16")
# Of one of the two 16-bit types what differs in no more than its conversions is left out; of both, what takes an odd
# number of samples and differs from float32's in these only.
LEFT_OUT = {
    *(("Half", (1, 4, 6, 2, 1)), ("Half", (1, 4, 8, 1, 1)), ("Half", (8, 8, 1))),
    *(("BFloat16", (1, 4, 8, 1, 1)), ("BFloat16", (6, 8, 2))),
}
GATHER_TILES = [(2, 2, 6, 2, 3), (2, 2, 8, 2, 3), (1, 4, 6, 2, 1), (1, 4, 8, 2, 1), (1, 4, 8, 1, 1)]
WEIGHT_GRAD_TILES = [(6, 8, 2), (8, 8, 2), (8, 8, 1)]
FEW_REGISTERS = dict.fromkeys(("sm_70", "sm_80", "sm_90"), 40)
INSTANCES = [
    *(gather(storage, *tile) for storage in STORAGE for tile in GATHER_TILES if (storage, tile) not in LEFT_OUT),
    *(
        weight_grad(storage, *tile)
        for storage in STORAGE
        for tile in WEIGHT_GRAD_TILES
        if (storage, tile) not in LEFT_OUT
    ),
    *(sample_grad("float", channels, 9) for channels in (6, 8)),
    sample_grad("BFloat16", 8, 9),
    Instance("sum_parts<float>", "const SumPartsArguments<float>", FEW_REGISTERS, {}),
    Instance("merge_statistics", "const MergeArguments", FEW_REGISTERS, {"SHFL.BFLY": 15}),
    *(matrix("Half", tiles) for tiles in (1, 3)),
    matrix("BFloat16", 3),
    matrix_of_sm_70(3),
    matrix_grad("Half", 1),
    matrix_grad("BFloat16", 6),
]


def source(architecture: str) -> str:
    """Return a file that instantiates what is compiled for an architecture."""
    kernels = [instance.declaration for instance in INSTANCES if architecture in instance.registers]
    headers = ["conv_gather_matrix.cuh", "conv_sample_grad.cuh", "conv_weight_grad_matrix.cuh", "statistics.cuh"]
    return "\n".join([*(f'#include "cuda/{header}"' for header in headers), "namespace bsfast {", *kernels, "}"])

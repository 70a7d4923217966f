"""Facts about how numbers are stored: dtypes, grids, block geometries, file limits.  Knows no names, files or torch.

Source: safetensors format (README, 0.8.0), OCP MX v1.0 sec. 5.3-5.4 (E2M1, E8M0), OCP FP8 (E4M3),
the released DeepSeek-V4 and V4.1 headers and configs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

Shape = tuple[int, ...]

# safetensors dtype names and their width in bits.  The F6 types of the format have no loader and are left out.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4,
}  # fmt: skip

FP8_MAX = 448.0  # E4M3FN: 0x7E; 0x7F and 0xFF are NaN, there is no infinity
FP4_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4  # DeepSeek's quantizer never takes a tile's largest value for less
FP4_AMAX_FLOOR = 6.0 * 2.0**-126  # nor a block's, so that scale bytes are at least 1
FP4_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 code & 7; bit 3 is the sign, so code 8 is -0.0
E8M0_BIAS = 127  # byte b means 2**(b - 127)
E8M0_NAN = 255

MAX_HEADER_BYTES = 100_000_000  # safetensors refuses more
MAX_PLAIN_HEADER_BYTES = 16 * 1024 * 1024  # beyond it ASCII only: other text needs 4 times the memory
MAX_TENSORS = 160_000  # of one file, __metadata__ counted; all shards of V4-Pro together hold 149,782
MAX_INDEX_BYTES = 30 * 1024 * 1024  # that of V4-Pro has 14 MB
MAX_DCP_METADATA_BYTES = 256 * 1024 * 1024  # of a torch DCP directory: 1.2 million chunks of tensors
MAX_CONFIG_BYTES = 1024 * 1024
MAX_SMALL_FILE_BYTES = 64 * 1024 * 1024
MAX_METADATA_BYTES = 1024 * 1024
MAX_NAME_CHARS = 512
MAX_RANK = 8
MAX_COUNT = 2**63 - 1

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
DCP_METADATA_NAME = ".metadata"  # of a torch DCP directory: torch reads it first
MANIFEST_NAME = "dsv4.manifest.json"
SIDECAR_NAME = (
    "dsv4.roundtrip"  # a safetensors container; readers in the field glob *.safetensors, so no such ending
)
SUMS_NAME = "dsv4.sha256"  # lines as sha256sum writes them, so that anyone can check without us
CARD_NAME = "README.md"  # on the Hub the model card, which whoever publishes it may write anew
OUR_NAMES = (MANIFEST_NAME, SIDECAR_NAME, SUMS_NAME)  # beside what a checkpoint has
MODEL_NAME = "model in memory"  # stands for the source's file where a manifest tells of a saved model
WORK_NAME = ".dsv4"  # unfinished work in an output directory


class Block(NamedTuple):
    """The elements that share one scale; a block cut off by the edge still has its own."""

    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


class Spelling(StrEnum):
    """Whose words name the tensors of a quantized matrix; names.LEAVES spells them."""

    RELEASED = "released"
    MODELOPT = "modelopt"
    COMPRESSED = "compressed-tensors"
    COMPRESSED_PACKED = "compressed-tensors, packed"


class Quant(NamedTuple):
    """How a quantized matrix is stored: dtype of the codes, codes per stored element, dtype and block of the scales."""

    codes: str
    codes_per_element: int
    scale: str
    block: Block
    spelling: Spelling = Spelling.RELEASED
    per_tensor: tuple[str, ...] = ()  # further scales, one F32 number each, in names.LEAVES' words


class Target(StrEnum):
    """What `--to` asks for. Which storage that means depends on the release: see storage_of."""

    BF16 = "bf16"
    NATIVE = "native"  # as the release stores it
    FP8 = "fp8"  # experts recast to E4M3 tiles with E8M0 scales: what SGLang reads
    FP8_F32SCALE = "fp8-f32scale"  # the same codes with F32 scales: what vLLM reads, and Base is
    NVFP4 = "nvfp4"  # ModelOpt: the released nibbles, E4M3 scales per 16 and one F32 scale
    MXFP4_CT = "mxfp4-ct"  # compressed-tensors: the released nibbles under other names


class Storage(StrEnum):
    """Storage formats that can be read and written. The value is the word that inspect and the manifest use."""

    FP4_FP8 = "fp4+fp8"  # experts E2M1 1x32 E8M0, dense E4M3 128x128 E8M0: Flash, Pro, 0731, 0813, Vision-Exp
    FP4_FP8_32 = "fp4+fp8-32x32"  # experts as above, dense 32x32, Engram tables 1x32: V4.1
    FP8_F32SCALE = "fp8-f32scale"  # everything E4M3 128x128 with F32 scales: Base
    FP8 = "fp8"  # everything E4M3 128x128 with E8M0 scales: the repackaged releases
    FP8_F32SCALE_32 = "fp8-f32scale-32x32"  # the same two for V4.1's tiles
    FP8_32 = "fp8-32x32"
    NVFP4 = "nvfp4"
    NVFP4_32 = "nvfp4-32x32"
    MXFP4_CT = "mxfp4-ct"
    MXFP4_CT_32 = "mxfp4-ct-32x32"
    BF16 = "bf16"


class Kind(StrEnum):
    """What a tensor is, as far as its storage depends on it."""

    EXPERT = "expert"  # routed expert matrix of a layer
    DRAFT_EXPERT = "draft expert"  # routed expert matrix of an MTP or DSpark stage
    DENSE = "dense"  # any other matrix that releases quantize
    TABLE = "table"  # Engram embedding table
    BF16 = "BF16"
    F32 = "F32"
    I64 = "I64"


MATRICES = (Kind.EXPERT, Kind.DRAFT_EXPERT, Kind.DENSE, Kind.TABLE)  # what a storage format may quantize

FP4_EXPERT = Quant("I8", 2, "F8_E8M0", Block(1, 32))
FP8_TILE = Quant("F8_E4M3", 1, "F8_E8M0", Block(128, 128))
FP8_TILE_F32 = Quant("F8_E4M3", 1, "F32", Block(128, 128))
FP8_TILE_32 = Quant("F8_E4M3", 1, "F8_E8M0", Block(32, 32))
FP8_TILE_32_F32 = Quant("F8_E4M3", 1, "F32", Block(32, 32))
FP8_ROW_32 = Quant("F8_E4M3", 1, "F8_E8M0", Block(1, 32))
FP8_ROW_32_F32 = Quant("F8_E4M3", 1, "F32", Block(1, 32))
NVFP4_EXPERT = Quant("U8", 2, "F8_E4M3", Block(1, 16), Spelling.MODELOPT, ("scale_2", "input_scale"))
CT_FP4 = Quant("U8", 2, "U8", Block(1, 32), Spelling.COMPRESSED_PACKED)
CT_FP8_TILE = Quant("F8_E4M3", 1, "F32", Block(128, 128), Spelling.COMPRESSED)
CT_FP8_TILE_32 = Quant("F8_E4M3", 1, "F32", Block(32, 32), Spelling.COMPRESSED)


def _row(expert: Quant, draft: Quant, dense: Quant, table: Quant | None = None) -> dict[Kind, Quant]:
    row = {Kind.EXPERT: expert, Kind.DRAFT_EXPERT: draft, Kind.DENSE: dense}
    return {**row, Kind.TABLE: table} if table else row


# One row per storage format: how experts, draft experts, dense matrices and tables are kept. None: as BF16.
QUANTS: dict[Storage, dict[Kind, Quant]] = {
    Storage.FP4_FP8: _row(FP4_EXPERT, FP4_EXPERT, FP8_TILE),
    Storage.FP4_FP8_32: _row(FP4_EXPERT, FP4_EXPERT, FP8_TILE_32, FP8_ROW_32),
    Storage.FP8_F32SCALE: _row(FP8_TILE_F32, FP8_TILE_F32, FP8_TILE_F32),
    Storage.FP8: _row(FP8_TILE, FP8_TILE, FP8_TILE),
    Storage.FP8_F32SCALE_32: _row(FP8_TILE_32_F32, FP8_TILE_32_F32, FP8_TILE_32_F32, FP8_ROW_32_F32),
    Storage.FP8_32: _row(FP8_TILE_32, FP8_TILE_32, FP8_TILE_32, FP8_ROW_32),
    Storage.NVFP4: _row(NVFP4_EXPERT, FP4_EXPERT, FP8_TILE),  # the consumers read draft stages as released
    Storage.NVFP4_32: _row(NVFP4_EXPERT, FP4_EXPERT, FP8_TILE_32, FP8_ROW_32),
    Storage.MXFP4_CT: _row(CT_FP4, CT_FP4, CT_FP8_TILE),
    Storage.MXFP4_CT_32: _row(CT_FP4, CT_FP4, CT_FP8_TILE_32, FP8_ROW_32),
    Storage.BF16: {},
}

# What a target means for a release whose native storage is one of these.
_TARGETS: dict[Storage, dict[Target, Storage]] = {
    Storage.FP4_FP8: {
        Target.FP8: Storage.FP8,
        Target.FP8_F32SCALE: Storage.FP8_F32SCALE,
        Target.NVFP4: Storage.NVFP4,
        Target.MXFP4_CT: Storage.MXFP4_CT,
    },
    Storage.FP8_F32SCALE: {
        Target.FP8: Storage.FP8,
        Target.FP8_F32SCALE: Storage.FP8_F32SCALE,
        Target.NVFP4: Storage.NVFP4,
        Target.MXFP4_CT: Storage.MXFP4_CT,
    },
    Storage.FP4_FP8_32: {
        Target.FP8: Storage.FP8_32,
        Target.FP8_F32SCALE: Storage.FP8_F32SCALE_32,
        Target.NVFP4: Storage.NVFP4_32,
        Target.MXFP4_CT: Storage.MXFP4_CT_32,
    },
}


def storage_of(target: Target, native: Storage) -> Storage:
    """The storage format that a target means for a release with this native one."""
    return {Target.BF16: Storage.BF16, Target.NATIVE: native, **_TARGETS[native]}[target]


def fits_any_namespace(storage: Storage) -> bool:
    """Whether tensors of this storage have names outside the released ones: other tools' formats do not."""
    return all(quant.spelling is Spelling.RELEASED for quant in QUANTS[storage].values())


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def spans(length: int, each: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive pieces of `each`, the last one shorter."""
    return [(first, min(each, length - first)) for first in range(0, length, each)]


def block_rows_of(first: int, rows: int, block: Block) -> slice:
    """Which rows of a scale grid belong to these rows of the matrix."""
    return slice(first // block.rows, ceil_div(first + rows, block.rows))


def num_elements(shape: Shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def stored_bytes(dtype: str, shape: Shape) -> int:
    """Size of a stored tensor. F4 counts half a byte per element."""
    return num_elements(shape) * DTYPE_BITS[dtype] // 8


def scale_shape(weight_shape: Shape, block: Block) -> Shape:
    """Shape of the scale grid of a logical [R, C] matrix: one scale per block, edges included."""
    rows, cols = weight_shape
    return ceil_div(rows, block.rows), ceil_div(cols, block.cols)


def codes_shape(weight_shape: Shape, quant: Quant) -> Shape:
    """Shape under which the codes of a logical [R, C] matrix are stored."""
    rows, cols = weight_shape
    return rows, ceil_div(cols, quant.codes_per_element)

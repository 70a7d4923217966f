"""Before the first byte: whether a recast of FP4 codes loses values, told from their scales.

Scales are a twentieth of the bytes, so that this costs little; codes are read only where a tile looks bad, since blocks
of zeros do not count.
Source: quantization facts 5.4 (FP8 tiles hold a gap of 14) and 5.6 (NVFP4 scales hold one of 17).
"""

from __future__ import annotations

from collections.abc import Iterable

from . import formats, recast
from .errors import NotLossless
from .inputs import Inputs, and_more, exponent_of, lost_values, require_finite_scales, tile_scales
from .plan import Plan
from .source import Checkpoint, Reader
from .steps import Op, PlannedFile, Step
from .stop import StopFlag

_ROWS = 4096
_OTHER = "--to native or --to mxfp4-ct keep them, --to bf16 as well; or accept the loss with --allow-lossy"


def require_lossless(
    plan: Plan, checkpoint: Checkpoint, stop: StopFlag, files: Iterable[PlannedFile]
) -> None:
    """Of these files of the plan. raises NotLossless naming tensor and tile, NotFinite for a NaN scale"""
    if plan.options.allow_lossy:
        return
    with checkpoint.reader() as reader:
        inputs = Inputs(reader)
        for file in files:
            for tensor in file.tensors:
                for step in tensor.steps:
                    stop.check()
                    if step.op is Op.TILES:
                        _require_tiles(inputs, step, reader)
                    elif step.op is Op.NVFP4_SCALES:
                        _require_nvfp4(inputs, step, reader)


def _require_tiles(inputs: Inputs, step: Step, reader: Reader) -> None:
    assert step.target is not None and step.quant is not None
    tile = step.target.block
    for first, rows in formats.spans(step.rows, max(1, _ROWS // tile.rows) * tile.rows):
        require_finite_scales(reader, step, inputs.scales(step, first, rows), first)
        tiles = tile_scales(inputs, step, first, rows)
        bad = tiles.gap_rc > recast.FP8_LOSSLESS_GAP  # a low tile is clamped, and stays exact
        if not bool(bad.any()):
            continue
        row, col = bad.nonzero()[0].tolist()
        gap = int(tiles.gap_rc[row, col])
        raise NotLossless(
            f"{step.name!r} does not fit into FP8: values would be rounded",
            file=reader.shard_of(step.source),
            expected=f"block exponents at most {recast.FP8_LOSSLESS_GAP} apart in each {tile} tile",
            found=f"{gap} apart in tile ({first // tile.rows + row}, {col}){and_more(bad)}",
            do=_OTHER,
        )


def _require_nvfp4(inputs: Inputs, step: Step, reader: Reader) -> None:
    assert step.quant is not None
    kmax = exponent_of(inputs, step)
    for first, rows in formats.spans(step.rows, _ROWS):
        scales = inputs.scales(step, first, rows)
        require_finite_scales(reader, step, scales, first)
        lost = recast.nvfp4_scales(scales, kmax).lost_rc
        if bool(lost.any()) and lost_values(inputs, step, first, rows, lost):
            row, col = lost.nonzero()[0].tolist()
            raise NotLossless(
                f"{step.name!r} does not fit into NVFP4: values would be lost",
                file=reader.shard_of(step.source),
                expected=f"block exponents at most {recast.NVFP4_LOSSLESS_GAP} below the largest of w1 and w3",
                found=f"block ({first + row}, {col}) is {kmax + formats.E8M0_BIAS - int(scales[row, col])} below",
                do=_OTHER,
            )

"""The model on a GPU: the CPU's numbers within rounding, in every dtype, dense and packed, with and without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_model import distance, random_ids, random_model, recomputing
from tiny_model import tiny_document
from torch import Tensor

from dsv4ckpt.formats import FP4_EXPERT, FP8_TILE, FP8_TILE_F32, Block, Quant
from dsv4model import load, packed
from dsv4model.cache import Cache
from dsv4model.config import Config
from dsv4model.generate import generate
from dsv4model.layers import linear_wide
from dsv4model.model import Model, initialize
from dsv4model.recipe import read_recipe
from dsv4model.simulate import Simulation
from dsv4model.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

IDS = random_ids(2, 300)  # 75 entries of ratio 4, of which 8 are picked; 2 of ratio 128
EXACT = 1e-12  # float64: sums of a few hundred products in another order
CLOSE = 2e-5  # float32: test_model_oracle.CLOSE_LOGITS, which is that of two orders of summation
CLOSE_GRADIENTS = 1e-3  # of a parameter's largest: sums over all tokens of what is CLOSE, with cancellation
SIMULATED = Simulation(kv_fp8=True, indexer_fp4=True, activations_fp8=True, experts_fp4=True)


def loss_of(model: Model, ids: Tensor) -> Tensor:
    """The mean loss of both predictions, in float64."""
    out = model(ids)
    assert out.mtp_logits is not None
    parts = (F.cross_entropy(x.double().flatten(0, 1), ids.flatten()) for x in (out.logits, out.mtp_logits))
    return sum(parts, torch.zeros((), dtype=torch.float64, device=ids.device))


def gradients(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """Parameter name -> gradient; the model forgets it."""
    loss_of(model, ids).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def on_both(model: Model, ids: Tensor = IDS, **given: Any) -> tuple[Any, Any]:
    """What the model gives on the CPU, and on the GPU, brought back."""
    with torch.no_grad():
        here = model(ids, **given)
        given = {name: value.cuda() for name, value in given.items()}
        there = model.cuda()(ids.cuda(), **given)
    return here, [x.cpu() for x in there]


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, EXACT), (torch.float32, CLOSE)])
def test_logits_are_those_of_the_cpu(dtype: torch.dtype, within: float) -> None:
    here, there = on_both(random_model(dtype))
    assert max(distance(*pair) for pair in zip(there, here, strict=True)) < within


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, EXACT), (torch.float32, CLOSE)])
def test_documents_of_one_row_are_those_of_the_cpu(dtype: torch.dtype, within: float) -> None:
    documents = (torch.arange(300) // 140).expand(2, -1)
    here, there = on_both(random_model(dtype), documents=documents)
    assert max(distance(*pair) for pair in zip(there, here, strict=True)) < within


def test_simulated_quantization_is_that_of_the_cpu() -> None:
    here, there = on_both(random_model(torch.float64, simulation=SIMULATED))
    assert max(distance(*pair) for pair in zip(there, here, strict=True)) < EXACT


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, EXACT), (torch.float32, CLOSE_GRADIENTS)])
def test_gradients_are_those_of_the_cpu(dtype: torch.dtype, within: float) -> None:
    model = random_model(dtype)
    here = gradients(model, IDS)
    there = gradients(model.cuda(), IDS.cuda())
    assert here.keys() == there.keys()
    apart = {name: distance(there[name].cpu(), here[name]) for name in here}
    assert max(apart.values()) < within, max(apart, key=lambda name: apart[name])


def test_bfloat16_stays_close_to_float32() -> None:
    """The divergence that test_reference_traps holds on the CPU, on average over all tokens, and finite gradients."""
    with torch.no_grad():
        exact = random_model(torch.float32).cuda()(IDS.cuda()).logits.double().log_softmax(-1)
        rounded = random_model(torch.bfloat16).cuda()(IDS.cuda()).logits.double().log_softmax(-1)
    divergence = (exact.exp() * (exact - rounded)).sum(-1).mean()
    assert 0 < divergence < 1e-2
    found = gradients(random_model(torch.bfloat16).cuda(), IDS.cuda())
    assert all(grad.isfinite().all() for grad in found.values())


def test_product_of_bfloat16_is_summed_in_float32() -> None:
    x, weight = torch.randn(3, 50, 256).bfloat16(), torch.randn(70, 256).bfloat16()
    exact = F.linear(x.double(), weight.double())
    found = linear_wide(x.cuda(), weight.cuda())
    assert found.dtype == torch.float32 and found.shape == exact.shape
    # 256 sums of values below 64, each rounded to 24 bits at the worst of magnitudes: 256 * 64 * 2**-24
    assert float((found.cpu().double() - exact).abs().max()) < 256 * 64 * 2**-24


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_forward_gives_the_same_bits_again() -> None:
    model = random_model(torch.bfloat16).cuda()
    with torch.no_grad():
        first, second = (model(IDS.cuda()).logits for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("deterministic")
def test_gradients_are_the_same_bits_again_with_deterministic_algorithms() -> None:
    model = random_model(torch.bfloat16).cuda()
    first, second = (gradients(model, IDS.cuda()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("deterministic")
def test_gradients_of_recomputed_blocks_are_the_same_bits() -> None:
    model = random_model(torch.bfloat16).cuda()
    kept = gradients(model, IDS.cuda())
    again = gradients(recomputing(model), IDS.cuda())
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_cache_gives_what_one_pass_gives() -> None:
    model = random_model(torch.float64).cuda()
    cache = Cache(model.config)
    with torch.no_grad():
        whole = model(IDS.cuda()).logits
        pieces = [model(piece, cache=cache).logits for piece in IDS.cuda().split([129, 1, 1, 169], 1)]
    assert distance(torch.cat(pieces, 1), whole) < EXACT


def test_generated_tokens_are_those_of_the_cpu() -> None:
    model, prompt = random_model(torch.float64), IDS[0].tolist()
    here = list(generate(model, prompt, max_new_tokens=20))
    there = list(generate(model.cuda(), prompt, max_new_tokens=20))
    assert here == there and len(set(here)) > 1


# ---- loading, packed matrices


@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_loaded_tensors_are_those_of_the_cpu(made: Callable[..., Path], experts: Any) -> None:
    here, there = (load(made("flash"), experts=experts, device=device) for device in ("cpu", "cuda"))
    theirs = there.state_dict()
    for name, tensor in here.state_dict().items():
        assert theirs[name].is_cuda and torch.equal(theirs[name].cpu(), tensor), name


def test_packed_model_is_the_dense_one(made: Callable[..., Path]) -> None:
    ids = IDS[:1].cuda()
    with torch.no_grad():
        dense, codes = (
            load(made("flash"), torch.float32, experts=experts, device="cuda")(ids).logits
            for experts in ("dense", "packed")
        )
    assert distance(codes, dense) < CLOSE


@pytest.mark.parametrize("width", [1, 2], ids=["FP8", "FP4"])
def test_every_code_decodes_as_on_the_cpu_under_every_scale(width: int) -> None:
    """Not finite where the CPU's is not; else the same bits. Scale 255 is NaN, which nobody loads."""
    codes = torch.arange(256, dtype=torch.uint8).expand(255, 256).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    quant = Quant("I8" if width == 2 else "F8_E4M3", width, "F8_E8M0", Block(1, 256 * width))
    here = packed.decoded(codes, scales, quant, torch.bfloat16)
    there = packed.decoded(codes.cuda(), scales.cuda(), quant, torch.bfloat16).cpu()
    assert torch.equal(there.nan_to_num(1, 2, 3), here.nan_to_num(1, 2, 3))
    numbers = ~here.isnan()
    assert torch.equal(there[numbers].view(torch.int16), here[numbers].view(torch.int16))


@pytest.mark.parametrize("quant", [FP4_EXPERT, FP8_TILE, FP8_TILE_F32])
def test_matrices_decode_as_on_the_cpu(quant: Quant) -> None:
    rows, cols = 300, 320
    codes = torch.randint(0, 127, (rows, cols // quant.codes_per_element), dtype=torch.uint8)
    grid = -(-rows // quant.block.rows), -(-cols // quant.block.cols)
    scales = torch.rand(grid) if quant.scale == "F32" else torch.randint(1, 250, grid, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        here = packed.decoded(codes, scales, quant, dtype)
        assert torch.equal(packed.decoded(codes.cuda(), scales.cuda(), quant, dtype).cpu(), here)


def test_weights_to_train_from_scratch_are_made_on_the_device() -> None:
    with torch.device("cuda"):
        model = Model(Config.read(tiny_document()))
    initialize(model, torch.Generator("cuda").manual_seed(0))
    table = model.model.layers[0].mlp.gate.tid2eid
    assert all(len(set(row)) == table.shape[1] for row in table.tolist())
    assert all(x.isfinite().all() and x.is_cuda for x in model.state_dict().values())


# ---- training


def test_offloaded_masters_train_the_weights_on_the_device(made: Callable[..., Path], tmp_path: Path) -> None:
    """As masters beside the weights do. AdamW's first step is a gradient's sign, and atomic sums may turn a few."""
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"input_ids": list(range(10, 60))}))
    text = f"""
        [model]\nsource = "{made("flash")}"\ndevice = "cuda"\ndtype = "bfloat16"
        [train]\nrun = "{tmp_path / "run"}"\nsteps = 1\nrows = 1
        [data]\nfiles = ["{tmp_path / "tokens.jsonl"}"]\nkind = "tokens"\nlength = 64
        [optimizer]\nmasters = true\nclip = 0.0
    """
    beside, away = (
        Trainer(read_recipe(text.encode(), [f"optimizer.offload={flag}"])) for flag in ("false", "true")
    )
    assert beside.step(0).loss == away.step(0).loss
    masters = {name: tensor for name, tensor in away.state().items() if name.endswith("/master")}
    assert masters
    for name, master in masters.items():
        weight = away.parameters[name.removeprefix("optim.").removesuffix("/master")]
        assert weight.is_cuda and not master.is_cuda
        assert torch.equal(weight.cpu(), master.bfloat16())
        theirs = beside.state()[name].cpu()
        close = torch.isclose(master, theirs, rtol=2.0**-22, atol=1e-8)  # a thousandth of the step
        assert close.float().mean() > 0.99, name

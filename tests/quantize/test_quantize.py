"""Codecs of matrices: errors, exact values and sizes."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.factories import ROWS, Row, build, tiny
from vitcompress.plans.make import make_plan
from vitcompress.quantize.codecs import (
    SCALE,
    STORES,
    cast,
    decode,
    decode_int4,
    decode_int8,
    encode,
    encode_int4,
    encode_int8,
    matrix_names,
    num_bytes,
    pack,
    unpack,
)
from vitcompress.quantize.store import stored_tensors
from vitcompress.recipe import QUANTIZED_STORES, PlanRecipe, StoreRecipe
from vitcompress.recipe.student import StoreName
from vitcompress.surgery import apply_plan

SHAPES = [(3, 8), (5, 32), (4, 48), (2, 33), (6, 3, 4, 5), (7, 147)]
QUANTISED = [name for name, store in STORES.items() if store.codec]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def round_trip(weight: Tensor, store: str) -> Tensor:
    codec = STORES[store].codec
    assert codec is not None
    return codec.round_trip(weight)


def test_the_recipe_offers_every_store() -> None:
    kind = get_type_hints(StoreRecipe)["store"]
    assert get_args(get_args(kind)[0]) == get_args(StoreName) == tuple(STORES)
    assert list(QUANTIZED_STORES) == QUANTISED
    assert StoreRecipe().store is None  # --target-size may choose
    assert StoreRecipe().kind == "source"


# --- int8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])
def test_int8_is_off_by_half_a_step_at_most(shape: tuple[int, ...], factor: float) -> None:
    weight = factor * noise(*shape)
    codes, scale = encode_int8(weight)
    assert (codes.shape, codes.dtype, scale.shape, scale.dtype) == (shape, torch.int8, shape[:1], torch.float32)
    off = (decode_int8(codes, scale, shape) - weight).abs().flatten(1).amax(1)
    assert bool((off <= scale * (0.5 + 1e-4)).all())
    torch.testing.assert_close(scale, weight.abs().flatten(1).amax(1) / 127)


def test_int8_gives_back_whole_multiples_of_its_scale() -> None:
    weight = torch.tensor([[-127.0, 3.0, 0.0, 64.0], [0.5, -1.0, 63.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = encode_int8(weight)
    assert codes.tolist() == [[-127, 3, 0, 64], [1, -2, 127, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.5, 0.0]
    assert torch.equal(decode_int8(codes, scale, (3, 4)), weight)


# --- int4


@pytest.mark.parametrize("num_inputs", [1, 2, 7, 32, 33])
def test_packing_is_undone_by_unpacking(num_inputs: int) -> None:
    codes = torch.randint(-8, 8, (5, num_inputs), generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (5, -(-num_inputs // 2)))
    assert torch.equal(unpack(packed)[:, :num_inputs], codes)


def test_two_codes_lie_in_a_byte_the_even_column_low() -> None:
    assert pack(torch.tensor([[-8, 7, 0]])).tolist() == [[0xF0, 0x08]]


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_has_a_scale_per_32_inputs_whatever_the_width(shape: tuple[int, ...]) -> None:
    weight = noise(*shape)
    width = weight[0].numel()
    packed, scale = encode_int4(weight)
    assert (tuple(packed.shape), packed.dtype) == ((shape[0], -(-width // 2)), torch.uint8)
    assert (tuple(scale.shape), scale.dtype) == ((shape[0], -(-width // 32)), torch.float16)
    decoded = decode_int4(packed, scale, shape)
    assert decoded.shape == shape
    assert float((decoded - weight).norm() / weight.norm()) < 0.11


def test_int4_gives_back_whole_multiples_of_its_scale() -> None:
    weight = torch.zeros(2, 40)
    weight[0, :5] = torch.tensor([-8.0, 7.0, 3.0, -1.0, 2.0])
    weight[1, 32:35] = torch.tensor([4.0, -3.5, 0.5])  # of the second, shorter group; its scale is negative
    packed, scale = encode_int4(weight)
    assert torch.equal(decode_int4(packed, scale, (2, 40)), weight)
    assert scale.tolist() == [[1.0, 0.0], [0.0, -0.5]]


def test_int4_takes_the_scale_that_errs_least() -> None:
    """No worse than plain rounding to −7 … 7, and better on most groups."""
    weight = noise(64, 64)
    groups = weight.view(64, 2, 32)
    step = (groups.abs().amax(2, keepdim=True) / 7).half().float()
    plain = ((groups / step).round() * step - groups).square().sum(2)
    errors = (round_trip(weight, "int4").view(64, 2, 32) - groups).square().sum(2)
    assert bool((errors <= plain + 1e-5).all())
    assert float((errors < plain - 1e-5).float().mean()) > 0.5


# --- all stores


@pytest.mark.parametrize("store", QUANTISED)
def test_what_was_rounded_stays_in_its_type_and_rows_do_not_mix(store: str) -> None:
    weight = noise(4, 64)
    louder = torch.cat([weight, 1e3 * weight[:1]])
    assert torch.equal(round_trip(louder, store)[:4], round_trip(weight, store))
    assert round_trip(weight.double(), store).dtype == torch.float64


@pytest.mark.parametrize("store", QUANTISED)
def test_a_matrix_of_zeros_stays_one(store: str) -> None:
    assert torch.equal(round_trip(torch.zeros(3, 40), store), torch.zeros(3, 40))


@pytest.mark.parametrize("store", STORES)
def test_meta_tensors_tell_names_types_and_shapes(store: str) -> None:
    tensors = {"w": noise(6, 3, 5, 3), "b": noise(6), "index": torch.arange(3), "table": noise(6, 6)}
    kinds = {"matrices": {"w"}, "parameters": {"w", "b"}}
    real = encode(tensors, store, **kinds)
    meta = encode({name: t.to("meta") for name, t in tensors.items()}, store, **kinds)
    assert {n: (t.dtype, t.shape) for n, t in real.items()} == {n: (t.dtype, t.shape) for n, t in meta.items()}
    assert num_bytes(real) == num_bytes(meta)
    assert (SCALE.strip(".") in "".join(real)) == (store in QUANTISED)
    assert torch.equal(real["index"], tensors["index"])
    assert torch.equal(real["table"], tensors["table"])  # was computed and not learned, so it stays as it is
    back = decode(real, tensors, store)
    assert {n: (t.dtype, t.shape) for n, t in back.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("store", "expected"),
    [("source", 4 * 1056), ("fp16", 2 * 1056), ("int8", 1024 + 4 * 16 + 2 * 32), ("int4", 512 + 2 * 32 + 2 * 32)],
)
def test_bytes_by_hand(store: str, expected: int) -> None:
    """A matrix 16×64 and a vector of 32."""
    stored = encode({"w": noise(16, 64), "b": noise(32)}, store, matrices={"w"}, parameters={"w", "b"})
    assert num_bytes(stored) == expected


def test_float16_is_exact_where_it_can_be_and_left_where_it_cannot() -> None:
    exact = noise(9).half().float()
    assert torch.equal(cast(exact, torch.float16).float(), exact)
    beyond = torch.tensor([1.0, 7e4])
    assert torch.equal(cast(beyond, torch.float16), beyond)
    assert cast(beyond, torch.bfloat16).dtype == torch.bfloat16
    small = 1e-6 * noise(9)
    assert cast(small, torch.float16).dtype == torch.float16
    torch.testing.assert_close(cast(small, torch.float16).float(), small, atol=3e-8, rtol=0)


# --- which tensors


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_matrices_are_those_of_linear_and_convolution_layers(row: Row) -> None:
    model = build(row)
    names = matrix_names(model)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    assert all(isinstance(owner, nn.Linear | nn.Conv2d) for owner in owners.values())
    assert "patch_embed.proj.weight" in names
    assert not any("cpb_mlp" in name or "pos_embed" in name or "rel_pos" in name for name in names)
    quantised = sum(model.get_parameter(name).numel() for name in names)
    assert quantised > 0.8 * sum(p.numel() for p in model.parameters())


def test_a_module_may_say_that_it_holds_matrices() -> None:
    class Factored(nn.Module):
        holds_matrices = True

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(noise(9, 8)), nn.Parameter(noise(2, 9))
            self.bias = nn.Parameter(noise(9))

    model = tiny()
    before = matrix_names(model)
    model.blocks[0].mlp.fc1 = Factored()  # type: ignore[index, union-attr]
    added = {"blocks.0.mlp.fc1.up", "blocks.0.mlp.fc1.down"}
    assert matrix_names(model) == before - {"blocks.0.mlp.fc1.weight"} | added


def test_a_swin_v2s_position_network_is_none() -> None:
    model = timm.create_model("swinv2_tiny_window8_256", **dict(ROWS["swin v2"].args))
    assert "layers.0.blocks.0.attn.cpb_mlp.2.weight" in dict(model.named_parameters())
    assert not any("cpb_mlp" in name for name in matrix_names(model))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_the_plan_tells_what_a_student_of_any_family_takes(row: Row, store: str) -> None:
    teacher = build(row)
    recipe = PlanRecipe(share=2, transforms=row.transforms)  # type: ignore[arg-type]
    plan = make_plan(teacher, recipe, name="model", store=store)
    apply_plan(teacher, plan)
    assert num_bytes(stored_tensors(teacher, store)) == plan.size.student_bytes

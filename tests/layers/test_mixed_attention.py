import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.relation_memory import PeakBytes
from tests.factories import ROWS, Row, build, compressed, images, row_images, tiny
from vitcompress.layers import mixed_attention as module
from vitcompress.layers.mixed_attention import attend_whole, mix_heads, mixed_attention


def noise(*shape: int, grad: bool = True) -> Tensor:
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=seed).requires_grad_(grad)


def qkv(batch: int, heads: int, tokens: int, width: int = 4) -> list[Tensor]:
    """Laid out as in timm: tokens before heads."""
    fused = noise(batch, tokens, 3, heads, width).detach().permute(2, 0, 3, 1, 4)
    return [t.detach().requires_grad_() for t in fused]


TERMS: dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "neither": (None, None),
    "a table": ((3, 7, 7), None),
    "a table for all, a mask per window": ((1, 3, 7, 7), (4, 1, 7, 7)),
    "a term per image": ((4, 3, 7, 7), None),
    "one mask": (None, (7, 7)),
}


@pytest.mark.parametrize("block_bytes", [1, 3 * 7 * 8 * 3, 2 * 3 * 7 * 7 * 8, 2**20], ids=["row", "rows", "2", "all"])
@pytest.mark.parametrize(("bias", "mask"), TERMS.values(), ids=TERMS.keys())
def test_blocks_equal_whole_maps_in_values_and_gradients(
    bias: tuple[int, ...] | None, mask: tuple[int, ...] | None, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    inputs: list[Any] = [*qkv(4, 3, 7), noise(3, 3), noise(3, 3) + 1]
    inputs += [None if shape is None else noise(*shape) for shape in (bias, mask)]
    upstream = noise(4, 3, 7, 4, grad=False)
    given = [t for t in inputs if t is not None]
    found = []
    for attend in (mixed_attention, attend_whole):
        out = attend(*inputs[:5], scale=0.7, bias=inputs[5], mask=inputs[6])
        found.append((out, *torch.autograd.grad(out, given, upstream)))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        out = mixed_attention(*inputs[:5], scale=0.7, bias=inputs[5], mask=inputs[6])
    torch.testing.assert_close(out, found[1][0])


@pytest.mark.broad
@pytest.mark.parametrize("mixes", [(True, True), (True, False), (False, True)])
def test_the_gradients_are_those_of_the_values(mixes: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 5 * 8 * 2)  # two queries of one image
    q, k, v = qkv(2, 2, 5, 3)
    weights = [noise(2, 2) if there else None for there in mixes]
    bias, mask = noise(2, 5, 5), noise(2, 1, 5, 5)
    torch.autograd.gradcheck(
        lambda *given: mixed_attention(*given[:5], scale=0.7, bias=given[5], mask=given[6]),
        (q, k, v, *weights, bias, mask),  # type: ignore[arg-type]
    )


def test_minus_infinity_masks_and_leaves_gradients_finite() -> None:
    q, k, v = qkv(2, 3, 6)
    mask = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    found = []
    for attend in (mixed_attention, attend_whole):
        out = attend(q, k, v, noise(3, 3), noise(3, 3), mask=mask)
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for ours, plain in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, plain)


def test_heads_are_mixed_as_by_an_einsum() -> None:
    maps, weight = noise(2, 3, 5, 7), noise(3, 3)
    expected = torch.einsum("gh,bhnm->bgnm", weight, maps)
    torch.testing.assert_close(mix_heads(maps, weight), expected)
    for ours, plain in zip(
        torch.autograd.grad(mix_heads(maps, weight).sin().sum(), (maps, weight)),
        torch.autograd.grad(expected.sin().sum(), (maps, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_mixes_at_the_identity_are_left_out_only_where_they_are_not_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = F.scaled_dot_product_attention

    def counted(*args: Any, **more: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = qkv(2, 3, 6)
    weights = [nn.Parameter(torch.eye(3, dtype=torch.float64)) for _ in range(2)]
    terms: dict[str, Any] = {"scale": 0.7, "bias": noise(3, 6, 6), "mask": noise(2, 1, 6, 6)}
    learned = mixed_attention(q, k, v, *weights, **terms)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(mixed_attention(q, k, v, *weights, **terms), learned)
        assert len(calls) == 1
        weights[1][0, 0] = 2.0
        mixed_attention(q, k, v, *weights)
    assert len(calls) == 1


def test_no_map_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the output is kept between the passes, and never more than a few blocks of maps."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # blocks of one image
    q, k, v = qkv(32, 2, 80)
    mixes = noise(2, 2), noise(2, 2)
    with PeakBytes() as counter:
        out = mixed_attention(q, k, v, *mixes)
        assert counter.alive == out.nbytes
        out.sum().backward()
    maps_of_an_image = 2 * 80 * 80 * 8
    assert counter.peak < 8 * maps_of_an_image + 8 * out.nbytes < 32 * maps_of_an_image


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_every_family_gives_the_same_in_blocks_as_with_whole_maps(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of all parameters, with mixes other than the identity."""
    torch.manual_seed(0)
    student, _ = compressed(build(row), share=2, transforms=("heads",))
    for name, p in student.named_parameters():
        if ".mix_" in name:
            nn.init.normal_(p, mean=p.detach().mean().item(), std=0.3)
    found = []
    for blocks in (True, False):
        monkeypatch.setattr(module, "_in_blocks", lambda q, drop, blocks=blocks: blocks)
        model = copy.deepcopy(student).double()  # some of Swin's gradients are small differences of large sums
        out = model(row_images(row).double())
        out.square().sum().backward()
        with torch.no_grad():
            inferred = model(row_images(row).double())
        found.append([out.detach(), inferred, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9 * float(plain.abs().max()))


def test_dropout_still_drops() -> None:
    model = tiny(attn_drop_rate=0.5)
    student, _ = compressed(model, share=2, transforms=("heads",))
    x = images(model)
    assert torch.equal(student(x), student(x))
    student.train()
    assert not torch.equal(student(x), student(x))


@pytest.mark.thorough
def test_exported_models_have_plain_operations() -> None:
    """Without blocks of fixed size, so that the batch size is free."""
    student, _ = compressed(tiny(), share=2, transforms=("heads", "mlp"))
    x = images(student)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(student, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for count in (2, 5):
            x = images(student, count)
            torch.testing.assert_close(program.module()(x), student(x))

"""How does a transformation get into a block?  What the families have in common, whatever their attention is.

Head mixing sits around the softmax, so each family brings an attention of its own that takes over timm's. The token
convolution is a hook on the MLP, told by another hook how the patches lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import BlockTransform
from vitcompress.families.narrow import project_narrow
from vitcompress.layers.mixed_attention import mixed_attention
from vitcompress.layers.transforms import HeadMix, KeyPositions, TokenConvolution, attach_token_convolution


def take_over(ours: nn.Module, attn: nn.Module) -> None:
    """Give `ours` all that `attn` holds, under the same names, in place.

    Parameters, buffers, children and plain attributes: timm's own methods that use nothing else can be borrowed.

    Args:
        ours: a module that holds nothing yet.
        attn: any attention; of no use afterwards.
    """
    for name, value in vars(attn).items():
        vars(ours)[name] = value.copy() if isinstance(value, (dict, set)) else value


def add_mixes(mixed: Any, *, mix_heads: bool = True) -> None:
    """Give an attention its two head mixes, in place.

    Args:
        mixed: holds `num_heads` and `proj`.
        mix_heads: whether the mixes mix; else they pass the maps on, for an attention whose logits are changed only.
    """
    like = mixed.proj.weight
    for name in ("mix_logits", "mix_probs"):
        mix = HeadMix(mixed.num_heads, device=like.device, dtype=like.dtype) if mix_heads else nn.Identity()
        mixed.add_module(name, mix)


def attend_mixed(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention with its maps mixed by the mixes of `attn`, as `mixed_attention` does it.

    Args:
        attn: holds `mix_logits` and `mix_probs`, each a `HeadMix` or an identity, and `attn_drop`.
        q: queries `[B, H, N, D]`.
        k: keys `[B, H, N, D]`.
        v: values `[B, H, N, V]`.
        scale: of the products of queries and keys.
        bias: position bias of the logits, `[B or 1, H, N, N]` or `[H, N, N]`; None where there is none.
        mask: added to the mixed logits, `[B or 1, H or 1, N, N]`; None where nothing is masked.

    Returns:
        `[B, N, H·V]`.
    """
    weights = (getattr(mix, "weight", None) for mix in (attn.mix_logits, attn.mix_probs))
    drop = attn.attn_drop.p if attn.training else 0.0
    found = mixed_attention(q, k, v, *weights, scale=scale, bias=bias, mask=mask, drop=drop)
    return found.transpose(1, 2).flatten(2)


def project_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention whose three projections are one layer, narrow or not.

    The layer is called as a module and bare biases are added after it: hooks on it see what passes, as they do not
    where timm hands its weight to `F.linear`.

    Args:
        attn: holds `qkv`, `num_heads` and, where keys have no bias, `q_bias`, `k_bias` and `v_bias`.
        x: tokens `[B, N, C]`.

    Returns:
        Queries and keys `[B, H, N, D]`, values `[B, H, N, V]`; D = V unless the heads are narrow.
    """
    qkv: Tensor = attn.qkv(x)
    if getattr(attn, "q_bias", None) is not None:
        qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return project_narrow(attn, qkv)


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Make `model` call each of its layers as a module, so that hooks on them see everything, until the context ends.

    Where queries and values have bare biases (BEiT, EVA, Swin V2), timm hands the weight of `qkv` to `F.linear`
    together with them, past the layer and its hooks, unless it is told to add them separately.

    Args:
        model: a timm model; its outputs change by rounding at most.
    """
    modules: list[Any] = [module for module in model.modules() if getattr(module, "qkv_bias_separate", True) is False]
    for module in modules:
        module.qkv_bias_separate = True
    try:
        yield
    finally:
        for module in modules:
            module.qkv_bias_separate = False


def head_mixing(classes: Mapping[type[nn.Module], type[nn.Module]]) -> BlockTransform:
    """The transformation `heads` of a family.

    Args:
        classes: timm's attention → ours, made from it. Exact types: a subclass may compute something else.
    """

    def fault(model: nn.Module, block: nn.Module) -> str:
        attn = getattr(block, "attn", None)
        known = ", ".join(kind.__name__ for kind in classes)
        return "" if type(attn) in classes else f"its attention is {type(attn).__name__}, not timm's plain {known}"

    def num_params(model: nn.Module, block: Any, token_kernel: int) -> int:
        return 2 * HeadMix.num_params(block.attn.num_heads)

    def insert(model: nn.Module, block: Any, token_kernel: int) -> None:
        block.attn = classes[type(block.attn)](block.attn)

    return BlockTransform(fault, num_params, insert)


def _fault_on_tokens(model: nn.Module, block: nn.Module) -> str:
    if not isinstance(getattr(block, "mlp", None), nn.Module):
        return "it has no MLP of its own"
    return _fault_of_grid(model)


def _fault_of_grid(model: nn.Module) -> str:
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return "patches are dropped (patch_drop_rate), so there is no whole grid"
    return ""


def _insert_on_tokens(model: Any, block: nn.Module, token_kernel: int) -> None:
    convolution = _convolution(block, model.embed_dim, token_kernel, model.patch_embed.grid_size)
    convolution.num_prefix_tokens = model.num_prefix_tokens
    model.patch_embed.register_forward_hook(partial(_follow_embedding, convolution))


def _follow_embedding(follower: TokenConvolution | KeyPositions, embed: Any, inputs: Any, output: Tensor) -> None:
    """Forward hook of a patch embedding, which keeps the grid's shape in its output where sizes are dynamic."""
    _set_grid(follower, output.shape[1:3] if output.ndim == 4 else embed.grid_size)


def _insert_on_grid(model: nn.Module, block: Any, token_kernel: int) -> None:
    convolution = _convolution(block, block.dim, token_kernel, tuple(block.input_resolution))
    block.register_forward_pre_hook(partial(_follow_input, convolution))


def _follow_input(convolution: TokenConvolution, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a block whose input is `[B, rows, columns, C]`; its MLP sees the patches in one row."""
    _set_grid(convolution, inputs[0].shape[1:3])


def _set_grid(follower: TokenConvolution | KeyPositions, grid: Any) -> None:
    if tuple(grid) != follower.grid_size:  # written only on a change: torch.export bars writes to attributes
        follower.grid_size = (grid[0], grid[1])


def _convolution(block: Any, dim: int, token_kernel: int, grid: tuple[int, int]) -> TokenConvolution:
    like = next(block.parameters())
    convolution = TokenConvolution(
        dim, token_kernel, grid_size=grid, num_prefix_tokens=0, device=like.device, dtype=like.dtype
    )
    attach_token_convolution(block.mlp, convolution)
    return convolution


TOKEN_CONVOLUTION = BlockTransform(
    fault=_fault_on_tokens,
    num_params=lambda model, block, token_kernel: TokenConvolution.num_params(model.embed_dim, token_kernel),  # type: ignore
    insert=_insert_on_tokens,
)
"""`mlp` where every block sees the tokens `[B, N, C]` of one grid: `model.embed_dim`, `patch_embed`, prefix tokens."""

GRID_CONVOLUTION = BlockTransform(
    fault=lambda model, block: "",
    num_params=lambda model, block, token_kernel: TokenConvolution.num_params(block.dim, token_kernel),  # type: ignore
    insert=_insert_on_grid,
)
"""`mlp` where a block sees patches `[B, rows, columns, C]` of its own stage: `block.dim`, `block.input_resolution`."""


def key_positions(plain: type[nn.Module], mixed: Callable[..., nn.Module]) -> BlockTransform:
    """The transformation `rpe` of a family whose blocks see the tokens `[B, N, C]` of one grid.

    It follows `heads` in the family's table: where both are asked for, the attention is `mixed` already.

    Args:
        plain: timm's attention, exactly.
        mixed: ours, made from it with or without `mix_heads`; adds what its `rpe` gives for its queries to its logits.
    """

    def fault(model: nn.Module, block: nn.Module) -> str:
        attn = getattr(block, "attn", None)
        if type(attn) is not plain:
            return f"its attention is {type(attn).__name__}, not timm's plain {plain.__name__}"
        return _fault_of_grid(model)

    def num_params(model: nn.Module, block: Any, token_kernel: int) -> int:
        return KeyPositions.num_params(block.attn.head_dim)

    def insert(model: Any, block: Any, token_kernel: int) -> None:
        if type(block.attn) is plain:
            block.attn = mixed(block.attn, mix_heads=False)
        like = block.attn.proj.weight
        block.attn.rpe = KeyPositions(
            block.attn.head_dim, grid_size=model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens,
            device=like.device, dtype=like.dtype,
        )  # fmt: skip
        model.patch_embed.register_forward_hook(partial(_follow_embedding, block.attn.rpe))

    return BlockTransform(fault, num_params, insert)


def never(reason: str) -> BlockTransform:
    """A transformation that no block of a family can have.

    Args:
        reason: why, as it follows "cannot have it".
    """

    def insert(model: nn.Module, block: nn.Module, token_kernel: int) -> None:
        raise AssertionError(reason)  # no plan has it

    return BlockTransform(lambda model, block: reason, lambda model, block, token_kernel: 0, insert)

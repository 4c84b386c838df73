"""Insert transformations into blocks: the code that all families share.

Head mixing sits around the softmax, so each family supplies its own attention, which takes over
everything that timm's attention holds. The token convolution is a hook on the MLP; a second hook
tells it the shape of the patch grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitcompress.families.base import BlockTransform, read_fused
from vitcompress.layers.mixed_attention import mixed_attention
from vitcompress.layers.transforms import HeadMix, KeyPositions, TokenConvolution, attach_token_convolution


def take_over(new_attn: nn.Module, attn: nn.Module) -> None:
    """Give `new_attn` everything that `attn` holds, under the same names, in place.

    This covers parameters, buffers, submodules and plain attributes, so the methods that `new_attn`
    inherits from timm, which resize windows and compute buffers, keep working.

    Args:
        new_attn: an attention whose constructor has set nothing yet, not even `nn.Module`'s.
        attn: any attention; must not be used afterwards.
    """
    for name, value in vars(attn).items():
        vars(new_attn)[name] = value.copy() if isinstance(value, (dict, set)) else value


def add_mixes(attn: Any, *, mix_heads: bool = True) -> None:
    """Add the two head mixes `mix_logits` and `mix_probs` to an attention, in place.

    Args:
        attn: holds `num_heads` and `proj`.
        mix_heads: whether to mix heads; False adds identities, for an attention that only changes
            its logits.
    """
    weight = attn.proj.weight
    for name in ("mix_logits", "mix_probs"):
        mix = HeadMix(attn.num_heads, device=weight.device, dtype=weight.dtype) if mix_heads else nn.Identity()
        attn.add_module(name, mix)


def attend_mixed(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0, bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention with the head mixes of `attn`.

    Args:
        attn: holds `mix_logits` and `mix_probs`, each a `HeadMix` or an identity, and `attn_drop`.
        q: queries `[B, H, N, D]`.
        k: keys `[B, H, N, D]`.
        v: values `[B, H, N, V]`.
        scale: factor of the products of queries and keys.
        bias: position bias added to the logits, `[B or 1, H, N, N]` or `[H, N, N]`; None adds none.
        mask: added to the mixed logits, `[B or 1, H or 1, N, N]`; None masks nothing.

    Returns:
        `[B, N, H·V]`.
    """
    mix_weights = (getattr(mix, "weight", None) for mix in (attn.mix_logits, attn.mix_probs))
    drop = attn.attn_drop.p if attn.training else 0.0
    heads = mixed_attention(q, k, v, *mix_weights, scale=scale, bias=bias, mask=mask, drop=drop)
    return heads.transpose(1, 2).flatten(2)


def project_qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute queries, keys and values of an attention with one layer for all three, narrow or not.

    The layer is called as a module, and bare biases are added to its output. Hooks on the layer
    therefore see every call; they do not where timm passes its weight to `F.linear`.

    Args:
        attn: holds `qkv`, `num_heads`, `proj`, whose input width is that of the values, and, if
            keys have no bias, `q_bias`, `k_bias` and `v_bias`.
        x: tokens `[B, N, C]`.

    Returns:
        Queries and keys `[B, H, N, D]`, values `[B, H, N, V]`; D = V unless the heads are narrow.
    """
    qkv = read_fused(attn, (x,), attn.qkv(x))
    v_width = attn.proj.in_features
    qk_width = (qkv.shape[-1] - v_width) // 2
    parts = qkv.split([qk_width, qk_width, v_width], dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return q, k, v


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Make `model` call every layer as a module within a context, so that hooks see all calls.

    Where queries and values have bare biases (BEiT, EVA, Swin V2), timm passes the weight of `qkv`
    and the biases to `F.linear`, which bypasses the layer and its hooks unless
    `qkv_bias_separate` is set.

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
    """Return the transformation `heads` of a family.

    Args:
        classes: maps timm's attention to the one with head mixes, which is constructed from it.
            Types must match exactly, because a subclass may compute something else.
    """

    def fault(model: nn.Module, block: nn.Module) -> str:
        attn = getattr(block, "attn", None)
        known = ", ".join(attn_type.__name__ for attn_type in classes)
        return "" if type(attn) in classes else f"its attention is {type(attn).__name__}, not timm's plain {known}"

    def num_params(model: nn.Module, block: Any, token_kernel: int) -> int:
        return 2 * HeadMix.num_params(block.attn.num_heads)

    def insert(model: nn.Module, block: Any, token_kernel: int) -> None:
        block.attn = classes[type(block.attn)](block.attn)

    return BlockTransform(fault, num_params, insert)


def _fault_on_tokens(model: nn.Module, block: nn.Module) -> str:
    if not isinstance(getattr(block, "mlp", None), nn.Module):
        return "it has no MLP of its own"
    return _fault_of_patch_drop(model)


def _fault_of_patch_drop(model: nn.Module) -> str:
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return "patches are dropped (patch_drop_rate), so the grid of patches is incomplete"
    return ""


def _insert_on_tokens(model: Any, block: nn.Module, token_kernel: int) -> None:
    convolution = _add_convolution(block, model.embed_dim, token_kernel, model.patch_embed.grid_size)
    convolution.num_prefix_tokens = model.num_prefix_tokens
    model.patch_embed.register_forward_hook(partial(_follow_embedding, convolution))


def _follow_embedding(module: TokenConvolution | KeyPositions, embed: Any, inputs: Any, output: Tensor) -> None:
    """Forward hook of a patch embedding: pass the grid's shape on to `module`.

    With dynamic image sizes the shape is that of the output, `[B, rows, columns, C]`.
    """
    _set_grid(module, output.shape[1:3] if output.ndim == 4 else embed.grid_size)


def _insert_on_grid(model: nn.Module, block: Any, token_kernel: int) -> None:
    convolution = _add_convolution(block, block.dim, token_kernel, tuple(block.input_resolution))
    block.register_forward_pre_hook(partial(_follow_input, convolution))


def _follow_input(convolution: TokenConvolution, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a block whose input is `[B, rows, columns, C]`: pass the grid's shape on.

    The block's MLP sees the patches in one row.
    """
    _set_grid(convolution, inputs[0].shape[1:3])


def _set_grid(module: TokenConvolution | KeyPositions, grid: Any) -> None:
    if tuple(grid) != module.grid_size:  # assign only on a change: torch.export forbids writes to attributes
        module.grid_size = (grid[0], grid[1])


def _add_convolution(block: Any, dim: int, token_kernel: int, grid: tuple[int, int]) -> TokenConvolution:
    parameter = next(block.parameters())
    convolution = TokenConvolution(
        dim, token_kernel, grid_size=grid, num_prefix_tokens=0, device=parameter.device, dtype=parameter.dtype
    )
    attach_token_convolution(block.mlp, convolution)
    return convolution


TOKEN_CONVOLUTION = BlockTransform(
    fault=_fault_on_tokens,
    num_params=lambda model, block, token_kernel: TokenConvolution.num_params(model.embed_dim, token_kernel),  # type: ignore
    insert=_insert_on_tokens,
)
"""Transformation `mlp` for models whose blocks all see the tokens `[B, N, C]` of one patch grid.

Uses the model's `embed_dim`, `patch_embed` and `num_prefix_tokens`.
"""

GRID_CONVOLUTION = BlockTransform(
    fault=lambda model, block: "",
    num_params=lambda model, block, token_kernel: TokenConvolution.num_params(block.dim, token_kernel),  # type: ignore
    insert=_insert_on_grid,
)
"""Transformation `mlp` for blocks that see the patches `[B, rows, columns, C]` of their own stage.

Uses the block's `dim` and `input_resolution`.
"""


def key_positions(attn_type: type[nn.Module], mixed_type: Callable[..., nn.Module]) -> BlockTransform:
    """Return the transformation `rpe` for blocks that see the tokens `[B, N, C]` of one grid.

    It follows `heads` in the family's table: with both, the attention is a `mixed_type` already.

    Args:
        attn_type: timm's attention; types must match exactly.
        mixed_type: constructs the replacing attention from timm's, with or without `mix_heads`; it
            adds the output of its `rpe` for its queries to its logits.
    """

    def fault(model: nn.Module, block: nn.Module) -> str:
        attn = getattr(block, "attn", None)
        if type(attn) is not attn_type:
            return f"its attention is {type(attn).__name__}, not timm's plain {attn_type.__name__}"
        return _fault_of_patch_drop(model)

    def num_params(model: nn.Module, block: Any, token_kernel: int) -> int:
        return KeyPositions.num_params(block.attn.head_dim)

    def insert(model: Any, block: Any, token_kernel: int) -> None:
        if type(block.attn) is attn_type:
            block.attn = mixed_type(block.attn, mix_heads=False)
        weight = block.attn.proj.weight
        block.attn.rpe = KeyPositions(
            block.attn.head_dim, grid_size=model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        model.patch_embed.register_forward_hook(partial(_follow_embedding, block.attn.rpe))

    return BlockTransform(fault, num_params, insert)


def never(reason: str) -> BlockTransform:
    """Return a transformation that no block of a family can have.

    Args:
        reason: why, worded to follow "cannot have it: ".
    """

    def insert(model: nn.Module, block: nn.Module, token_kernel: int) -> None:
        raise AssertionError(reason)  # make_plan and apply_plan reject such plans

    return BlockTransform(lambda model, block: reason, lambda model, block, token_kernel: 0, insert)

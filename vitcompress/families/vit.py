"""Plain Vision Transformers: ViT, DeiT (distilled too), DeiT III, DINOv2 with and without registers."""

from __future__ import annotations

import re

from timm.layers import Attention, PatchDropout, maybe_add_mask, resolve_self_attn_mask
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitcompress.families.base import BlockTransform, Family
from vitcompress.transforms import HeadMix, TokenConvolution, attach_token_convolution


class MixedAttention(nn.Module):
    """timm's `Attention` with its maps mixed across heads before and after the softmax.

    Takes over the modules of `attn`, so their names stay. Mixing needs the maps themselves, so fused attention is
    given up here, and only here.

    Args:
        attn: the attention to take over.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    gate: nn.Module | None

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        for name, child in attn.named_children():
            self.add_module(name, child)
        if "gate" not in self._modules:  # absent, or None, in every model but a few gated ones
            self.gate = None
        self.num_heads: int = attn.num_heads
        self.head_dim: int = attn.head_dim
        self.scale: float = attn.scale
        like = {"device": attn.qkv.weight.device, "dtype": attn.qkv.weight.dtype}
        self.mix_logits = HeadMix(self.num_heads, **like)
        self.mix_probs = HeadMix(self.num_heads, **like)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]`; the shape is kept."""
        batch, tokens, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        logits: Tensor = self.mix_logits((q * self.scale) @ k.transpose(-2, -1))
        # the mask comes after the mix: masked places must stay masked whatever the mix is
        logits = maybe_add_mask(logits, resolve_self_attn_mask(tokens, logits, attn_mask, is_causal))
        probs = self.attn_drop(self.mix_probs(logits.softmax(dim=-1)))
        x = self.norm((probs @ v).transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        out: Tensor = self.proj_drop(self.proj(x))
        return out


def _heads_fault(model: nn.Module, block: nn.Module) -> str:
    attn = getattr(block, "attn", None)
    return "" if type(attn) is Attention else f"its attention is {type(attn).__name__}, not timm's plain Attention"


def _insert_heads(model: nn.Module, block: nn.Module, token_kernel: int) -> None:
    block.attn = MixedAttention(block.attn)


def _mlp_fault(model: nn.Module, block: nn.Module) -> str:
    if not isinstance(getattr(block, "mlp", None), nn.Module):
        return "it has no MLP of its own"
    if isinstance(getattr(model, "patch_drop", None), PatchDropout):
        return "patches are dropped (patch_drop_rate), so there is no whole grid"
    return ""


def _insert_mlp(model: nn.Module, block: nn.Module, token_kernel: int) -> None:
    like = next(block.parameters())
    convolution = TokenConvolution(
        model.embed_dim,  # type: ignore[arg-type]
        token_kernel,
        grid_size=model.patch_embed.grid_size,  # type: ignore[arg-type, union-attr]
        num_prefix_tokens=model.num_prefix_tokens,  # type: ignore[arg-type]
        device=like.device,
        dtype=like.dtype,
    )
    attach_token_convolution(block.mlp, convolution)  # type: ignore[arg-type]


VIT = Family(
    name="vit",
    model_type=VisionTransformer,
    block=re.compile(r"blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d(_[gx])?)\.weight"),
    biases=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d(_[gx])?)\.bias"),
    transforms={
        "heads": BlockTransform(
            fault=_heads_fault,
            num_params=lambda model, block, token_kernel: 2 * HeadMix.num_params(block.attn.num_heads),  # type: ignore
            insert=_insert_heads,
        ),
        "mlp": BlockTransform(
            fault=_mlp_fault,
            num_params=lambda model, block, token_kernel: TokenConvolution.num_params(model.embed_dim, token_kernel),  # type: ignore
            insert=_insert_mlp,
        ),
    },
    convert=checkpoint_filter_fn,
)

__all__ = ["VIT", "MixedAttention"]

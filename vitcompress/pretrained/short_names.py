"""Short names of common timm models, one row each."""

from __future__ import annotations

from collections.abc import Mapping

SHORT_NAMES: Mapping[str, str] = {
    # DeiT
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit3_small": "deit3_small_patch16_224",
    "deit3_base": "deit3_base_patch16_224",
    "deit3_large": "deit3_large_patch16_224",
    "deit3_huge": "deit3_huge_patch14_224",
    # ViT
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    # DINOv2
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
    "dinov2_giant": "vit_giant_patch14_dinov2",
    "dinov2_reg_small": "vit_small_patch14_reg4_dinov2",
    "dinov2_reg_base": "vit_base_patch14_reg4_dinov2",
    "dinov2_reg_large": "vit_large_patch14_reg4_dinov2",
    "dinov2_reg_giant": "vit_giant_patch14_reg4_dinov2",
    # image towers of CLIP and SigLIP
    "clip_base": "vit_base_patch16_clip_224",
    "clip_base_32": "vit_base_patch32_clip_224",
    "clip_large": "vit_large_patch14_clip_224",
    "siglip_base": "vit_base_patch16_siglip_224",
    "siglip_large": "vit_large_patch16_siglip_256",
    "siglip_so400m": "vit_so400m_patch14_siglip_224",
    "siglip2_base": "vit_base_patch16_siglip_224.v2_webli",
    "siglip2_so400m": "vit_so400m_patch14_siglip_224.v2_webli",
    # Swin
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_base_384": "swin_base_patch4_window12_384",
    "swin_large": "swin_large_patch4_window7_224",
    "swin_s3_tiny": "swin_s3_tiny_224",
    "swin_s3_small": "swin_s3_small_224",
    "swin_s3_base": "swin_s3_base_224",
    "swinv2_tiny": "swinv2_tiny_window8_256",
    "swinv2_small": "swinv2_small_window8_256",
    "swinv2_base": "swinv2_base_window8_256",
    # BEiT
    "beit_base": "beit_base_patch16_224",
    "beit_large": "beit_large_patch16_224",
    "beitv2_base": "beitv2_base_patch16_224",
    "beitv2_large": "beitv2_large_patch16_224",
    # EVA and models built on it
    "eva_giant": "eva_giant_patch14_224",
    "eva02_tiny": "eva02_tiny_patch14_336",
    "eva02_small": "eva02_small_patch14_336",
    "eva02_base": "eva02_base_patch14_448",
    "eva02_large": "eva02_large_patch14_448",
    "dinov3_small": "vit_small_patch16_dinov3",
    "dinov3_small_plus": "vit_small_plus_patch16_dinov3",
    "dinov3_base": "vit_base_patch16_dinov3",
    "dinov3_large": "vit_large_patch16_dinov3",
    "pe_core_tiny": "vit_pe_core_tiny_patch16_384",
    "pe_core_small": "vit_pe_core_small_patch16_384",
    "pe_core_base": "vit_pe_core_base_patch16_224",
    "pe_core_large": "vit_pe_core_large_patch14_336",
}

"""Set the learning rate: its peak for a given start, and its course over the training."""

from __future__ import annotations

import math

import torch


def lr_for_start(divergence: float, chance_divergence: float, batch_size: int, width: int) -> float:
    """Return AdamW's peak learning rate for a start: low if good, up to ten times that if bad.

    Chosen on a small model and on DeiT-Tiny: docs/explanation.md. Grows with the square root of the
    batch size, as gradient noise does.

    Args:
        divergence: KL of the start's predictions from the source's, nats per image.
        chance_divergence: the same for predictions that ignore the image.
        batch_size: images per step.
        width: channels of the model; wider models take smaller steps from a bad start.

    Source: ours; for the square root, Malladi et al. 2022, arXiv:2205.10287; for the width, Yang et
        al. 2022, arXiv:2203.03466, Sec. 3.
    """
    lost = min(1.0, divergence / chance_divergence) if chance_divergence > 0 else 1.0
    max_factor = min(10.0, max(2.0, 960 / width))
    return float(5e-5 * max_factor**lost * math.sqrt(batch_size / 16))


def lr_factor(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then half a cosine.

    Args:
        done: share of the training that is over, 0–1.
        warmup: share of the training spent warming up.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak, in place."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor

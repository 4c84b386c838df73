"""Train the built-in model `fashion_vit`: `python -m vitcompress.bundled.train --help`.

Trains a small ViT on Fashion-MNIST from random weights, and writes the two files beside this
script: the weights and a subset of the images. The images come from Debian's package
`dataset-fashion-mnist` (MIT license) or from any other copy of the four IDX files. Takes about an
hour on two CPU cores.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitcompress.bundled import FASHION_VIT, HERE

(MEAN,), (STD,) = (FASHION_VIT.pretrained_cfg[key] for key in ("mean", "std"))  # of the 60,000 training images


def read_split(source: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read one split of Fashion-MNIST from gzipped IDX files.

    Args:
        source: folder with the four `*-ubyte.gz` files.
        train: read the 60,000 training images, otherwise the 10,000 test images.

    Returns:
        Images `[N, 28, 28]` uint8 and labels `[N]` int64.
    """
    prefix = "train" if train else "t10k"
    images = gzip.decompress((source / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16)  # after the header
    return torch.tensor(pixels).view(-1, 28, 28), torch.tensor(np.frombuffer(labels, np.uint8, offset=8)).long()


def shift_and_mirror(images: Tensor) -> Tensor:
    """Shift each image by up to two pixels, and mirror half of them.

    Args:
        images: `[B, 1, 28, 28]`, normalized.

    Returns:
        Images `[B, 1, 28, 28]`.
    """
    size = images.shape[-1]
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    batch = torch.arange(len(images))[:, None, None]
    top, left = (torch.randint(0, 5, (len(images), 1, 1)) for _ in range(2))
    rows, cols = top + torch.arange(size)[None, :, None], left + torch.arange(size)[None, None, :]
    cols = torch.where(torch.rand(len(images), 1, 1) < 0.5, cols.flip(2), cols)
    return padded[batch, 0, rows, cols].unsqueeze(1)


def erase(images: Tensor) -> Tensor:
    """Erase a square of eight pixels in a quarter of the images `[B, 1, 28, 28]`."""
    size = images.shape[-1]
    hole = torch.randint(0, size - 7, (len(images), 2))
    pixel = torch.arange(size)
    inside = [(pixel >= hole[:, i, None]) & (pixel < hole[:, i, None] + 8) for i in range(2)]
    erased = (inside[0][:, :, None] & inside[1][:, None, :]) & (torch.rand(len(images), 1, 1) < 0.25)
    return images.masked_fill(erased.unsqueeze(1), 0.0)


def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images `[B, 1, 28, 28]` and labels `[B, 10]` with the batch reversed.

    Source: mixup, Zhang et al. 2018, arXiv:1710.09412.
    """
    share = float(torch.distributions.Beta(0.4, 0.4).sample())
    return share * images + (1 - share) * images.flip(0), share * labels + (1 - share) * labels.flip(0)


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 images `[N, 28, 28]` to model inputs `[N, 1, 28, 28]`."""
    return images.float().div(255).unsqueeze(1).sub(MEAN).div(STD)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, lr: float, batch_size: int, strong: bool
) -> nn.Module:
    """Train `model` in place.

    Args:
        model: a timm ViT.
        images: `[N, 28, 28]` uint8.
        labels: `[N]` int64.
        epochs: passes over the images.
        lr: peak learning rate.
        batch_size: images per step.
        strong: mix and erase images and smooth labels; otherwise only shift and mirror images.

    Returns:
        The model with the moving average of its weights.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}])
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(images)).split(batch_size)[:steps]:
            views, targets = shift_and_mirror(normalize(images[index])), F.one_hot(labels[index], 10).float()
            if strong:
                views, targets = mix(erase(views), targets)
            loss = F.cross_entropy(model(views), targets, label_smoothing=0.05 if strong else 0.0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        typer.echo(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return average.module.eval()


def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in percent on images `[N, 28, 28]` with labels `[N]`."""
    with torch.inference_mode():
        predictions = torch.cat([model(normalize(part)).argmax(1) for part in images.split(500)])
    return 100 * float((predictions == labels).float().mean())


def main(
    source: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    epochs: Annotated[int, typer.Option(min=0, help="Epochs with mixup, label smoothing and erasing.")] = 30,
    last_epochs: Annotated[int, typer.Option(min=0, help="Epochs without them, at a quarter of the rate.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 256,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 2e-3,
    num_train: Annotated[int, typer.Option(help="Number of training images to bundle.")] = 10_000,
    num_val: Annotated[int, typer.Option(help="Number of test images to bundle.")] = 5_000,
    weights: Annotated[Path | None, typer.Option(help="Start from these weights instead of random ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the two files to.")] = HERE,
    seed: int = 0,
) -> None:
    """Train `fashion_vit` and bundle it with a subset of the images."""
    torch.manual_seed(seed)
    images, labels = read_split(source, train=True)
    val_images, val_labels = read_split(source, train=False)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(  # both splits are shuffled, so their first images sample all ten classes
        out / FASHION_VIT.images.name,
        train_images=images[:num_train].numpy(),
        train_labels=labels[:num_train].numpy().astype(np.uint8),
        val_images=val_images[:num_val].numpy(),
        val_labels=val_labels[:num_val].numpy().astype(np.uint8),
    )
    network = VisionTransformer(**FASHION_VIT.model_args, drop_path_rate=0.1)
    trunc_normal_(network.head.weight, std=0.02)
    model: nn.Module = network
    if weights is not None:
        model.load_state_dict(load_file(weights))
    for count, peak, strong in ((epochs, lr, True), (last_epochs, lr / 4, False)):
        if count:
            model = train(model, images, labels, epochs=count, lr=peak, batch_size=batch_size, strong=strong)
            typer.echo(f"top-1 {top1(model, val_images, val_labels):.2f} % on all 10,000 test images")
    # float16 halves the size of the wheel, and changes top-1 by less than 0.05 points
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    save_file(tensors, out / FASHION_VIT.checkpoint.name, metadata={"licence": "Apache-2.0"})
    model.load_state_dict(tensors)
    typer.echo(f"top-1 {top1(model, val_images, val_labels):.2f} % after rounding to float16")


if __name__ == "__main__":
    typer.run(main)

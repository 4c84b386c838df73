"""How was `fashion_vit` made?  `python -m vitcompress.bundled.train --help`.

Trains a small ViT on Fashion-MNIST from random weights and writes the two files beside this script: the weights and a
subset of the images.  The images come from Debian's package `dataset-fashion-mnist` (MIT licence) or from any
other copy of the four IDX files.  About 40 minutes on two CPU cores.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchvision.datasets import FashionMNIST

from vitcompress.bundled import FASHION_VIT, HERE

(MEAN,), (STD,) = (FASHION_VIT.pretrained_cfg[key] for key in ("mean", "std"))  # of the 60,000 training images


def read_split(source: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read one split of Fashion-MNIST from gzipped IDX files.

    Args:
        source: folder with the four `*-ubyte.gz` files.
        train: the 60,000 training images, else the 10,000 test images.

    Returns:
        Images `[N, 28, 28]` uint8 and labels `[N]` int64.
    """
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in source.glob("*-ubyte.gz"):
            with gzip.open(packed) as src, open(raw / packed.stem, "wb") as dst:
                shutil.copyfileobj(src, dst)
        split = FashionMNIST(root, train=train, download=False)
        return split.data, split.targets


def augment(images: Tensor) -> Tensor:
    """Shift each image by up to two pixels, mirror half of them and erase a square in a quarter of them.

    Args:
        images: `[B, 1, 28, 28]`, normalised.

    Returns:
        `[B, 1, 28, 28]`.
    """
    size = images.shape[-1]
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    batch = torch.arange(len(images))[:, None, None]
    top, left = (torch.randint(0, 5, (len(images), 1, 1)) for _ in range(2))
    rows, cols = top + torch.arange(size)[None, :, None], left + torch.arange(size)[None, None, :]
    cols = torch.where(torch.rand(len(images), 1, 1) < 0.5, cols.flip(2), cols)
    out = padded[batch, 0, rows, cols].unsqueeze(1)
    hole = torch.randint(0, size - 7, (len(images), 2))
    pixel = torch.arange(size)
    inside = [(pixel >= hole[:, i, None]) & (pixel < hole[:, i, None] + 8) for i in range(2)]
    erased = (inside[0][:, :, None] & inside[1][:, None, :]) & (torch.rand(len(images), 1, 1) < 0.25)
    return out.masked_fill(erased.unsqueeze(1), 0.0)


def main(
    source: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    lr: Annotated[float, typer.Option(min=0.0)] = 2e-3,
    num_train: Annotated[int, typer.Option(help="Training images to bundle.")] = 10_000,
    num_val: Annotated[int, typer.Option(help="Test images to bundle.")] = 5_000,
    out: Annotated[Path, typer.Option(help="Where the two files are written.")] = HERE,
    seed: int = 0,
) -> None:
    """Train `fashion_vit` and bundle it with a subset of the images."""
    torch.manual_seed(seed)
    train_images, train_labels = read_split(source, train=True)
    val_images, val_labels = read_split(source, train=False)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(  # the sets come shuffled: their heads are fair samples of all ten classes
        out / "fashion_mnist.npz",
        train_images=train_images[:num_train].numpy(),
        train_labels=train_labels[:num_train].numpy().astype(np.uint8),
        val_images=val_images[:num_val].numpy(),
        val_labels=val_labels[:num_val].numpy().astype(np.uint8),
    )
    model = VisionTransformer(**FASHION_VIT.model_args, drop_path_rate=0.1)
    trunc_normal_(model.head.weight, std=0.02)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}])
    steps = epochs * (len(train_images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))

    def normalise(images: Tensor) -> Tensor:
        return images.float().div(255).unsqueeze(1).sub(MEAN).div(STD)

    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(train_images)).split(batch_size)[: len(train_images) // batch_size]:
            images, labels = augment(normalise(train_images[index])), F.one_hot(train_labels[index], 10).float()
            share = float(torch.distributions.Beta(0.4, 0.4).sample())  # mixup, Zhang et al. 2018, arXiv:1710.09412
            images = share * images + (1 - share) * images.flip(0)
            labels = share * labels + (1 - share) * labels.flip(0)
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        average.eval()
        with torch.inference_mode():
            correct = sum(
                int((average(normalise(images)).argmax(1) == labels).sum())
                for images, labels in zip(val_images.split(500), val_labels.split(500), strict=True)
            )
        typer.echo(f"epoch {epoch + 1:3d}  loss {loss.item():.3f}  top-1 on 10,000 test images {correct / 100:.2f} %")
        # float16 halves the wheel; the rounding moves top-1 by less than 0.02 points
        save_file(
            {name: t.half() for name, t in average.module.state_dict().items()},
            out / "fashion_vit.safetensors",
            metadata={"top1": f"{correct / 100:.2f}", "epochs": str(epoch + 1), "licence": "Apache-2.0"},
        )


if __name__ == "__main__":
    typer.run(main)

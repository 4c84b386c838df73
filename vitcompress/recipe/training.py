"""The stages that define the training: images, teacher, losses and optimizer, and device."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vitcompress.errors import nearest
from vitcompress.recipe.values import CONFIG, AnyPath, Pairs, Workers, option

BUILT_IN = "built-in"
DEFAULT_STEPS = 500
DEFAULT_LR = 5e-4
DEFAULT_BATCH_SIZE, CPU_BATCH_SIZE = 128, 32
LOSS_NAMES = ("logits", "hidden", "attention", "hidden_relation", "features", "labels")


@dataclass(frozen=True, config=CONFIG)
class DataRecipe:
    """Images, labels and augmentation."""

    data: Annotated[str | None, AnyPath] = option(
        None,
        "Training images: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in. "
        f"Default: {BUILT_IN}, the images that come with the package.",
    )
    val_data: Annotated[str | None, AnyPath] = option(
        None,
        "Images to evaluate on. Default: the validation split of --data, "
        "otherwise 10 % of --data, held out from training.",
    )
    image_key: str | None = option(None, "Column (hfds) or file extension (wds) of the images. Default: detected.")
    label_key: str | None = option(
        None, "Column (hfds) or file extension (wds) of the labels. Default: label (hfds), cls (wds)."
    )
    class_map: Path | None = option(
        None, "Text file with one class name per line, in the order of the model's classes."
    )
    class_order: Literal["natural", "ascii"] | None = option(
        None,
        "Order of class folders: natural, as timm numbers them (class2 before class10), or ascii, as torchvision. "
        "Default: detected from their names and numbers; if these are ambiguous, the order in which the teacher is "
        "more accurate.",
    )
    skip_bad_images: bool = option(False, "Skip and count unreadable images instead of stopping.")
    batch_size: int | None = option(
        None,
        f"Images per training step, over all processes. Default: {DEFAULT_BATCH_SIZE}, or {CPU_BATCH_SIZE} on a CPU.",
        ge=1,
    )
    num_workers: Annotated[int | Literal["auto"], Workers] = option(
        "auto", "Processes that decode images; auto: one less than the CPU cores, at most 16."
    )
    crop_min: float = option(0.6, "Smallest fraction of the image that a random training crop covers.", gt=0, le=1)
    hflip: float = option(0.5, "Probability of flipping a training image horizontally.", ge=0, le=1)
    auto_augment: str | None = option(None, "timm augmentation policy for training images, like rand-m9-mstd0.5-inc1.")
    erase: float = option(0.0, "Probability of erasing a random rectangle of a training image.", ge=0, le=1)
    repeats: int = option(1, "Number of successive views of each training image (repeated augmentation).", ge=1)
    mixup: float = option(0.0, "Mixup alpha; 0 turns mixup off.", ge=0)
    cutmix: float = option(0.0, "CutMix alpha; 0 turns CutMix off.", ge=0)

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.step_images % 2:
            raise ValueError(
                f"--batch-size {self.batch_size}: must be even, because --mixup and --cutmix mix pairs of images"
            )

    @property
    def step_images(self) -> int:
        """The given number of images per step, or the default."""
        return self.batch_size or DEFAULT_BATCH_SIZE


@dataclass(frozen=True, config=CONFIG)
class TeacherRecipe:
    """The teacher, if it is not the source."""

    teacher: str | None = option(
        None,
        "Model to learn from: a timm name, hf-hub:…, local-dir:… or a vitcompress file. Default: the source model.",
    )
    teacher_checkpoint: Path | None = option(None, "Weights of the teacher, as --checkpoint takes them.")
    teacher_arg: Annotated[dict[str, Any], Pairs] = option(
        {}, "key=value argument of the teacher's constructor; repeatable."
    )
    allow_weak_teacher: bool = option(False, "Train even if the source is no better than chance on the labeled images.")
    teacher_checkpoint_key: str | None = option(
        None, "Key of the weights in the teacher's checkpoint, like --checkpoint-key. Default: detected."
    )

    def __post_init__(self) -> None:
        if self.teacher is None and (self.teacher_checkpoint is not None or self.teacher_arg):
            flag = "--teacher-arg" if self.teacher_checkpoint is None else "--teacher-checkpoint"
            raise ValueError(f"{flag} needs --teacher")
        if self.teacher_checkpoint_key is not None and self.teacher_checkpoint is None:
            raise ValueError("--teacher-checkpoint-key needs --teacher-checkpoint")


@dataclass(frozen=True, config=CONFIG)
class DistillRecipe:
    """Length, optimizer and losses of the training."""

    steps: int | None = option(
        None, f"Training steps; 0 trains nothing. Default: {DEFAULT_STEPS}, if no length is given.", ge=0
    )
    epochs: float | None = option(None, "Passes over the training images, instead of --steps.", gt=0)
    max_minutes: float | None = option(
        None, "Minutes for the whole command, including evaluation and writing, instead of --steps.", gt=0
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "adamw, or muon (Muon for the matrices that blocks share, AdamW for all else). "
        "muon suits long runs and students that start far from the source.",
    )
    lr: float | None = option(
        None,
        "Peak learning rate of AdamW. Default: computed from the width of the model, the batch size and, by compress, "
        "the number of images and how far the untrained student is from its source; printed before training.",
        gt=0,
    )
    matrix_lr: float = option(0.02, "Peak learning rate of Muon.", gt=0)
    weight_decay: float = option(0.05, "Weight decay of matrices; vectors and transformations have none.", ge=0)
    fade: float = option(
        0.0,
        "At the start, each block still uses its own matrices; they are blended into the shared ones over this "
        "fraction of the training. 0 turns this off.",
        ge=0,
        le=0.9,
    )
    warmup: float = option(0.1, "Fraction of the training for learning rate warmup.", ge=0, lt=1)
    clip_norm: float = option(1.0, "Maximum gradient norm.", gt=0)
    accumulate: int = option(
        1, "Gradient accumulation: parts that each step's images are split into, to save memory.", ge=1
    )
    loss: Annotated[dict[str, Annotated[float, Field(ge=0)]] | None, Pairs] = option(
        None,
        "Weight of a loss as name=weight; repeatable. Losses: " + ", ".join(LOSS_NAMES) + ". "
        "Default: depends on model and command; to compress a classifier, logits=1 hidden=1 attention=1 "
        "hidden_relation=0.1.",
    )
    temperature: float = option(1.0, "Temperature of the logits loss.", gt=0)
    label_smoothing: float = option(0.0, "Label smoothing of the labels loss.", ge=0, lt=1)
    layers: str | None = option(
        None,
        "Blocks to compare, as student:teacher, like 1:3,3:9 (numbered from 0; a single number n means n:n). "
        "Default: every block of the student, paired with evenly spaced blocks of the teacher.",
    )
    relation_heads: int = option(
        1, "Number of parts that channels are split into for attention relations; MiniViT uses 1.", ge=1
    )
    max_relation_tokens: int = option(
        128, "Maximum number of tokens in relation losses, sampled anew at each step.", ge=2
    )
    small_first: float = option(
        0.0,
        "Fraction of the training, from its start, that uses images of half the size: more images in the same time. "
        "ViT and EVA families.",
        ge=0,
        le=0.9,
    )
    ema: float | None = option(
        None, "Decay of a moving average of the weights, which replaces them at the end.", gt=0, lt=1
    )
    drop_path: float = option(
        0.0, "Stochastic depth: drop rate of the last block; earlier blocks drop less.", ge=0, lt=1
    )
    grad_checkpointing: bool = option(False, "Recompute blocks in the backward pass: less memory, more time.")

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.max_minutes)) > 1:
            raise ValueError("--steps, --epochs and --max-minutes cannot be used together. Give only one of them")
        if self.loss is None:
            return
        for name in self.loss.keys() - set(LOSS_NAMES):
            raise ValueError(
                f"--loss {name}: no such loss{nearest(name, LOSS_NAMES)}; there are {', '.join(LOSS_NAMES)}"
            )
        if not any(self.loss.values()):
            raise ValueError("--loss: every weight is zero, so there is nothing to learn")
        if self.label_smoothing and not self.loss.get("labels"):
            raise ValueError(f"--label-smoothing {self.label_smoothing:g}: there is no labels loss to smooth")

    @property
    def peak_lr(self) -> float:
        """The given learning rate, or the default."""
        return self.lr or DEFAULT_LR


@dataclass(frozen=True, config=CONFIG)
class RunRecipe:
    """Seed, device, precision, and saved states."""

    seed: int = option(0, "Seed of data order, augmentation and drop path.", ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device to train on; auto: a CUDA GPU if there is one, else the CPU."
    )
    num_processes: int | None = option(
        None, "Training processes on this machine. Default: one per GPU, else one.", ge=1
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = option(
        "auto", "Precision of training; auto: bf16 where the device is faster in it, else fp32."
    )
    compile: bool = option(False, "Compile the blocks with torch.compile: slower start, faster steps.")
    save_every: str = option("10m", "How often to save the training state: steps (500), minutes (10m) or none.")
    resume: bool = option(False, "Continue from the last saved state of an interrupted run of the same recipe.")
    log_with: Literal["tensorboard", "wandb"] | None = option(None, "Log loss curves to this tracker.")

    def __post_init__(self) -> None:
        save_interval(self.save_every)


@dataclasses.dataclass(frozen=True)
class Interval:
    """How often to save the training state, in steps or in seconds; the other one is None."""

    steps: int | None = None
    seconds: float | None = None


def save_interval(text: str) -> Interval | None:
    """Read --save-every: `500` (steps), `10m` (minutes) or `none`.

    Raises:
        ValueError: `text` is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(m?)\s*", text)
    if text.strip() == "none":
        return None
    if match is None or float(match[1]) <= 0 or not (match[2] or match[1].isdigit()):
        raise ValueError(f"--save-every {text}: expected steps like 500, minutes like 10m, or none")
    return Interval(seconds=60 * float(match[1])) if match[2] else Interval(steps=int(match[1]))

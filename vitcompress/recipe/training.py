"""The stages that define the training: images, teacher, losses and optimizer, and device."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vitcompress.errors import nearest
from vitcompress.recipe.values import CONFIG, AnyPath, Pairs, Workers

BUILT_IN = "built-in"
DEFAULT_STEPS = 500
DEFAULT_LR = 5e-4
LOSS_NAMES = ("logits", "hidden", "attention", "hidden_relation", "features", "labels")


@dataclass(frozen=True, config=CONFIG)
class DataRecipe:
    """Images, labels and augmentation."""

    data: Annotated[
        str | None,
        AnyPath,
        Field(
            description="Training images: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in. "
            f"Default: {BUILT_IN}, if images are needed."
        ),
    ] = None
    val_data: Annotated[
        str | None,
        AnyPath,
        Field(
            description="Images to evaluate on. Default: the validation split of --data, else a tenth held out of it."
        ),
    ] = None
    image_key: Annotated[
        str | None, Field(description="Column (hfds) or file extension (wds) of the images. Default: detected.")
    ] = None
    label_key: Annotated[
        str | None,
        Field(description="Column (hfds) or file extension (wds) of the labels. Default: label (hfds), cls (wds)."),
    ] = None
    class_map: Annotated[
        Path | None, Field(description="Text file with one class name per line, in the order of the model's classes.")
    ] = None
    skip_bad_images: Annotated[bool, Field(description="Skip and count unreadable images instead of stopping.")] = False
    batch_size: Annotated[int, Field(ge=1, description="Images per training step, over all processes.")] = 128
    num_workers: Annotated[
        int | Literal["auto"],
        Workers,
        Field(description="Processes that decode images; auto: one less than the CPU cores, at most 16."),
    ] = "auto"
    crop_min: Annotated[
        float, Field(gt=0, le=1, description="Smallest fraction of the image that a random training crop covers.")
    ] = 0.6
    hflip: Annotated[float, Field(ge=0, le=1, description="Probability of flipping a training image horizontally.")] = (
        0.5
    )
    auto_augment: Annotated[
        str | None, Field(description="timm augmentation policy for training images, like rand-m9-mstd0.5-inc1.")
    ] = None
    erase: Annotated[
        float, Field(ge=0, le=1, description="Probability of erasing a random rectangle of a training image.")
    ] = 0.0
    repeats: Annotated[
        int, Field(ge=1, description="Number of successive views of each training image (repeated augmentation).")
    ] = 1
    mixup: Annotated[float, Field(ge=0, description="Mixup alpha; 0 turns mixup off.")] = 0.0
    cutmix: Annotated[float, Field(ge=0, description="CutMix alpha; 0 turns CutMix off.")] = 0.0

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"--batch-size {self.batch_size}: must be even, because --mixup and --cutmix mix pairs of images"
            )


@dataclass(frozen=True, config=CONFIG)
class TeacherRecipe:
    """The teacher, if it is not the source."""

    teacher: Annotated[
        str | None,
        Field(description="Model to learn from: a name like MODEL, or a vitcompress file. Default: the source model."),
    ] = None
    teacher_checkpoint: Annotated[Path | None, Field(description="Weights of the teacher, like --checkpoint.")] = None
    teacher_arg: Annotated[
        dict[str, Any], Pairs, Field(description="key=value argument of the teacher's constructor; repeatable.")
    ] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.teacher is None and (self.teacher_checkpoint is not None or self.teacher_arg):
            flag = "--teacher-arg" if self.teacher_checkpoint is None else "--teacher-checkpoint"
            raise ValueError(f"{flag} needs --teacher")


@dataclass(frozen=True, config=CONFIG)
class DistillRecipe:
    """Length, optimizer and losses of the training."""

    steps: Annotated[
        int | None,
        Field(
            ge=0,
            description=f"Training steps; 0 trains nothing. Default: {DEFAULT_STEPS}, if no length is given.",
        ),
    ] = None
    epochs: Annotated[float | None, Field(gt=0, description="Passes over the training images, instead of --steps.")] = (
        None
    )
    max_minutes: Annotated[
        float | None,
        Field(
            gt=0,
            description="Minutes for the whole command, including evaluation and writing, instead of --steps.",
        ),
    ] = None
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Field(description="muon: Muon for the blocks' matrices, AdamW for the rest; for long runs, far starts."),
    ] = "adamw"
    lr: Annotated[
        float | None,
        Field(
            gt=0, description="Peak learning rate of AdamW. Default: depends on how far the start is from the source."
        ),
    ] = None
    matrix_lr: Annotated[float, Field(gt=0, description="Peak learning rate of Muon.")] = 0.02
    weight_decay: Annotated[
        float, Field(ge=0, description="Weight decay of matrices; vectors and transformations have none.")
    ] = 0.05
    fade: Annotated[
        float,
        Field(
            ge=0,
            le=0.9,
            description="Fraction of the training over which each block's own matrices fade into the shared ones.",
        ),
    ] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="Fraction of the training for learning rate warmup.")] = 0.1
    clip_norm: Annotated[float, Field(gt=0, description="Maximum gradient norm.")] = 1.0
    accumulate: Annotated[
        int,
        Field(ge=1, description="Gradient accumulation: parts that each step's images are split into, to save memory."),
    ] = 1
    loss: Annotated[
        dict[str, Annotated[float, Field(ge=0)]] | None,
        Pairs,
        Field(
            description="Weight of a loss as name=weight; repeatable. Losses: " + ", ".join(LOSS_NAMES) + ". "
            "Default: depends on model and command; to compress a classifier, logits=1 hidden=1 attention=1 "
            "hidden_relation=0.1."
        ),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="Temperature of the logits loss.")] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="Label smoothing of the labels loss.")] = 0.0
    layers: Annotated[
        str | None,
        Field(
            description="Blocks to compare, as student:teacher, like 1:3,3:9 (numbered from 0; 1 means 1:1). "
            "Default: every block of the student, with blocks of the teacher at even distances."
        ),
    ] = None
    relation_heads: Annotated[
        int,
        Field(
            ge=1, description="Number of parts that channels are split into for attention relations; MiniViT uses 1."
        ),
    ] = 1
    max_relation_tokens: Annotated[
        int, Field(ge=2, description="Maximum number of tokens in relation losses, sampled anew at each step.")
    ] = 128
    ema: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Decay of a moving average of the weights, which replaces them at the end.",
        ),
    ] = None
    drop_path: Annotated[
        float, Field(ge=0, lt=1, description="Stochastic depth: drop rate of the last block; earlier blocks drop less.")
    ] = 0.0
    grad_checkpointing: Annotated[
        bool, Field(description="Recompute blocks in the backward pass: less memory, more time.")
    ] = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.max_minutes)) > 1:
            raise ValueError("--steps, --epochs and --max-minutes exclude each other")
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

    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of data order, augmentation and drop path.")] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="Device to train on; auto: a CUDA GPU if there is one, else the CPU."),
    ] = "auto"
    num_processes: Annotated[
        int | None, Field(ge=1, description="Training processes on this machine. Default: one per GPU, else one.")
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16"],
        Field(description="Precision of training; auto: bf16 where the device computes in it, else fp32."),
    ] = "auto"
    compile: Annotated[
        bool, Field(description="Compile the blocks with torch.compile: slower start, faster steps.")
    ] = False
    save_every: Annotated[
        str, Field(description="How often to save the training state: steps (500), minutes (10m) or none.")
    ] = "10m"
    resume: Annotated[
        bool, Field(description="Continue from the last saved state of an interrupted run of the same recipe.")
    ] = False
    cache_teacher: Annotated[
        Path | None,
        Field(description="Cache the teacher's logits here for later runs on the same views (logits loss only)."),
    ] = None
    log_with: Annotated[
        Literal["tensorboard", "wandb"] | None, Field(description="Log loss curves to this tracker.")
    ] = None

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

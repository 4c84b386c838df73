"""How does the student learn?  Images, another teacher, losses and optimizer, and where it runs."""

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
    """Images, labels and views."""

    data: Annotated[
        str | None,
        AnyPath,
        Field(
            description="Training images: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in. "
            f"Default: {BUILT_IN}, where images are needed."
        ),
    ] = None
    val_data: Annotated[
        str | None,
        AnyPath,
        Field(description="Images to evaluate on; default: the validation split of --data, else a tenth held out."),
    ] = None
    image_key: Annotated[
        str | None, Field(description="Column (hfds) or extension (wds) of the images; default: the one there is.")
    ] = None
    label_key: Annotated[
        str | None, Field(description="Column (hfds) or extension (wds) of the labels; default: label, cls.")
    ] = None
    class_map: Annotated[
        Path | None, Field(description="Text file with a class's name per line, in the order of the model's classes.")
    ] = None
    skip_bad_images: Annotated[bool, Field(description="Count images that cannot be read instead of stopping.")] = False
    batch_size: Annotated[int, Field(ge=1, description="Images per step, of all processes together.")] = 128
    num_workers: Annotated[
        int | Literal["auto"],
        Workers,
        Field(description="Processes that decode images; auto: all cores but one, at most 16."),
    ] = "auto"
    crop_min: Annotated[
        float, Field(gt=0, le=1, description="Smallest share of the image that a random training crop keeps.")
    ] = 0.6
    hflip: Annotated[float, Field(ge=0, le=1, description="Probability of mirroring a training image.")] = 0.5
    auto_augment: Annotated[
        str | None, Field(description="timm's policy for training images, like rand-m9-mstd0.5-inc1.")
    ] = None
    erase: Annotated[float, Field(ge=0, le=1, description="Probability of erasing a part of a training image.")] = 0.0
    repeats: Annotated[
        int, Field(ge=1, description="Views of an image that follow each other (repeated augmentation).")
    ] = 1
    mixup: Annotated[float, Field(ge=0, description="α of mixup: blends of two images; 0 is none.")] = 0.0
    cutmix: Annotated[float, Field(ge=0, description="α of cutmix: parts pasted from another image; 0 is none.")] = 0.0

    def __post_init__(self) -> None:
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"--batch-size {self.batch_size}: must be even, --mixup and --cutmix take images in pairs")


@dataclass(frozen=True, config=CONFIG)
class TeacherRecipe:
    """Whom the student learns from, where it is not the model itself."""

    teacher: Annotated[
        str | None, Field(description="Another model to learn from, named like MODEL, or a file of vitcompress.")
    ] = None
    teacher_checkpoint: Annotated[Path | None, Field(description="Weights of the teacher.")] = None
    teacher_arg: Annotated[
        dict[str, Any], Pairs, Field(description="key=value for the teacher's constructor; repeatable.")
    ] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.teacher is None and (self.teacher_checkpoint is not None or self.teacher_arg):
            flag = "--teacher-arg" if self.teacher_checkpoint is None else "--teacher-checkpoint"
            raise ValueError(f"{flag} needs --teacher")


@dataclass(frozen=True, config=CONFIG)
class DistillRecipe:
    """How the student learns from the teacher."""

    steps: Annotated[
        int | None,
        Field(ge=0, description=f"Training steps ({DEFAULT_STEPS} if no length is given); 0 converts only."),
    ] = None
    epochs: Annotated[float | None, Field(gt=0, description="Training length in passes over the images.")] = None
    max_minutes: Annotated[
        float | None,
        Field(gt=0, description="Length of the whole command in minutes, evaluation and writing included."),
    ] = None
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Field(description="adamw; or muon for the blocks' matrices and adamw for the rest (long runs, far starts)."),
    ] = "adamw"
    lr: Annotated[
        float | None,
        Field(gt=0, description="Peak learning rate of AdamW; default: by how far the start is from the source."),
    ] = None
    matrix_lr: Annotated[float, Field(gt=0, description="Peak learning rate of Muon.")] = 0.02
    weight_decay: Annotated[
        float, Field(ge=0, description="Weight decay of matrices; vectors and transformations have none.")
    ] = 0.05
    fade: Annotated[
        float,
        Field(ge=0, le=0.9, description="Share of the training during which the blocks' own matrices fade out."),
    ] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the training spent warming up.")] = 0.1
    clip_norm: Annotated[float, Field(gt=0, description="Largest norm of the gradient.")] = 1.0
    accumulate: Annotated[
        int, Field(ge=1, description="Parts that each step's images are taken in: less memory, the same update.")
    ] = 1
    loss: Annotated[
        dict[str, Annotated[float, Field(ge=0)]] | None,
        Pairs,
        Field(
            description="Weight of a loss, name=weight; repeatable. Losses: " + ", ".join(LOSS_NAMES) + ". Default: by "
            "model and command; to compress a model with classes, logits=1 hidden=1 attention=1 hidden_relation=0.1."
        ),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="Temperature of the logits loss.")] = 1.0
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="Share of each label spread over all classes (labels loss).")
    ] = 0.0
    layers: Annotated[
        str | None,
        Field(
            description="Compared blocks, student:teacher, like 1:3,3:9 (1 is 1:1; blocks from 0); "
            "default: every block, the teacher's evenly spread."
        ),
    ] = None
    relation_heads: Annotated[
        int, Field(ge=1, description="Parts of the width that attention relations are taken of, as published 1.")
    ] = 1
    max_relation_tokens: Annotated[
        int, Field(ge=2, description="Most tokens that relations are taken of, at random and anew each step.")
    ] = 128
    ema: Annotated[
        float | None, Field(gt=0, lt=1, description="Decay of a running mean of the weights, to be kept instead.")
    ] = None
    drop_path: Annotated[
        float, Field(ge=0, lt=1, description="Probability of skipping the last block's branches; grows with depth.")
    ] = 0.0
    grad_checkpointing: Annotated[
        bool, Field(description="Compute blocks again in the backward pass: less memory, more time.")
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
        """The learning rate, where nothing else chooses it."""
        return self.lr or DEFAULT_LR


@dataclass(frozen=True, config=CONFIG)
class RunRecipe:
    """Where and how reproducibly it runs."""

    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of data order, views and drop path.")] = 0
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="Device to train on; auto: a GPU, if CUDA has one.")
    ] = "auto"
    num_processes: Annotated[
        int | None, Field(ge=1, description="Processes to train in, on this machine; default: one per GPU, else one.")
    ] = None
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        Field(description="Of products while training: fp32; tf32 on GPUs that have it; bf16 under autocast."),
    ] = "fp32"
    compile: Annotated[bool, Field(description="Compile the blocks (torch.compile): slow to start, then faster.")] = (
        False
    )
    save_every: Annotated[
        str, Field(description="How often to keep the state of the training: 500 steps, 10m minutes, or none.")
    ] = "10m"
    resume: Annotated[
        bool, Field(description="Go on from the newest state that an interrupted run of the same recipe kept.")
    ] = False
    cache_teacher: Annotated[
        Path | None,
        Field(description="Folder for what the teacher says of each view, for the next run on the same (logits only)."),
    ] = None
    log_with: Annotated[
        Literal["tensorboard", "wandb"] | None, Field(description="Send loss curves there, through accelerate.")
    ] = None

    def __post_init__(self) -> None:
        save_interval(self.save_every)


@dataclasses.dataclass(frozen=True)
class Interval:
    """How often: one of the two is None."""

    steps: int | None = None
    seconds: float | None = None


def save_interval(text: str) -> Interval | None:
    """`500` steps, `10m` minutes, or `none`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(m?)\s*", text)
    if text.strip() == "none":
        return None
    if found is None or float(found[1]) <= 0 or not (found[2] or found[1].isdigit()):
        raise ValueError(f"--save-every {text}: not a number of steps like 500, of minutes like 10m, or none")
    return Interval(seconds=60 * float(found[1])) if found[2] else Interval(steps=int(found[1]))

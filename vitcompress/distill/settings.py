"""The settings of one training, as a single value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vitcompress.data.augmentation import Mixing
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.matching import Matching
from vitcompress.recipe import DistillRecipe

Watch = Callable[[int, nn.Module], Mapping[str, float]]
"""`(steps taken, model) -> point of the accuracy curve`, empty where it cannot be measured."""


@dataclass(frozen=True)
class TrainSettings:
    """How a student is trained.

    Attributes:
        recipe: temperature, optimizer and regularization.
        matching: the losses, and where student and teacher are read.
        deviation: the teacher's deviation of each output over images, `[K]`; None where no loss
            uses it.
        blocks: names of all blocks of the student, for drop path.
        matrices: names of the blocks' shared matrices, for the optimizer.
        input_size: (channels, height, width) of a view.
        num_steps: length in optimizer steps; None if `seconds` limits the training.
        seconds: length in seconds; None if `num_steps` limits the training.
        seed: of the random tokens that relations are computed of.
        mixing: mixes each batch, for student and teacher alike.
        skip_bad_images: count unreadable images instead of stopping.
        checkpoints: keeps the state, and restores it if there is one; None to keep none.
        compiled: whether to compile the student's blocks.
        watch: measures the model whose weights are kept; None to measure nothing during the
            training.
        before_step: called before each step with the share of the training that is over, 0–1.
    """

    recipe: DistillRecipe
    matching: Matching
    blocks: Sequence[str]
    matrices: Collection[str]
    input_size: tuple[int, int, int]
    num_steps: int | None
    seconds: float | None = None
    seed: int = 0
    mixing: Mixing = field(default_factory=Mixing)
    skip_bad_images: bool = False
    checkpoints: Checkpoints | None = None
    deviation: Tensor | None = None
    compiled: bool = False
    watch: Watch | None = None
    before_step: Callable[[float], None] = lambda done: None

"""Evaluate a student on images, next to its teacher."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitcompress.data.loaders import Batch, count_unreadable, evaluation_loader, process_share
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.families.outputs import outputs_of
from vitcompress.measure.results import Accuracy
from vitcompress.measure.tally import TALLIES, Tally
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.processes import gathered

MAX_BATCH = 128  # images, of a process that also trains
Watch = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
Tell = Callable[[float], None]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models on a set of images.

    Attributes:
        images: images to evaluate on; None if there are none.
        config: timm's data config.
        recipe: batch size, workers, and what to do with unreadable images.
        accelerator: distributes the batches over the processes; None for a single process that does
            not train.
        accumulate: number of parts in which a process takes its images of a training step.
    """

    images: ImageSet | None
    config: Mapping[str, Any]
    recipe: DataRecipe
    accelerator: Accelerator | None = None
    accumulate: int = 1

    @property
    def batch_size(self) -> int:
        """Number of images that a process evaluates at once: no more than it trains on."""
        if self.accelerator is None:
            return self.recipe.step_images
        parts: int = self.accelerator.num_processes * self.accumulate
        return min(MAX_BATCH, max(1, self.recipe.step_images // parts))

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, tell: Tell | None = None, watch: Watch | None = None
    ) -> Accuracy | None:
        """Evaluate a student; the kind of its outputs decides what is measured.

        Args:
            student: student in eval mode.
            teacher: teacher in eval mode, on the same device; None to evaluate the student alone.
            tell: receives the fraction of this process's batches that is done, 0–1; not called for
                streams of unknown length.
            watch: receives each batch of this process: images, logits of student and teacher,
                labels.

        Returns:
            The accuracy on all images, in every process; None if there are no images.

        Raises:
            DataError: an image is unreadable, or all of them are.
        """
        if self.images is None:
            return None
        tally = TALLIES[outputs_of(student).name]()
        fault: DataError | None = None
        try:
            self._run(student, teacher, tally, _progress(self._batches(), tell), watch)
        except DataError as error:
            fault = error
        parts = gathered((tally, fault), self.accelerator) if self.accelerator else [(tally, fault)]
        for _, other in parts:  # a fault in one process ends all of them
            if other is not None:
                raise other
        total: Tally = functools.reduce(operator.add, (part for part, _ in parts))
        if total.count == 0:
            raise DataError(f"{self.images.name}: none of the images could be read.")
        return total.result(self.images.name)

    def _batches(self) -> DataLoader[Any]:
        assert self.images is not None
        share = process_share(self.accelerator) if self.accelerator else None
        return evaluation_loader(self.images, self.config, self.recipe, share, self.batch_size)

    def _run(
        self, student: nn.Module, teacher: nn.Module | None, tally: Tally, batches: Iterable[Batch], watch: Watch | None
    ) -> None:
        """Run both models over the batches and add their outputs to the tally, in place."""
        device = next(student.parameters()).device
        with torch.inference_mode():
            for batch in batches:
                tally.skipped += count_unreadable(batch, skip=self.recipe.skip_bad_images)
                if len(batch.labels) == 0:
                    continue
                images = batch.images.to(device, non_blocking=True)
                outputs = student(images).float().cpu(), teacher(images).float().cpu() if teacher else None
                tally.add(*outputs, batch.labels)
                if watch is not None:
                    watch(batch.images, *outputs, batch.labels)


def _progress(batches: Iterable[Batch], tell: Tell | None) -> Iterator[Batch]:
    """Yield the batches, and report the fraction that is done after each."""
    total = operator.length_hint(batches, 0)
    for number, batch in enumerate(batches, 1):
        yield batch
        if tell and total:
            tell(number / total)

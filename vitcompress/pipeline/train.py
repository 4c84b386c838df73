"""Train the student of a checked request: views, length, and what is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vitcompress.data.augmentation import Mixing
from vitcompress.data.loaders import Batch, process_share, training_loader
from vitcompress.distill.fading import fading
from vitcompress.distill.log import TrainLog
from vitcompress.distill.loop import distill
from vitcompress.distill.settings import TrainSettings
from vitcompress.families.outputs import deviation_of, outputs_of, outputs_on
from vitcompress.families.registry import family_named
from vitcompress.initialize.inputs import first_images
from vitcompress.pipeline.budget import training_budget
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.watch import make_watch
from vitcompress.quantize.layers import quantization_aware_training

DEVIATION_IMAGES = 128  # calibration images on which the outputs' deviation is measured


def train(
    run: Run,
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    reference: nn.Module | None,
) -> TrainLog:
    """Train the student, in place.

    Args:
        run: the request.
        student: the student, on any device.
        teacher: takes the student's views; None where no loss needs it.
        reference: the model that the student is compared with, whose matrices fade out; None where
            there is none.

    Returns:
        The training log; empty where nothing is trained.
    """
    steps, images, recipe = run.num_steps, run.train, run.recipe
    if steps == 0 or images is None:
        return TrainLog()
    if recipe.distill.optimizer == "muon" and not run.plan.matrices:
        run.reporter.say("No matrices are shared, so AdamW updates all parameters, and Muon none.")
    student.to(run.accelerator.device)  # before the source's matrices are added to it
    budget = training_budget(run, student, reference)
    watch = make_watch(run, student, reference, budget.watched_images)
    seed, share = recipe.run.seed, process_share(run.accelerator, accumulate=recipe.distill.accumulate)

    def batches(start: int) -> Iterable[Batch]:
        return training_loader(images, run.config, recipe.data, seed=seed, num_steps=steps, start=start, share=share)

    num_classes: Any = student.num_classes
    mixing = Mixing(
        mixup=recipe.data.mixup,
        cutmix=recipe.data.cutmix,
        num_classes=num_classes if "labels" in run.matching.losses else None,
        smoothing=recipe.distill.label_smoothing,
        seed=seed,
    )
    with (
        fading(student, reference or student, run.plan, recipe.distill.fade) as fade,
        quantization_aware_training(student, recipe.store.kind, recipe.store.qat_fraction) as quantize,
        run.reporter.training(forecast=recipe.distill.max_minutes is None) as ticker,
    ):

        def before_step(done: float) -> None:
            fade(done)
            quantize(done)

        settings = TrainSettings(
            recipe.distill,
            run.matching,
            blocks=family_named(run.plan.family).block_names(student),
            matrices=run.plan.matrices,
            input_size=run.config["input_size"],
            num_steps=steps,
            seconds=budget.seconds,
            seed=seed,
            mixing=mixing,
            skip_bad_images=recipe.data.skip_bad_images,
            checkpoints=run.checkpoints,
            deviation=_deviation(run, student, teacher),
            compiled=recipe.run.compile,
            watch=watch,
            before_step=before_step,
        )
        log = distill(student, teacher, batches, settings, accelerator=run.accelerator, ticker=ticker)
    run.accelerator.free_memory()  # the optimizers hold three times the student
    run.clock.lap("training")
    return log


def _deviation(run: Run, student: nn.Module, teacher: nn.Module | None) -> Tensor | None:
    """Return the deviation of the teacher's outputs over images, where a loss uses it."""
    kind = outputs_of(student)
    if teacher is None or not kind.uses_deviation or kind.loss not in run.matching.losses:
        return None
    teacher.to(run.accelerator.device).eval()
    return deviation_of(outputs_on(teacher, first_images(run.calibration(), DEVIATION_IMAGES)))

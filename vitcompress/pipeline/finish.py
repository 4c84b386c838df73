"""Finish a run: train, store, measure and write the student, for `compress` and `finetune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from vitcompress.artifact.manifest import Manifest
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.distill.log import TrainLog
from vitcompress.distill.state import DivergedError
from vitcompress.families.outputs import has_classes, outputs_of
from vitcompress.measure.baselines import measure_baselines
from vitcompress.measure.latency import measure_speed
from vitcompress.measure.results import Accuracy, Baseline
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.write import described, notes_on, versions, write_result
from vitcompress.plans.make import with_student_bytes
from vitcompress.pretrained.build import build_model
from vitcompress.quantize.codecs import num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe.compose import to_dict
from vitcompress.report.events import tell_result
from vitcompress.report.model import SCHEMA_VERSION, Report, to_json
from vitcompress.runtime.processes import from_main, tracking

_MIN_CURVE_POINTS = 10


def measure(run: Run, student: nn.Module, teacher: nn.Module | None) -> Accuracy | None:
    """Evaluate a student next to its teacher, or alone if it has classes and images have labels.

    Args:
        run: the request, with the images.
        student: moved to the device; in eval mode afterwards.
        teacher: likewise; None where there is none.

    Returns:
        The accuracy; None where nothing can be measured.
    """
    val = run.val
    if val is None or (teacher is None and (val.labels is None or not has_classes(student))):
        return None
    for model in filter(None, (student, teacher)):
        model.to(run.accelerator.device).eval()
    run.reporter.say(f"evaluating on {val.name}")
    with run.reporter.counting("evaluating", brief=True) as tell:
        return run.evaluator(student, teacher, tell)


@dataclass(frozen=True)
class Reference:
    """What a student is compared with.

    Attributes:
        teacher: the model to compare outputs with; None for none.
        source_sha256: digest of the source's weights; empty where the student no longer has their
            head or size.
        before: accuracy of the student before it was fine-tuned.
    """

    teacher: nn.Module | None
    source_sha256: str
    before: Accuracy | None = None


def finish(run: Run, student: nn.Module, reference: Reference, log: TrainLog, out: Path) -> Report:
    """Round, evaluate, write and verify a student; the main process writes.

    Args:
        run: the request.
        student: the trained student.
        reference: what it is compared with.
        log: the training log.
        out: path of the artifact.

    Returns:
        The report, as it is in the file.
    """
    store, teacher = run.recipe.store.kind, reference.teacher
    tensors = stored_tensors(student, store)
    round_to(student, tensors, store)
    plan = with_student_bytes(run.plan, num_bytes(tensors))
    accuracy = measure(run, student, teacher)
    baselines: tuple[Baseline, ...] = ()
    if run.baselines and teacher is not None and accuracy is not None:
        baselines = measure_baselines(teacher, run.evaluator, accuracy, run.reporter)
    run.clock.lap("evaluation")
    report: Report | None = None
    if run.accelerator.is_main_process:
        device = run.accelerator.device
        # the source, or one with the new head and size: latency does not depend on weights
        unshared = build_model(run.source) if run.lineage or teacher is None else teacher
        models = [model.to(device).eval() for model in (student, unshared)]
        report = Report(
            schema_version=SCHEMA_VERSION,
            model=run.source.name,
            family=plan.family,
            groups=tuple(len(group.blocks) for group in plan.groups),
            transforms=plan.transforms,
            size=plan.size,
            accuracy=accuracy,
            speed=measure_speed(models[0], models[1], run.config["input_size"], device=device),
            train=log,
            data=run.train.name if run.train and log.steps else None,
            versions=versions(),
            command=run.command,
            notes=(*notes_on(plan), *run.notes, *(run.matching.notes if log.steps else ())),
            before=reference.before,
            lineage=run.lineage,
            store=store,
            baselines=baselines,
            made_of=plan.groups,
            why=() if run.lineage else plan.why,
            preprocessing=describe_preprocessing(run.config),
            outputs=outputs_of(student).name,
            seconds={name: round(seconds, 1) for name, seconds in run.clock.laps.items()},
        )
        report = _write(replace(run, plan=plan), student, tensors, reference.source_sha256, report, out)
    report = from_main(report, run.accelerator)
    assert report is not None  # from the main process
    return report


def _write(
    run: Run, student: nn.Module, tensors: Mapping[str, Tensor], source_sha256: str, report: Report, out: Path
) -> Report:  # fmt: skip
    """Write the file; if it exceeds `--target-size`, again with a shorter loss curve.

    Returns:
        The report that is in the file.
    """
    limit = run.recipe.target.target_size
    while True:
        manifest = Manifest(
            source=described(run.source, outputs_of(student)),
            source_sha256=source_sha256,
            plan=run.plan,
            data_config=run.config,
            recipe=to_dict(run.recipe),
            report=to_json(report),
            versions=report.versions,
            classes=run.classes,
            lineage=tuple(to_json(parent) for parent in run.lineage),
            store=report.store,
        )
        write_result(out, student, tensors, manifest, report, run.reporter)
        size, curve = out.stat().st_size, report.train.loss_curve
        if limit is None or size <= limit:
            return report
        if len(curve) <= _MIN_CURVE_POINTS:
            run.reporter.say(f"--target-size {limit:,} bytes is missed: {out} has {size:,}.")
            return report
        run.reporter.say(f"{out} exceeds --target-size {limit:,} bytes: writing it again with half of the loss curve")
        report = replace(report, train=replace(report.train, loss_curve=curve[::-2][::-1]))


def conclude(run: Run, student: nn.Module, reference: Reference, learn: Callable[[], TrainLog]) -> Report:
    """Train and write the file. If training diverges, write the last good state instead.

    Args:
        run: the request.
        student: the student at its start.
        reference: what it is compared with.
        learn: trains the student, in place.

    Raises:
        DivergedError: the training diverged; the message names the file with the last good state.
    """
    out, checkpoints = run.out, run.checkpoints
    with checkpoints.naming_state() if checkpoints else nullcontext():
        try:
            with tracking(run.accelerator, run.recipe, out):
                log = learn()
        except DivergedError as error:
            run.clock.lap("training")
            last_good = out.with_name(f"{out.stem}.last-good{out.suffix}")
            finish(run, student, reference, run.labelled(error.log), last_good)
            raise DivergedError(f"{error} The last good state is in {last_good}.", hint=error.hint) from error
        report = finish(run, student, reference, run.labelled(log), out)
    tell_result(run.reporter, report, out)
    if checkpoints and run.accelerator.is_main_process:
        checkpoints.discard()
    run.accelerator.end_training()
    return report

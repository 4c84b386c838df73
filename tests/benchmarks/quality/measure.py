"""How good is each method? All train equally long on the same images, from the same teacher."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

from tests.benchmarks.quality.methods import (
    METHODS,
    WHOLE,
    Case,
    Method,
    Start,
    UnfitError,
    keep_stored,
    share_for,
)
from tests.benchmarks.quality.record import Key, Record, Results
from tests.benchmarks.quality.subjects import Batches, Labelled, Sets, Subject, logits_of
from vitcompress.data.augmentation import Mixing
from vitcompress.distill.fading import fading
from vitcompress.distill.loop import distill
from vitcompress.distill.matching import ComparedModel, match_models
from vitcompress.distill.settings import TrainSettings
from vitcompress.distill.state import DivergedError
from vitcompress.families.registry import family_of
from vitcompress.measure.macs import macs_of
from vitcompress.recipe import DistillRecipe


@dataclass(frozen=True)
class Schedule:
    """What is run.

    Attributes:
        methods: names in `METHODS`.
        ratios: sizes aimed at.
        learning_rates: of which each method has the best, found at the first seed.
        seeds: at the best learning rate.
        steps: of each training.
        choosing_steps: of the trainings that the learning rate is chosen by.
    """

    methods: Sequence[str]
    ratios: Sequence[str]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    steps: int
    choosing_steps: int


Load = Callable[[], tuple[nn.Module, Sets]]


class Comparison:
    """Runs what a schedule asks for and the results do not have yet.

    Args:
        subject: the model.
        load: gives the teacher and the images; called where there is something to run.
        results: gets the records.
    """

    def __init__(self, subject: Subject, load: Load, results: Results) -> None:
        self.subject, self.load, self.results = subject, load, results
        self.loaded: tuple[nn.Module, Sets] | None = None
        self.start: tuple[Any, Start, float] | None = None  # the last one built, its key, and its top-1

    def run(self, schedule: Schedule) -> None:
        """Run it, method by method."""
        for names in self._alike([name for name in schedule.methods if METHODS[name].whole]):
            self._run_once(WHOLE, names, lr=0.0, seed=0, steps=0)
        for ratio in schedule.ratios:
            for names in self._alike([name for name in schedule.methods if not METHODS[name].whole]):
                self._run_method(ratio, names, schedule)

    def _alike(self, names: Sequence[str]) -> list[list[str]]:
        """Group the methods that share a training and differ only in how they are stored."""
        found: dict[Any, list[str]] = {}
        for name in names:
            method = METHODS[name]
            key = method.build, tuple(method.losses.items()), tuple(self._options(method).items())
            found.setdefault(key, []).append(name)
        return list(found.values())

    def _options(self, method: Method) -> Mapping[str, Any]:
        return self.subject.ours if method.ours else {}

    def _run_method(self, ratio: str, names: Sequence[str], schedule: Schedule) -> None:
        """Find the learning rate at the first seed, then run the other seeds by it."""
        if all(Key(self.subject.model, ratio, name, 0.0, 0, 0) in self.results.records for name in names):
            return  # there is no such student
        first, shorter = schedule.seeds[0], schedule.choosing_steps < schedule.steps
        try:
            tried = [
                self._run_once(ratio, names, lr=lr, seed=first, steps=schedule.choosing_steps, test=not shorter)
                for lr in schedule.learning_rates
            ]
        except UnfitError as error:
            for name in names:
                self.results.add(Record(self.subject.model, ratio, name, unfit=str(error)))
                sys.stderr.write(f"{self.subject.model} {ratio} {name}: left out, {error}\n")
            return
        lr = max(tried, key=lambda record: record.rank).lr
        for seed in schedule.seeds:
            self._run_once(ratio, names, lr=lr, seed=seed, steps=schedule.steps)

    def _run_once(
        self, ratio: str, names: Sequence[str], *, lr: float, seed: int, steps: int, test: bool = True
    ) -> Record:
        """Train and measure once, unless that is done; the record of the first method."""
        keys = [Key(self.subject.model, ratio, name, lr, seed, steps) for name in names]
        known = [self.results.records.get(key) for key in keys]
        if any(record is None or (test and record.top1 is None) for record in known):
            self._measure(keys, test=test)
        return self.results.records[keys[0]]

    def _measure(self, keys: Sequence[Key], *, test: bool) -> None:
        """Train once, and record it for every one of the methods."""
        self.loaded = self.loaded or self.load()
        sets = self.loaded[1]
        key, method = keys[0], METHODS[keys[0].method]
        start, start_top1 = self._started(key, method)
        student, began, diverged = copy.deepcopy(start.student), time.perf_counter(), False
        if key.steps:
            try:
                self._train(student, start, method, key)
            except DivergedError:
                diverged = True
        record = Record(
            *key, batch_size=self.subject.batch_size, start_top1=start_top1,
            seconds=round(time.perf_counter() - began, 1), diverged=diverged,
            num_params=sum(p.numel() for p in student.parameters()),
            macs=macs_of(copy.deepcopy(student).to("meta").eval(), sets.input_size),
        )  # fmt: skip
        for other in keys:
            stored = copy.deepcopy(student)
            num_bytes = keep_stored(stored, METHODS[other.method].store)
            top1, agreement, _ = score(stored, sets.test) if test else (None, 0.0, 0.0)
            held_out_top1, _, held_out_kl = score(stored, sets.held_out)
            self.results.add(replace(
                record, method=other.method, num_bytes=num_bytes, top1=top1, agreement=agreement,
                held_out_top1=held_out_top1, held_out_kl=held_out_kl,
            ))  # fmt: skip
            reached = f"{top1:.2f} %" if top1 is not None else f"{held_out_top1:.2f} % held out"
            sys.stderr.write(
                f"{other.model} {other.ratio} {other.method} lr {other.lr:g} seed {other.seed}, {other.steps} steps: "
                f"{start_top1:.2f} → {reached} in {record.seconds:.1f} s\n"
            )

    def _started(self, key: Key, method: Method) -> tuple[Start, float]:
        """Return the untrained student and its top-1; cached, as the next run is often the same."""
        assert self.loaded is not None
        teacher, sets = self.loaded
        wanted = key.ratio, method.build, key.seed if method.random else 0
        if self.start is None or self.start[0] != wanted:
            if method.whole:
                share, budget_params = 1, sum(p.numel() for p in teacher.parameters())
            else:
                share, budget_params = share_for(teacher, key.model, key.ratio)
            case = Case(
                teacher, key.model, share, budget_params, sets.calibration, sets.input_size,
                seed=key.seed if method.random else 0,
            )  # fmt: skip
            start = method.build(case)
            self.start = wanted, start, score(start.student, sets.test)[0]
        return self.start[1], self.start[2]

    def _train(self, student: nn.Module, start: Start, method: Method, key: Key) -> None:
        """Train a student, in place."""
        assert self.loaded is not None
        teacher, sets = start.source, self.loaded[1]
        recipe = training_recipe(method, start, self._options(method), lr=key.lr, steps=key.steps)
        sides = [ComparedModel(key.model, model, sets.input_size) for model in (student, teacher)]
        matching = match_models(sides[0], sides[1], recipe)
        set_seed(key.seed)
        fade = fading(student, teacher, start.plan, recipe.fade) if start.plan else nullcontext(lambda done: None)
        AcceleratorState._reset_state()  # the model before may have trained in another precision
        with fade as before_step:
            settings = TrainSettings(
                recipe,
                matching,
                blocks=family_of(student, key.model).block_names(student),
                matrices=start.plan.matrices if start.plan else (),
                input_size=sets.input_size,
                num_steps=key.steps,
                seed=key.seed,
                mixing=Mixing(seed=key.seed),
                before_step=before_step,
            )
            distill(
                student,
                teacher,
                lambda start: Batches(sets, self.subject.batch_size, key.seed, key.steps),
                settings,
                accelerator=Accelerator(cpu=True, mixed_precision=self.subject.precision),
                ticker=_Silent(),
            )


class _Silent:
    def step(self, *, done: float, loss: float, images_per_second: float, waiting: float = 0.0) -> None:
        """Say nothing."""


def training_recipe(
    method: Method, start: Start, options: Mapping[str, Any], *, lr: float, steps: int
) -> DistillRecipe:
    """How a method trains.

    Args:
        method: with its losses.
        start: with its plan.
        options: that the product brings for the model; they are for blocks that share whole
            matrices, and are left out where a plan does anything else: what is narrow or factored
            has no matrices to fade out or for Muon.
        lr: peak learning rate of AdamW; Muon's keeps its proportion to it.
        steps: of training.
    """
    plain = start.plan is not None and all(group.is_plain and group.shared for group in start.plan.groups)
    recipe = DistillRecipe(steps=steps, loss=dict(method.losses), lr=lr, **(options if plain else {}))
    return replace(recipe, matrix_lr=MUON_OVER_ADAMW * lr)


MUON_OVER_ADAMW = 10.0  # what the built-in model's recipe has: 0.02 over 0.002


def score(model: nn.Module, images: Labelled) -> tuple[float, float, float]:
    """Return top-1 and agreement with the teacher in percent, and divergence in nats per image."""
    logits = logits_of(model, images.images)
    found, theirs = logits.argmax(1), images.teacher_logits.argmax(1)
    log_q, log_p = F.log_softmax(logits, 1), F.log_softmax(images.teacher_logits, 1)
    return (
        round(100 * float((found == images.labels).float().mean()), 4),
        round(100 * float((found == theirs).float().mean()), 4),
        round(float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)), 6),
    )

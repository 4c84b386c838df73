"""Measure a search's options, or take them from a file; keep them, and what is measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vitcompress.artifact.digest import sha256_of
from vitcompress.artifact.paths import check_no_weights, check_not_an_input
from vitcompress.data.calibration import Drawing
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.distill.checkpoints import Checkpoints
from vitcompress.distill.facts import images_digest
from vitcompress.errors import VitcompressError
from vitcompress.families.outputs import outputs_of
from vitcompress.pipeline.checks import check_writable, files_read
from vitcompress.pipeline.run import Run
from vitcompress.recipe import Recipe
from vitcompress.runtime.signals import TerminationError
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import Search
from vitcompress.search.progress import Progress, kept_facts
from vitcompress.search.saved import load_options, read_options, save_options

_NUM_FITTED = "--calibration-images"  # a fact: how many there are


@dataclass(frozen=True)
class Place:
    """Where a search keeps what it measures.

    Attributes:
        options: the options, when all are measured.
        progress: the state of a measurement that is interrupted.
        lasts: whether the options are a result; otherwise they only outlive an interruption.
    """

    options: Path
    progress: Path
    lasts: bool

    @classmethod
    def beside(cls, options: Path | None) -> Place | None:
        """Return the place of an options file that a user names; None for None."""
        return cls(options, options.with_name(f"{options.name}.part"), True) if options else None

    @classmethod
    def of(cls, checkpoints: Checkpoints | None) -> Place | None:
        """Return the place among the checkpoints of a compression; None without any."""
        return cls(checkpoints.options, checkpoints.search, False) if checkpoints else None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the measured options when the context is interrupted; drop them after a mistake."""
        try:
            yield
        except (KeyboardInterrupt, TerminationError) as error:
            message = f"The measured options are in {self.options}: the same command with --resume uses them."
            raise type(error)(message) from error
        except VitcompressError:
            if not self.lasts:
                self.options.unlink(missing_ok=True)
                with suppress(OSError):  # other files are in it
                    self.options.parent.rmdir()
            raise


def check_save(recipe: Recipe, save: Path) -> None:
    """Make sure, before anything is measured, that options can be written to a file.

    Args:
        recipe: what to do; the file is none that it reads.
        save: path of the options.

    Raises:
        RecipeError: they cannot.
    """
    check_writable("--save", save)
    check_no_weights("--save", save)
    check_not_an_input("--save", save, files_read(recipe))


def measured_options(
    run: Run, search: Search, kinds: Sequence[str], tell: Callable[[float], None], place: Place | None
) -> MeasuredOptions:
    """Return a run's options: from `--options`, as an interrupted run kept them, or measured.

    Args:
        run: the request.
        search: the search for it.
        kinds: kinds of options.
        tell: called with the share that is done, 0–1.
        place: where the options are kept, too; None keeps nothing.

    Raises:
        VitcompressError: a file is of another model, other images or settings.
    """
    recipe, say = run.recipe, run.reporter.say
    if recipe.target.options is None and place is None:
        return search.measure(kinds, tell)
    facts = measured_facts(run, search.teacher)
    if recipe.target.options is not None:
        measured = load_options(recipe.target.options, search.shapes(kinds), facts)
        say(f"options: {len(measured.options):,} from {recipe.target.options}, not measured again")
        return measured
    assert place is not None  # see above
    resume = recipe.run.resume
    if not resume:
        place.progress.unlink(missing_ok=True)
    elif not place.progress.exists() and place.options.exists():
        measured = load_options(place.options, search.shapes(kinds), facts)
        say(f"continuing from the options in {place.options}")
        return measured
    elif not place.progress.exists():
        say(f"--resume: there is no {place.progress}; measuring from the beginning")
    progress = Progress(place.progress, {**facts, "--kinds": ",".join(kinds)}, resume, say)
    measured = search.measure(kinds, tell, progress)
    place.options.parent.mkdir(exist_ok=True)
    save_options(place.options, measured, facts)
    place.progress.unlink(missing_ok=True)
    return measured


def images_kept(place: Place | None) -> int | None:
    """Return the number of images that an interrupted search was fitted to, where that is kept.

    Args:
        place: where the search keeps what it measures; None keeps nothing.
    """
    count = None
    if place is not None:
        with suppress(VitcompressError):  # raised again, with a hint, when the file is used
            if place.progress.exists():
                count = kept_facts(place.progress).get(_NUM_FITTED)
            elif place.options.exists():
                count = read_options(place.options).facts.get(_NUM_FITTED)
    return count if isinstance(count, int) else None


def measured_facts(run: Run, source: nn.Module) -> dict[str, str | int | None]:
    """Return what the costs of options depend on, as JSON values by flag or name.

    Args:
        run: the request, its calibration images drawn.
        source: the model to compress.
    """
    assert run.train is not None  # `prepare` made sure
    recipe, drawing = run.recipe, run.drawing
    return {
        "model.sha256": sha256_of(source.state_dict()),
        "outputs": outputs_of(source).name,
        "preprocessing": describe_preprocessing(run.config),
        "training images": images_digest(run.train),
        _NUM_FITTED: len(drawing.fitted),
        "images fitted to": _digest(drawing, drawing.fitted),
        "images judged on": _digest(drawing, drawing.judged),
        "--width-multiple": recipe.target.width_multiple,
        "--transforms": ",".join(recipe.plan.transforms or ()) or "none",
        "--token-kernel": recipe.plan.token_kernel,
    }


def _digest(drawing: Drawing, positions: Sequence[int]) -> str:
    """Return the number of drawn images, and a digest of which ones they are."""
    text = json.dumps([drawing.seed, *positions])
    return f"{len(positions):,} images, {hashlib.sha256(text.encode()).hexdigest()[:16]}"

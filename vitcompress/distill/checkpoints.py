"""Keep the state of a training beside its output, and continue an interrupted run from it.

    <stem>.checkpoints/
      search.safetensors     what an interrupted search has measured
      options.json           its options, when all are measured, until the plan is settled
      run.json               the recipe, and what was settled before training: plan, learning rate
      step-00000500/         accelerate's state of model, optimizers and random numbers
        counters.json        steps, images, loss curve
        weights.safetensors  the last good weights, and the running mean if there is one

A state is written as a whole or not at all. Nothing is unpickled except by
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from vitcompress.artifact.atomic import write_text
from vitcompress.distill.state import TrainState, set_parameters
from vitcompress.errors import ArtifactError, RecipeError, TrainingError, first_line
from vitcompress.recipe import Interval
from vitcompress.recipe.differences import describe_differences
from vitcompress.runtime.processes import from_main
from vitcompress.runtime.signals import TerminationError

KEPT_STATES = 2
MIN_SECONDS_TO_KEEP = 60.0  # shorter trainings keep no state at their end, unless they kept one before
_STATES = "step-" + 8 * "[0-9]"


class Checkpoints:
    """States of one run.

    Args:
        folder: holds the states; created with the first one.
        every: how often to keep the state.
    """

    def __init__(self, folder: Path, every: Interval) -> None:
        self.folder, self.every = folder, every
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.text = ""

    @property
    def options(self) -> Path:
        """Path of the options that a search has measured."""
        return self.folder / "options.json"

    @property
    def search(self) -> Path:
        """Path of the state of a search's measurement."""
        return self.folder / "search.safetensors"

    @classmethod
    def for_output(cls, out: Path, every: Interval | None) -> Checkpoints | None:
        """Return the checkpoints of the run that writes `out`; None without `every`."""
        return cls(out.with_name(f"{out.stem}.checkpoints"), every) if every else None

    def read_run(self) -> dict[str, Any] | None:
        """Return what an interrupted run gave to `begin`; None if there was no such run.

        Raises:
            TrainingError: run.json cannot be read.
        """
        try:
            tree = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            if not (isinstance(tree, dict) and all(isinstance(tree.get(key), dict) for key in ("facts", "settled"))):
                raise ValueError("it does not describe a run")
            return tree
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise TrainingError(f"{self.folder / 'run.json'} cannot be read: {error}.", hint="Delete it.") from error

    def check(self) -> None:
        """Check that the folder holds an interrupted run, or nothing but its states.

        Raises:
            RecipeError: it holds other files and no run.
            TrainingError: its run.json cannot be read.
        """
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_dir() and (self.read_run() or set(self.folder.iterdir()) <= set(self._paths())):
            return
        raise RecipeError(
            f"{self.folder} is where the state of the training is kept, but it holds something else.",
            hint="Use another --out, move the folder away, or give --save-every none.",
        )

    def newest(self) -> Path | None:
        """Return the folder of the newest state; None if there is none."""
        return max(self.folder.glob(_STATES), default=None)

    @contextmanager
    def naming_state(self) -> Iterator[None]:
        """Name the folder of the state, if one was kept, when the context is interrupted."""
        try:
            yield
        except (KeyboardInterrupt, TerminationError) as error:
            if self.saved_step == 0:
                raise
            message = f"Its state is in {self.folder}: the same command with --resume continues from there."
            raise type(error)(message) from error

    def read_settled(
        self, facts: Mapping[str, Any], *, resume: bool, say: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Return what the interrupted run settled before training; None to start a new run.

        Args:
            facts: of this run.
            resume: whether to continue the interrupted run.
            say: shows a message to the user.

        Raises:
            RecipeError: the interrupted run differs from this one; lists every difference.
        """
        run = self.read_run()
        searched = self.options.exists() or self.search.exists()
        if not resume:
            if run or searched:
                say(f"replacing {self.folder} of an interrupted run (--resume would continue it)")
            return None
        if run is None and searched:
            return None  # the search goes on
        if run is None:
            say(f"--resume: there is no {self.folder}; starting from the beginning")
            return None
        lines = describe_differences(run["facts"], json.loads(json.dumps(facts)))
        if lines:
            raise RecipeError(
                "\n".join((f"--resume: the run in {self.folder} differs from this one.", *lines)),
                hint="Use the same options, or leave out --resume to start over.",
            )
        newest = self.newest()
        say(f"continuing from {newest}" if newest else f"continuing from the plan in {self.folder}")
        settled: dict[str, Any] = run["settled"]
        return settled

    def begin(self, facts: Mapping[str, Any], settled: Mapping[str, Any], *, eager: bool) -> None:
        """Start a new run: remove the states of an older one.

        Args:
            facts: what must be equal when the run is resumed.
            settled: what a resumed run need not compute again.
            eager: write now; settling was expensive. Otherwise it is written with the first state.
        """
        self.discard()
        self.text = json.dumps({"facts": facts, "settled": settled})
        if eager:
            with self._writing():
                self._write_run()

    def _write_run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / "run.json", self.text)

    def due(self, steps: int) -> bool:
        """Return whether to keep the state after `steps`, or now if the interval is in seconds."""
        if self.every.steps is not None:
            return steps > self.saved_step and steps % self.every.steps == 0
        assert self.every.seconds is not None
        return steps > self.saved_step and time.monotonic() - self.saved_at >= self.every.seconds

    def worth_it(self, state: TrainState, accelerator: Accelerator) -> bool:
        """Return whether to keep a last state: only after a long training or earlier states."""
        long = from_main(state.seconds() >= MIN_SECONDS_TO_KEEP, accelerator)
        return state.steps > self.saved_step and (long or self.saved_step > 0)

    def save(self, accelerator: Accelerator, state: TrainState, mean: AveragedModel | None) -> Path:
        """Keep the state, and delete all but the newest `KEPT_STATES`. Every process must call it.

        Args:
            accelerator: has prepared model and optimizers.
            state: counters and last good weights.
            mean: running mean of the weights; None without one.

        Returns:
            Folder of the state.

        Raises:
            TrainingError: it cannot be written; earlier states stay as they are.
        """
        target = self.folder / f"step-{state.steps:08}"
        beside = self.folder / f".{target.name}.part"
        with self._writing(beside):
            if accelerator.is_main_process:
                if self.text:
                    self._write_run()
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(beside))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _write_state(beside, state, mean)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(beside, target)
                for old in sorted(self.folder.glob(_STATES))[:-KEPT_STATES]:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()
        self.saved_at, self.saved_step = time.monotonic(), state.steps
        return target

    def restore(self, accelerator: Accelerator, state: TrainState, mean: AveragedModel | None) -> None:
        """Load the newest state, if any, into model, optimizers, `state` and `mean`, in place.

        Raises:
            TrainingError: it cannot be read.
        """
        folder = self.newest()
        if folder is None:
            return
        device = accelerator.device
        try:
            accelerator.load_state(str(folder))
            weights = load_file(folder / "weights.safetensors")
            counters = json.loads((folder / "counters.json").read_text(encoding="utf-8"))
            averaged = counters.pop("averaged")
        except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
            raise TrainingError(
                f"{folder} cannot be read: {first_line(error)}.",
                hint="Delete this folder to continue from the state before it.",
            ) from error
        state.resume(counters, [weights[f"good.{i}"].to(device) for i in range(len(state.good))])
        if mean:
            mean.n_averaged.fill_(averaged)
            set_parameters(mean.module, (weights[f"mean.{i}"] for i in range(len(state.good))))
        self.saved_at, self.saved_step = time.monotonic(), state.steps

    def discard(self) -> None:
        """Delete the states of a finished run, and their folder if nothing else is in it."""
        for path in self._paths():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        """Return the files and folders that this class has written."""
        names = ("run.json", self.options.name, self.search.name)
        patterns = (*names, *(f".{name}.*" for name in names), _STATES, f".{_STATES}.part")
        return [path for pattern in patterns for path in self.folder.glob(pattern)]

    @contextmanager
    def _writing(self, beside: Path | None = None) -> Iterator[None]:
        """Explain errors of writing, and delete the unfinished state `beside`."""
        try:
            yield
        except BaseException as error:  # a second Ctrl-C does not wait for the state
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            # torch and safetensors raise their own errors for a full disk
            if not isinstance(error, (OSError, RuntimeError, SafetensorError, ArtifactError)):
                raise
            cause = error.__cause__ if isinstance(error, ArtifactError) and error.__cause__ else error
            newest = self.newest()
            hint = f"The last good state is {newest}: --resume continues from there." if newest else ""
            raise TrainingError(
                f"{self.folder}: the state of the training cannot be written: {first_line(cause)}.",
                hint=hint or "Free some space there.",
            ) from error


def _write_state(folder: Path, state: TrainState, mean: AveragedModel | None) -> None:
    """Write weights and counters next to accelerate's files, and flush everything to disk."""
    weights = {f"good.{i}": tensor.cpu().contiguous() for i, tensor in enumerate(state.good)}
    for i, p in enumerate(mean.module.parameters() if mean else ()):
        weights[f"mean.{i}"] = p.detach().cpu().contiguous()
    save_file(weights, folder / "weights.safetensors")
    averaged = int(mean.n_averaged) if mean else 0
    text = json.dumps({**state.counters(), "averaged": averaged})
    (folder / "counters.json").write_text(text, encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

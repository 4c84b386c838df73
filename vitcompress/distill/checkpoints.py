"""How does a run go on after an interruption?  From the states kept beside its output, each whole or not there at all.

    <stem>.checkpoints/
      run.json               what was asked for, and what had to be found out for it: plan, learning rate
      step-00000500/         accelerate's state of model, optimizers and random numbers;
        counters.json        steps, images, loss curve
        weights.safetensors  the last good weights, and the running mean where there is one

Nothing in it is unpickled but what `torch.load(weights_only=True)` lets through.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import StreamReader
from vitcompress.distill.run import Run
from vitcompress.errors import RecipeError, TrainingError, first_line
from vitcompress.recipe import Interval
from vitcompress.recipe.values import flag_of
from vitcompress.runtime.processes import from_main
from vitcompress.runtime.signals import TerminationError

KEPT = 2
WORTH_KEEPING_SECONDS = 60.0  # of training, where it comes to its end before any state was kept
_STATES = "step-" + 8 * "[0-9]"
_DECIDES_NOTHING = {  # of what comes out: where it runs, what is watched, and what the result must reach
    "run": ("resume", "save_every", "log_with", "num_processes", "device", "cache_teacher"),
    "data": ("num_workers",),
    "gates": None,
    "model": ("checkpoint",),  # its weights are compared
    "teacher": ("teacher_checkpoint",),
}


class Checkpoints:
    """The states of one run.

    Args:
        folder: where they are; made when there is something to keep.
        every: how often the state is kept.
    """

    def __init__(self, folder: Path, every: Interval) -> None:
        self.folder, self.every = folder, every
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.text = ""

    @classmethod
    def of(cls, out: Path, every: Interval | None) -> Checkpoints | None:
        """Those of the run that writes `out`; None where none are kept."""
        return cls(out.with_name(f"{out.stem}.checkpoints"), every) if every else None

    def found(self) -> dict[str, Any] | None:
        """What `begin` was told by the run that was interrupted; None where there was none."""
        try:
            tree = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            if not (isinstance(tree, dict) and all(isinstance(tree.get(key), dict) for key in ("facts", "settled"))):
                raise ValueError("it does not say what the run was")
            return tree
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise TrainingError(f"{self.folder / 'run.json'} cannot be read: {error}.", hint="Remove it.") from error

    def check(self) -> None:
        """Make sure that the folder holds no files of anybody else's.

        Raises:
            RecipeError: it does, and no state beside them.
            TrainingError: its run.json says nothing of a run.
        """
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_dir() and (self.found() or set(self.folder.iterdir()) <= set(self._own())):
            return
        raise RecipeError(
            f"{self.folder} is where the state of the training would be kept, and holds something else.",
            hint="Name another --out, move it away, or give --save-every none.",
        )

    def newest(self) -> Path | None:
        """The newest state; None where there is none."""
        return max(self.folder.glob(_STATES), default=None)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let an interruption of the block say where the state is, if there is one."""
        try:
            yield
        except (KeyboardInterrupt, TerminationError) as error:
            if self.saved_step == 0:
                raise
            kept = f"Its state is in {self.folder}: the same command with --resume goes on from there."
            raise type(error)(kept) from error

    def resumed(self, facts: Mapping[str, Any], *, resume: bool, say: Callable[[str], None]) -> dict[str, Any] | None:
        """What was settled by the run that shall go on; None where a new one starts.

        Args:
            facts: of this run.
            resume: whether the user asked to go on.
            say: told what there is.

        Raises:
            RecipeError: the run to go on from is another one; names every difference.
        """
        found = self.found()
        if not resume:
            if found:
                say(f"{self.folder} is of an interrupted run, and is replaced (--resume would go on from it).")
            return None
        if found is None:
            say(f"--resume: there is no {self.folder}, so it starts from the beginning.")
            return None
        lines = differences(found["facts"], json.loads(json.dumps(facts)))
        if lines:
            raise RecipeError(
                "\n".join((f"--resume: the run in {self.folder} is another one.", *lines)),
                hint="Ask for the same, or leave --resume out to start over.",
            )
        newest = self.newest()
        say(f"going on from {newest}" if newest else f"going on from the plan in {self.folder}")
        settled: dict[str, Any] = found["settled"]
        return settled

    def begin(self, facts: Mapping[str, Any], settled: Mapping[str, Any], *, dear: bool) -> None:
        """Make room for the states of a new run; those of an older one go.

        Args:
            facts: what must be the same where the run is resumed.
            settled: what need not be found out again.
            dear: that took long to find out: it is kept at once, and not just with the first state.
        """
        self.discard()
        self.text = json.dumps({"facts": facts, "settled": settled})
        if dear:
            with self._writing():
                self._write_run()

    def _write_run(self) -> None:
        self.folder.mkdir(exist_ok=True)
        beside = self.folder / ".run.json.part"
        beside.write_text(self.text, encoding="utf-8")
        os.replace(beside, self.folder / "run.json")

    def due(self, steps: int) -> bool:
        """Whether it is time to keep the state, by this process's clock where time decides."""
        if self.every.steps is not None:
            return steps > self.saved_step and steps % self.every.steps == 0
        assert self.every.seconds is not None
        return steps > self.saved_step and time.monotonic() - self.saved_at >= self.every.seconds

    def worth_it(self, run: Run, accelerator: Accelerator) -> bool:
        """Whether the state at the end of a training is worth keeping: of a short one none is, unless one was kept."""
        long = from_main(run.seconds() >= WORTH_KEEPING_SECONDS, accelerator)
        return run.steps > self.saved_step and (long or self.saved_step > 0)

    def save(self, accelerator: Accelerator, run: Run, mean: AveragedModel | None) -> Path:
        """Keep the state, and only the newest `KEPT`. Every process calls it, and the main one writes.

        Args:
            accelerator: has prepared model and optimizers.
            run: counters and last good weights.
            mean: running mean of the weights, where there is one.

        Returns:
            Its folder.

        Raises:
            TrainingError: it cannot be written; those kept before are whole.
        """
        target = self.folder / f"step-{run.steps:08}"
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
                weights = {f"good.{i}": tensor.cpu().contiguous() for i, tensor in enumerate(run.good)}
                for i, p in enumerate(mean.module.parameters() if mean else ()):
                    weights[f"mean.{i}"] = p.detach().cpu().contiguous()
                save_file(weights, beside / "weights.safetensors")
                averaged = int(mean.n_averaged) if mean else 0
                text = json.dumps({**run.counters(), "averaged": averaged})
                (beside / "counters.json").write_text(text, encoding="utf-8")
                shutil.rmtree(target, ignore_errors=True)
                os.replace(beside, target)
                for old in sorted(self.folder.glob(_STATES))[:-KEPT]:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()
        self.saved_at, self.saved_step = time.monotonic(), run.steps
        return target

    def restore(self, accelerator: Accelerator, run: Run, mean: AveragedModel | None) -> None:
        """Set everything that trains to the newest state, in place; do nothing where there is none.

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
                hint="Remove that folder to use the one before.",
            ) from error
        run.go_on(counters, [weights[f"good.{i}"].to(device) for i in range(len(run.good))])
        if mean:
            mean.n_averaged.fill_(averaged)
            for i, p in enumerate(mean.module.parameters()):
                p.data.copy_(weights[f"mean.{i}"])
        self.saved_at, self.saved_step = time.monotonic(), run.steps

    def discard(self) -> None:
        """Remove the states, for the run came to its end, and their folder if nothing else is in it."""
        for path in self._own():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _own(self) -> list[Path]:
        """What this class writes into the folder."""
        return [path for kind in ("run.json", _STATES, f".{_STATES}.part", ".run.json.part")
                for path in self.folder.glob(kind)]  # fmt: skip

    @contextmanager
    def _writing(self, beside: Path | None = None) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have own ones for a full disk
            newest = self.newest()
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            raise TrainingError(
                f"{self.folder}: the state of the training cannot be written: {first_line(error)}.",
                hint=f"The last good one is {newest}: --resume goes on from there." if newest else "Make room there.",
            ) from error
        except KeyboardInterrupt:  # the second one: nobody waits for the rest
            if beside is not None:
                shutil.rmtree(beside, ignore_errors=True)
            raise


def run_facts(recipe: Mapping[str, Any], images: ImageSet | None, **more: Any) -> dict[str, Any]:
    """What decides the weights that come out, so that a run that goes on can be told from another one.

    Args:
        recipe: as it was asked for, as a tree.
        images: to train on.
        **more: digests of weights, versions, counts.
    """
    tree = {}
    for stage, fields in recipe.items():
        left_out = _DECIDES_NOTHING.get(stage, ())
        if left_out is not None:
            tree[stage] = {name: value for name, value in fields.items() if name not in left_out}
    return {"recipe": tree, "training images": images_digest(images) if images else None, **more}


def images_digest(images: ImageSet) -> str:
    """Of the names and labels of the images, in their order, and of where they lie nothing."""
    if isinstance(images.reader, StreamReader):
        return f"a stream of {len(images.reader.urls)} shards, {_sha(images.reader.urls)}"
    names = [images.reader.where(index) for index in images.indices]
    root = len(os.path.dirname(names[0])) if len(names) == 1 else len(_beginning(names))
    labels = [images.labels[index] for index in images.indices] if images.labels is not None else None
    return f"{len(names):,} images, {_sha([[name[root:] for name in names], labels, images.classes])}"


def _sha(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for every fact that is another one, by what the user calls it."""
    older, newer = _flat(before), _flat(now)
    return [
        f"  {name}: {_shown(newer.get(name))}, was {_shown(older.get(name))}"
        for name in sorted(older.keys() | newer.keys())
        if older.get(name) != newer.get(name)
    ]


def _beginning(names: Sequence[str]) -> str:
    """What all names begin with."""
    low, high = min(names), max(names)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves of a tree of facts by what the user calls them: a flag, or a name."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if name == "" and key == "recipe":  # stage → field → value
            for fields in value.values():
                found |= {flag_of(field): each for field, each in fields.items()}
        else:
            found |= _flat(value, f"{name}.{key}" if name else key)
    return found


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)

"""Reports to render, and how one looks on the terminal."""

import io
from dataclasses import replace

from rich.console import Console

from vitcompress.distill.log import TrainLog
from vitcompress.measure.results import Accuracy, Baseline, ClassHits, Speed
from vitcompress.plans.model import Group, Size
from vitcompress.report.model import Report, Result
from vitcompress.report.terminal import print_report

ACCURACY = Accuracy("val", 400, 3, 86.0, 84.5, 97.25, 96.0, 1.5, (-0.2, 3.2), 92.0, 0.21)
REPORT = Report(
    schema_version=1,
    model="deit_base_patch16_224",
    family="vit",
    groups=(5, 5, 2),
    transforms=("heads", "mlp"),
    size=Size(86_567_656, 22_953_064, 3.7715, 346_270_624, 91_812_256, 3.7715, 17_563_828_224, 17_714_209_152, 0.9915),
    accuracy=ACCURACY,
    speed=Speed({"1": 10.0, "32": 100.0}, {"1": 12.0, "32": 110.0}, 2, "cpu"),
    train=TrainLog(500, 64_000, 3, 120.0, 533.3, ({"step": 1, "lr": 1e-3, "loss": 2.0, "logits": 2.0},)),
    data="train",
    versions={"torch": "2.15.0"},
    command="vitcompress compress deit_base --share 5 --out mini.safetensors",
    notes=("Sharing makes a model smaller, not faster: every block is still computed.",),
)
UNLABELLED = replace(
    REPORT, accuracy=Accuracy("flat", 9, 0, None, None, None, None, None, None, 88.0, 0.3), speed=None, train=TrainLog()
)
BASELINES = (
    Baseline("teacher fp16", 86_567_656, 173_135_312, 86.0, 0.0, None, None),
    Baseline("teacher int8", 86_567_656, 87_100_000, 85.75, 0.25, None, None),
)
FULL = replace(
    REPORT,
    accuracy=replace(ACCURACY, classes=(ClassHits(0, 4, 3, 2),)),
    baselines=(Baseline("teacher int8", 9, 9, 85.0, 1.0, None, None),),
    made_of=(Group(("blocks.0", "blocks.1"), ("attn.qkv.weight",)),),
)
CURVE = tuple(
    {"step": float(i), "lr": 1e-3, "loss": 3.0 / i, "logits": 2.0 / i, "hidden": 1.0 / i} for i in range(1, 40)
)
ACCURACY_CURVE = ({"step": 0.0, "images": 256.0, "top1": 70.3125}, {"step": 500.0, "images": 256.0, "top1": 83.984375})
TRAINED = replace(
    REPORT, baselines=BASELINES, train=replace(REPORT.train, loss_curve=CURVE, accuracy_curve=ACCURACY_CURVE),
    seconds={"loading": 4.2, "training": 120.4, "evaluation": 15.6},
)  # fmt: skip
RESULT = Result(
    "mini.safetensors", 92_000_000, TRAINED, {"plan": {"share": 5}, "gates": {"max_drop": 1.0, "min_ratio": None}}
)


def shown(report: Report) -> str:
    """A report as the terminal shows it."""
    console = Console(width=200, file=io.StringIO(), record=True)
    print_report(report, console)
    return console.export_text()

"""Make pretrained Vision Transformers small and fast, after the fact (arXiv:2204.07154).

    import vitcompress
    model = vitcompress.load("mini.safetensors")  # an nn.Module in eval mode

The names below are imported when first used, so that `import vitcompress` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "artifact.load",
    "compress": "pipeline.compress",
    "evaluate": "pipeline.evaluate",
    "finetune": "pipeline.finetune",
    "plan": "pipeline.plan",
    "Recipe": "recipe",
    "Report": "report",
    "VitcompressError": "errors",
}
__all__ = ["Recipe", "Report", "VitcompressError", "compress", "evaluate", "finetune", "load", "plan"]

if TYPE_CHECKING:
    from vitcompress.artifact.load import load
    from vitcompress.errors import VitcompressError
    from vitcompress.pipeline.compress import compress
    from vitcompress.pipeline.evaluate import evaluate
    from vitcompress.pipeline.finetune import finetune
    from vitcompress.pipeline.plan import plan
    from vitcompress.recipe import Recipe
    from vitcompress.report.model import Report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

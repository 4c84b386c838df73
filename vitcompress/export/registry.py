"""The formats that `vitcompress export` writes; a new one is one module and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from vitcompress.export.executorch import EXECUTORCH
from vitcompress.export.format import Format
from vitcompress.export.hf import HF
from vitcompress.export.onnx import ONNX
from vitcompress.export.pt2 import PT2
from vitcompress.export.timm import TIMM

FORMATS: Mapping[str, Format] = {"onnx": ONNX, "pt2": PT2, "executorch": EXECUTORCH, "timm": TIMM, "hf": HF}

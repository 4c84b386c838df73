"""Export artifacts to other formats: one module per format, listed in `registry`."""

from vitcompress.export.export import NUM_IMAGES, Exported, export
from vitcompress.export.registry import FORMATS

__all__ = ["FORMATS", "NUM_IMAGES", "Exported", "export"]

"""Export artifacts to other formats: one module per format, `export.py` for the function."""

from vitcompress.export.export import FORMATS, NUM_IMAGES, Exported, export

__all__ = ["FORMATS", "NUM_IMAGES", "Exported", "export"]

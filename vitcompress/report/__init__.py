"""The numbers of a result, and how they are shown on the terminal, in Markdown and in HTML."""

from vitcompress.report.model import Report

__all__ = ["Report"]

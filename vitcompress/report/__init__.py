"""What came out: `Report` holds every number that a user is shown; the renderings only lay it out."""

from vitcompress.report.model import Report

__all__ = ["Report"]

"""Keep what libraries print, warn of and log away from the streams of the command."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_library_output() -> Iterator[None]:
    """Discard what timm and torch print, warn of and log while they read or convert weights.

    timm prints to stdout, which is for results. What matters in it, `fit` says in its own words.
    """
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)

"""Where pictures go: known to be writable before anything is measured for minutes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def directory(text: str) -> Path:
    """For argparse's `type`: the directory *text*, which is made if it is not there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written to")
    return path

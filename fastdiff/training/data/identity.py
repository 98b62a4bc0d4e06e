"""Whether a set is the one that a run was trained on, wherever it lies now. May import: source."""

from __future__ import annotations

import hashlib

from .source import Source, evenly

_PICTURES = 16


def fingerprint(source: Source) -> str:
    """A hash of up to 16 pictures, evenly spread over the set, and of their labels."""
    pictures, labels = source.fetch(evenly(len(source), _PICTURES))
    digest = hashlib.sha256(pictures.cpu().numpy().tobytes())
    if labels is not None:
        digest.update(labels.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

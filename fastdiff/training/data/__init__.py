"""Training data: `open_data` reads a folder or file of any supported kind as one `Source`."""

from .formats import open_data
from .source import Resident, Source

__all__ = ["Resident", "Source", "open_data"]

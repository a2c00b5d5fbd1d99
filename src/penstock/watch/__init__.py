"""What is seen of a run: its events, written and read as TensorBoard event files."""

from penstock.watch.events import EventWriter
from penstock.watch.reader import Events, Histogram, Scalars, Text, read_events

__all__ = ["EventWriter", "Events", "Histogram", "Scalars", "Text", "read_events"]

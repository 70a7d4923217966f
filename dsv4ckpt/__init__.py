"""DeepSeek-V4 checkpoints: formats, names, plans, readers, writers.  Prints nothing; importing it imports no torch."""

__version__ = "0.1.0"

"""Find where time and memory go when a transformer is fine-tuned."""

__version__ = "0.1.0"

"""Reads a trace: events, attribution, breakdown. Imports no torch."""

from peftprof.trace.loading import Loaded, load

__all__ = ["Loaded", "load"]

"""Reads a trace: events, attribution, breakdown. Imports no torch."""

from peftprof.trace.sources import Loaded, load

__all__ = ["Loaded", "load"]

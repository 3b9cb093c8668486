"""Reads a trace: events, attribution, breakdown. Imports no torch."""

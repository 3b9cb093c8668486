"""Formats results; computes nothing."""

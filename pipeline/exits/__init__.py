"""Nets with exits, of any family: their policies, their losses, and each exit as a module."""

"""Modules that replace or extend the layers of a block."""

"""Adapter files: saved, checked against a base, converted to kohya's format and back."""

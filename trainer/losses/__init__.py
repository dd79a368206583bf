"""Balanced losses for streams. Importing them needs torch alone."""

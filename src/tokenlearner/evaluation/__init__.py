"""Scoring saved models, one small file per protocol."""

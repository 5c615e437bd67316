"""Weights in and out: loading, official checkpoints, conversion."""

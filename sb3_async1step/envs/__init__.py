"""Envs that are made for several workers."""

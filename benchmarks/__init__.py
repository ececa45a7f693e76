"""Ratios against named alternatives, measured in one run, and what holds on a real CLIP. `make bench`, `make real`."""

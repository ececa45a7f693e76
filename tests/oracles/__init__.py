"""Slow, plain re-statements of the formulas, in float64 and with loops; nothing here imports clip_lens_ext."""

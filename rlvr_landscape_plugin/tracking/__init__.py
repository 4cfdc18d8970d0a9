"""Watching from afar: a sweep's points and a training run's steps, sent to Weights & Biases or to trackio."""

from rlvr_landscape_plugin.tracking.tracker import Guard, project_of, require, set_defaults, sweep_display

__all__ = ["Guard", "project_of", "require", "set_defaults", "sweep_display"]

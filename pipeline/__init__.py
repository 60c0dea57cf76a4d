"""Whole jobs, composed of stages: what each command runs."""

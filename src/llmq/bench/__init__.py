"""Workloads, the metrics of a run, and what it ran on."""

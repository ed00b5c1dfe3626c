"""Checkpoints of a training run: when, how they are written, and how a run goes on from one."""

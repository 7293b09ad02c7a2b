"""Accelerations: functions from trained runs to a run that samples in less time."""

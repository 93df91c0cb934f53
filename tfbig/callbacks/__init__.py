"""Callbacks: backups, a monitor of the course of training, and what changes it in its course."""

from tfbig.callbacks._backup_and_restore import PREEMPTED, BackupAndRestore
from tfbig.callbacks._batch_size_schedule import BatchSizeSchedule
from tfbig.callbacks._chief_only import ChiefOnly
from tfbig.callbacks._monitor import TrainingMonitor
from tfbig.callbacks._spike_guard import SpikeGuard

__all__ = (
    "PREEMPTED",
    "BackupAndRestore",
    "BatchSizeSchedule",
    "ChiefOnly",
    "SpikeGuard",
    "TrainingMonitor",
)

"""Callbacks: backups that training resumes from, a monitor of its course, and what changes it."""

from tfbig.callbacks._backup_and_restore import PREEMPTED, BackupAndRestore
from tfbig.callbacks._batch_size_schedule import BatchSizeSchedule
from tfbig.callbacks._chief_only import ChiefOnly
from tfbig.callbacks._monitor import TrainingMonitor

__all__ = ("PREEMPTED", "BackupAndRestore", "BatchSizeSchedule", "ChiefOnly", "TrainingMonitor")

"""Callbacks: backups that training resumes from, and a monitor of its course."""

from tfbig.callbacks._backup_and_restore import PREEMPTED, BackupAndRestore
from tfbig.callbacks._chief_only import ChiefOnly
from tfbig.callbacks._monitor import TrainingMonitor

__all__ = ("PREEMPTED", "BackupAndRestore", "ChiefOnly", "TrainingMonitor")

"""The output directory of a run: what it holds, and whether a run may begin or resume there."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import command_line

# What every run leaves. Some tasks leave more.
RESULTS = ("history.csv", "curves.png", "model.keras")
_MORE_RESULTS = ("samples.txt", "samples.png")

# Where `tfbig.callbacks.TrainingMonitor` writes, in the output directory.
MONITOR = "monitor"

# The backups of `tfbig.callbacks.BackupAndRestore`: the newest, which is missing after a kill or if
# it was damaged and moved away, and older ones. A program that is killed while it writes leaves
# other files beside them.
_BACKUP = re.compile(r"backup(-\d+)?\.npz")

_ABOUT = "run.json"

# The one key in run.json that is no setting: whether the run is complete.
_COMPLETE = "complete"


class RunDirectory:
    """The output directory of one run.

    Its `run.json` identifies the run by the task and the flags that decide the weights, and says
    whether it is complete.

    Args:
        path: Of the directory.
        settings: What decides the weights, with the key "task".
        backup_dir: Where backups go. None: `backup` in the directory.

    Attributes:
        resumes: After `prepare`, whether there is a backup from which the run resumes.
    """

    def __init__(
        self, path: pathlib.Path | str, settings: dict[str, Any], backup_dir: str | None
    ) -> None:
        self.path = pathlib.Path(path)
        self.settings = settings
        self.has_own_backup = bool(backup_dir)
        self.backup = pathlib.Path(backup_dir or self.path / "backup")
        self.resumes = False

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Checks that a run may begin here or, with `resume`, continue.

        Makes the directories and changes nothing else.

        Raises:
            UsageError: If it may not; the message says what to do instead.
        """
        about = {} if overwrite else self._read_about(self.path)
        # Without the key, only a backup tells that a run was interrupted.
        is_complete = about.pop(_COMPLETE, True)
        is_interrupted = self.holds_backup() or not is_complete
        if not overwrite:
            self._check_task(about)
        if resume:
            self._check_resumable(about, is_interrupted)
        elif about and is_interrupted and self.has_own_backup:
            # A job that restarts with the same flags resumes without being told.
            self._check_same("--backup_dir", self.path, about)
        elif not overwrite:
            self._check_free(is_interrupted)
        self.resumes = self.holds_backup() and not overwrite
        if self.resumes and self.has_own_backup:
            # The backup may belong to a run in another directory.
            theirs = self._read_about(self.backup)
            theirs.pop(_COMPLETE, None)
            self._check_same("--backup_dir", self.backup, theirs)
        self._check_writable(self.path, "output_dir")
        if self.has_own_backup or self.backup.exists():
            self._check_writable(self.backup, "backup_dir")

    def begin(self) -> None:
        """Removes an old run, unless this one resumes it. On the chief only."""
        if not self.resumes:
            shutil.rmtree(self.path / MONITOR, ignore_errors=True)
            for name in (*RESULTS, *_MORE_RESULTS):
                (self.path / name).unlink(missing_ok=True)
            if not self.has_own_backup:
                shutil.rmtree(self.backup, ignore_errors=True)
        self._write_about(is_complete=False)

    def end(self) -> None:
        """Marks the run as complete and removes its own backup. On the chief only."""
        self._write_about(is_complete=True)
        if not self.has_own_backup:
            shutil.rmtree(self.backup, ignore_errors=True)

    def holds_backup(self) -> bool:
        """Whether there is a backup to resume from."""
        return any(_BACKUP.fullmatch(path.name) for path in self.backup.glob("backup*.npz"))

    def _check_writable(self, path: pathlib.Path, flag: str) -> None:
        if re.match(r"\w+:/", str(path)):  # pathlib has collapsed two slashes.
            raise command_line.UsageError(
                f"--{flag} must be a directory of a file system: mount the storage. Received: "
                f"{path}."
            )
        command_line.make_writable(path, flag)

    def _check_task(self, theirs: dict[str, Any]) -> None:
        other = theirs.get("task", self.settings["task"])
        if other != self.settings["task"]:
            raise command_line.UsageError(
                f"--output_dir={self.path} holds a run of --task={other}. Received: "
                f"--task={self.settings['task']}. Choose another directory. "
                f"{self._how_to_start_over()}"
            )

    def _check_free(self, is_interrupted: bool) -> None:
        found = [name for name in RESULTS if (self.path / name).exists()]
        if is_interrupted and not self.has_own_backup and (found or self.holds_backup()):
            raise command_line.UsageError(
                f"--output_dir={self.path} holds a run that was interrupted. Resume it with "
                "--resume, choose another directory, or add --overwrite."
            )
        if found:
            raise command_line.UsageError(
                f"--output_dir={self.path} already holds a run ({', '.join(found)}). Choose "
                f"another. {self._how_to_start_over()}"
            )

    def _check_resumable(self, theirs: dict[str, Any], is_interrupted: bool) -> None:
        if not theirs:
            raise command_line.UsageError(
                f"--resume resumes a run in --output_dir. Received: {self.path}, which holds "
                "none. Name the directory of the run, or leave out --resume."
            )
        self._check_same("--resume", self.path, theirs)
        if not is_interrupted:
            raise command_line.UsageError(
                f"--resume resumes a run that was interrupted. Received: {self.path}, whose "
                f"run is complete. {self._how_to_start_over()}"
            )

    def _check_same(self, flag: str, place: pathlib.Path, theirs: dict[str, Any]) -> None:
        if not theirs:
            return
        names = {**theirs, **self.settings}
        others = [name for name in names if theirs.get(name) != self.settings.get(name)]
        if others:
            said = ", ".join(f"{name}={self.settings.get(name)}" for name in others)
            wanted = ", ".join(f"{name}={theirs.get(name)}" for name in others)
            raise command_line.UsageError(
                f"{flag} resumes the same run only: {place} holds one with {wanted}. Received: "
                f"{said}. Give the flags of that run, or choose other directories."
            )

    def _how_to_start_over(self) -> str:
        if self.has_own_backup:
            return f"Remove it and {self.backup} to start over."
        return "Add --overwrite to start over."

    def _read_about(self, directory: pathlib.Path) -> dict[str, Any]:
        """What run.json in a directory says; empty if there is none."""
        path = directory / _ABOUT
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(about, dict):
                raise ValueError("it is not a dictionary")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise command_line.UsageError(
                f"{path}, which identifies the run in {directory}, cannot be read: {e}. Choose "
                "another directory, or remove this one."
            ) from None
        return about

    def _write_about(self, is_complete: bool) -> None:
        about = json.dumps({**self.settings, _COMPLETE: is_complete}, indent=2)
        # A backup elsewhere gets one too, since another output directory may point at it.
        for directory in (self.path, self.backup) if self.has_own_backup else (self.path,):
            # In one step, since a run may be killed at any time.
            temporary = directory / f"{_ABOUT}.tmp"
            temporary.write_text(about + "\n", encoding="utf-8")
            temporary.replace(directory / _ABOUT)

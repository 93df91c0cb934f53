"""The output directory of a run: what it holds, and whether a run may begin or go on there."""

import json
import pathlib
import re
import shutil

import command_line

# What every run leaves; some tasks leave more.
RESULTS = ("history.csv", "curves.png", "model.keras")
_MORE_RESULTS = ("samples.txt", "samples.png")

# The directory of a `tfbig.callbacks.TrainingMonitor` in it.
MONITOR = "monitor"

# The file of a `tfbig.callbacks.BackupAndRestore`. A program that is killed while it writes leaves
# others beside it.
_BACKUP = "backup.npz"

_ABOUT = "run.json"

# The key in run.json that is no setting: whether all of the run is there.
_COMPLETE = "complete"


class RunDirectory:
    """The output directory of one run.

    `run.json` in it says what run it is: the task and the flags that decide the weights, and
    whether it is complete.

    Args:
        path: path of the directory.
        settings: dict of what decides the weights, "task" among it.
        backup_dir: path that was asked for, or None: `backup` in the directory.

    Attributes:
        goes_on: bool, after `prepare`, whether there is a backup that the run goes on from.
    """

    def __init__(self, path, settings, backup_dir):
        self.path = pathlib.Path(path)
        self.settings = settings
        self.has_own_backup = bool(backup_dir)
        self.backup = pathlib.Path(backup_dir or self.path / "backup")
        self.goes_on = False

    def prepare(self, resume, overwrite):
        """Checks that a run may begin or, with `resume`, go on here.

        Nothing is changed but that the directories are there.

        Raises:
            UsageError: If it may not; the text says what does.
        """
        about = {} if overwrite else self._read_about(self.path)
        # Of a run without the key only a backup tells that it was interrupted.
        is_complete = about.pop(_COMPLETE, True)
        is_interrupted = self.holds_backup() or not is_complete
        if not overwrite:
            self._check_task(about)
        if resume:
            self._check_resumable(about, is_interrupted)
        elif about and is_interrupted and self.has_own_backup:
            # A job that is started again with the same flags goes on without being told.
            self._check_same("--backup_dir", self.path, about)
        elif not overwrite:
            self._check_free(is_interrupted)
        self.goes_on = self.holds_backup() and not overwrite
        if self.goes_on and self.has_own_backup:
            # The backup may be of the run in another directory.
            theirs = self._read_about(self.backup)
            theirs.pop(_COMPLETE, None)
            self._check_same("--backup_dir", self.backup, theirs)
        self._check_writable(self.path, "output_dir")
        if self.has_own_backup or self.backup.exists():
            self._check_writable(self.backup, "backup_dir")

    def begin(self):
        """Makes room for a run; one that goes on keeps what is there. On the chief only."""
        if not self.goes_on:
            shutil.rmtree(self.path / MONITOR, ignore_errors=True)
            for name in (*RESULTS, *_MORE_RESULTS):
                (self.path / name).unlink(missing_ok=True)
            if not self.has_own_backup:
                shutil.rmtree(self.backup, ignore_errors=True)
        self._write_about(is_complete=False)

    def end(self):
        """Says that all is there; a backup in the directory has served. On the chief only."""
        self._write_about(is_complete=True)
        if not self.has_own_backup:
            shutil.rmtree(self.backup, ignore_errors=True)

    def holds_backup(self):
        """Whether there is a backup to go on from."""
        return (self.backup / _BACKUP).exists()

    def _check_writable(self, path, flag):
        if re.match(r"\w+:/", str(path)):  # pathlib has made one slash of two.
            raise command_line.UsageError(
                f"--{flag} must be a directory of a file system; mount the storage. Received: "
                f"{path}."
            )
        command_line.make_writable(path, flag)

    def _check_task(self, theirs):
        other = theirs.get("task", self.settings["task"])
        if other != self.settings["task"]:
            raise command_line.UsageError(
                f"--output_dir={self.path} holds a run of --task={other}. Received: "
                f"--task={self.settings['task']}. Choose another directory. "
                f"{self._to_begin_anew()}"
            )

    def _check_free(self, is_interrupted):
        found = [name for name in RESULTS if (self.path / name).exists()]
        if is_interrupted and not self.has_own_backup and (found or self.holds_backup()):
            raise command_line.UsageError(
                f"--output_dir={self.path} holds a run that was interrupted. Go on with it by "
                "--resume, choose another directory, or add --overwrite."
            )
        if found:
            raise command_line.UsageError(
                f"--output_dir={self.path} already holds a run ({', '.join(found)}). Choose "
                f"another. {self._to_begin_anew()}"
            )

    def _check_resumable(self, theirs, is_interrupted):
        if not theirs:
            raise command_line.UsageError(
                f"--resume goes on with a run in --output_dir. Received: {self.path}, which holds "
                "none. Name the directory of the run, or leave out --resume."
            )
        self._check_same("--resume", self.path, theirs)
        if not is_interrupted:
            raise command_line.UsageError(
                f"--resume goes on with a run that was interrupted. Received: {self.path}, whose "
                f"run is complete. {self._to_begin_anew()}"
            )

    def _check_same(self, flag, place, theirs):
        if not theirs:
            return
        names = {**theirs, **self.settings}
        others = [name for name in names if theirs.get(name) != self.settings.get(name)]
        if others:
            said = ", ".join(f"{name}={self.settings.get(name)}" for name in others)
            wanted = ", ".join(f"{name}={theirs.get(name)}" for name in others)
            raise command_line.UsageError(
                f"{flag} goes on with the same run: {place} holds one with {wanted}. Received: "
                f"{said}. Give the flags of that run, or choose other directories."
            )

    def _to_begin_anew(self):
        if self.has_own_backup:
            return f"Remove it and {self.backup} to train anew."
        return "Add --overwrite to train anew."

    def _read_about(self, directory):
        """What run.json in a directory says; nothing where there is none."""
        path = directory / _ABOUT
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(about, dict):
                raise ValueError("it is not a dictionary")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise command_line.UsageError(
                f"{path} says what run {directory} holds, and cannot be read: {e}. Choose another "
                "directory, or remove this one."
            ) from None
        return about

    def _write_about(self, is_complete):
        about = json.dumps({**self.settings, _COMPLETE: is_complete}, indent=2)
        # A backup elsewhere has one as well, as it may be found from another output directory.
        for directory in (self.path, self.backup) if self.has_own_backup else (self.path,):
            # Whole, and in one step: a run may be killed at any time.
            temporary = directory / f"{_ABOUT}.tmp"
            temporary.write_text(about + "\n", encoding="utf-8")
            temporary.replace(directory / _ABOUT)

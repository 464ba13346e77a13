"""A small file system of its own for disk tiers, that can be filled and frozen. Needs root and loop devices."""

import contextlib
import os
import shutil
import subprocess
import tempfile

TOOLS = ["mkfs.ext4", "mount", "umount", "fsfreeze"]
SECONDS = 60  # a disk that hangs must not hang a test


class LoopDisk:
    """Context manager; `path` is where it is mounted."""

    def __init__(self, mebibytes=192):
        self.size = mebibytes << 20
        self.folder = tempfile.mkdtemp(prefix="tidepool-loop-")
        self.path = os.path.join(self.folder, "disk")
        self.frozen = False

    @staticmethod
    def why_not():
        """Why there can be none here; empty: there can."""
        for tool in TOOLS:
            if shutil.which(tool) is None:
                return f"{tool} is not installed"
        try:
            with LoopDisk(mebibytes=8):
                return ""
        except AssertionError as error:
            return f"no file system can be mounted here: {error}"

    def __enter__(self):
        image = os.path.join(self.folder, "image")
        with open(image, "wb") as file:
            file.truncate(self.size)
        os.mkdir(self.path)
        try:
            _run("mkfs.ext4", "-q", "-F", image)
            _run("mount", "-o", "loop", image, self.path)
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *_):
        self.heal()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["umount", "-l", self.path], capture_output=True, check=False, timeout=SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def freeze(self):
        """Whoever writes waits."""
        _run("fsfreeze", "-f", self.path)
        self.frozen = True

    def fill(self):
        """No byte is left."""
        with open(os.path.join(self.path, "fill"), "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
                file.flush()

    def remove(self):
        """All that is there is unlinked."""
        for name in os.listdir(self.path):
            shutil.rmtree(os.path.join(self.path, name), ignore_errors=True)

    def heal(self):
        if self.frozen:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["fsfreeze", "-u", self.path], capture_output=True, check=False, timeout=SECONDS)
            self.frozen = False
        with contextlib.suppress(OSError):
            os.remove(os.path.join(self.path, "fill"))


def _run(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{' '.join(command)}: hangs") from error
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")

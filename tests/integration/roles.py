"""Single `tidepool ROLE` processes, for clusters that `tidepool serve` does not make. Standard library only."""

import json
import os
import re
import select
import subprocess
import urllib.error
import urllib.request

from harness import eventually
from support import BINARY, ROOT

MODEL = os.path.join(ROOT, "tools", "demo_model", "model")


def cluster_of(serve):
    """Environment by which a role joins the cluster of a Serve, with its model."""
    with open(os.path.join(serve.dir, "tidepool", f"serve-{serve.process.pid}.json")) as file:
        runtime = json.load(file)
    return {
        "TIDEPOOL_CLUSTER_SCHEDULER": runtime["scheduler"],
        "TIDEPOOL_CLUSTER_TOKEN": runtime["token"],
        "TIDEPOOL_MODEL_PATH": MODEL,
        "TIDEPOOL_MODEL_NAME": "demo",
        "XDG_RUNTIME_DIR": serve.dir,
    }


class Role:
    """One process, with its log in `directory`. Context manager: kills what is left of it."""

    def __init__(self, name, args, env, directory, ready_seconds=60):
        """`ready_seconds` 0: does not wait until it is ready."""
        env = {**{key: value for key, value in os.environ.items() if not key.startswith("TIDEPOOL_")}, **env}
        read_end, write_end = os.pipe()
        env["TIDEPOOL_READY_FD"] = str(write_end)
        self.name = name
        self.log_path = os.path.join(directory, f"{name}.log")
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen([BINARY, *args], env=env, stdout=log, stderr=log, pass_fds=[write_end])
        os.close(write_end)
        ready = b""
        if ready_seconds and select.select([read_end], [], [], ready_seconds)[0]:
            ready = os.read(read_end, 4096)
        os.close(read_end)
        if ready_seconds and not ready.startswith(b"READY"):
            self.__exit__()
            raise AssertionError(f"{name} was not ready: {self.log()}")
        self.info = dict(word.split("=", 1) for word in ready.decode().split()[1:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def readyz(self):
        """(status, body) of its /readyz; status 0: no answer."""
        try:
            with urllib.request.urlopen(f"http://{self.listens('http')}/readyz", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def listens(self, what):
        """host:port of its `grpc` or `http`, ready or not."""
        pattern = re.compile(rf"listens: .*\b{what}=(\S+)")
        return eventually(lambda: pattern.search(self.log()), 20, f"{self.name} listens").group(1)

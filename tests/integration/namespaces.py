"""Network namespaces for test clusters: one for each process, all on one bridge in a namespace of its own, so that no
packet leaves what the test made. Links can be cut, dropped one way, or slowed down. Needs root and iproute2."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import threading
import unittest

CLONE_NEWNET = 0x40000000
SLOW = "1mbit"


class Namespaces:
    """Context manager: makes the hub, and takes everything away at the end. The threads of the test that shall reach
    the cluster enter the hub: see `inside`."""

    # Private to the namespaces: nothing outside has a route to it, nor they one to anywhere else.
    network = "10.213.77."
    hub_address = network + "1"

    def __init__(self):
        self.prefix = f"tp{os.getpid()}-{threading.get_ident() % 1000}"
        self.hub = self.prefix + "-hub"
        self.made = []
        self.hosts = {}  # name -> (namespace, link's name in the hub, address)

    @staticmethod
    def why_not():
        """Why there can be none here; empty: there can."""
        if shutil.which("ip") is None or shutil.which("tc") is None:
            return "iproute2 is not installed"
        if shutil.which("nsenter") is None:
            return "nsenter (util-linux) is not installed"
        probe = f"tp{os.getpid()}-probe"
        commands = [
            ["ip", "netns", "add", probe],
            ["ip", "-n", probe, "link", "add", "bridge0", "type", "bridge"],
            ["ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two"],
            ["tc", "-n", probe, "qdisc", "add", "dev", "one", "root", *_tbf(SLOW)],
            ["tc", "-n", probe, "qdisc", "replace", "dev", "one", "root", *_NOTHING],
        ]
        try:
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    return f"network namespaces cannot be made here: {' '.join(command[:4])}: {done.stderr.strip()}"
        finally:
            subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
        return ""

    def __enter__(self):
        _remove_left_behind()
        try:
            self._add(self.hub)
            self._hub("link", "add", "bridge0", "type", "bridge")
            self._hub("addr", "add", self.hub_address + "/24", "dev", "bridge0")
            self._hub("link", "set", "bridge0", "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        # With a namespace go its links.
        for name in reversed(self.made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self.made = []

    def add(self, name):
        """A namespace of its own for `name`, behind a link of its own; its address."""
        if name not in self.hosts:
            number = len(self.hosts) + 2
            space, link, address = f"{self.prefix}-{number}", f"link{number}", f"{self.network}{number}"
            self._add(space)
            self._hub("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._hub("link", "set", link, "master", "bridge0", "up")
            _ip("-n", space, "addr", "add", address + "/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            self.hosts[name] = (space, link, address)
        return self.hosts[name][2]

    def command(self, name):
        """What stands before a command that shall run there. It execs: the process keeps its id."""
        return ["nsenter", f"--net=/run/netns/{self.hosts[name][0]}", "--"]

    @contextlib.contextmanager
    def inside(self, name=None):
        """The calling thread, and the threads and processes that it starts meanwhile, are there (None: in the hub)."""
        space = self.hub if name is None else self.hosts[name][0]
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self._enter(f"/run/netns/{space}")
            yield
        finally:
            _setns(here)
            os.close(here)

    @staticmethod
    def _enter(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            _setns(fd)
        finally:
            os.close(fd)

    # Faults of the link of `name`, until heal().

    def cut(self, name):
        """Neither side sees anything but silence; its own side sees the carrier go."""
        self._hub("link", "set", self.hosts[name][1], "down")

    def drop_outgoing(self, name):
        """What it sends is lost; what is sent to it arrives."""
        self._shape(name, outgoing=_NOTHING)

    def slow(self, name, rate=SLOW):
        self._shape(name, outgoing=_tbf(rate), incoming=_tbf(rate))

    def heal(self, name):
        space, link, _ = self.hosts[name]
        self._hub("link", "set", link, "up")
        for where, device in ((space, "eth0"), (self.hub, link)):
            subprocess.run(["tc", "-n", where, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)

    def _shape(self, name, outgoing=None, incoming=None):
        space, link, _ = self.hosts[name]
        for where, device, how in ((space, "eth0", outgoing), (self.hub, link, incoming)):
            if how is not None:
                _run(["tc", "-n", where, "qdisc", "replace", "dev", device, "root", *how])

    def _add(self, namespace):
        _ip("netns", "add", namespace)
        self.made.append(namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _hub(self, *words):
        _ip("-n", self.hub, *words)


def needs_namespaces():
    reason = Namespaces.why_not()
    if reason:
        raise unittest.SkipTest(reason)


def _tbf(rate):
    return ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]


# No packet fits in its bucket. (Many kernels have no netem, and there need be no firewall.)
_NOTHING = ["tbf", "rate", "8bit", "burst", "1", "limit", "1"]


def _remove_left_behind():
    """Namespaces of tests that were killed before they could take them away."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        found = re.match(r"tp(\d+)-\S+", line)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            subprocess.run(["ip", "netns", "del", found[0]], capture_output=True, check=False)


def _ip(*words):
    _run(["ip", *words])


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")


def _setns(fd):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))

"""Pairwise fault matrix with real processes: victims x moments x faults (fault_cells.py says what each is, and what
must hold). Every victim meets every moment, every fault every victim and every moment.

By default about a third of the cells runs; TIDEPOOL_TEST_LONG=1 runs all. Cells of links need network namespaces."""

import os
import unittest

from cluster_harness import needs_etcd
from fault_cells import FAULTS, LINK_FAULTS, MOMENTS, VICTIMS, Cell, DiskCell, FaultCluster
from loop_disk import LoopDisk
from namespaces import Namespaces

LONG = os.environ.get("TIDEPOOL_TEST_LONG") == "1"


def cells():
    """(victim, moment, fault): a Latin square, which covers all pairs."""
    return [
        (victim, moment, FAULTS[(i + j) % len(FAULTS)])
        for i, victim in enumerate(VICTIMS)
        for j, moment in enumerate(MOMENTS)
    ]


def by_default(number, fault):
    return fault == "killed" or number % 4 == 1


class FaultMatrixTest(unittest.TestCase):
    faults = None

    @classmethod
    def setUpClass(cls):
        needs_etcd()
        cls.no_links = Namespaces.why_not()
        cls.namespaces = None
        if not cls.no_links:
            cls.namespaces = cls.enterClassContext(Namespaces())
            cls.enterClassContext(cls.namespaces.inside())

    @classmethod
    def tearDownClass(cls):
        cls.end_cluster()

    @classmethod
    def end_cluster(cls):
        if cls.faults is not None:
            cls.faults.__exit__(None, None, None)
            cls.faults = None

    def run_cell(self, victim, moment, fault):
        if fault in LINK_FAULTS and self.no_links:
            self.skipTest(self.no_links)
        cls = type(self)
        if cls.faults is None:
            cls.faults = FaultCluster(cls.namespaces).__enter__()
        try:
            Cell(cls.faults, victim, moment, fault).run()
        except BaseException:
            # The next cell gets a cluster that nothing has happened to.
            cls.faults.cluster.print_logs()
            cls.end_cluster()
            raise


# (moment, fault, by default)
DISK_CELLS = [
    ("loading", "removed", True),
    ("loading", "frozen_long", True),
    ("loading", "full", False),
    ("queued", "frozen_short", False),
    ("prefilling", "frozen_long", False),
    ("prefilling", "removed", False),
    ("reserved", "full", False),
    ("transfer", "frozen_short", False),
    ("first_token", "removed", False),
    ("mid_decode", "full", True),
    ("mid_decode", "frozen_long", False),
    ("last_chunk", "frozen_short", False),
]
DISK_ARGS = [
    "--kv-disk-bytes=48MiB",
    "--kv-load=always",
    # A prompt's blocks take about two seconds.
    "--kv-disk-read-bytes-per-second=2MB",
]


class DiskFaultMatrixTest(unittest.TestCase):
    faults = None

    @classmethod
    def setUpClass(cls):
        needs_etcd()
        reason = LoopDisk.why_not()
        if reason:
            raise unittest.SkipTest(reason)
        cls.disk = cls.enterClassContext(LoopDisk())

    @classmethod
    def tearDownClass(cls):
        cls.end_cluster()

    @classmethod
    def end_cluster(cls):
        cls.disk.heal()
        if cls.faults is not None:
            cls.faults.__exit__(None, None, None)
            cls.faults = None

    def run_cell(self, moment, fault):
        cls = type(self)
        if cls.faults is None:
            args = [*DISK_ARGS, "--kv-disk-path=" + cls.disk.path]
            cls.faults = FaultCluster(args=args, schedulers=1, gateways=2, workers=("prefill", "decode")).__enter__()
        try:
            DiskCell(cls.faults, cls.disk, moment, fault).run()
            if fault == "removed":
                # A tier whose files were unlinked is off until its worker starts again.
                cls.end_cluster()
        except BaseException:
            if cls.faults is not None:
                cls.faults.cluster.print_logs()
            cls.end_cluster()
            raise


def add_cells():
    for moment, fault, always in DISK_CELLS:
        if LONG or always:

            def disk_case(self, what=(moment, fault)):
                self.run_cell(*what)

            setattr(DiskFaultMatrixTest, f"test_disk_{fault}_{moment}", disk_case)

    for number, (victim, moment, fault) in enumerate(cells()):
        if LONG or by_default(number, fault):

            def case(self, what=(victim, moment, fault)):
                self.run_cell(*what)

            setattr(FaultMatrixTest, f"test_{victim}_{fault}_{moment}", case)


add_cells()

if __name__ == "__main__":
    unittest.main()

"""One cell of the fault matrix: a request is brought to a moment, a fault befalls somebody, and what must hold holds.

Moments are states that are seen in metrics or in the stream, some of them held by processes that stand still meanwhile;
nothing waits for a time to pass but the faults themselves."""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

from cluster_harness import Cluster
from harness import Stream, eventually
from support import BINARY, EXACT, ROOT, passage

# Generous: the machine may be busy. What is bounded is that nothing hangs.
WAIT_SECONDS = 60
# Shorter than every lease and timeout that is in play, and longer than all but gRPC's keepalive.
SHORT_SECONDS = 1
LONG_SECONDS = 7
TOKENS = 240
# At most this many tokens are left when a request is "before its final chunk".
LAST_TOKENS = 40
ARGS = [
    *EXACT,
    "--engine-order=fcfs",
    "--engine-max-step-tokens=64",
    "--worker-prefill-timeout=5s",
    "--transport-fetch-timeout=4s",
    "--kv-offer-lease=6s",
    "--gateway-request-timeout=60s",
    # A transfer takes about a second.
    "--transport-share-arena=false",
    "--transport-max-bytes-per-second=8MB",
]

MOMENTS = ["queued", "prefilling", "reserved", "transfer", "first_token", "mid_decode", "last_chunk"]
VICTIMS = ["client", "gateway", "scheduler", "prefill", "decode", "etcd"]
FAULTS = ["killed", "stopped_short", "stopped_long", "cut", "one_way", "slow"]
LINK_FAULTS = {"cut", "one_way", "slow"}


def make_model(folder):
    """A model whose prefill of a prompt takes about a second on one core, and whose answers are varied."""
    demo = os.path.join(ROOT, "tools", "demo_model", "model")
    out = os.path.join(folder, "model")
    shape = "--layers 6 --hidden 512 --intermediate 1408 --heads 8 --kv-heads 2 --vocab 1280 --max-positions 4096"
    command = [BINARY, "model", "synthesize", "--config", os.path.join(demo, "config.json"), *shape.split()]
    subprocess.run([*command, "--tokenizer", demo, "--out", out], check=True, capture_output=True, timeout=300)
    return out


def request_body(salt, seed=1, sentences=100, tokens=TOKENS):
    """Drawn with a seed: unlike the greedy answer of a random model no token is like the next, so that a repeated or
    missing one shows; and the same on every worker, as the engine is batch-invariant."""
    return {
        "model": "demo",
        "prompt": passage(seed, sentences),
        "max_tokens": tokens,
        "temperature": 1,
        "seed": seed,
        "ignore_eos": True,
        "cache_salt": salt,
        "return_token_ids": True,
    }


class Subject(threading.Thread):
    """The client of the request that the cell is about."""

    def __init__(self, gateway, body, inside):
        super().__init__(daemon=True)
        self.gateway, self.inside = gateway, inside
        self.body = dict(body, stream_options={"include_usage": True})
        self.tokens, self.events, self.outcome = [], [], None
        self.reading = threading.Event()
        self.reading.set()
        self.stream = None
        self.gone = False

    def run(self):
        try:
            with self.inside():
                # There before the answer's head comes, so that it can be cut then, too.
                self.stream = Stream.__new__(Stream)
                body = dict(self.body, stream=True)
                self.stream.__init__(self.gateway.info["http"], "/v1/completions", body, 2 * WAIT_SECONDS)
            with self.stream as stream:
                if stream.status != 200:
                    self.outcome = ("refused", stream.status, stream.response.read().decode())
                    return
                for event in stream:
                    self.reading.wait()
                    if event == "[DONE]":
                        self.outcome = ("done",)
                    elif "error" in event:
                        self.outcome = ("error", event["error"]["code"], event["error"]["message"])
                    else:
                        self.events.append(event)
                        for choice in event["choices"]:
                            self.tokens.extend(choice.get("token_ids") or [])
                if self.outcome is None:
                    self.outcome = ("cut",)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.outcome = ("left",) if self.gone else ("cut", repr(error))

    def leave(self):
        """As a killed client: the kernel closes its socket."""
        self.gone = True
        with contextlib.suppress(OSError, AttributeError):  # it has not begun, or is over
            self.stream.connection.sock.shutdown(socket.SHUT_RDWR)

    def usage(self):
        return next((e["usage"] for e in reversed(self.events) if e.get("usage")), None)


class FaultCluster:
    """The cluster of a class of cells, the undisturbed answers, and the faults. Context manager."""

    salts = itertools.count()

    def __init__(self, namespaces=None, args=(), **options):
        self.namespaces = namespaces
        self.args = list(args)
        self.options = options
        self.folder = tempfile.mkdtemp(prefix="tidepool-faults-")
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        try:
            self.model = make_model(self.folder)
            self.cluster = Cluster(args=[*ARGS, *self.args], namespaces=self.namespaces, **self.options)
            self.cluster.env["TIDEPOOL_MODEL_PATH"] = self.model
            self.stack.enter_context(self.cluster)
            if self.namespaces is not None:
                self.namespaces.add("client")
            before = self.bytes_in()
            self.whole = self.answer(self.body())
            self.transferred = self.bytes_in() - before
            self.small = self.answer(self.small_body(), gateway=1)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        if self.namespaces is not None:
            for name in list(self.namespaces.hosts):
                self.namespaces.heal(name)
        self.stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def salt(self):
        return f"cell {next(self.salts)}"

    def body(self):
        return request_body(self.salt())

    def small_body(self):
        return request_body(self.salt(), seed=2, sentences=2, tokens=8)

    def answer(self, body, gateway=0):
        """(token ids, usage) of an answer that nothing disturbs."""
        status, reply = self.cluster.gateways[gateway].post("/v1/completions", body, timeout=WAIT_SECONDS)
        assert status == 200, reply
        return reply["choices"][0]["token_ids"], reply["usage"]

    def client_inside(self):
        return contextlib.nullcontext() if self.namespaces is None else self.namespaces.inside("client")

    def subject(self, gateway=0):
        return Subject(self.cluster.gateways[gateway], self.body(), self.client_inside)

    # What is seen.

    def workers(self, role):
        return [w for w in self.cluster.workers if w.name.startswith(role) and w.process.poll() is None]

    def bytes_in(self):
        return sum(in_bytes(w) for w in self.workers("decode"))

    def busy(self, role, metric="tidepool_worker_requests_active"):
        """The one of that role that has something to do; None."""
        for worker in self.workers(role):
            if not stopped(worker) and worker.metric(metric) > 0:
                return worker
        return None

    def held(self):
        """What a cluster at rest does not hold; only what is not zero."""
        out = {}
        for worker in self.cluster.workers:
            metrics = worker.metrics()
            for name in (
                "tidepool_worker_requests_active",
                "tidepool_requests_waiting",
                "tidepool_requests_running",
                "tidepool_worker_slot_queue_length",
                "tidepool_pool_leases",
                "tidepool_pool_quarantined_objects",
            ):
                out[f"{worker.name} {name}"] = sum(metrics[name].values())
        for gateway in self.cluster.gateways:
            out[f"{gateway.name} running"] = gateway.metric("tidepool_requests_running")
        leader = self.cluster.wait_leader(WAIT_SECONDS)
        out[f"{leader.name} in flight"] = leader.metric("tidepool_scheduler_inflight_requests")
        for pool in self.cluster.ctl("kv"):
            out[f"{pool['worker']} offers"] = pool["offers"]
        return {name: value for name, value in out.items() if value}

    def at_rest(self):
        try:
            self.last_held = self.held()
        except (OSError, AssertionError, http.client.HTTPException) as error:
            self.last_held = repr(error)
        return not self.last_held

    def wait_rest(self):
        try:
            eventually(self.at_rest, WAIT_SECONDS, "nothing is held")
        except AssertionError:
            raise AssertionError(f"still held after {WAIT_SECONDS} s: {self.last_held}") from None

    # Faults.

    def heal(self):
        """Everybody is there and well again."""
        for role in [*self.cluster.roles(), self.cluster.etcd]:
            if role.process.poll() is None:
                role.process.send_signal(signal.SIGCONT)
        if self.namespaces is not None:
            for name in list(self.namespaces.hosts):
                self.namespaces.heal(name)
        if self.cluster.etcd.process.poll() is not None:
            self.cluster.etcd.start()
        dead = [role for role in self.cluster.roles() if role.process.poll() is not None]
        for role in dead:
            role.start(wait=False)
        for role in dead:
            role.wait_ready()
        self.cluster.wait_leader(WAIT_SECONDS)
        names = {w.name for w in self.cluster.workers}
        eventually(lambda: names <= self.ready_workers(), WAIT_SECONDS, "all workers are ready")

    def ready_workers(self):
        """Those that the scheduler knows now, under the id of their present process."""
        pids = {w.name: w.pid for w in self.cluster.workers}
        try:
            rows = self.cluster.ctl("workers")
        except AssertionError:  # who led gave way
            return set()
        return {r["worker"] for r in rows if r["state"] == "ready" and pids.get(r["worker"]) == r["pid"]}


def in_bytes(worker):
    return worker.metrics()["tidepool_kv_transfer_bytes_total"][(("direction", "in"),)]


def stopped(role):
    """All of its threads stand still: the signal takes effect in one after the other."""
    tasks = f"/proc/{role.pid}/task"
    for task in os.listdir(tasks):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"{tasks}/{task}/stat") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] != "T":
                return False
    return True


class Holds:
    """Processes that stand still so that a moment lasts. Context manager: lets go."""

    def __init__(self):
        self.roles = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def stop(self, role):
        role.process.send_signal(signal.SIGSTOP)
        eventually(lambda: stopped(role), WAIT_SECONDS, f"{role.name} stands still")
        self.roles.append(role)

    def release(self, but=None):
        for role in self.roles:
            if role is not but and role.process.poll() is None:
                role.process.send_signal(signal.SIGCONT)
        self.roles = [role for role in self.roles if role is but]


class Cell:
    """victim x moment x fault on a FaultCluster; `run` raises AssertionError where something does not hold."""

    def __init__(self, faults, victim, moment, fault):
        self.faults, self.victim, self.moment, self.fault = faults, victim, moment, fault
        self.cluster = faults.cluster
        self.others = []  # that the moment takes

    def run(self):
        faults = self.faults
        subject = self.make_subject()
        with Holds() as holds, contextlib.ExitStack() as ending:
            ending.callback(subject.leave)
            self.prepare(holds)
            subject.start()
            self.reach(subject, holds)
            victim = self.find_victim(subject)
            end_fault = self.strike(victim, subject)
            # A held process that is the victim as well is held by the fault from here on.
            holds.release(but=victim if self.fault == "stopped_short" or self.fault == "stopped_long" else None)
            bystanders = self.bystanders(victim)
            end_fault()
            holds.release()
            faults.heal()
            subject.join(2 * WAIT_SECONDS)
            assert not subject.is_alive(), f"no outcome within {2 * WAIT_SECONDS} s; {len(subject.tokens)} tokens"
            for bystander in bystanders:
                bystander.check()
            for other in self.others:
                other.join(2 * WAIT_SECONDS)
                assert other.outcome == ("done",), other.outcome
            self.check(subject)
        faults.wait_rest()
        for gateway in range(len(self.cluster.gateways)):
            tokens, _ = faults.answer(faults.small_body(), gateway)
            assert tokens == faults.small[0], "a later request is answered as ever"

    def make_subject(self):
        return self.faults.subject()

    # Moments.

    def prepare(self, holds):
        if self.moment == "reserved":
            for worker in self.faults.workers("prefill"):
                holds.stop(worker)
        if self.moment == "queued":
            # More than there are prefill workers: wherever the subject goes, it waits its turn.
            for _ in range(3):
                other = self.faults.subject(gateway=1)  # not the one that may be the victim
                other.body["max_tokens"] = 1
                other.start()
                self.others.append(other)
            active = "tidepool_worker_requests_active"
            eventually(
                lambda: sum(w.metric(active) for w in self.faults.workers("decode")) >= len(self.others)
                or any(other.outcome for other in self.others),
                WAIT_SECONDS,
                "the others are under way",
            )

    def reach(self, subject, holds):
        faults = self.faults
        reached = self.reached(subject)
        # On a machine that did not look for a while the moment may be over: the fault then comes while tokens do.
        early = self.moment not in ("mid_decode", "last_chunk")
        over = lambda: subject.outcome or (early and subject.tokens)  # noqa: E731
        eventually(lambda: over() or reached(), WAIT_SECONDS, f"the moment {self.moment}")
        if self.moment == "first_token" and not subject.tokens:
            # All is computed and sent as far as it can be, and the decode worker cannot say so.
            worker = faults.busy("decode")
            if worker is not None:
                holds.stop(worker)
                eventually(
                    lambda: faults.busy("prefill", "tidepool_requests_running") is None, WAIT_SECONDS, "it is computed"
                )
        assert subject.outcome is None or self.moment == "last_chunk", f"over before the fault: {subject.outcome}"

    def reached(self, subject):
        """What tells that the moment has come."""
        faults = self.faults
        before = faults.bytes_in()
        return {
            "queued": lambda: any(w.metric("tidepool_requests_waiting") > 0 for w in faults.workers("prefill")),
            "prefilling": lambda: faults.busy("prefill", "tidepool_requests_running"),
            "reserved": lambda: faults.busy("decode"),
            "transfer": lambda: faults.bytes_in() - before >= faults.transferred / 4,
            "first_token": lambda: faults.busy("prefill", "tidepool_requests_running"),
            "mid_decode": lambda: len(subject.tokens) >= TOKENS // 3,
            "last_chunk": lambda: len(subject.tokens) >= TOKENS - LAST_TOKENS,
        }[self.moment]

    def find_victim(self, subject):
        if self.victim == "gateway":
            return subject.gateway
        if self.victim == "scheduler":
            return self.cluster.wait_leader()
        if self.victim == "etcd":
            return self.cluster.etcd
        if self.victim == "client":
            return None
        held = [w for w in self.faults.workers(self.victim) if stopped(w)]
        # Once the prefill worker is through with it, any one is as good.
        return (held or [self.faults.busy(self.victim)] or [None])[0] or self.faults.workers(self.victim)[0]

    # Faults. Each begins at once and returns what waits for its end.

    def strike(self, victim, subject):
        if self.fault in LINK_FAULTS:
            name = "client" if victim is None else victim.name
            net = self.faults.namespaces
            {"cut": net.cut, "one_way": net.drop_outgoing, "slow": net.slow}[self.fault](name)
            return lambda: time.sleep(LONG_SECONDS)
        if self.fault == "killed":
            if victim is None:
                subject.leave()
            else:
                victim.kill()
            return lambda: None
        seconds = SHORT_SECONDS if self.fault == "stopped_short" else LONG_SECONDS
        if victim is None:
            subject.reading.clear()

            def read_on():
                time.sleep(seconds)
                subject.reading.set()

            return read_on
        victim.process.send_signal(signal.SIGSTOP)

        def go_on():
            time.sleep(seconds)
            victim.process.send_signal(signal.SIGCONT)

        return go_on

    def bystanders(self, victim):
        """Requests that come while the fault lasts, through a gateway that is well."""
        gateway = next(g for g in self.cluster.gateways if g is not victim)
        out = [Bystander(self.faults, gateway) for _ in range(2)]
        for bystander in out:
            bystander.start()
        return out

    # What must hold.

    def check(self, subject):
        whole, usage = self.faults.whole
        outcome, tokens = subject.outcome, subject.tokens
        assert tokens == whole[: len(tokens)], f"not as undisturbed, from token {first_difference(tokens, whole)} on"
        if self.victim == "client" and self.fault == "killed":
            assert outcome[0] in ("left", "cut", "done"), outcome
        elif self.victim in ("client", "gateway") and self.fault != "stopped_short":
            # Connections of a dead gateway are cut, and a client that is away for long has been given up: never is a
            # cut answer called a whole one.
            assert outcome[0] in ("cut", "done", "error"), outcome
        else:
            assert outcome == ("done",), f"{outcome} behind {len(tokens)} tokens"
        if outcome == ("done",):
            assert tokens == whole, f"{len(tokens)} of {len(whole)} tokens"
            counted = subject.usage()
            for field in ("prompt_tokens", "completion_tokens"):
                assert counted[field] == usage[field], (counted, usage)


class DiskCell(Cell):
    """The victim is the disk that the workers' disk tiers are on. At the moment `loading` the prompt's blocks come from
    there, slowly (kv.disk.read_bytes_per_second); at the others they are written."""

    def __init__(self, faults, disk, moment, fault):
        super().__init__(faults, "disk", moment, fault)
        self.disk = disk

    def make_subject(self):
        if self.moment != "loading":
            return self.faults.subject()
        # What was asked before, is on disk, and is not in any host tier.
        body = self.faults.body()
        tokens, _ = self.faults.answer(body)
        assert tokens == self.faults.whole[0]
        eventually(self.stored, WAIT_SECONDS, "all is written")
        self.cluster.ctl("kv", "evict", "--all")
        eventually(self.known, WAIT_SECONDS, "the scheduler knows that it is on disk alone")
        return Subject(self.cluster.gateways[0], body, self.faults.client_inside)

    def stored(self):
        return all(
            w.metric("tidepool_worker_store_queue_blocks") == 0 and w.metric("tidepool_pool_ops_waiting") == 0
            for w in self.cluster.workers
        )

    def known(self):
        disk = {w.name: w.metrics()["tidepool_pool_objects"][(("tier", "disk"),)] for w in self.cluster.workers}
        return disk == {row["worker"]: row["indexed_blocks"] for row in self.cluster.ctl("kv")}

    def reached(self, subject):
        if self.moment != "loading":
            return super().reached(subject)
        read = (("op", "read"), ("tier", "disk"))
        return lambda: any(w.metrics()["tidepool_pool_ops_waiting"][read] > 0 for w in self.cluster.workers)

    def find_victim(self, subject):
        return self.disk

    def strike(self, victim, subject):
        if self.fault == "removed":
            self.disk.remove()
            return lambda: None
        if self.fault == "full":
            self.disk.fill()
            return lambda: time.sleep(SHORT_SECONDS)
        self.disk.freeze()

        def thaw():
            time.sleep(SHORT_SECONDS if self.fault == "frozen_short" else LONG_SECONDS)
            self.disk.heal()

        return thaw

    def check(self, subject):
        super().check(subject)
        self.disk.heal()
        if self.fault != "removed":
            # Switched off or not meanwhile: it comes back by itself.
            on = (("state", "on"), ("tier", "disk"))
            eventually(
                lambda: all(w.metrics()["tidepool_pool_tier_state"].get(on) == 1 for w in self.cluster.workers),
                WAIT_SECONDS,
                "the disk tiers are on",
            )


class Bystander(threading.Thread):
    def __init__(self, faults, gateway):
        super().__init__(daemon=True)
        self.faults, self.gateway = faults, gateway
        self.reply = None

    def run(self):
        try:
            self.reply = self.gateway.post("/v1/completions", self.faults.small_body(), timeout=WAIT_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            self.reply = (0, repr(error))

    def check(self):
        self.join(2 * WAIT_SECONDS)
        assert self.reply is not None, "a request that came during the fault has no outcome"
        status, body = self.reply
        assert status == 200, f"a request that came during the fault failed: {status} {json.dumps(body)}"
        assert body["choices"][0]["token_ids"] == self.faults.small[0], "and has the wrong answer"


def first_difference(left, right):
    return next((i for i, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), min(len(left), len(right)))

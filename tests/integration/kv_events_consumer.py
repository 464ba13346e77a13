"""An outside router's view of one worker's blocks: follows its events and keeps an index. See server/kv/EVENTS.md.

    python3 kv_events_consumer.py HOST:PORT PROTO_DIR [--token TOKEN] [--until BLOCKS] [--resume SEQ,BOOT]

Needs grpcio and grpcio-tools. Prints one JSON line for every batch: what is known after it.
"""

import argparse
import json
import os
import sys
import tempfile

import grpc
import grpc_tools
from grpc_tools import protoc


def load(proto_dir):
    """The generated modules of kv.proto, made anew."""
    out = tempfile.mkdtemp(prefix="tidepool-proto-")
    names = [f"tidepool/v1/{name}.proto" for name in ("inference", "member", "cluster", "kv")]
    include = os.path.join(os.path.dirname(grpc_tools.__file__), "_proto")
    if protoc.main(["protoc", f"-I{proto_dir}", f"-I{include}", f"--python_out={out}", f"--grpc_python_out={out}", *names]) != 0:
        raise SystemExit("protoc failed")
    sys.path.insert(0, out)
    from tidepool.v1 import kv_pb2, kv_pb2_grpc

    return kv_pb2, kv_pb2_grpc


class Index:
    """What one worker holds: {tier: {key}}, as of event next_seq - 1 of boot boot_id."""

    def __init__(self):
        self.held, self.next_seq, self.boot_id, self.in_snapshot = {}, 0, "", False

    def apply(self, pb, batch):
        self.boot_id = batch.boot_id
        if batch.snapshot and not self.in_snapshot:
            self.held = {}
        self.in_snapshot = batch.snapshot and not batch.snapshot_end
        for event in batch.events:
            if not batch.snapshot and event.seq != self.next_seq:
                raise RuntimeError(f"event {event.seq} follows {self.next_seq - 1}")
            self.next_seq = event.seq + 1
            tier = self.held.setdefault(event.tier, set())
            if event.kind == pb.KvEvent.KIND_STORED:
                tier.add(event.key)
            elif event.kind == pb.KvEvent.KIND_REMOVED:
                tier.discard(event.key)
            elif event.kind == pb.KvEvent.KIND_CLEARED:
                tier.clear()
            elif event.kind == pb.KvEvent.KIND_MOVED:
                tier.add(event.key)
                self.held.setdefault(event.from_tier, set()).discard(event.key)
        if batch.snapshot:
            self.next_seq = batch.snapshot_seq + 1 if batch.snapshot_end else 0

    def blocks(self):
        return len(set().union(*self.held.values())) if self.held else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("proto_dir")
    parser.add_argument("--token", default="")
    parser.add_argument("--until", type=int, default=None, help="end once so many blocks are known")
    parser.add_argument("--resume", default="", help="SEQ,BOOT of an earlier run")
    args = parser.parse_args()
    pb, stubs = load(args.proto_dir)
    index = Index()
    if args.resume:
        seq, index.boot_id = args.resume.split(",")
        index.next_seq = int(seq)
    # Local names are never asked of a proxy.
    channel = grpc.insecure_channel(args.address, options=[("grpc.enable_http_proxy", 0)])
    metadata = [("x-tidepool-cluster-token", args.token)] if args.token else []
    while True:
        request = pb.KvSubscribeRequest(from_seq=index.next_seq, boot_id=index.boot_id)
        try:
            for batch in stubs.KvStub(channel).Subscribe(request, metadata=metadata):
                index.apply(pb, batch)
                line = {"worker": batch.worker_id, "boot": batch.boot_id, "next_seq": index.next_seq}
                print(json.dumps(dict(line, blocks=index.blocks(), snapshot=batch.snapshot)), flush=True)
                if args.until is not None and not index.in_snapshot and index.blocks() >= args.until:
                    return
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            # The worker restarts, or the link was cut: go on where we were; it knows whether it can.


if __name__ == "__main__":
    main()

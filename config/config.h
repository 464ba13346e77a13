#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// The whole configuration, as plain structs. Rooms get the struct they need; only config/ reads files,
// environment and flags (fields.cc lists every field once, with its range and its help). Every default has
// its reason beside it. Precedence: flag > env > the cluster's
// document in etcd > file > default.

struct ModelConfig {
  std::string path;            // directory in Hugging Face layout; required by workers and the gateway
  std::string tokenizer;       // directory of the tokenizer, where it is not in `path`
  std::string name;            // as clients call it; default: the directory's name
  std::string dtype = "auto";  // auto (the checkpoint's; float16 computes in float32), bfloat16, float32
  uint32_t max_model_len = 0;  // tokens of prompt and answer; 0: the model's own
  // auto (sampling defaults from the model's generation_config.json, as in vLLM), off (OpenAI's neutral ones)
  std::string generation_config = "auto";
  // How the model writes tool calls: auto (found by its chat template), hermes, llama3, mistral, none.
  std::string tool_parser = "auto";
  // Whether <think>...</think> is split off as reasoning: auto (where the template or the vocabulary knows
  // it), think, none.
  std::string reasoning_parser = "auto";
};

struct EngineConfig {
  uint32_t threads = 0;     // 0: cores / workers on this machine, at least 1
  uint32_t max_batch = 32;  // sequences decoded together; beyond it latency rises and nothing is won on CPU
  uint32_t max_step_tokens = 256;  // token budget of one step: bounds how long a prefill holds up decodes
  bool batch_invariant = false;    // results independent of batch size, chunking and threads; slower
  uint32_t max_waiting = 256;      // requests queued in the engine; beyond: RESOURCE_EXHAUSTED
  std::string order = "vtc";       // between tenants, of those that wait: a name of FairQueue::Order
  uint32_t max_waiting_per_tenant = 0;  // of max_waiting; 0: no limit of its own
  uint32_t max_running_per_tenant = 0;  // 0: no limit of its own
  // What running requests of lower rank are made to give up their KV slots by: auto, swap, recompute, off.
  std::string preemption = "auto";
};

// The disk tier of each worker and store.
struct KvDiskConfig {
  std::string path;                     // absolute; empty: no disk tier
  uint64_t bytes = 10ULL << 30;         // of each worker: a preallocated file
  uint64_t read_bytes_per_second = 0;   // 0: no limit
  uint64_t write_bytes_per_second = 0;  // 0: no limit but the disk's and the loads' precedence
  uint64_t write_bytes_per_day = 0;     // what the disk's endurance allows; 0: no limit
  // One operation of one block that takes longer switches the tier off until the disk is well again. Above
  // what a busy network disk takes, below what a client would wait.
  absl::Duration slow_op = absl::Milliseconds(800);
  std::string eviction = "lru";  // disks hold what came out of the host tier: its policy has chosen already
  // How blocks are stored: none (as they are), or lossless (fewer bytes; every load pays for decoding).
  std::string compress = "none";
  // Which sealed blocks are stored: always, frequent (from the second use on: fewer writes, fewer hits), or
  // tinylfu (once the disk is full, only what was used more often than what would have to go).
  std::string admission = "always";
};

struct KvConfig {
  uint32_t block_tokens = 32;
  uint64_t host_bytes = 256ULL << 20;  // of the host tier in each worker: small enough for a laptop
  absl::Duration offer_lease = absl::Seconds(30);  // as long as vLLM's KV lease
  // Whether a prefix that is on a disk or with a peer is loaded: auto (where that is faster than computing
  // it), always (whatever there is), never.
  std::string load = "auto";
  // What sealed blocks go through on their way to the disk and to peers (kvstore/codec). All workers equal;
  // it enters the block keys. Anything but none makes answers depend on where a prefix came from.
  std::string codec = "none";
  std::string huge_pages = "auto";  // of the host tier: auto, on, off
  std::string numa_node = "auto";   // of the host tier: auto, interleave, a number
  bool lock_memory = false;         // the host tier is never swapped out
  // What leaves the host tier first: a name of kvstore/policy/policy.h, or auto (tried out on the side).
  std::string policy = "turn-aware";
  uint64_t tenant_quota_bytes = 0;                // of one tenant in the host tier; 0: no limit
  std::map<std::string, uint64_t> tenant_quotas;  // of these tenants instead; 0: no limit
  uint32_t hard_pin_percent = 50;                 // of the host tier that hard pins may hold
  KvDiskConfig disk;
};

struct TransportConfig {
  std::string kind = "ucx";  // ucx: fast, trusts its peers; tls: mutual TLS, for any other network
  // Interfaces that may be used; the address is the first's. Loopback by default: UCX trusts its peers, so a
  // public interface is never chosen by accident. Several, comma-separated, as UCX_NET_DEVICES.
  std::string net_devices = "lo";
  uint32_t port = 0;  // that peers connect to; 0: any free one. A firewall wants a fixed one
  // UCX_TLS: tcp, rc, ud; shm (one copy), posix, sysv, cma take processes of this host over shared memory.
  std::string ucx_tls = "tcp,self";
  // PEM files of kind tls: a certificate with its chain, its key, and who signs peers' certificates.
  std::string tls_cert;
  std::string tls_key;
  std::string tls_ca;
  bool tls_check_name = false;        // a worker's certificate must name worker.id
  uint64_t max_bytes_per_second = 0;  // that one worker sends; 0: no limit
  absl::Duration fetch_timeout = absl::Seconds(10);
  uint32_t lanes =
      2;  // connections to one peer: what breaks on one does not restart the fetches of the other
  // On its way to this worker over one connection, at most; less where the link is slow. Fills 25 Gbit/s at
  // a round trip of 10 ms.
  uint64_t window_bytes = 32ULL << 20;
  bool share_arena = true;      // workers of one host and user read each other's blocks in place
  bool layer_streaming = true;  // send the last chunk of a prompt layer by layer, while it is computed
};

struct WorkerConfig {
  std::string id;                                      // default: ROLE-HOST-PID
  std::string role = "both";                           // prefill, decode, both
  std::string listen = "127.0.0.1:0";                  // gRPC of the cluster; port 0: any free one
  std::string metrics_listen = "127.0.0.1:0";          // HTTP /metrics, /livez, /readyz
  absl::Duration prefill_timeout = absl::Seconds(60);  // one attempt at a remote prefill
  absl::Duration report_interval = absl::Milliseconds(100);
};

struct SloConfig {
  absl::Duration ttft = absl::ZeroDuration();  // 0: none, nothing is rejected early for it
  absl::Duration itl = absl::ZeroDuration();
};

// Objectives of one class of requests; zero: those of scheduler.slo, and for batch none.
struct SloClassesConfig {
  SloConfig standard;
  SloConfig batch;
};

struct SchedulerConfig {
  std::string listen = "127.0.0.1:8002";
  std::string metrics_listen = "127.0.0.1:0";
  SloConfig slo;
  SloClassesConfig classes;
  std::string placement = "tidepool";   // a name of PlacementPolicy; the others are there to compare with
  std::string admission = "predicted";  // a name of AdmissionPolicy
  std::string fairness = "none";        // a name of FairnessPolicy: one tenant needs none
  // Prompts with at most this many uncached tokens are prefilled on the decode worker: the handoff would
  // cost more than it saves.
  uint32_t local_prefill_tokens = 32;
  absl::Duration worker_timeout = absl::Seconds(3);  // without a report: lost
  uint32_t max_inflight = 4096;                      // placed and unfinished requests
  // Blocks that many requests use are copied until so many workers and stores hold them: one that is busy or
  // gone is not missed. 1: never.
  uint32_t hot_copies = 2;
  uint64_t replicate_bytes_per_second = 64ULL << 20;  // of all such copies: 5% of a 10 Gbit/s link
  // Prefill and decode workers: off, advise (say which kind is short), act (let workers change).
  std::string elasticity = "advise";
  // So long one kind is short before a worker of the other changes: longer than bursts.
  absl::Duration elasticity_dwell = absl::Seconds(10);
};

// `tidepool store`: a node of DRAM and disk that computes nothing. Its tiers are sized by kv, as a worker's.
struct StoreConfig {
  std::string id;  // default: store-HOST-PID
  // Directory of the cluster's model: the store starts before any worker does. Empty: the scheduler's word is
  // waited for.
  std::string model;
  std::string listen = "127.0.0.1:0";          // gRPC of the cluster; port 0: any free one
  std::string metrics_listen = "127.0.0.1:0";  // HTTP /metrics, /livez, /readyz
  // What it takes over from the workers by itself, besides what the scheduler and `ctl kv` order: reused
  // (chains that a later request carried on), all (every sealed block), none.
  std::string follow = "reused";
  uint64_t follow_bytes_per_second = 64ULL << 20;  // 0: no limit
};

struct ApiKeyConfig {
  std::string key_sha256;  // hex digest of the key: the file holds no secret
  std::string tenant;
};

// What one tenant may use. 0: no limit. See server/gateway/tenant_limits.h.
struct TenantLimitsConfig {
  uint32_t requests_per_minute = 0;
  uint32_t tokens_per_minute = 0;    // prompt and answer
  uint32_t max_inflight = 0;         // sequences at once: each choice of `n` is one
  uint32_t max_queued_requests = 0;  // admitted, without a first token
  uint32_t max_queued_tokens = 0;    // prompt tokens of those
};

// PEM files of a listener. All empty: plain TCP.
struct TlsConfig {
  std::string cert;       // certificate, followed by its chain
  std::string key;        // its private key
  std::string client_ca;  // clients need a certificate signed by one of these: mutual TLS

  bool enabled() const { return !cert.empty(); }
};

struct CorsConfig {
  std::vector<std::string> allowed_origins;  // https://app.example, or * for any
};

struct GatewayConfig {
  std::string http_listen = "127.0.0.1:8000";
  std::string grpc_listen = "127.0.0.1:8001";
  // HTTP /metrics, /livez, /readyz for operators. Metrics tell of all tenants together: where there are API
  // keys or this is set, http_listen does not serve them.
  std::string metrics_listen;
  std::vector<ApiKeyConfig> api_keys;  // empty: no authentication, one tenant "default"
  // YAML or JSON file of keys and tenants' limits (config/tenants.h), in api_keys' place; read again when it
  // changes and on SIGHUP.
  std::string api_keys_file;
  // Without keys or client certificates a listener that others can reach is refused, unless this is set.
  bool allow_unauthenticated = false;
  std::string server_key;  // secret of the tenant salts; default: drawn at start
  TlsConfig tls;           // of HTTP and gRPC
  // Host headers taken beside localhost's, without port; of a listener that is not on loopback: any, if
  // empty.
  std::vector<std::string> allowed_hosts;
  CorsConfig cors;
  TenantLimitsConfig tenant_limits;  // of each tenant without its own
  uint32_t max_body_bytes = 10u << 20;
  uint32_t max_header_bytes = 32u << 10;
  uint32_t max_connections = 4096;
  uint32_t max_inflight = 1024;  // requests admitted at once; beyond: 429
  // Admitted requests without a first token, and their prompt tokens; beyond: 429. A prompt of a million
  // tokens fits. 0 requests: as many as max_inflight.
  uint32_t max_queued_requests = 0;
  uint32_t max_queued_tokens = 1u << 20;
  uint32_t max_stream_buffer_bytes = 256u << 10;  // of one slow client; beyond: it is cancelled
  absl::Duration request_timeout = absl::Minutes(10);
  absl::Duration header_timeout = absl::Seconds(10);
  absl::Duration body_timeout = absl::Seconds(60);   // 10 MiB at 1.4 Mbit/s
  absl::Duration idle_timeout = absl::Seconds(120);  // keep-alive; above the usual client's 90 s
  absl::Duration slow_client_timeout = absl::Seconds(10);
  uint32_t max_retries = 2;  // of a request whose worker failed
  // A request that finds no scheduler in a cluster with etcd, or no worker to go on at in the middle of its
  // answer, asks again for so long: as long as a takeover or the restart of a small worker lasts.
  absl::Duration placement_wait = absl::Seconds(5);
  // Compiled structured outputs that are kept, of all tenants; one is a few KiB to a few MiB.
  uint64_t grammar_cache_bytes = 64ULL << 20;
  // One JSON line a request: stderr (at log level info), off, or a file, opened again on SIGHUP.
  std::string access_log = "stderr";
  // Files and batches (/v1/files, /v1/batches) are kept here; empty: both are off. `serve` takes the user's
  // state directory.
  std::string batch_dir;
  uint32_t batch_max_inflight = 32;              // batch lines at once, of all tenants; as engine.max_batch
  uint64_t batch_max_file_bytes = 200ULL << 20;  // of one upload; OpenAI's
  uint64_t batch_max_tenant_bytes = 4ULL << 30;  // of all files of one tenant
  uint32_t batch_max_files = 1000;               // of one tenant
  uint32_t batch_max_batches = 32;               // of one tenant, unfinished
  uint32_t batch_max_lines = 50000;              // of one batch; OpenAI's
  absl::Duration batch_file_ttl = absl::Hours(30 * 24);  // uploads and results; OpenAI's
};

struct ClusterConfig {
  std::string scheduler = "127.0.0.1:8002";
  // host:port of etcd's members. Then the scheduler that leads is found there and not at `scheduler`, others
  // stand by, and every process is known there while it lives. Empty: there is one scheduler, and no etcd.
  std::vector<std::string> etcd;
  std::string etcd_prefix = "/tidepool";  // of all keys: one for each cluster that shares an etcd
  std::string etcd_user;                  // empty: etcd asks for none
  std::string etcd_password;
  // PEM files. Authority that signed etcd's certificates; empty: etcd is spoken to in plaintext.
  std::string etcd_ca;
  std::string etcd_cert, etcd_key;  // ours, where etcd asks clients for one
  // After so long without a sign of life another scheduler takes over. Shorter than the 5 s that a takeover
  // may last; etcd gives at least about 2 s.
  absl::Duration lease = absl::Seconds(3);
  // Shared secret of the cluster's processes, best given as TIDEPOOL_CLUSTER_TOKEN; `serve` draws one.
  // Empty is refused unless every listener is on loopback.
  std::string token;
  absl::Duration start_timeout = absl::Minutes(10);  // of one role, weight loading included
  absl::Duration drain_timeout = absl::Seconds(30);
};

struct LogConfig {
  std::string level = "info";
};

struct ServeConfig {
  std::string metrics_listen = "127.0.0.1:0";  // HTTP /metrics, /livez, /readyz of the supervisor itself
  bool store = false;                          // start a store, too
};

struct Config {
  ModelConfig model;
  EngineConfig engine;
  KvConfig kv;
  TransportConfig transport;
  WorkerConfig worker;
  SchedulerConfig scheduler;
  StoreConfig store;
  GatewayConfig gateway;
  ClusterConfig cluster;
  LogConfig log;
  ServeConfig serve;
};

}  // namespace tidepool

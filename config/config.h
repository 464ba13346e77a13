#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace tidepool {

// The whole configuration, as plain structs. Rooms get the struct they need; only config/ reads files,
// environment and flags (fields.cc lists every field once, with its range and its help). Every default has
// its reason beside it. Precedence: flag > env > file > default.

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
};

struct KvConfig {
  uint32_t block_tokens = 32;
  uint64_t host_bytes = 256ULL << 20;  // of the host tier in each worker: small enough for a laptop
  absl::Duration offer_lease = absl::Seconds(30);  // as long as vLLM's KV lease
};

struct TransportConfig {
  // Interfaces that UCX may use. Loopback by default: UCX trusts its peers, so a public interface is
  // never chosen by accident. Several, comma-separated, as UCX_NET_DEVICES.
  std::string net_devices = "lo";
  // UCX_TLS. Add rc for InfiniBand. Shared memory would not be used: UCX 1.13 cannot force-close its
  // endpoints, without which a slot could not be freed safely.
  std::string tls = "tcp,self";
  absl::Duration fetch_timeout = absl::Seconds(10);
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

struct SchedulerConfig {
  std::string listen = "127.0.0.1:8002";
  std::string metrics_listen = "127.0.0.1:0";
  SloConfig slo;
  // Prompts with at most this many uncached tokens are prefilled on the decode worker: the handoff would
  // cost more than it saves.
  uint32_t local_prefill_tokens = 32;
  absl::Duration worker_timeout = absl::Seconds(3);  // without a report: lost
  uint32_t max_inflight = 4096;                      // placed and unfinished requests
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
};

struct Config {
  ModelConfig model;
  EngineConfig engine;
  KvConfig kv;
  TransportConfig transport;
  WorkerConfig worker;
  SchedulerConfig scheduler;
  GatewayConfig gateway;
  ClusterConfig cluster;
  LogConfig log;
  ServeConfig serve;
};

}  // namespace tidepool

#include "config/fields.h"

#include <algorithm>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "config/address.h"
#include "config/yaml_read.h"

namespace tidepool {
namespace {

constexpr uint64_t kMsSecond = 1000, kMsMinute = 60 * kMsSecond, kMsHour = 60 * kMsMinute,
                   kMsDay = 24 * kMsHour;
constexpr uint64_t kKiB = 1024, kMiB = 1024 * kKiB, kGiB = 1024 * kMiB, kTiB = 1024 * kGiB;

// The member's path is the field's name.
#define TP_FIELD(member) .path = #member, .in = [](Config& c) -> FieldPtr { return &c.member; }

const Field kFields[] = {
    {TP_FIELD(model.path), .kind = FieldKind::kText,
     .help = "model directory in Hugging Face layout; `serve` without one takes the demo model",
     .common = true},
    {TP_FIELD(model.tokenizer), .kind = FieldKind::kText,
     .help = "directory of the tokenizer, where it is not the model's"},
    {TP_FIELD(model.name), .kind = FieldKind::kText,
     .help = "as clients call the model; default: the directory's name", .common = true},
    {TP_FIELD(model.dtype), .kind = FieldKind::kChoice,
     .help = "numbers to compute in; auto is the checkpoint's, float16 computes in float32",
     .choices = "auto|bfloat16|float32"},
    {TP_FIELD(model.max_model_len), .kind = FieldKind::kCount,
     .help = "prompt and answer together; 0 is the model's own", .min = 0, .max = 1 << 20, .unit = "tokens"},
    {TP_FIELD(model.generation_config), .kind = FieldKind::kChoice,
     .help = "auto takes sampling defaults from the model's generation_config.json", .choices = "auto|off"},
    {TP_FIELD(model.tool_parser), .kind = FieldKind::kChoice,
     .help = "how the model writes tool calls; auto asks its chat template",
     .choices = "auto|hermes|llama3|mistral|none"},
    {TP_FIELD(model.reasoning_parser), .kind = FieldKind::kChoice,
     .help = "splits <think>...</think> off answers; auto where the model's template or vocabulary knows it",
     .choices = "auto|think|none"},

    {TP_FIELD(engine.threads), .kind = FieldKind::kCount,
     .help = "compute threads of one worker; 0 is cores / workers on this machine, at least 1", .min = 0,
     .max = 1024, .unit = "threads", .common = true},
    {TP_FIELD(engine.max_batch), .kind = FieldKind::kCount, .help = "sequences decoded together", .min = 1,
     .max = 4096, .unit = "sequences"},
    {TP_FIELD(engine.max_step_tokens), .kind = FieldKind::kCount,
     .help = "token budget of one step: bounds how long a prefill holds up decodes", .min = 1, .max = 1 << 20,
     .unit = "tokens"},
    {TP_FIELD(engine.batch_invariant), .kind = FieldKind::kBool,
     .help = "results independent of batch size, chunking and threads; slower"},
    {TP_FIELD(engine.max_waiting), .kind = FieldKind::kCount,
     .help = "requests queued in the engine; beyond it they are refused", .min = 1, .max = 1 << 20,
     .unit = "requests"},
    {TP_FIELD(engine.order), .kind = FieldKind::kChoice,
     .help = "which tenant's request begins next: who was given least, arrival, or a known prefix within "
             "fair shares",
     .choices = "vtc|fcfs|dlpm"},
    {TP_FIELD(engine.max_waiting_per_tenant), .kind = FieldKind::kCount,
     .help =
         "requests of one tenant queued in the engine; beyond it they are refused; 0: no limit of its own",
     .min = 0, .max = 1 << 20, .unit = "requests"},
    {TP_FIELD(engine.max_running_per_tenant), .kind = FieldKind::kCount,
     .help = "requests of one tenant computed together; its others wait; 0: no limit of its own", .min = 0,
     .max = 4096, .unit = "requests"},
    {TP_FIELD(engine.preemption), .kind = FieldKind::kChoice,
     .help =
         "a running request gives its KV slots up to one that goes before it, and goes on later: its KV is "
         "kept in the pool (swap), computed again, or the faster of the two; off: it keeps its slots",
     .choices = "auto|swap|recompute|off"},

    {TP_FIELD(kv.block_tokens), .kind = FieldKind::kCount,
     .help = "tokens of one KV block: the unit of storage, transfer and reuse", .min = 1, .max = 1024,
     .unit = "tokens"},
    {TP_FIELD(kv.host_bytes), .kind = FieldKind::kBytes, .help = "host tier of one worker", .min = 1 * kMiB,
     .max = 64 * kTiB, .common = true},
    {TP_FIELD(kv.offer_lease), .kind = FieldKind::kDuration,
     .help = "how long a finished prefill keeps its blocks for the decode worker", .min = 100,
     .max = kMsHour},
    {TP_FIELD(kv.load), .kind = FieldKind::kChoice,
     .help = "load a prefix from disks and peers: auto is where that is faster than computing it",
     .choices = "auto|always|never"},
    {TP_FIELD(kv.huge_pages), .kind = FieldKind::kChoice,
     .help = "pages of the host tier: on needs reserved ones, auto takes what there is",
     .choices = "auto|on|off"},
    {TP_FIELD(kv.numa_node), .kind = FieldKind::kText,
     .help = "memory of the host tier: auto (near this process's CPUs), interleave, or a node's number"},
    {TP_FIELD(kv.lock_memory), .kind = FieldKind::kBool, .help = "keep the host tier from being swapped out"},
    {TP_FIELD(kv.policy), .kind = FieldKind::kChoice,
     .help = "which blocks leave the host tier first; auto tries all on a sample and takes the best",
     .choices = "turn-aware|lru|lfu|s3-fifo|gdsf|pgdsf|auto"},
    {TP_FIELD(kv.tenant_quota_bytes), .kind = FieldKind::kBytes,
     .help = "what one tenant's blocks may take of the host tier; 0 is no limit", .min = 0, .max = 64 * kTiB},
    {TP_FIELD(kv.tenant_quotas), .kind = FieldKind::kTenantBytes,
     .help = "the same for single tenants, TENANT:SIZE,TENANT:SIZE, in tenant_quota_bytes' place", .min = 0,
     .max = 64 * kTiB},
    {TP_FIELD(kv.hard_pin_percent), .kind = FieldKind::kCount,
     .help = "share of the host tier that hard pins may hold", .min = 0, .max = 90},
    {TP_FIELD(kv.codec), .kind = FieldKind::kChoice,
     .help = "what blocks on disk and on the wire are coded with; anything but none is approximate",
     .choices = "none|int8|fp8|int4|cachegen|cachegen-3|cachegen-2|cachegen-1"},
    {TP_FIELD(kv.disk.path), .kind = FieldKind::kText,
     .help = "directory of the disk tier, absolute; empty is none"},
    {TP_FIELD(kv.disk.bytes), .kind = FieldKind::kBytes,
     .help = "disk tier of one worker: a file of this size is set aside", .min = 1 * kMiB,
     .max = 1024 * kTiB},
    {TP_FIELD(kv.disk.read_bytes_per_second), .kind = FieldKind::kBytes,
     .help = "that one worker loads; 0 is as fast as the disk", .min = 0, .max = 64 * kTiB},
    {TP_FIELD(kv.disk.write_bytes_per_second), .kind = FieldKind::kBytes,
     .help = "that one worker stores; 0 is as fast as loads leave room for", .min = 0, .max = 64 * kTiB},
    {TP_FIELD(kv.disk.write_bytes_per_day), .kind = FieldKind::kBytes,
     .help = "that one worker stores, for the disk's endurance; 0 is no limit", .min = 0, .max = 1024 * kTiB},
    {TP_FIELD(kv.disk.slow_op), .kind = FieldKind::kDuration,
     .help = "an operation that takes longer switches the disk tier off until the disk is well again",
     .min = 10, .max = kMsMinute},
    {TP_FIELD(kv.disk.admission), .kind = FieldKind::kChoice,
     .help = "which blocks are stored: all, those that were used twice, or those used more than what must go",
     .choices = "always|frequent|tinylfu"},
    {TP_FIELD(kv.disk.compress), .kind = FieldKind::kChoice,
     .help = "lossless stores blocks in fewer bytes and reads the same ones", .choices = "none|lossless"},
    {TP_FIELD(kv.disk.eviction), .kind = FieldKind::kChoice,
     .help = "which blocks leave the disk first when it is full", .choices = "lru|lfu|s3-fifo|gdsf|pgdsf"},

    {TP_FIELD(transport.kind), .kind = FieldKind::kChoice,
     .help = "what KV blocks travel by: ucx trusts its peers, tls is for networks one does not trust",
     .choices = "ucx|tls"},
    {TP_FIELD(transport.net_devices), .kind = FieldKind::kText,
     .help = "interfaces to use, comma-separated; UCX trusts its peers: private ones only"},
    {TP_FIELD(transport.port), .kind = FieldKind::kCount,
     .help = "that peers connect to, on the first of net_devices; 0 is any free one", .min = 0, .max = 65535},
    {TP_FIELD(transport.ucx_tls), .kind = FieldKind::kText,
     .help = "UCX transports, as UCX_TLS: tcp, rc, ud; shm, posix, sysv, cma for processes of one host"},
    {TP_FIELD(transport.tls_cert), .kind = FieldKind::kText,
     .help = "PEM certificate chain of this worker; kind tls needs it"},
    {TP_FIELD(transport.tls_key), .kind = FieldKind::kText, .help = "PEM private key of transport.tls_cert"},
    {TP_FIELD(transport.tls_ca), .kind = FieldKind::kText,
     .help = "PEM certificates that peers' own must be signed by"},
    {TP_FIELD(transport.tls_check_name), .kind = FieldKind::kBool,
     .help = "peers' certificates must carry their worker.id as a DNS name"},
    {TP_FIELD(transport.max_bytes_per_second), .kind = FieldKind::kBytes,
     .help = "that one worker sends; 0 is no limit", .min = 0, .max = 64 * kTiB},
    {TP_FIELD(transport.lanes), .kind = FieldKind::kCount,
     .help = "connections to one peer that share its fetches", .min = 1, .max = 64},
    {TP_FIELD(transport.window_bytes), .kind = FieldKind::kBytes,
     .help = "of KV that may be on their way to a worker over one connection", .min = 64 * kKiB,
     .max = 64 * kGiB},
    {TP_FIELD(transport.share_arena), .kind = FieldKind::kBool,
     .help = "workers of one host and user read each other's KV blocks where they lie"},
    {TP_FIELD(transport.layer_streaming), .kind = FieldKind::kBool,
     .help = "send a prompt's last chunk layer by layer while it is computed"},
    {TP_FIELD(transport.fetch_timeout), .kind = FieldKind::kDuration, .help = "of one fetch of KV blocks",
     .min = 10, .max = kMsHour},

    {TP_FIELD(worker.id), .kind = FieldKind::kText, .help = "default: ROLE-HOST-PID"},
    {TP_FIELD(worker.role), .kind = FieldKind::kChoice, .help = "what a worker does",
     .choices = "prefill|decode|both"},
    {TP_FIELD(worker.listen), .kind = FieldKind::kAddress,
     .help = "gRPC of the cluster; port 0 is any free one"},
    {TP_FIELD(worker.metrics_listen), .kind = FieldKind::kAddress, .help = "HTTP /metrics, /livez, /readyz"},
    {TP_FIELD(worker.prefill_timeout), .kind = FieldKind::kDuration,
     .help = "one attempt at a prefill on another worker", .min = 10, .max = kMsHour},
    {TP_FIELD(worker.report_interval), .kind = FieldKind::kDuration, .help = "between load reports",
     .min = 10, .max = kMsMinute},

    {TP_FIELD(scheduler.listen), .kind = FieldKind::kAddress,
     .help = "gRPC of the cluster; `serve` takes any free port unless this is set"},
    {TP_FIELD(scheduler.metrics_listen), .kind = FieldKind::kAddress,
     .help = "HTTP /metrics, /livez, /readyz"},
    {TP_FIELD(scheduler.slo.ttft), .kind = FieldKind::kDuration,
     .help = "reject at arrival what would wait longer for its first token; 0s is never", .min = 0,
     .max = kMsDay},
    {TP_FIELD(scheduler.slo.itl), .kind = FieldKind::kDuration,
     .help = "reject at arrival what would wait longer between tokens; 0s is never", .min = 0,
     .max = kMsHour},
    {TP_FIELD(scheduler.classes.standard.ttft), .kind = FieldKind::kDuration,
     .help = "scheduler.slo.ttft of standard requests; 0s is the same", .min = 0, .max = kMsDay},
    {TP_FIELD(scheduler.classes.standard.itl), .kind = FieldKind::kDuration,
     .help = "scheduler.slo.itl of standard requests; 0s is the same", .min = 0, .max = kMsHour},
    {TP_FIELD(scheduler.classes.batch.ttft), .kind = FieldKind::kDuration,
     .help = "first token of batch requests, which scheduler.slo is not meant for; 0s is none", .min = 0,
     .max = kMsDay},
    {TP_FIELD(scheduler.classes.batch.itl), .kind = FieldKind::kDuration,
     .help = "between tokens of batch requests, which scheduler.slo is not meant for; 0s is none", .min = 0,
     .max = kMsHour},
    {TP_FIELD(scheduler.placement), .kind = FieldKind::kChoice,
     .help = "how workers are chosen; anything but tidepool is a baseline to compare with",
     .choices =
         "tidepool|random|round-robin|least-loaded|power-of-two|prefix-only|cache-aware|dynamo|mooncake"},
    {TP_FIELD(scheduler.admission), .kind = FieldKind::kChoice,
     .help = "what is judged by the objectives at arrival: the load predicted, the load now, or nothing",
     .choices = "predicted|early|at-stage|none"},
    {TP_FIELD(scheduler.fairness), .kind = FieldKind::kChoice,
     .help = "between tenants, in placement: d2lpm gives each its share of every worker",
     .choices = "none|d2lpm"},
    {TP_FIELD(scheduler.local_prefill_tokens), .kind = FieldKind::kCount,
     .help = "prompts with at most this many uncached tokens are prefilled on the decode worker", .min = 0,
     .max = 1 << 20, .unit = "tokens"},
    {TP_FIELD(scheduler.worker_timeout), .kind = FieldKind::kDuration,
     .help = "a worker without a report for this long is lost", .min = 100, .max = kMsHour},
    {TP_FIELD(scheduler.max_inflight), .kind = FieldKind::kCount, .help = "placed and unfinished requests",
     .min = 1, .max = 1 << 20, .unit = "requests"},
    {TP_FIELD(scheduler.hot_copies), .kind = FieldKind::kCount,
     .help = "workers and stores that are to hold a block that many requests use; 1 is never copy", .min = 1,
     .max = 16, .unit = "copies"},
    {TP_FIELD(scheduler.replicate_bytes_per_second), .kind = FieldKind::kBytes,
     .help = "of the copies that the scheduler orders", .min = 1 * kMiB, .max = 64 * kTiB},
    {TP_FIELD(scheduler.elasticity), .kind = FieldKind::kChoice,
     .help = "workers change between prefill and decode: by themselves, or `ctl advice` says which should",
     .choices = "advise|act|off"},
    {TP_FIELD(scheduler.elasticity_dwell), .kind = FieldKind::kDuration,
     .help = "so long one kind of worker is short before one of the other changes", .min = 100,
     .max = kMsDay},

    {TP_FIELD(store.id), .kind = FieldKind::kText, .help = "default: store-HOST-PID"},
    {TP_FIELD(store.model), .kind = FieldKind::kText,
     .help =
         "directory of the cluster's model, of which no weights are loaded; none is what the scheduler says"},
    {TP_FIELD(store.listen), .kind = FieldKind::kAddress,
     .help = "gRPC of the cluster; port 0 is any free one"},
    {TP_FIELD(store.metrics_listen), .kind = FieldKind::kAddress, .help = "HTTP /metrics, /livez, /readyz"},
    {TP_FIELD(store.follow), .kind = FieldKind::kChoice,
     .help = "blocks that a store takes over by itself: of chains that a later request carried on, all, none",
     .choices = "reused|all|none"},
    {TP_FIELD(store.follow_bytes_per_second), .kind = FieldKind::kBytes,
     .help = "of what it takes over; 0 is no limit", .min = 0, .max = 64 * kTiB},

    {TP_FIELD(gateway.http_listen), .kind = FieldKind::kAddress, .help = "OpenAI-compatible HTTP",
     .common = true},
    {TP_FIELD(gateway.grpc_listen), .kind = FieldKind::kAddress, .help = "tidepool.v1.Inference",
     .common = true},
    {TP_FIELD(gateway.metrics_listen), .kind = FieldKind::kText,
     .help = "HTTP /metrics, /livez, /readyz for operators; with API keys, metrics are served nowhere else"},
    {TP_FIELD(gateway.api_keys), .kind = FieldKind::kApiKeys,
     .help = "who may call: SHA-256 of a key and its tenant; none is no authentication"},
    {TP_FIELD(gateway.api_keys_file), .kind = FieldKind::kText,
     .help = "file of keys and tenants' limits in api_keys' place; read again when it changes and on SIGHUP"},
    {TP_FIELD(gateway.allow_unauthenticated), .kind = FieldKind::kBool,
     .help = "lets a listener that others can reach take anybody's requests"},
    {TP_FIELD(gateway.tls.cert), .kind = FieldKind::kText,
     .help = "PEM certificate chain; HTTP and gRPC then speak TLS; read again when it changes"},
    {TP_FIELD(gateway.tls.key), .kind = FieldKind::kText, .help = "PEM private key of gateway.tls.cert"},
    {TP_FIELD(gateway.tls.client_ca), .kind = FieldKind::kText,
     .help = "PEM certificates that clients' own must be signed by: mutual TLS"},
    {TP_FIELD(gateway.allowed_hosts), .kind = FieldKind::kList,
     .help = "names that clients may call this server by, beside localhost; * is any"},
    {TP_FIELD(gateway.cors.allowed_origins), .kind = FieldKind::kList,
     .help = "origins whose web pages may call, as https://app.example; * is any"},
    {TP_FIELD(gateway.tenant_limits.requests_per_minute), .kind = FieldKind::kCount,
     .help = "of one tenant; 0 is no limit", .min = 0, .max = 100'000'000, .unit = "requests"},
    {TP_FIELD(gateway.tenant_limits.tokens_per_minute), .kind = FieldKind::kCount,
     .help = "prompt and answer, of one tenant; 0 is no limit", .min = 0, .max = 4'000'000'000,
     .unit = "tokens"},
    {TP_FIELD(gateway.tenant_limits.max_inflight), .kind = FieldKind::kCount,
     .help = "of one tenant at once, each choice of n counted; 0 is no limit", .min = 0, .max = 1 << 20,
     .unit = "requests"},
    {TP_FIELD(gateway.tenant_limits.max_queued_requests), .kind = FieldKind::kCount,
     .help = "of one tenant, without a first token; 0 is no limit", .min = 0, .max = 1 << 20,
     .unit = "requests"},
    {TP_FIELD(gateway.tenant_limits.max_queued_tokens), .kind = FieldKind::kCount,
     .help = "prompt tokens of those; 0 is no limit", .min = 0, .max = 1 << 30, .unit = "tokens"},
    {TP_FIELD(gateway.server_key), .kind = FieldKind::kText,
     .help = "secret of the tenants' cache salts; default: drawn at start", .secret = true},
    {TP_FIELD(gateway.max_body_bytes), .kind = FieldKind::kBytes, .help = "of one request", .min = 1 * kKiB,
     .max = 1 * kGiB},
    {TP_FIELD(gateway.max_header_bytes), .kind = FieldKind::kBytes,
     .help = "all header fields of one request", .min = 1 * kKiB, .max = 1 * kMiB},
    {TP_FIELD(gateway.max_connections), .kind = FieldKind::kCount, .help = "open at once", .min = 1,
     .max = 1 << 20, .unit = "connections"},
    {TP_FIELD(gateway.max_inflight), .kind = FieldKind::kCount, .help = "admitted at once; beyond it 429",
     .min = 1, .max = 1 << 20, .unit = "requests"},
    {TP_FIELD(gateway.max_queued_requests), .kind = FieldKind::kCount,
     .help = "admitted, without a first token; beyond it 429; 0 is max_inflight", .min = 0, .max = 1 << 20,
     .unit = "requests"},
    {TP_FIELD(gateway.max_queued_tokens), .kind = FieldKind::kCount,
     .help = "prompt tokens of those; beyond it 429", .min = 1, .max = 1 << 30, .unit = "tokens"},
    {TP_FIELD(gateway.max_stream_buffer_bytes), .kind = FieldKind::kBytes,
     .help = "unsent output of one slow client; beyond it the request is cancelled", .min = 1 * kKiB,
     .max = 1 * kGiB},
    {TP_FIELD(gateway.request_timeout), .kind = FieldKind::kDuration, .help = "of one request, all of it",
     .min = 100, .max = kMsDay},
    {TP_FIELD(gateway.header_timeout), .kind = FieldKind::kDuration,
     .help = "to receive one request's head; also of a TLS handshake", .min = 10, .max = kMsHour},
    {TP_FIELD(gateway.body_timeout), .kind = FieldKind::kDuration, .help = "to receive one request's body",
     .min = 10, .max = kMsHour},
    {TP_FIELD(gateway.idle_timeout), .kind = FieldKind::kDuration, .help = "of a kept-alive connection",
     .min = 10, .max = kMsDay},
    {TP_FIELD(gateway.slow_client_timeout), .kind = FieldKind::kDuration,
     .help = "a client that takes nothing for this long is cancelled", .min = 10, .max = kMsHour},
    {TP_FIELD(gateway.max_retries), .kind = FieldKind::kCount, .help = "of a request whose worker failed",
     .min = 0, .max = 10, .unit = "retries"},
    {TP_FIELD(gateway.placement_wait), .kind = FieldKind::kDuration,
     .help = "a request without a scheduler, or a worker to go on at, asks again for so long", .min = 0,
     .max = kMsHour},
    {TP_FIELD(gateway.grammar_cache_bytes), .kind = FieldKind::kBytes,
     .help = "compiled structured outputs that are kept; the least recently used go first", .min = 16 * kMiB,
     .max = 64 * kGiB},
    {TP_FIELD(gateway.access_log), .kind = FieldKind::kText,
     .help = "a JSON line a request: stderr, off, or a file"},
    {TP_FIELD(gateway.batch_dir), .kind = FieldKind::kText,
     .help = "files and batches are kept here; off is off, empty too but for `serve`"},
    {TP_FIELD(gateway.batch_max_inflight), .kind = FieldKind::kCount,
     .help = "batch lines at once, where online requests leave room", .min = 1, .max = 1 << 16,
     .unit = "lines"},
    {TP_FIELD(gateway.batch_max_file_bytes), .kind = FieldKind::kBytes, .help = "of one uploaded file",
     .min = 1 * kKiB, .max = 64 * kGiB},
    {TP_FIELD(gateway.batch_max_tenant_bytes), .kind = FieldKind::kBytes,
     .help = "of all files of one tenant, results too", .min = 1 * kKiB, .max = 65536 * kGiB},
    {TP_FIELD(gateway.batch_max_files), .kind = FieldKind::kCount, .help = "of one tenant", .min = 1,
     .max = 1 << 20, .unit = "files"},
    {TP_FIELD(gateway.batch_max_batches), .kind = FieldKind::kCount, .help = "of one tenant, unfinished",
     .min = 1, .max = 1 << 16, .unit = "batches"},
    {TP_FIELD(gateway.batch_max_lines), .kind = FieldKind::kCount, .help = "of one batch", .min = 1,
     .max = 100'000'000, .unit = "lines"},
    {TP_FIELD(gateway.batch_file_ttl), .kind = FieldKind::kDuration,
     .help = "a file is removed so long after it was made", .min = 1000, .max = 3650 * kMsDay},

    {TP_FIELD(cluster.scheduler), .kind = FieldKind::kAddress, .help = "where the scheduler is"},
    {TP_FIELD(cluster.etcd), .kind = FieldKind::kList,
     .help = "HOST:PORT of etcd's members: the scheduler that leads is found there, others stand by"},
    {TP_FIELD(cluster.etcd_prefix), .kind = FieldKind::kText,
     .help = "of all keys in etcd: one for each cluster that shares it"},
    {TP_FIELD(cluster.etcd_user), .kind = FieldKind::kText, .help = "where etcd asks for one"},
    {TP_FIELD(cluster.etcd_password), .kind = FieldKind::kText, .help = "of cluster.etcd_user",
     .secret = true},
    {TP_FIELD(cluster.etcd_ca), .kind = FieldKind::kText,
     .help = "PEM file of who signed etcd's certificates; empty is plaintext"},
    {TP_FIELD(cluster.etcd_cert), .kind = FieldKind::kText,
     .help = "PEM file of our certificate, where etcd asks clients for one"},
    {TP_FIELD(cluster.etcd_key), .kind = FieldKind::kText, .help = "PEM file of its key"},
    {TP_FIELD(cluster.lease), .kind = FieldKind::kDuration,
     .help = "another scheduler takes over after so long without a sign of life", .min = 1000,
     .max = 10 * kMsMinute},
    {TP_FIELD(cluster.token), .kind = FieldKind::kText,
     .help = "shared secret of the cluster's processes; `serve` draws one", .secret = true},
    {TP_FIELD(cluster.start_timeout), .kind = FieldKind::kDuration,
     .help = "of one role, loading of weights included", .min = 100, .max = kMsDay},
    {TP_FIELD(cluster.drain_timeout), .kind = FieldKind::kDuration,
     .help = "in-flight requests get this long after SIGTERM", .min = 0, .max = kMsDay, .common = true},

    {TP_FIELD(log.level), .kind = FieldKind::kChoice, .help = "least that is logged",
     .choices = "error|warn|info|debug", .common = true},

    {TP_FIELD(serve.metrics_listen), .kind = FieldKind::kAddress,
     .help = "HTTP /metrics, /livez, /readyz of the supervisor"},
    {TP_FIELD(serve.store), .kind = FieldKind::kBool,
     .help = "start a store beside the workers: more memory and disk for KV, and a place that outlives them"},
};
#undef TP_FIELD

size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

struct ByteUnit {
  const char* suffix;
  uint64_t bytes;
};
constexpr ByteUnit kByteUnits[] = {
    {"TiB", kTiB},       {"GiB", kGiB},   {"MiB", kMiB}, {"KiB", kKiB}, {"TB", 1000000000000u},
    {"GB", 1000000000u}, {"MB", 1000000}, {"kB", 1000},  {"KB", 1000},  {"B", 1}};

std::string FormatBytes(uint64_t bytes) {
  for (const ByteUnit& unit : {kByteUnits[0], kByteUnits[1], kByteUnits[2], kByteUnits[3]}) {
    if (bytes != 0 && bytes % unit.bytes == 0) return absl::StrCat(bytes / unit.bytes, unit.suffix);
  }
  return absl::StrCat(bytes, "B");
}

std::string Quote(std::string_view text) { return absl::StrCat("'", std::string(text), "'"); }

absl::Status RangeError(std::string_view text, const std::string& min, const std::string& max,
                        std::string_view unit) {
  return absl::InvalidArgumentError(absl::StrCat(Quote(text), " is out of range; give ", min, " to ", max,
                                                 unit.empty() ? "" : " ", std::string(unit)));
}

absl::StatusOr<uint64_t> ParseWhole(std::string_view text, std::string_view example) {
  uint64_t value = 0;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
  if (!digits || !absl::SimpleAtoi(std::string(text), &value)) {
    return absl::InvalidArgumentError(
        absl::StrCat(Quote(text), " is not a whole number; write it as ", std::string(example)));
  }
  return value;
}

absl::StatusOr<uint64_t> ParseBytes(std::string_view text) {
  uint64_t unit_bytes = 1;
  std::string_view number = text;
  for (const ByteUnit& unit : kByteUnits) {
    if (absl::EndsWith(std::string(text), unit.suffix)) {
      unit_bytes = unit.bytes;
      number.remove_suffix(std::string_view(unit.suffix).size());
      break;
    }
  }
  while (!number.empty() && number.back() == ' ') number.remove_suffix(1);
  auto value = ParseWhole(number, "256MiB (units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)");
  // The whole text belongs into the message, not only what was left of it.
  if (!value.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(
        Quote(text), " is not a size; write it as 256MiB (units: B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)"));
  }
  if (*value > std::numeric_limits<uint64_t>::max() / unit_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(Quote(text), " does not fit into 64 bits"));
  }
  return *value * unit_bytes;
}

absl::StatusOr<absl::Duration> ParseDurationText(std::string_view text) {
  absl::Duration out;
  if (!absl::ParseDuration(std::string(text), &out)) {
    const bool bare = !text.empty() && text.find_first_not_of("0123456789.") == std::string_view::npos;
    return absl::InvalidArgumentError(absl::StrCat(Quote(text), bare ? " has no unit" : " is not a duration",
                                                   "; write it as 30s, 500ms or 2m"));
  }
  return out;
}

absl::StatusOr<std::vector<ApiKeyConfig>> ParseApiKeys(std::string_view text) {
  std::vector<ApiKeyConfig> keys;
  for (absl::string_view entry : absl::StrSplit(std::string(text), ',', absl::SkipWhitespace())) {
    const std::vector<std::string> parts =
        absl::StrSplit(absl::StripAsciiWhitespace(entry), absl::MaxSplits(':', 1));
    if (parts.size() != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("entry ", keys.size() + 1, " has no tenant; write SHA256:TENANT,SHA256:TENANT"));
    }
    keys.push_back({parts[0], parts[1]});
  }
  return keys;
}

absl::StatusOr<std::map<std::string, uint64_t>> ParseTenantBytes(std::string_view text, const Field& field) {
  std::map<std::string, uint64_t> out;
  for (absl::string_view entry : absl::StrSplit(std::string(text), ',', absl::SkipWhitespace())) {
    const std::vector<std::string> parts =
        absl::StrSplit(absl::StripAsciiWhitespace(entry), absl::MaxSplits(':', 1));
    const std::string tenant(absl::StripAsciiWhitespace(parts[0]));
    if (parts.size() != 2) {
      return absl::InvalidArgumentError(
          absl::StrCat("entry ", out.size() + 1, " has no size; write TENANT:256MiB,TENANT:1GiB"));
    }
    if (const std::string problem = TenantNameProblem(tenant); !problem.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("tenant ", Quote(tenant), " ", problem));
    }
    const std::string size(absl::StripAsciiWhitespace(parts[1]));
    auto bytes = ParseBytes(size);
    if (bytes.ok() && (*bytes < field.min || *bytes > field.max)) {
      bytes = RangeError(size, FormatBytes(field.min), FormatBytes(field.max), "");
    }
    if (!bytes.ok()) return Annotate(bytes.status(), absl::StrCat("of tenant ", Quote(tenant)));
    if (!out.emplace(tenant, *bytes).second) {
      return absl::InvalidArgumentError(absl::StrCat("gives tenant ", Quote(tenant), " twice; remove one"));
    }
  }
  return out;
}

absl::StatusOr<std::vector<std::string>> ParseList(std::string_view text) {
  std::vector<std::string> words;
  for (absl::string_view part : absl::StrSplit(std::string(text), ',', absl::SkipWhitespace())) {
    words.emplace_back(absl::StripAsciiWhitespace(part));
  }
  for (const std::string& word : words) {
    if (word.find_first_of(" \t\r\n\v\f") != std::string::npos || word.find('\0') != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(Quote(word), " is more than one word; write A,B,C"));
    }
  }
  return words;
}

// The four texts a person can give for a whole field are short; anything longer is a mistake.
constexpr size_t kMaxText = 64 << 10;

}  // namespace

std::string Field::env() const {
  return "TIDEPOOL_" + absl::AsciiStrToUpper(absl::StrReplaceAll(std::string(path), {{".", "_"}}));
}

std::string Field::flag() const {
  return "--" + absl::StrReplaceAll(std::string(path), {{".", "-"}, {"_", "-"}});
}

std::span<const Field> Fields() { return kFields; }

const Field* FindField(std::string_view path) {
  for (const Field& field : kFields) {
    if (field.path == path) return &field;
  }
  return nullptr;
}

namespace {
constexpr RenamedField kRenamed[] = {
    {"transport.tls", "transport.ucx_tls"},  // TLS now also stands for the security layer
};
}  // namespace

std::span<const RenamedField> RenamedFields() { return kRenamed; }

std::string_view PresentPath(std::string_view old_path) {
  for (const RenamedField& field : kRenamed) {
    if (field.old_path == old_path) return field.path;
  }
  return "";
}

std::string NearestOf(std::string_view name, std::span<const std::string> known) {
  std::string best;
  size_t best_distance = name.size() / 3 + 2;  // farther than this is another word, not a slip
  for (const std::string& candidate : known) {
    const size_t distance = EditDistance(name, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

absl::Status SetField(const Field& field, std::string_view text, Config& config) {
  if (text.size() > kMaxText) {
    return absl::InvalidArgumentError(absl::StrCat("has ", text.size(), " characters; at most ", kMaxText));
  }
  const FieldPtr target = field.in(config);
  switch (field.kind) {
    case FieldKind::kText:
      if (text.find('\0') != std::string_view::npos)
        return absl::InvalidArgumentError("contains a NUL character");
      *std::get<std::string*>(target) = text;
      return absl::OkStatus();
    case FieldKind::kChoice: {
      const std::vector<std::string> choices = absl::StrSplit(std::string(field.choices), '|');
      if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
        const std::string nearest = NearestOf(text, choices);
        return absl::InvalidArgumentError(
            absl::StrCat(Quote(text), " is not one of ", absl::StrJoin(choices, ", "),
                         nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?")));
      }
      *std::get<std::string*>(target) = text;
      return absl::OkStatus();
    }
    case FieldKind::kAddress: {
      TP_RETURN_IF_ERROR(ParseHostPort(text).status());
      *std::get<std::string*>(target) = text;
      return absl::OkStatus();
    }
    case FieldKind::kBool:
      if (text != "true" && text != "false") {
        return absl::InvalidArgumentError(
            absl::StrCat(Quote(text), " is not a truth value; write true or false"));
      }
      *std::get<bool*>(target) = text == "true";
      return absl::OkStatus();
    case FieldKind::kCount: {
      TP_ASSIGN_OR_RETURN(const uint64_t value,
                          ParseWhole(text, FormatField(field, Config()) + " " + std::string(field.unit)));
      if (value < field.min || value > field.max) {
        return RangeError(text, absl::StrCat(field.min), absl::StrCat(field.max), field.unit);
      }
      *std::get<uint32_t*>(target) = static_cast<uint32_t>(value);
      return absl::OkStatus();
    }
    case FieldKind::kBytes: {
      TP_ASSIGN_OR_RETURN(const uint64_t value, ParseBytes(text));
      if (value < field.min || value > field.max) {
        return RangeError(text, FormatBytes(field.min), FormatBytes(field.max), "");
      }
      if (uint32_t* const* small = std::get_if<uint32_t*>(&target)) {
        **small = static_cast<uint32_t>(value);
      } else {
        *std::get<uint64_t*>(target) = value;
      }
      return absl::OkStatus();
    }
    case FieldKind::kDuration: {
      TP_ASSIGN_OR_RETURN(const absl::Duration value, ParseDurationText(text));
      const absl::Duration min = absl::Milliseconds(field.min), max = absl::Milliseconds(field.max);
      if (value < min || value > max) {
        return RangeError(text, field.min == 0 ? "0s" : absl::FormatDuration(min), absl::FormatDuration(max),
                          "");
      }
      *std::get<absl::Duration*>(target) = value;
      return absl::OkStatus();
    }
    case FieldKind::kList: {
      TP_ASSIGN_OR_RETURN(auto words, ParseList(text));
      *std::get<std::vector<std::string>*>(target) = std::move(words);
      return absl::OkStatus();
    }
    case FieldKind::kApiKeys: {
      TP_ASSIGN_OR_RETURN(auto keys, ParseApiKeys(text));
      *std::get<std::vector<ApiKeyConfig>*>(target) = std::move(keys);
      return absl::OkStatus();
    }
    case FieldKind::kTenantBytes: {
      TP_ASSIGN_OR_RETURN(auto bytes, ParseTenantBytes(text, field));
      *std::get<std::map<std::string, uint64_t>*>(target) = std::move(bytes);
      return absl::OkStatus();
    }
  }
  return absl::InternalError("a field without a kind");
}

std::string FormatField(const Field& field, const Config& config) {
  // `in` wants a mutable Config because setting does; nothing is written through it here.
  const FieldPtr value = field.in(const_cast<Config&>(config));
  switch (field.kind) {
    case FieldKind::kText:
    case FieldKind::kChoice:
    case FieldKind::kAddress:
      return *std::get<std::string*>(value);
    case FieldKind::kBool:
      return *std::get<bool*>(value) ? "true" : "false";
    case FieldKind::kCount:
      return absl::StrCat(*std::get<uint32_t*>(value));
    case FieldKind::kBytes:
      if (const uint32_t* const* small = std::get_if<uint32_t*>(&value)) return FormatBytes(**small);
      return FormatBytes(*std::get<uint64_t*>(value));
    case FieldKind::kDuration: {
      const absl::Duration duration = *std::get<absl::Duration*>(value);
      return duration == absl::ZeroDuration() ? "0s" : absl::FormatDuration(duration);
    }
    case FieldKind::kList:
      return absl::StrJoin(*std::get<std::vector<std::string>*>(value), ",");
    case FieldKind::kApiKeys:
      return absl::StrJoin(*std::get<std::vector<ApiKeyConfig>*>(value), ",",
                           [](std::string* out, const ApiKeyConfig& key) {
                             absl::StrAppend(out, key.key_sha256, ":", key.tenant);
                           });
    case FieldKind::kTenantBytes:
      return absl::StrJoin(*std::get<std::map<std::string, uint64_t>*>(value), ",",
                           [](std::string* out, const auto& entry) {
                             absl::StrAppend(out, entry.first, ":", FormatBytes(entry.second));
                           });
  }
  return "";
}

std::string DisplayField(const Field& field, const Config& config) {
  std::string text = FormatField(field, config);
  if (!field.secret) return text;
  return text.empty() ? "(empty)" : "(set)";
}

}  // namespace tidepool

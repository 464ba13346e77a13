#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "config/address.h"
#include "config/loader.h"
#include "config/yaml_read.h"

namespace tidepool {
namespace {

// A short token can be guessed; `openssl rand -hex 16` gives 32 characters.
constexpr size_t kMinTokenChars = 16;

struct Listener {
  std::string_view path;
  const std::string& address;
};

std::vector<Listener> ListenersOf(const Config& c, ConfigRole role) {
  const bool serve = role == ConfigRole::kServe;
  std::vector<Listener> out;
  if (serve || role == ConfigRole::kGateway) {
    out.push_back({"gateway.http_listen", c.gateway.http_listen});
    out.push_back({"gateway.grpc_listen", c.gateway.grpc_listen});
    if (!c.gateway.metrics_listen.empty()) {
      out.push_back({"gateway.metrics_listen", c.gateway.metrics_listen});
    }
  }
  if (serve || role == ConfigRole::kScheduler) {
    out.push_back({"scheduler.listen", c.scheduler.listen});
    out.push_back({"scheduler.metrics_listen", c.scheduler.metrics_listen});
  }
  if (serve || role == ConfigRole::kWorker) {
    out.push_back({"worker.listen", c.worker.listen});
    out.push_back({"worker.metrics_listen", c.worker.metrics_listen});
  }
  if (role == ConfigRole::kStore || (serve && c.serve.store)) {
    out.push_back({"store.listen", c.store.listen});
    out.push_back({"store.metrics_listen", c.store.metrics_listen});
  }
  if (serve) out.push_back({"serve.metrics_listen", c.serve.metrics_listen});
  return out;
}

// Validator: collects what is wrong with a whole configuration for one role.
class Validator {
 public:
  Validator(const LoadedConfig& loaded, ConfigRole role) : loaded_(loaded), c_(loaded.config), role_(role) {}

  absl::Status Run() {
    Model();
    Listeners();
    Token();
    Etcd();
    Gateway();
    Ids();
    Limits();
    Transport();
    if (problems_.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrJoin(problems_, "\n"));
  }

 private:
  bool Is(ConfigRole role) const { return role_ == role || role_ == ConfigRole::kServe; }

  void Problem(std::string_view path, const std::string& what) {
    problems_.push_back(absl::StrCat(loaded_.Describe(path), ": ", what));
  }

  void Model() {
    const bool needed = role_ == ConfigRole::kWorker || role_ == ConfigRole::kGateway;
    if (needed && c_.model.path.empty()) {
      Problem("model.path", "is empty; give the model's directory with --model-path DIR");
    }
  }

  void Listeners() {
    std::set<uint16_t> ports;
    for (const Listener& listener : ListenersOf(c_, role_)) {
      const auto address = ParseHostPort(listener.address);
      if (!address.ok()) {
        Problem(listener.path, std::string(address.status().message()));
      } else if (address->port != 0 && !ports.insert(address->port).second) {
        // Equal ports on different interfaces would work, and are a slip nearly always.
        Problem(listener.path,
                absl::StrCat("port ", address->port, " is taken by another listener; choose another"));
      }
    }
    // `serve` starts two workers from one section: a fixed port would serve only the first.
    if (role_ == ConfigRole::kServe) {
      for (const auto& [path, text] :
           {std::pair<std::string_view, std::string>{"worker.listen", c_.worker.listen},
            {"worker.metrics_listen", c_.worker.metrics_listen}}) {
        const auto address = ParseHostPort(text);
        if (address.ok() && address->port != 0) {
          Problem(path, absl::StrCat("port ", address->port,
                                     " cannot serve two workers; with `serve` give port 0"));
        }
      }
      if (!c_.worker.id.empty()) Problem("worker.id", "cannot name two workers; leave it empty with `serve`");
    }
  }

  void Token() {
    if (!c_.cluster.token.empty() && c_.cluster.token.size() < kMinTokenChars) {
      Problem("cluster.token", absl::StrCat("has ", c_.cluster.token.size(), " characters; at least ",
                                            kMinTokenChars, ", as from `openssl rand -hex 16`"));
    }
    if (!c_.cluster.token.empty() || role_ == ConfigRole::kServe) return;  // serve draws one
    for (const Listener& listener : ListenersOf(c_, role_)) {
      const auto address = ParseHostPort(listener.address);
      if (address.ok() && !address->IsLoopback()) {
        Problem(
            "cluster.token",
            absl::StrCat("is empty while ", std::string(listener.path), " (", listener.address,
                         ") can be reached from outside; set TIDEPOOL_CLUSTER_TOKEN or listen on loopback"));
        return;
      }
    }
  }

  void Etcd() {
    const ClusterConfig& c = c_.cluster;
    for (const std::string& endpoint : c.etcd) {
      const auto address = ParseHostPort(endpoint);
      if (!address.ok()) {
        Problem("cluster.etcd", std::string(address.status().message()));
      } else if (address->port == 0) {
        Problem("cluster.etcd", absl::StrCat(endpoint, ": port 0 is no peer's; etcd's own is 2379"));
      }
    }
    if (!c.etcd.empty() && role_ == ConfigRole::kServe) {
      Problem("cluster.etcd",
              "is for roles that are started by themselves; `serve` needs no etcd: leave it empty");
    }
    // What others are told in etcd is where it listens.
    for (const auto& [role, path, listen] :
         {std::tuple{ConfigRole::kScheduler, "scheduler.listen", c_.scheduler.listen},
          std::tuple{ConfigRole::kWorker, "worker.listen", c_.worker.listen},
          std::tuple{ConfigRole::kStore, "store.listen", c_.store.listen}}) {
      const auto address = ParseHostPort(listen);
      if (c.etcd.empty() || role_ != role || !address.ok()) continue;
      if (address->host == "0.0.0.0" || address->host == "::") {
        Problem(path, absl::StrCat(listen,
                                   " is no address that others can reach; with cluster.etcd it is what they "
                                   "are told: give this machine's own"));
      }
    }
    if (c.etcd_prefix.empty() || c.etcd_prefix.back() == '\xff') {
      Problem("cluster.etcd_prefix", "is empty or no text; /tidepool is one");
    }
    if (c.etcd_user.empty() != c.etcd_password.empty()) {
      Problem(c.etcd_user.empty() ? "cluster.etcd_user" : "cluster.etcd_password",
              "is empty; a user needs its password");
    }
    if (c.etcd_cert.empty() != c.etcd_key.empty()) {
      Problem(c.etcd_cert.empty() ? "cluster.etcd_cert" : "cluster.etcd_key",
              "is empty; TLS needs the certificate and its key");
    }
    if (!c.etcd_cert.empty() && c.etcd_ca.empty()) {
      Problem("cluster.etcd_ca",
              "is empty; without it etcd is spoken to in plaintext, and etcd_cert is of no use");
    }
    if (!c.etcd_user.empty() && c.etcd_ca.empty()) {
      for (const std::string& endpoint : c.etcd) {
        const auto address = ParseHostPort(endpoint);
        if (!address.ok() || address->IsLoopback()) continue;
        Problem("cluster.etcd_ca",
                absl::StrCat("is empty; the password would go to ", endpoint, " in plaintext"));
        break;
      }
    }
  }

  void Gateway() {
    if (!Is(ConfigRole::kGateway)) return;
    const GatewayConfig& g = c_.gateway;
    for (const std::string& problem : ApiKeyProblems(g.api_keys)) Problem("gateway.api_keys", problem);
    if (!g.api_keys_file.empty() && !g.api_keys.empty()) {
      Problem("gateway.api_keys_file", "and gateway.api_keys are both given; put all keys into the file");
    }
    if (g.tls.cert.empty() != g.tls.key.empty()) {
      Problem(g.tls.cert.empty() ? "gateway.tls.cert" : "gateway.tls.key",
              "is empty; TLS needs the certificate and its key");
    }
    if (!g.tls.client_ca.empty() && g.tls.cert.empty()) {
      Problem("gateway.tls.client_ca", "is of no use without gateway.tls.cert and gateway.tls.key");
    }
    for (const std::string& origin : g.cors.allowed_origins) {
      const size_t scheme = origin.find("://");
      const bool bare = scheme != std::string::npos && scheme > 0 && scheme + 3 < origin.size() &&
                        origin.find('/', scheme + 3) == std::string::npos;
      if (origin != "*" && !bare) {
        Problem("gateway.cors.allowed_origins",
                "'" + origin +
                    "' is no origin; write https://app.example or http://localhost:3000, without a path");
      }
    }
    Unauthenticated();
  }

  // Keys or client certificates before anybody else's machine can spend this one's time.
  void Unauthenticated() {
    const GatewayConfig& g = c_.gateway;
    const bool guarded = !g.api_keys.empty() || !g.api_keys_file.empty() || !g.tls.client_ca.empty();
    if (guarded || g.allow_unauthenticated) return;
    for (const auto& [path, text] :
         {std::pair<std::string_view, const std::string&>{"gateway.http_listen", g.http_listen},
          {"gateway.grpc_listen", g.grpc_listen}}) {
      const auto address = ParseHostPort(text);
      if (address.ok() && !address->IsLoopback()) {
        Problem(path,
                absl::StrCat(text,
                             " can be reached from outside and no API keys are configured; make one with "
                             "`tidepool key new --tenant NAME` and put it into gateway.api_keys_file, or set "
                             "gateway.tls.client_ca, or listen on loopback, or say "
                             "--gateway-allow-unauthenticated true"));
      }
    }
  }

  void Transport() {
    if (!Is(ConfigRole::kWorker) && role_ != ConfigRole::kStore) return;
    const TransportConfig& t = c_.transport;
    for (const auto& [path, file] :
         {std::pair<std::string_view, const std::string&>{"transport.tls_cert", t.tls_cert},
          {"transport.tls_key", t.tls_key},
          {"transport.tls_ca", t.tls_ca}}) {
      if (t.kind == "tls" && file.empty()) {
        Problem(path, "is empty; transport.kind tls needs a certificate, its key and the CA of its peers");
      } else if (t.kind != "tls" && !file.empty()) {
        // Somebody believes that the wire is encrypted.
        Problem(path, absl::StrCat("is of no use with transport.kind ", t.kind, "; say kind: tls"));
      }
    }
    if (role_ == ConfigRole::kServe && t.port != 0) {
      Problem("transport.port", absl::StrCat(t.port, " cannot serve two workers; with `serve` give port 0"));
    }
    if (t.tls_check_name && t.kind == "tls") {
      if (role_ == ConfigRole::kServe) {
        Problem("transport.tls_check_name",
                "cannot hold with `serve`, whose two workers have one certificate and names of their own; "
                "start roles one by one, or switch it off");
      } else if (role_ == ConfigRole::kStore && c_.store.id.empty()) {
        Problem("transport.tls_check_name", "needs store.id, the name in this store's certificate");
      } else if (role_ == ConfigRole::kWorker && c_.worker.id.empty()) {
        Problem("transport.tls_check_name", "needs worker.id, the name in this worker's certificate");
      }
    }
  }

  // An id names a directory of the disk tier and is part of transport addresses.
  void Ids() {
    for (const auto& [path, id, role] : {std::tuple<std::string_view, const std::string&, ConfigRole>{
                                             "worker.id", c_.worker.id, ConfigRole::kWorker},
                                         {"store.id", c_.store.id, ConfigRole::kStore}}) {
      if (role_ != role) continue;
      const bool plain = std::all_of(id.begin(), id.end(), [](unsigned char c) {
        return std::isalnum(c) != 0 || c == '.' || c == '_' || c == '-';
      });
      if (!plain || id.starts_with('.')) {
        Problem(path, absl::StrCat("'", id,
                                   "' may hold letters, digits, '.', '_' and '-', and begins with no '.'; "
                                   "choose another"));
      }
    }
  }

  void Limits() {
    if (!c_.kv.disk.path.empty() && !c_.kv.disk.path.starts_with('/')) {
      Problem("kv.disk.path", absl::StrCat("'", c_.kv.disk.path, "' is no absolute path; begin it with /"));
    }
    if (Is(ConfigRole::kWorker)) {
      // Each decoding sequence takes one token of every step.
      if (c_.engine.max_step_tokens < c_.engine.max_batch) {
        Problem("engine.max_step_tokens",
                absl::StrCat(c_.engine.max_step_tokens, " is below engine.max_batch (", c_.engine.max_batch,
                             "); give at least as much"));
      }
      // The user of a lease stops at 0.8 of it, so a fetch must be able to end by then.
      if (c_.kv.offer_lease * 0.8 < c_.transport.fetch_timeout) {
        Problem("kv.offer_lease", absl::StrCat(absl::FormatDuration(c_.kv.offer_lease),
                                               " does not outlive a fetch; give at least ",
                                               absl::FormatDuration(c_.transport.fetch_timeout * 1.25),
                                               " or lower transport.fetch_timeout"));
      }
    }
    if ((role_ == ConfigRole::kServe || role_ == ConfigRole::kScheduler) &&
        c_.scheduler.admission == "at-stage") {
      Problem(
          "scheduler.admission",
          "at-stage is a baseline of `tidepool simulate`: workers ask nobody when a prefill has ended; take "
          "predicted, early or none");
    }
    // A scheduler of its own is told with worker.report_interval how often its workers report.
    if ((role_ == ConfigRole::kServe || role_ == ConfigRole::kScheduler) &&
        c_.scheduler.worker_timeout < 3 * c_.worker.report_interval) {
      Problem(
          "scheduler.worker_timeout",
          absl::StrCat(absl::FormatDuration(c_.scheduler.worker_timeout),
                       " is under three report intervals: a late report would lose a worker; give at least ",
                       absl::FormatDuration(3 * c_.worker.report_interval)));
    }
  }

  const LoadedConfig& loaded_;
  const Config& c_;
  const ConfigRole role_;
  std::vector<std::string> problems_;
};

}  // namespace

absl::Status Validate(const LoadedConfig& loaded, ConfigRole role) { return Validator(loaded, role).Run(); }

}  // namespace tidepool

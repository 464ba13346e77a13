#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "config/address.h"
#include "config/loader.h"

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
  }
  if (serve || role == ConfigRole::kScheduler) {
    out.push_back({"scheduler.listen", c.scheduler.listen});
    out.push_back({"scheduler.metrics_listen", c.scheduler.metrics_listen});
  }
  if (serve || role == ConfigRole::kWorker) {
    out.push_back({"worker.listen", c.worker.listen});
    out.push_back({"worker.metrics_listen", c.worker.metrics_listen});
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
    ApiKeys();
    Limits();
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

  void ApiKeys() {
    std::set<std::string> digests;
    for (size_t i = 0; i < c_.gateway.api_keys.size(); ++i) {
      const ApiKeyConfig& key = c_.gateway.api_keys[i];
      const std::string entry = absl::StrCat("entry ", i + 1, " ");
      if (key.key_sha256.size() != 64 ||
          key.key_sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
        Problem("gateway.api_keys",
                entry + "needs key_sha256 of 64 lower-case hex digits: printf %s KEY | sha256sum");
      } else if (!digests.insert(key.key_sha256).second) {
        Problem("gateway.api_keys", entry + "repeats a key; one key belongs to one tenant");
      }
      if (key.tenant.empty() || key.tenant.size() > 64 ||
          key.tenant.find_first_of(",:\n") != std::string::npos) {
        Problem("gateway.api_keys", entry + "needs a tenant of 1 to 64 characters without ',' and ':'");
      }
    }
  }

  void Limits() {
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
    if (role_ == ConfigRole::kServe && c_.scheduler.worker_timeout < 3 * c_.worker.report_interval) {
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

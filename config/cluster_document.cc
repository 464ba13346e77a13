#include "config/cluster_document.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "config/fields.h"
#include "yaml-cpp/yaml.h"

namespace tidepool {
namespace {

constexpr std::string_view kMachine = "is of one machine; set it in that process's file or environment";
constexpr std::string_view kAddress = "is an address of one process; set it in that process's file or flags";
constexpr std::string_view kSecurity =
    "decides who may call, and must not hang on who may write to etcd; set it in the gateway's file";
constexpr std::string_view kIdentity =
    "is part of the block keys: workers that were restarted would refuse those that were not; begin another "
    "cluster (cluster.etcd_prefix) with it";

struct PrefixRule {
  std::string_view prefix;  // a field's path, or the beginning of several, up to a dot
  ClusterRule rule;
};

// The longest prefix that matches holds.
constexpr PrefixRule kRules[] = {
    {"model",
     {ClusterUse::kRefused, "says what this process loads; workers tell the cluster what it serves"}},

    {"engine", {ClusterUse::kRestart, ""}},
    {"engine.threads", {ClusterUse::kRefused, kMachine}},

    {"kv", {ClusterUse::kRestart, ""}},
    {"kv.block_tokens", {ClusterUse::kRefused, kIdentity}},
    {"kv.codec", {ClusterUse::kRefused, kIdentity}},
    {"kv.host_bytes", {ClusterUse::kRefused, kMachine}},
    {"kv.huge_pages", {ClusterUse::kRefused, kMachine}},
    {"kv.numa_node", {ClusterUse::kRefused, kMachine}},
    {"kv.lock_memory", {ClusterUse::kRefused, kMachine}},
    {"kv.disk", {ClusterUse::kRefused, kMachine}},
    {"kv.disk.admission", {ClusterUse::kRestart, ""}},
    {"kv.disk.eviction", {ClusterUse::kRestart, ""}},
    {"kv.disk.compress", {ClusterUse::kRestart, ""}},
    {"kv.tenant_quota_bytes", {ClusterUse::kLive, ""}},
    {"kv.tenant_quotas", {ClusterUse::kLive, ""}},

    {"transport", {ClusterUse::kRefused, kMachine}},

    {"worker", {ClusterUse::kRestart, ""}},
    {"worker.id", {ClusterUse::kRefused, "names one process"}},
    {"worker.role", {ClusterUse::kRefused, "is of one process; start it with --role"}},
    {"worker.listen", {ClusterUse::kRefused, kAddress}},
    {"worker.metrics_listen", {ClusterUse::kRefused, kAddress}},

    {"scheduler", {ClusterUse::kLive, ""}},
    {"scheduler.listen", {ClusterUse::kRefused, kAddress}},
    {"scheduler.metrics_listen", {ClusterUse::kRefused, kAddress}},

    {"store", {ClusterUse::kRestart, ""}},
    {"store.id", {ClusterUse::kRefused, "names one process"}},
    {"store.model", {ClusterUse::kRefused, kMachine}},
    {"store.listen", {ClusterUse::kRefused, kAddress}},
    {"store.metrics_listen", {ClusterUse::kRefused, kAddress}},

    {"gateway", {ClusterUse::kRestart, ""}},
    {"gateway.http_listen", {ClusterUse::kRefused, kAddress}},
    {"gateway.grpc_listen", {ClusterUse::kRefused, kAddress}},
    {"gateway.metrics_listen", {ClusterUse::kRefused, kAddress}},
    {"gateway.api_keys", {ClusterUse::kRefused, kSecurity}},
    {"gateway.api_keys_file", {ClusterUse::kRefused, kSecurity}},
    {"gateway.allow_unauthenticated", {ClusterUse::kRefused, kSecurity}},
    {"gateway.tls", {ClusterUse::kRefused, kSecurity}},
    {"gateway.allowed_hosts", {ClusterUse::kRefused, kSecurity}},
    {"gateway.cors", {ClusterUse::kRefused, kSecurity}},
    {"gateway.server_key", {ClusterUse::kRefused, "is a secret, and etcd shows its values to every reader"}},
    {"gateway.access_log", {ClusterUse::kRefused, kMachine}},
    {"gateway.batch_dir", {ClusterUse::kRefused, kMachine}},
    {"gateway.tenant_limits", {ClusterUse::kLive, ""}},
    {"gateway.max_queued_requests", {ClusterUse::kLive, ""}},
    {"gateway.max_queued_tokens", {ClusterUse::kLive, ""}},

    {"cluster",
     {ClusterUse::kRefused,
      "is needed to find etcd, or is of one process; set it in its file or environment"}},

    {"log.level", {ClusterUse::kLive, ""}},

    {"serve", {ClusterUse::kRefused, "is of `tidepool serve`, which has no etcd"}},
};

bool Covers(std::string_view prefix, std::string_view path) {
  return path.substr(0, prefix.size()) == prefix &&
         (path.size() == prefix.size() || path[prefix.size()] == '.');
}

std::string Text(const Field& field, const Config& config) { return FormatField(field, config); }

// What the document says over defaults that let every role start.
LoadedConfig OverDefaults(const LoadedConfig& document) {
  LoadedConfig whole = document;
  whole.config.model.path = "/";
  return whole;
}

void Emit(YAML::Emitter& out, const Field& field, const Config& config) {
  const std::string text = Text(field, config);
  if (field.kind == FieldKind::kList) {
    out << YAML::Flow << YAML::BeginSeq;
    for (absl::string_view word : absl::StrSplit(text, ',', absl::SkipEmpty())) {
      out << YAML::DoubleQuoted << std::string(word);
    }
    out << YAML::EndSeq;
  } else if (field.kind == FieldKind::kTenantBytes) {
    out << YAML::Flow << YAML::BeginMap;
    for (absl::string_view entry : absl::StrSplit(text, ',', absl::SkipEmpty())) {
      const size_t colon = entry.rfind(':');
      out << YAML::Key << YAML::DoubleQuoted << std::string(entry.substr(0, colon));
      out << YAML::Value << YAML::DoubleQuoted << std::string(entry.substr(colon + 1));
    }
    out << YAML::EndMap;
  } else {
    out << YAML::DoubleQuoted << text;
  }
}

}  // namespace

ClusterRule ClusterRuleOf(std::string_view path) {
  const PrefixRule* best = nullptr;
  for (const PrefixRule& rule : kRules) {
    if (Covers(rule.prefix, path) && (best == nullptr || rule.prefix.size() > best->prefix.size())) {
      best = &rule;
    }
  }
  return best == nullptr ? ClusterRule{ClusterUse::kRefused, "is not known to be the same everywhere"}
                         : best->rule;
}

bool Concerns(std::string_view path, ConfigRole role) {
  const std::string_view section = path.substr(0, path.find('.'));
  const bool worker = role == ConfigRole::kWorker, store = role == ConfigRole::kStore;
  if (role == ConfigRole::kServe || section == "cluster" || section == "log") return true;
  if (section == "model") return worker || store || role == ConfigRole::kGateway;
  if (section == "engine") return worker;
  if (section == "kv" || section == "transport") return worker || store;
  if (section == "worker") return worker || path == "worker.report_interval";
  if (section == "store") return store;
  if (section == "gateway") return role == ConfigRole::kGateway;
  if (section == "scheduler") {
    return role == ConfigRole::kScheduler || (role == ConfigRole::kGateway && Covers("scheduler.slo", path));
  }
  return false;
}

absl::StatusOr<LoadedConfig> ParseClusterDocument(std::string_view yaml, std::string_view name) {
  if (yaml.size() > kClusterDocumentBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(name), ": has ", yaml.size(), " bytes; at most ", kClusterDocumentBytesMax));
  }
  auto document = LoadConfigText(yaml, name);
  if (!document.ok()) return document.status();
  std::vector<std::string> problems;
  for (const Field& field : Fields()) {
    const auto source = document->sources.find(field.path);
    if (source == document->sources.end()) continue;
    const ClusterRule rule = ClusterRuleOf(field.path);
    if (rule.use != ClusterUse::kRefused) continue;
    problems.push_back(absl::StrCat(source->second, ": ", std::string(field.path),
                                    " cannot be set for the whole cluster: it ", std::string(rule.reason)));
  }
  if (problems.empty()) {
    // The same problem may show for several roles.
    std::set<std::string> seen;
    const LoadedConfig whole = OverDefaults(*document);
    for (const ConfigRole role :
         {ConfigRole::kScheduler, ConfigRole::kGateway, ConfigRole::kWorker, ConfigRole::kStore}) {
      const absl::Status status = Validate(whole, role);
      if (status.ok()) continue;
      for (const absl::string_view line : absl::StrSplit(status.message(), '\n')) {
        if (seen.emplace(line).second) problems.emplace_back(line);
      }
    }
  }
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  return document;
}

ConfigChange CompareConfigs(const Config& from, const Config& to, ConfigRole role) {
  ConfigChange change;
  for (const Field& field : Fields()) {
    if (!Concerns(field.path, role) || Text(field, from) == Text(field, to)) continue;
    (ClusterRuleOf(field.path).use == ClusterUse::kLive ? change.live : change.restart).push_back(field.path);
  }
  return change;
}

void CopyLiveFields(const LoadedConfig& from, LoadedConfig& to) {
  for (const Field& field : Fields()) {
    if (ClusterRuleOf(field.path).use != ClusterUse::kLive) continue;
    TP_CHECK(SetField(field, Text(field, from.config), to.config).ok());  // it was a value before
    const auto source = from.sources.find(field.path);
    if (source == from.sources.end()) {
      to.sources.erase(std::string(field.path));
    } else {
      to.sources[std::string(field.path)] = source->second;
    }
  }
}

std::string DescribeChange(std::string_view path, const Config& from, const Config& to) {
  const Field* field = FindField(path);
  TP_CHECK(field != nullptr);
  const auto shown = [&](const Config& config) {
    const std::string text = DisplayField(*field, config);
    return text.empty() ? std::string("(empty)") : text;
  };
  return absl::StrCat(std::string(path), " ", shown(from), " -> ", shown(to));
}

std::string FormatLiveFields(const Config& config) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  // Sections that are open; Fields() is grouped, so that each is opened once.
  std::vector<std::string> open;
  for (const Field& field : Fields()) {
    if (ClusterRuleOf(field.path).use != ClusterUse::kLive) continue;
    std::vector<std::string> parts = absl::StrSplit(std::string(field.path), '.');
    const std::string key = parts.back();
    parts.pop_back();
    size_t same = 0;
    while (same < std::min(open.size(), parts.size()) && open[same] == parts[same]) ++same;
    for (; open.size() > same; open.pop_back()) out << YAML::EndMap;
    for (; open.size() < parts.size(); open.push_back(parts[open.size()])) {
      out << YAML::Key << parts[open.size()] << YAML::Value << YAML::BeginMap;
    }
    out << YAML::Key << key << YAML::Value;
    Emit(out, field, config);
  }
  for (; !open.empty(); open.pop_back()) out << YAML::EndMap;
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

}  // namespace tidepool

// `tidepool ctl config show | diff | apply`: the cluster's document in etcd.
#include "server/cli/ctl_config.h"

#include <pwd.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "config/cluster_document.h"
#include "config/fields.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"
#include "server/cluster/config_store.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

struct ConfigOptions {
  std::shared_ptr<CtlOptions> ctl;
  ConfigInput local;     // where etcd is, and what else this process would read
  std::string document;  // a file; - is stdin
  std::string role = "scheduler";
  bool effective = false;
  std::optional<int64_t> revision;
};

const std::map<std::string, ConfigRole>& Roles() {
  static const std::map<std::string, ConfigRole> roles = {{"gateway", ConfigRole::kGateway},
                                                          {"scheduler", ConfigRole::kScheduler},
                                                          {"worker", ConfigRole::kWorker},
                                                          {"store", ConfigRole::kStore}};
  return roles;
}

absl::StatusOr<std::string> ReadDocument(const std::string& path) {
  if (path != "-") return ReadSmallFile(path, kClusterDocumentBytesMax);
  std::string text(kClusterDocumentBytesMax + 1, '\0');
  std::cin.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(std::cin.gcount()));
  return text;  // one that is too long is refused with its parsing
}

std::string Whoami() {
  char host[256] = {};
  if (gethostname(host, sizeof host - 1) != 0) *host = '\0';
  const passwd* user = getpwuid(geteuid());
  return absl::StrCat(user == nullptr ? absl::StrCat("uid ", geteuid()) : user->pw_name, "@", host);
}

std::string When(const ConfigAuthor& author) {
  return absl::FormatTime(absl::RFC3339_sec, author.when, absl::UTCTimeZone());
}

const char* UseText(std::string_view path) {
  return ClusterRuleOf(path).use == ClusterUse::kLive ? "at once" : "after a restart";
}

// What stands in etcd, parsed. A broken one is shown as it is, and replaced as if it were empty.
struct Standing {
  StoredConfig stored;
  LoadedConfig parsed;
  absl::Status status;
};

absl::StatusOr<Standing> Look(const Config& config) {
  Standing out;
  TP_ASSIGN_OR_RETURN(out.stored, ReadStoredConfig(config.cluster));
  if (out.stored.revision == 0) return out;
  auto parsed = ParseClusterDocument(out.stored.text, out.stored.name);
  out.status = parsed.status();
  if (parsed.ok()) out.parsed = *std::move(parsed);
  return out;
}

ordered_json Differences(const LoadedConfig& from, const LoadedConfig& to) {
  ordered_json rows = ordered_json::array();
  const auto text = [](const Field& field, const LoadedConfig& of) {
    return of.IsDefault(field.path) ? std::string("(not given)") : DisplayField(field, of.config);
  };
  for (const Field& field : Fields()) {
    const std::string before = text(field, from), after = text(field, to);
    if (before == after) continue;
    rows.push_back({{"field", field.path}, {"from", before}, {"to", after}, {"holds", UseText(field.path)}});
  }
  return rows;
}

absl::Status ShowEffective(const ConfigOptions& o, const LoadedConfig& local) {
  TP_ASSIGN_OR_RETURN(const Standing standing, Look(local.config));
  TP_RETURN_IF_ERROR(standing.status);
  ConfigInput input = o.local;
  input.cluster = std::make_shared<const LoadedConfig>(standing.parsed);
  TP_ASSIGN_OR_RETURN(const LoadedConfig whole, LoadConfig(input));
  ordered_json rows = ordered_json::array();
  for (const Field& field : Fields()) {
    if (!Concerns(field.path, Roles().at(o.role))) continue;
    const auto source = whole.sources.find(field.path);
    rows.push_back({{"field", field.path},
                    {"value", DisplayField(field, whole.config)},
                    {"source", source == whole.sources.end() ? "default" : source->second}});
  }
  CtlPrint(*o.ctl, rows);
  return absl::OkStatus();
}

absl::Status Show(const ConfigOptions& o, const LoadedConfig& local) {
  if (o.effective) return ShowEffective(o, local);
  TP_ASSIGN_OR_RETURN(const Standing standing, Look(local.config));
  const StoredConfig& stored = standing.stored;
  if (o.ctl->output == "json") {
    ordered_json fields = ordered_json::object();
    for (const Field& field : Fields()) {
      if (!standing.parsed.IsDefault(field.path))
        fields[std::string(field.path)] = DisplayField(field, standing.parsed.config);
    }
    PrintJson({{"revision", stored.revision},
               {"by", stored.author ? stored.author->who : ""},
               {"at", stored.author ? When(*stored.author) : ""},
               {"problems", std::string(standing.status.message())},
               {"fields", fields},
               {"document", stored.text}});
    return standing.status;
  }
  if (stored.revision == 0) {
    std::printf("# %s: there is no document\n", stored.name.c_str());
    return absl::OkStatus();
  }
  std::printf("# %s%s\n", stored.name.c_str(),
              stored.author
                  ? absl::StrCat(", by ", Printable(stored.author->who), " at ", When(*stored.author)).c_str()
                  : ", written past `ctl config apply`");
  // Whoever can write to etcd may have written anything.
  for (const absl::string_view line : absl::StrSplit(absl::StripSuffix(stored.text, "\n"), '\n')) {
    std::printf("%s\n", Printable(std::string_view(line.data(), line.size())).c_str());
  }
  return standing.status;
}

absl::Status Diff(const ConfigOptions& o, const LoadedConfig& local) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadDocument(o.document));
  TP_ASSIGN_OR_RETURN(const LoadedConfig wanted, ParseClusterDocument(text, o.document));
  TP_ASSIGN_OR_RETURN(const Standing standing, Look(local.config));
  const ordered_json rows = Differences(standing.parsed, wanted);
  if (o.ctl->output == "json") {
    PrintJson({{"revision", standing.stored.revision}, {"changes", rows}});
  } else if (rows.empty()) {
    std::printf("%s says the same\n", standing.stored.name.c_str());
  } else {
    std::fputs(FormatTable(rows).c_str(), stdout);
  }
  return absl::OkStatus();
}

absl::Status Apply(const ConfigOptions& o, const LoadedConfig& local) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadDocument(o.document));
  TP_ASSIGN_OR_RETURN(const LoadedConfig wanted, ParseClusterDocument(text, o.document));
  TP_ASSIGN_OR_RETURN(const Standing standing, Look(local.config));
  TP_ASSIGN_OR_RETURN(const int64_t revision,
                      WriteStoredConfig(local.config.cluster, o.revision.value_or(standing.stored.revision),
                                        text, {.who = Whoami(), .when = absl::Now()}));
  const ordered_json rows = Differences(standing.parsed, wanted);
  if (o.ctl->output == "json") {
    PrintJson({{"revision", revision}, {"changes", rows}});
    return absl::OkStatus();
  }
  if (!rows.empty()) std::fputs(FormatTable(rows).c_str(), stdout);
  std::printf("revision %lld%s\n", static_cast<long long>(revision),
              rows.empty() ? ": nothing has changed" : "");
  return absl::OkStatus();
}

using Action = absl::Status (*)(const ConfigOptions&, const LoadedConfig& local);

}  // namespace

void AddCtlConfigCommands(CLI::App& config, const std::shared_ptr<CtlOptions>& options, Command& run) {
  const auto add = [&](const std::string& name, const std::string& help, Action action) {
    CLI::App* command = config.add_subcommand(name, help);
    command->fallthrough();
    auto o = std::make_shared<ConfigOptions>();
    o->ctl = options;
    command->add_option("-c,--config", o->local.file, "Where cluster.etcd stands, if not in the environment")
        ->type_name("FILE");
    command->callback([&run, o, action] {
      run = [=]() -> int {
        const auto local = LoadConfig(o->local);
        if (!local.ok()) return ReportError(local.status());
        return ReportError(action(*o, *local));
      };
    });
    return std::pair(command, o);
  };
  {
    auto [c, o] =
        add("show", "What stands in etcd for the whole cluster, by whom and of which revision", Show);
    c->add_flag("--effective", o->effective,
                "Instead: every value that a process started here would have, and where it comes from");
    c->add_option("--for", o->role, "With --effective: of gateway, scheduler, worker or store [scheduler]")
        ->check(CLI::IsMember({"gateway", "scheduler", "worker", "store"}))
        ->type_name("ROLE");
  }
  {
    auto [c, o] = add("diff", "What `apply` would change, and whether that holds at once", Diff);
    c->add_option("FILE", o->document, "YAML as in config/tidepool.yaml; - is stdin")
        ->required()
        ->type_name("");
  }
  {
    auto [c, o] = add("apply", "Check a document as a whole and put it in the old one's place", Apply);
    c->add_option("FILE", o->document,
                  "YAML as in config/tidepool.yaml; - is stdin; an empty one takes all back")
        ->required()
        ->type_name("");
    c->add_option("--revision", o->revision,
                  "Only where this one still stands, as `show` said; 0: where none does [whichever stands]")
        ->type_name("");
  }
}

}  // namespace tidepool

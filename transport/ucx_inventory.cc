#include "transport/ucx_inventory.h"

#include <ucp/api/ucp.h>
#include <ucs/debug/log_def.h>
#include <uct/api/uct.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <set>
#include <utility>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/log.h"

// Exported by libucs and declared in a header that Debian does not ship.
extern "C" void ucs_log_push_handler(ucs_log_func_t handler);

namespace tidepool {
namespace {

// UCX's names for several transports at once, and what a name of each begins with.
struct Family {
  std::string_view name;
  std::array<std::string_view, 5> prefixes;
};
constexpr Family kFamilies[] = {
    {"rc", {"rc_verbs", "rc_mlx5"}},
    {"rc_v", {"rc_verbs"}},
    {"rc_x", {"rc_mlx5"}},
    {"ud", {"ud_verbs", "ud_mlx5"}},
    {"ud_v", {"ud_verbs"}},
    {"ud_x", {"ud_mlx5"}},
    {"dc", {"dc_mlx5"}},
    {"dc_x", {"dc_mlx5"}},
    {"ib", {"rc_verbs", "rc_mlx5", "ud_verbs", "ud_mlx5", "dc_mlx5"}},
    {"shm", {"posix", "sysv"}},
    {"sm", {"posix", "sysv"}},
    {"mm", {"posix", "sysv"}},
    {"cuda", {"cuda_copy", "cuda_ipc"}},
};

void AddComponent(uct_component_h component, std::set<std::pair<std::string, std::string>>& out) {
  uct_component_attr_t attr{};
  attr.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCE_COUNT;
  if (uct_component_query(component, &attr) != UCS_OK || attr.md_resource_count == 0) return;
  std::vector<uct_md_resource_desc_t> domains(attr.md_resource_count);
  attr.field_mask = UCT_COMPONENT_ATTR_FIELD_MD_RESOURCES;
  attr.md_resources = domains.data();
  if (uct_component_query(component, &attr) != UCS_OK) return;
  for (const uct_md_resource_desc_t& domain : domains) {
    uct_md_config_t* config = nullptr;
    if (uct_md_config_read(component, nullptr, nullptr, &config) != UCS_OK) continue;
    uct_md_h md = nullptr;
    const ucs_status_t opened = uct_md_open(component, domain.md_name, config, &md);
    uct_config_release(config);
    if (opened != UCS_OK) continue;
    uct_tl_resource_desc_t* resources = nullptr;
    unsigned count = 0;
    if (uct_md_query_tl_resources(md, &resources, &count) == UCS_OK) {
      for (unsigned i = 0; i < count; ++i) out.emplace(resources[i].tl_name, resources[i].dev_name);
      uct_release_tl_resource_list(resources);
    }
    uct_md_close(md);
  }
}

std::vector<std::string> MemoryTypes() {
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM;
  ucp_context_h context = nullptr;
  if (ucp_init(&params, nullptr, &context) != UCS_OK) return {};
  ucp_context_attr_t attr{};
  attr.field_mask = UCP_ATTR_FIELD_MEMORY_TYPES;
  std::vector<std::string> out;
  if (ucp_context_query(context, &attr) == UCS_OK) {
    for (const auto& [type, name] : {std::pair<int, const char*>{UCS_MEMORY_TYPE_HOST, "host"},
                                     {UCS_MEMORY_TYPE_CUDA, "cuda"},
                                     {UCS_MEMORY_TYPE_CUDA_MANAGED, "cuda-managed"},
                                     {UCS_MEMORY_TYPE_ROCM, "rocm"}}) {
      if ((attr.memory_types & (1ULL << type)) != 0) out.emplace_back(name);
    }
  }
  ucp_cleanup(context);
  return out;
}

UcxInventory Query() {
  RouteUcxLog();
  UcxInventory out;
  out.version = ucp_get_version_string();
  out.version = out.version.substr(0, out.version.find(' '));
  std::set<std::pair<std::string, std::string>> found;
  uct_component_h* components = nullptr;
  unsigned count = 0;
  if (uct_query_components(&components, &count) == UCS_OK) {
    for (unsigned i = 0; i < count; ++i) AddComponent(components[i], found);
    uct_release_component_list(components);
  }
  for (const auto& [transport, device] : found) out.resources.push_back({transport, device});
  out.memory_types = MemoryTypes();
  return out;
}

ucs_log_func_rc_t Log(const char*, unsigned, const char*, ucs_log_level_t level,
                      const ucs_log_component_config_t*, const char* format, va_list args) {
  char text[1024];
  vsnprintf(text, sizeof text, format, args);
  const std::string_view message(text);
  // Both are how a shared-memory lane ends while its peer still sends, and a setting that one of several
  // transports does not have.
  const bool expected = message.find("not returned to mpool") != std::string_view::npos ||
                        message.find("invalid configuration: ") != std::string_view::npos;
  if (expected || level > UCS_LOG_LEVEL_WARN) {
    spdlog::debug("ucx: {}", text);
  } else if (level <= UCS_LOG_LEVEL_ERROR) {
    spdlog::error("ucx: {}", text);
  } else {
    spdlog::warn("ucx: {}", text);
  }
  // A fatal message is UCX's last one: let it reach UCX's own handler, with its backtrace.
  return level == UCS_LOG_LEVEL_FATAL ? UCS_LOG_FUNC_RC_CONTINUE : UCS_LOG_FUNC_RC_STOP;
}

}  // namespace

void RouteUcxLog() {
  static std::once_flag once;
  std::call_once(once, [] { ucs_log_push_handler(&Log); });
}

bool UcxInventory::HasTransport(std::string_view name) const {
  const auto present = [&](std::string_view exact) {
    return std::any_of(resources.begin(), resources.end(),
                       [&](const Resource& r) { return r.transport == exact; });
  };
  for (const Family& family : kFamilies) {
    if (family.name != name) continue;
    return std::any_of(family.prefixes.begin(), family.prefixes.end(),
                       [&](std::string_view p) { return !p.empty() && present(p); });
  }
  return present(name);
}

bool UcxInventory::HasMemory(std::string_view type) const {
  return std::find(memory_types.begin(), memory_types.end(), type) != memory_types.end();
}

std::string UcxInventory::TransportNames() const {
  std::set<std::string> names;
  for (const Resource& r : resources) names.insert(r.transport);
  return absl::StrJoin(names, ", ");
}

const UcxInventory& LoadedUcx() {
  static const UcxInventory inventory = Query();
  return inventory;
}

absl::Status CheckUcxTransports(std::string_view tls) {
  if (tls.empty() || tls.starts_with("^")) return absl::OkStatus();
  std::vector<std::string> missing;
  for (const std::string& name :
       std::vector<std::string>(absl::StrSplit(std::string(tls), ',', absl::SkipEmpty()))) {
    if (name != "all" && !LoadedUcx().HasTransport(name)) missing.push_back(name);
  }
  if (missing.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "transport.ucx_tls names " + absl::StrJoin(missing, ", ") + ", which UCX " + LoadedUcx().version +
      " does not offer on this machine; it offers " + LoadedUcx().TransportNames());
}

}  // namespace tidepool

// `tidepool key`: API keys and their digests. Nothing is stored: the gateway's file takes the digest.
#include <cstdio>
#include <iostream>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "config/tenants.h"
#include "server/cli/commands.h"
#include "server/cli/config_flags.h"
#include "server/cli/output.h"

namespace tidepool {
namespace {

struct Options {
  std::string tenant;
  std::string output = "table";
};

std::string DigestOf(const std::string& key) { return HexEncode(Sha256().Update(key).Finish()); }

// The gateway's own reader judges the tenant's name.
absl::Status CheckTenant(const Options& options, const std::string& digest) {
  GatewayConfig config;
  config.api_keys = {{digest, options.tenant}};
  const absl::Status status = LoadTenants(config).status();
  return status.ok() ? status : absl::InvalidArgumentError("--tenant: " + std::string(status.message()));
}

int Show(const Options& options, const std::string& key) {
  const std::string digest = DigestOf(key);
  if (const absl::Status status = CheckTenant(options, digest); !status.ok()) return ReportError(status);
  if (options.output == "json") {
    PrintJson({{"key", key}, {"key_sha256", digest}, {"tenant", options.tenant}});
    return 0;
  }
  std::printf("key, for the client; it is shown once and kept nowhere:\n  %s\n", key.c_str());
  std::printf("line, for the keys of gateway.api_keys_file (or gateway.api_keys):\n");
  std::printf("  - {key_sha256: %s, tenant: '%s'}\n", digest.c_str(), options.tenant.c_str());
  return 0;
}

int Digest(const Options& options) {
  std::string key;
  std::getline(std::cin, key);
  key = std::string(absl::StripAsciiWhitespace(key));
  if (key.empty()) return ReportError(absl::InvalidArgumentError("stdin: give the key on one line"));
  if (options.output == "json") {
    PrintJson({{"key_sha256", DigestOf(key)}});
  } else {
    std::printf("%s\n", DigestOf(key).c_str());
  }
  return 0;
}

}  // namespace

void AddKeyCommand(CLI::App& app, Command& run) {
  CLI::App* command = app.add_subcommand("key", "API keys of the gateway's tenants, and their digests");
  command->require_subcommand(1)->fallthrough();
  const auto options = std::make_shared<Options>();
  command->add_option("-o,--output", options->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}));
  CLI::App* fresh = command->add_subcommand("new", "Draws a key; prints it, and the line that lets it in");
  fresh->add_option("--tenant", options->tenant, "Whose key it is")->required()->type_name("NAME");
  fresh->fallthrough()->callback([&run, options] {
    // 256 bits: not to be guessed, so a plain digest of it is safe to keep.
    run = [options] { return Show(*options, "tp-" + RandomHexId() + RandomHexId()); };
  });
  CLI::App* digest = command->add_subcommand("digest", "The digest of a key that stdin gives");
  digest->fallthrough()->callback([&run, options] { run = [options] { return Digest(*options); }; });
}

}  // namespace tidepool

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tidepool {

namespace jinja {
struct Template;
}

// ChatTemplate: a parsed Jinja chat template. Immutable, thread-safe, cheap to copy. Follows Jinja2 3.1 as
// the `transformers` library sets it up: immutable sandbox, trim_blocks and lstrip_blocks on, loop controls,
// the `generation` tag, `tojson` without HTML escaping, `raise_exception` and `strftime_now`. Not there:
// include, import, extends, block, custom extensions; each is a parse error that names line and construct.
class ChatTemplate {
 public:
  static constexpr size_t kSourceBytesMax = size_t{1} << 20;

  // A template runs on the gateway's threads with data that clients send, so everything it may consume is
  // bounded.
  struct Limits {
    uint64_t steps_max = 10'000'000;             // evaluated nodes, loop turns and elements touched
    size_t output_bytes_max = size_t{32} << 20;  // the output, and any single string or list made on the way
    uint64_t alloc_bytes_max = uint64_t{256} << 20;  // strings and lists made in one rendering, summed
    int depth_max = 1000;  // nested evaluations: blocks, expressions and macro calls
    // What strftime_now shows; now in the local time zone when absent.
    std::optional<absl::Time> now;
    absl::TimeZone zone = absl::LocalTimeZone();
  };

  // Errors: InvalidArgument, `chat template line N: ...`.
  static absl::StatusOr<ChatTemplate> Parse(std::string source);

  // `context` is an object: messages, tools, documents, add_generation_prompt, bos_token, eos_token and the
  // caller's keyword arguments; a key that is not there is undefined to the template, null is none.
  // Errors: InvalidArgument (raise_exception's message, or a type error, as Jinja2 would word it, with the
  // line), ResourceExhausted (a limit).
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& context, const Limits& limits) const;
  absl::StatusOr<std::string> Render(const nlohmann::ordered_json& context) const {
    return Render(context, Limits{});
  }

 private:
  explicit ChatTemplate(std::shared_ptr<const jinja::Template> parsed) : parsed_(std::move(parsed)) {}
  std::shared_ptr<const jinja::Template> parsed_;
};

}  // namespace tidepool

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/model/strings/marked_text.h"

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
    // Of the calling thread's processor time, so that a busy machine fails nobody. Looked at every few
    // thousand steps.
    absl::Duration time_max = absl::Milliseconds(250);
    int depth_max = 1000;  // nested evaluations: blocks, expressions and macro calls
    // What strftime_now shows; now in the local time zone when absent.
    std::optional<absl::Time> now;
    absl::TimeZone zone = absl::LocalTimeZone();
  };

  // Errors: InvalidArgument, `chat template line N: ...`.
  static absl::StatusOr<ChatTemplate> Parse(std::string source);

  // Both are objects: `request` holds what came from outside (messages, tools, documents, the caller's
  // keyword arguments), `trusted` what the server itself puts in (bos_token, eos_token and their like from
  // the tokenizer's configuration); of a name in both, `trusted` counts. A key that is not there is undefined
  // to the template, null is none.
  //
  // In the result, `data` covers every byte that stems from `request`, whatever the template did with it:
  // sliced, joined, upper-cased, written as JSON, used as a key. Where an operation does not follow single
  // bytes (case mapping, escaping, quoting of a text of mixed origin) all of its result counts as data. What
  // the template only works out about the data, as a length, a position or a comparison, is the template's,
  // and so is a message's role as long as it is one of kTrustedRoles: templates spell control tokens with it
  // (`<|{{ message.role }}|>`).
  //
  // Errors: InvalidArgument (raise_exception's message, or a type error, as Jinja2 would word it, with the
  // line), ResourceExhausted (a limit).
  absl::StatusOr<MarkedText> Render(const nlohmann::ordered_json& request,
                                    const nlohmann::ordered_json& trusted, const Limits& limits) const;
  absl::StatusOr<MarkedText> Render(const nlohmann::ordered_json& request,
                                    const nlohmann::ordered_json& trusted) const {
    return Render(request, trusted, Limits{});
  }

  static constexpr std::string_view kTrustedRoles[] = {"system",    "developer", "user",
                                                       "assistant", "tool",      "function"};

 private:
  explicit ChatTemplate(std::shared_ptr<const jinja::Template> parsed) : parsed_(std::move(parsed)) {}
  std::shared_ptr<const jinja::Template> parsed_;
};

}  // namespace tidepool

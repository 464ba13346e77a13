#define PCRE2_CODE_UNIT_WIDTH 8
#include "server/model/text/regex.h"

#include <pcre2.h>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace tidepool {

namespace {

// A pattern's steps are linear in the text for every tokenizer that we know; this bound is for hostile ones.
// The JIT counts backtracking points only, so it is far above what a 64 MB text needs.
constexpr uint32_t kMatchLimit = 500'000'000;
constexpr size_t kJitStackBytesMax = size_t{16} << 20;

// Scratch of one thread: PCRE2's match data and JIT stack may not be shared by two matches at once.
struct Scratch {
  Scratch()
      : data(pcre2_match_data_create(8, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(64 << 10, kJitStackBytesMax, nullptr)) {
    if (context != nullptr) {
      pcre2_set_match_limit(context, kMatchLimit);
      pcre2_jit_stack_assign(context, nullptr, stack);
    }
  }
  ~Scratch() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

std::string Message(int code) {
  PCRE2_UCHAR buffer[256];
  if (pcre2_get_error_message(code, buffer, sizeof(buffer)) < 0) return absl::StrCat("PCRE2 error ", code);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

absl::StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("regex: ", Message(error), " at offset ", offset));
  }
  // Without the JIT (a hardened kernel that forbids executable pages) the interpreter gives the same matches.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  Regex regex;
  regex.code_ = std::shared_ptr<const void>(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  return regex;
}

absl::StatusOr<Regex> Regex::Literal(std::string text) {
  if (text.empty()) return absl::InvalidArgumentError("must not be empty");
  Regex regex;
  regex.literal_ = std::move(text);
  return regex;
}

absl::Status Regex::FindAll(std::string_view text, std::vector<Span>& out) const {
  out.clear();
  if (is_literal()) {
    for (size_t pos = text.find(literal_); pos != text.npos;
         pos = text.find(literal_, pos + literal_.size())) {
      out.push_back({pos, pos + literal_.size()});
    }
    return absl::OkStatus();
  }
  thread_local Scratch scratch;
  if (scratch.data == nullptr || scratch.context == nullptr) {
    return absl::ResourceExhaustedError("no memory for a regex match");
  }
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  size_t pos = 0;
  while (pos <= text.size()) {
    const int rc = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), pos,
                               PCRE2_NO_UTF_CHECK, scratch.data, scratch.context);
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("text too hard for the tokenizer's regex near byte ", pos, ": ", Message(rc)));
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(scratch.data);
    if (span[1] > span[0]) {
      out.push_back({span[0], span[1]});
      pos = span[1];
    } else {
      // An empty match: go on one character further.
      do {
        ++pos;
      } while (pos < text.size() && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> Regex::ReplaceAll(std::string_view text, std::string_view content) const {
  std::vector<Span> spans;
  TP_RETURN_IF_ERROR(FindAll(text, spans));
  std::string out;
  out.reserve(text.size());
  size_t done = 0;
  for (const Span& s : spans) {
    out.append(text.substr(done, s.begin - done)).append(content);
    done = s.end;
  }
  out.append(text.substr(done));
  return out;
}

}  // namespace tidepool

#include "base/log.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

namespace tidepool {
namespace {

// The bytes of the UTF-8 character that `text` begins with, 0 where there is none, and its code point.
size_t Character(std::string_view text, uint32_t& code) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  const size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first >= 0xF8 || (first >= 0x80 && first < 0xC0) || text.size() < length) return 0;
  code = length == 1 ? first : first & (0x7F >> length);
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3F);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool surrogate = code >= 0xD800 && code < 0xE000;
  return code < kLeast[length] || code > 0x10FFFF || surrogate ? 0 : length;
}

// C0, DEL, C1; line and paragraph separator, embeddings, overrides and isolates.
bool Harmless(uint32_t code) {
  return code >= 0x20 && (code < 0x7F || code > 0x9F) && (code < 0x2028 || code > 0x202E) &&
         (code < 0x2066 || code > 0x2069);
}

// %*: the message as Printable gives it.
class PrintablePayload : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&, spdlog::memory_buf_t& out) override {
    const std::string text = Printable({message.payload.data(), message.payload.size()});
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<PrintablePayload>();
  }
};

}  // namespace

std::string Printable(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    uint32_t code = 0;
    const size_t length = Character(text, code);
    if (length > 0 && Harmless(code)) {
      out.append(text.substr(0, length));
    } else {
      for (const char c : text.substr(0, std::max<size_t>(length, 1))) {
        out += "\\x";
        out += kHex[static_cast<uint8_t>(c) >> 4];
        out += kHex[static_cast<uint8_t>(c) & 15];
      }
    }
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return out;
}

absl::Status PrintableStatus(const absl::Status& status) {
  const absl::string_view message = status.message();
  return absl::Status(status.code(), Printable({message.data(), message.size()}));
}

absl::Status InitLogging(std::string_view role, std::string_view level) {
  const auto parsed = spdlog::level::from_str(std::string(level));
  if (parsed == spdlog::level::off && level != "off") {
    return absl::InvalidArgumentError("log level '" + std::string(level) +
                                      "' is unknown; use error, warn, info or debug");
  }
  auto logger = std::make_shared<spdlog::logger>("", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  formatter->add_flag<PrintablePayload>('*').set_pattern("%Y-%m-%dT%H:%M:%S.%e %^%l%$ " + std::string(role) +
                                                         "[%P] %*");
  logger->set_formatter(std::move(formatter));
  logger->set_level(parsed);
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace tidepool

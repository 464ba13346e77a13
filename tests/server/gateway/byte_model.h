#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "server/gateway/json.h"

namespace tidepool {

// A model directory with only a tokeniser: byte-level, token id = byte; <s> is 256, </s> is 257. Its chat
// template writes "role:content|" for each message and "assistant:" as the generation prompt.
inline void WriteByteModel(const std::filesystem::path& dir) {
  std::filesystem::create_directories(dir);
  OrderedJson vocab = OrderedJson::object();
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    // GPT-2's mapping of bytes to printable characters.
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int c = printable ? byte : next++;
    std::string utf8;
    if (c < 0x80) {
      utf8 = std::string(1, static_cast<char>(c));
    } else {
      utf8 = {static_cast<char>(0xc0 | (c >> 6)), static_cast<char>(0x80 | (c & 0x3f))};
    }
    vocab[utf8] = byte;
  }
  auto special = [](int id, const char* text) {
    return OrderedJson{{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
                       {"rstrip", false}, {"normalized", false}, {"special", true}};
  };
  const OrderedJson byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  const OrderedJson tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", OrderedJson::array({special(256, "<s>"), special(257, "</s>")})},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", nullptr},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", OrderedJson::array()}}}};
  std::ofstream(dir / "tokenizer.json") << DumpJson(tokenizer);
  std::ofstream(dir / "tokenizer_config.json")
      << DumpJson(OrderedJson{{"bos_token", "<s>"},
                              {"eos_token", "</s>"},
                              {"chat_template",
                               "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
                               "{% if add_generation_prompt %}assistant:{% endif %}"}});
}

}  // namespace tidepool

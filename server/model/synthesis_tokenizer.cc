#include "server/model/synthesis_tokenizer.h"

#include "base/status.h"
#include "server/model/strings/utf8.h"

namespace tidepool {
namespace {

using nlohmann::ordered_json;

// GPT-2's spelling of a byte. Source: openai/gpt-2, encoder.py, bytes_to_unicode.
std::string ByteSpelling(int byte) {
  static const std::vector<uint32_t> kCodes = [] {
    std::vector<uint32_t> codes(256);
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      codes[b] = printable ? b : next++;
    }
    return codes;
  }();
  std::string out;
  utf8::Append(kCodes[static_cast<size_t>(byte)], out);
  return out;
}

// Word number n, with a space in front: one to four syllables, no two alike.
std::string Word(uint32_t n) {
  constexpr std::string_view kConsonants = "bdfgklmnprstvz", kVowels = "aeiou";
  std::string word = ByteSpelling(' ');
  do {
    word += kConsonants[n % kConsonants.size()];
    n /= kConsonants.size();
    word += kVowels[n % kVowels.size()];
    n /= kVowels.size();
  } while (n-- > 0);
  return word;
}

}  // namespace

SynthesisTokenizer MakeSynthesisTokenizer(uint32_t vocab) {
  TP_CHECK(vocab >= SynthesisTokenizer::kVocabMin);
  SynthesisTokenizer out;
  ordered_json words = ordered_json::object();
  for (int byte = 0; byte < 256; ++byte) words[ByteSpelling(byte)] = byte;
  // Ids straight into the object: nlohmann's operator[] walks it.
  auto& entries = words.get_ref<ordered_json::object_t&>();
  const uint32_t special_first = vocab - 4;
  for (uint32_t id = 256; id < special_first; ++id) entries.emplace_back(Word(id - 256), id);
  const ordered_json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  ordered_json added = ordered_json::array();
  uint32_t next = special_first;
  for (const char* text : {"<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"}) {
    added.push_back({{"id", next++},
                     {"content", text},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  out.bos_id = special_first;
  out.eos_id = special_first + 2;
  out.tokenizer = {{"version", "1.0"},
                   {"truncation", nullptr},
                   {"padding", nullptr},
                   {"added_tokens", std::move(added)},
                   {"normalizer", nullptr},
                   {"pre_tokenizer", byte_level},
                   {"post_processor", nullptr},
                   {"decoder", byte_level},
                   {"model",
                    {{"type", "BPE"},
                     {"dropout", nullptr},
                     {"unk_token", nullptr},
                     {"continuing_subword_prefix", nullptr},
                     {"end_of_word_suffix", nullptr},
                     {"fuse_unk", false},
                     {"byte_fallback", false},
                     {"vocab", std::move(words)},
                     {"merges", ordered_json::array()}}}};
  out.config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                {"bos_token", "<|bos|>"},
                {"eos_token", "<|im_end|>"},
                {"pad_token", "<|pad|>"},
                {"chat_template",
                 "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
                 "message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
                 "{{ '<|im_start|>assistant\\n' }}{% endif %}"}};
  return out;
}

}  // namespace tidepool

#include "server/bench/kv_codec_quality.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "base/rng.h"
#include "base/status.h"
#include "kvstore/codec/block_codec.h"
#include "kvstore/disk/plane_codec.h"
#include "server/model/model.h"
#include "server/model/text/tokenizer.h"

namespace tidepool {
namespace {

// kv.disk.compress, which is no codec of kv.codec.
constexpr char kLossless[] = "lossless";

using Words = std::vector<const char*>;
using Bytes = std::vector<std::byte>;
using Tokens = std::vector<int32_t>;

// Words and forms are a part of those that the model was trained on (tools/demo_model/generate.py). {s} is
// the subject, {v} the value.
const Words kColours = {"red",   "blue",  "green", "yellow", "black",
                        "white", "brown", "grey",  "orange", "purple"};
const Words kLocked = {"door",  "box",    "gate",    "safe",     "locker",
                       "chest", "drawer", "cabinet", "suitcase", "garage"};
const Words kNames = {"Anna", "Ben",   "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida",   "Jack",
                      "Kate", "Leo",   "Maria", "Noah",  "Olga", "Paul",  "Rosa",  "Simon", "Tina",  "Victor",
                      "Adam", "Bella", "Carl",  "Diana", "Eric", "Fiona", "Helen", "Ivan",  "Julia", "Kevin"};
const Words kCities = {"Paris", "London", "Berlin", "Rome",    "Madrid",  "Vienna",
                       "Oslo",  "Lisbon", "Athens", "Dublin",  "Prague",  "Warsaw",
                       "Tokyo", "Cairo",  "Boston", "Chicago", "Toronto", "Sydney"};
const Words kThings = {"key",   "book",   "map",      "letter", "phone",
                       "watch", "wallet", "umbrella", "camera", "ticket"};
const Words kRooms = {"kitchen", "cellar", "attic", "garden", "library", "office", "hall", "bedroom"};
const Words kFillers = {"The weather is calm today.",
                        "A cold wind blows from the sea.",
                        "The streets are quiet in the morning.",
                        "The sun is warm and bright.",
                        "The old bridge is still open.",
                        "Birds sing in the tall trees.",
                        "The bells ring every hour.",
                        "The tea is still hot."};

struct Form {
  const char* statement;
  const char* question;
  const char* answer;
};
const std::vector<Form> kForms = {
    {"The code of the {s} is {v}.", "What is the code of the {s}?", "The code of the {s} is {v}."},
    {"{s} lives in {v}.", "Where does {s} live?", "{s} lives in {v}."},
    {"The {s} is in the {v}.", "Where is the {s}?", "The {s} is in the {v}."}};

struct Fact {
  std::string statement, question, answer;
};

const char* Pick(Rng& rng, const Words& words) { return words[rng.Below(words.size())]; }

Fact DrawFact(Rng& rng, std::string& subject) {
  // Codes are digit by digit the hardest to copy: half of the facts.
  const size_t kind = rng.Chance(0.5) ? 0 : 1 + rng.Below(2);
  std::string value;
  if (kind == 0) {
    subject = absl::StrCat(Pick(rng, kColours), " ", Pick(rng, kLocked));
    value = absl::StrCat(1000 + rng.Below(9000));
  } else {
    subject = kind == 1 ? Pick(rng, kNames) : Pick(rng, kThings);
    value = kind == 1 ? Pick(rng, kCities) : Pick(rng, kRooms);
  }
  const auto fill = [&](const char* form) {
    return absl::StrReplaceAll(form, {{"{s}", subject}, {"{v}", value}});
  };
  return {fill(kForms[kind].statement), fill(kForms[kind].question), fill(kForms[kind].answer)};
}

// One passage and two different questions about it.
struct Sample {
  Tokens prompt[2];
  Tokens answer[2];  // with the token that ends it
};

class Sampler {
 public:
  static absl::StatusOr<Sampler> Create(std::shared_ptr<const Tokenizer> tokenizer) {
    Sampler out(std::move(tokenizer));
    TP_ASSIGN_OR_RETURN(out.end_, out.Encode("<|end|>"));
    return out;
  }

  // A prompt of at most `context` tokens, and not much less.
  absl::StatusOr<Sample> Draw(Rng& rng, uint32_t context) const {
    std::string text = "<|begin_of_text|><|user|>";
    std::vector<Fact> facts;
    std::set<std::string> known;
    size_t used = 40;  // what stands around the passage
    while (true) {
      std::string sentence, subject;
      Fact fact;
      if (rng.Chance(0.2)) {
        sentence = Pick(rng, kFillers);
      } else {
        fact = DrawFact(rng, subject);
        if (!known.insert(subject).second) continue;
        sentence = fact.statement;
      }
      TP_ASSIGN_OR_RETURN(const Tokens tokens, Encode(" " + sentence));
      if (used + tokens.size() > context) break;
      used += tokens.size();
      text += (facts.empty() && text.back() == '>' ? "" : " ") + sentence;
      if (!subject.empty()) facts.push_back(fact);
      // Nothing is left to say that is new: more of the same would contradict.
      if (known.size() > 120) break;
    }
    if (facts.size() < 2)
      return absl::InvalidArgumentError(absl::StrCat("a context of ", context, " tokens holds no two facts"));
    const size_t first = rng.Below(facts.size());
    const size_t second = (first + 1 + rng.Below(facts.size() - 1)) % facts.size();
    Sample out;
    for (const size_t i : {0, 1}) {
      const Fact& fact = facts[i == 0 ? first : second];
      TP_ASSIGN_OR_RETURN(out.prompt[i], Encode(text + " " + fact.question + "<|end|><|assistant|>"));
      TP_ASSIGN_OR_RETURN(out.answer[i], Encode(fact.answer));
      out.answer[i].insert(out.answer[i].end(), end_.begin(), end_.end());
    }
    return out;
  }

 private:
  explicit Sampler(std::shared_ptr<const Tokenizer> tokenizer) : tokenizer_(std::move(tokenizer)) {}
  absl::StatusOr<Tokens> Encode(const std::string& text) const {
    return tokenizer_->Encode(text, {.add_special_tokens = false});
  }

  std::shared_ptr<const Tokenizer> tokenizer_;
  Tokens end_;
};

// Logits at each token of an answer, [answer tokens][vocab].
using Logits = std::vector<float>;

class Lab {
 public:
  Lab(std::shared_ptr<const Model> model, const KvCodecQualityOptions& options, uint32_t longest)
      : model_(std::move(model)),
        layout_(model_->Layout(options.block_tokens)),
        threads_(static_cast<int>(std::max(options.threads, 1u))),
        workspace_(model_->spec, longest, 1) {}

  const BlockLayout& layout() const { return layout_; }
  uint32_t vocab() const { return model_->spec.vocab; }

  // Computes tokens [from, end) of prompt + answer over `blocks`, which hold what comes before.
  absl::StatusOr<Logits> Run(std::vector<Bytes>& blocks, const Tokens& prompt, const Tokens& answer,
                             size_t from) {
    Tokens all = prompt;
    all.insert(all.end(), answer.begin(), answer.end() - 1);
    while (blocks.size() * layout_.block_tokens < all.size()) blocks.emplace_back(layout_.block_bytes());
    std::vector<std::byte*> bases;
    for (Bytes& b : blocks) bases.push_back(b.data());
    const Tokens rest(all.begin() + static_cast<ptrdiff_t>(from), all.end());
    Tokens positions, logit_rows;
    for (size_t i = from; i < all.size(); ++i) positions.push_back(static_cast<int32_t>(i));
    for (size_t i = 0; i < answer.size(); ++i)
      logit_rows.push_back(static_cast<int32_t>(prompt.size() - 1 + i - from));
    const ForwardSequence sequence{.blocks = bases.data(),
                                   .context = static_cast<int32_t>(all.size()),
                                   .first_row = 0,
                                   .q_len = static_cast<int32_t>(rest.size())};
    Logits out(answer.size() * vocab());
    TP_RETURN_IF_ERROR(model_->transformer.Forward({.tokens = rest,
                                                    .positions = positions,
                                                    .sequences = std::span(&sequence, 1),
                                                    .logit_rows = logit_rows},
                                                   layout_, NumericMode::kBatchInvariant, threads_,
                                                   workspace_, out.data()));
    return out;
  }

 private:
  const std::shared_ptr<const Model> model_;
  const BlockLayout layout_;
  ThreadPool threads_;
  Workspace workspace_;
};

size_t Argmax(const float* row, size_t n) {
  return static_cast<size_t>(std::max_element(row, row + n) - row);
}

// log softmax in double.
std::vector<double> LogProbs(const float* row, size_t n) {
  const double top = *std::max_element(row, row + n);
  double sum = 0;
  for (size_t i = 0; i < n; ++i) sum += std::exp(row[i] - top);
  std::vector<double> out(n);
  for (size_t i = 0; i < n; ++i) out[i] = row[i] - top - std::log(sum);
  return out;
}

struct Tally {
  size_t questions = 0, right = 0, right_exact = 0, tokens = 0, same = 0;
  double kl = 0;

  void Add(const Logits& exact, const Logits& coded, const Tokens& answer, size_t vocab) {
    bool good = true, good_exact = true;
    for (size_t i = 0; i < answer.size(); ++i) {
      const float *e = exact.data() + i * vocab, *c = coded.data() + i * vocab;
      const size_t best = Argmax(c, vocab), best_exact = Argmax(e, vocab);
      good &= best == static_cast<size_t>(answer[i]);
      good_exact &= best_exact == static_cast<size_t>(answer[i]);
      same += best == best_exact;
      const std::vector<double> p = LogProbs(e, vocab), q = LogProbs(c, vocab);
      for (size_t k = 0; k < vocab; ++k) kl += std::exp(p[k]) * (p[k] - q[k]);
    }
    ++questions;
    right += good;
    right_exact += good_exact;
    tokens += answer.size();
  }
  KvCodecAnswers Answers() const {
    const auto per = [](double n, size_t of) { return of == 0 ? 0 : n / static_cast<double>(of); };
    return {.right = per(static_cast<double>(right), questions),
            .right_exact = per(static_cast<double>(right_exact), questions),
            .top1 = per(static_cast<double>(same), tokens),
            .kl = per(kl, tokens)};
  }
};

struct Counted {
  Tally first, second;
  uint64_t bytes = 0, blocks = 0;
  std::vector<double> encode_ms, decode_ms;
};

double Median(std::vector<double> v) {
  if (v.empty()) return 0;
  const auto middle = v.begin() + static_cast<ptrdiff_t>(v.size() / 2);
  std::nth_element(v.begin(), middle, v.end());
  return *middle;
}

double Milliseconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - since).count();
}

// blocks[0, count) after a trip through the codec.
absl::StatusOr<std::vector<Bytes>> Trip(const BlockCodec& codec, const BlockLayout& layout,
                                        std::span<const Bytes> blocks, Counted& counted) {
  Bytes payload(codec.MaxEncodedBytes(layout));
  std::vector<Bytes> out;
  for (const Bytes& block : blocks) {
    auto at = std::chrono::steady_clock::now();
    TP_ASSIGN_OR_RETURN(const size_t bytes, codec.Encode(layout, block, payload));
    counted.encode_ms.push_back(Milliseconds(at));
    out.emplace_back(block.size());
    at = std::chrono::steady_clock::now();
    TP_RETURN_IF_ERROR(codec.Decode(layout, std::span(payload).first(bytes), out.back()));
    counted.decode_ms.push_back(Milliseconds(at));
    counted.bytes += bytes;
    ++counted.blocks;
  }
  return out;
}

// The same through the disk's lossless encoding, which must change nothing.
absl::Status LosslessTrip(const BlockLayout& layout, std::span<const Bytes> blocks, Counted& counted) {
  static thread_local PlaneCodec codec(2);
  if (DTypeBytes(layout.dtype) != 2) return absl::InvalidArgumentError("lossless: KV of 16 bits is measured");
  Bytes payload(layout.block_bytes()), back(layout.block_bytes());
  for (const Bytes& block : blocks) {
    auto at = std::chrono::steady_clock::now();
    const std::optional<size_t> bytes = codec.Encode(block, payload);
    counted.encode_ms.push_back(Milliseconds(at));
    at = std::chrono::steady_clock::now();
    if (bytes.has_value()) TP_RETURN_IF_ERROR(codec.Decode(std::span(payload).first(*bytes), back));
    counted.decode_ms.push_back(Milliseconds(at));
    if (bytes.has_value() && back != block) return absl::InternalError("lossless: other bytes came back");
    counted.bytes += bytes.value_or(block.size());
    ++counted.blocks;
  }
  return absl::OkStatus();
}

absl::Status MeasureSample(Lab& lab, const Sample& s, std::span<const BlockCodec* const> codecs,
                           bool lossless, std::map<std::string, Counted>& counted) {
  const size_t block_tokens = lab.layout().block_tokens;
  std::vector<Bytes> exact;
  TP_ASSIGN_OR_RETURN(const Logits first, lab.Run(exact, s.prompt[0], s.answer[0], 0));
  // What the two prompts share, as the cache would find it: whole blocks.
  const auto [differ, unused] =
      std::mismatch(s.prompt[0].begin(), s.prompt[0].end(), s.prompt[1].begin(), s.prompt[1].end());
  const size_t shared = static_cast<size_t>(differ - s.prompt[0].begin()) / block_tokens;
  std::vector<Bytes> prefix(exact.begin(), exact.begin() + static_cast<ptrdiff_t>(shared));
  TP_ASSIGN_OR_RETURN(const Logits second, lab.Run(prefix, s.prompt[1], s.answer[1], shared * block_tokens));

  // The last token of a prompt is computed in any case: its logits are wanted.
  const size_t sealed = s.prompt[0].size() / block_tokens;
  if (lossless) {
    Counted& c = counted[kLossless];
    TP_RETURN_IF_ERROR(LosslessTrip(lab.layout(), std::span(exact).first(sealed), c));
    // The same bytes give the same answers.
    c.first.Add(first, first, s.answer[0], lab.vocab());
    c.second.Add(second, second, s.answer[1], lab.vocab());
  }
  for (const BlockCodec* codec : codecs) {
    Counted& c = counted[std::string(codec->name())];
    TP_ASSIGN_OR_RETURN(std::vector<Bytes> coded,
                        Trip(*codec, lab.layout(), std::span(exact).first(sealed), c));
    std::vector<Bytes> again(coded.begin(), coded.begin() + static_cast<ptrdiff_t>(shared));
    TP_ASSIGN_OR_RETURN(const Logits one, lab.Run(coded, s.prompt[0], s.answer[0],
                                                  std::min(sealed * block_tokens, s.prompt[0].size() - 1)));
    c.first.Add(first, one, s.answer[0], lab.vocab());
    TP_ASSIGN_OR_RETURN(const Logits two, lab.Run(again, s.prompt[1], s.answer[1], shared * block_tokens));
    c.second.Add(second, two, s.answer[1], lab.vocab());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<KvCodecQualityRow>> MeasureKvCodecQuality(const KvCodecQualityOptions& options) {
  std::vector<const BlockCodec*> codecs(AllBlockCodecs().begin(), AllBlockCodecs().end());
  bool lossless = options.codecs.empty();
  if (!options.codecs.empty()) codecs.clear();
  for (const std::string& name : options.codecs) {
    if (name == kLossless) {
      lossless = true;
      continue;
    }
    TP_ASSIGN_OR_RETURN(const BlockCodec* codec, GetBlockCodec(name));
    codecs.push_back(codec);
  }
  TP_ASSIGN_OR_RETURN(auto tokenizer, Tokenizer::Load(options.model));
  TP_ASSIGN_OR_RETURN(auto model, LoadModel({.path = options.model}, tokenizer->Digest(), {}));
  TP_ASSIGN_OR_RETURN(const Sampler sampler, Sampler::Create(tokenizer));
  constexpr uint32_t kAnswerTokens = 64;  // more than any answer has
  uint32_t longest = 0;
  for (const uint32_t context : options.contexts) {
    if (context + kAnswerTokens > model->max_model_len)
      return absl::InvalidArgumentError(absl::StrCat(
          "a context of ", context, " tokens and its answer exceed the model's ", model->max_model_len));
    longest = std::max(longest, context + kAnswerTokens);
  }
  if (options.block_tokens == 0)
    return absl::InvalidArgumentError("block_tokens is 0; it must be at least 1");
  Lab lab(model, options, longest);
  std::vector<KvCodecQualityRow> rows;
  for (const uint32_t context : options.contexts) {
    Rng rng(options.seed * 1000003 + context);
    std::map<std::string, Counted> counted;
    for (uint32_t i = 0; i < options.questions; ++i) {
      TP_ASSIGN_OR_RETURN(const Sample sample, sampler.Draw(rng, context));
      TP_RETURN_IF_ERROR(MeasureSample(lab, sample, codecs, lossless, counted));
    }
    std::vector<std::string> names;
    for (const BlockCodec* codec : codecs) names.emplace_back(codec->name());
    if (lossless) names.emplace_back(kLossless);
    for (const std::string& name : names) {
      const Counted& c = counted[name];
      const double bytes = c.blocks == 0 ? 0 : static_cast<double>(c.bytes) / static_cast<double>(c.blocks);
      rows.push_back({.codec = name,
                      .context = context,
                      .bytes_per_token = bytes / options.block_tokens,
                      .ratio = bytes == 0 ? 0 : static_cast<double>(lab.layout().block_bytes()) / bytes,
                      .encode_ms = Median(c.encode_ms),
                      .decode_ms = Median(c.decode_ms),
                      .first = c.first.Answers(),
                      .second = c.second.Answers()});
    }
  }
  return rows;
}

std::string KvCodecQualityTable(const std::vector<KvCodecQualityRow>& rows) {
  std::string out =
      "| codec | context | bytes/token | ratio | encode ms | decode ms | 1st right (exact) | 2nd right "
      "(exact) | "
      "1st top-1 | 2nd top-1 | 1st KL | 2nd KL "
      "|\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
  for (const KvCodecQualityRow& r : rows) {
    absl::StrAppendFormat(
        &out,
        "| %s | %d | %.0f | %.2f | %.3f | %.3f | %.1f%% (%.1f%%) | %.1f%% (%.1f%%) | %.2f%% | %.2f%% | "
        "%.5f | %.5f |\n",
        r.codec, r.context, r.bytes_per_token, r.ratio, r.encode_ms, r.decode_ms, 100 * r.first.right,
        100 * r.first.right_exact, 100 * r.second.right, 100 * r.second.right_exact, 100 * r.first.top1,
        100 * r.second.top1, r.first.kl, r.second.kl);
  }
  return out;
}

}  // namespace tidepool

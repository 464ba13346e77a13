#include "server/engine/engine.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status.h"
#include "server/engine/batch_core.h"
#include "server/engine/probe.h"
#include "server/engine/sampler.h"
#include "server/engine/sequence.h"

namespace tidepool {
namespace {

constexpr size_t kObservationsMax = 1024;
// Nothing depends on it: no wait is without an end.
constexpr absl::Duration kIdleWait = absl::Seconds(1);
// Rows of a prompt that are scored at a time: the logits of a large vocabulary take half a megabyte a row.
constexpr uint32_t kScoreRows = 16;
// How fast the mean cost of a prompt's token follows the steps.
constexpr double kTokenSecondsGain = 0.1;
// What a step waits, once, for masks that are nearly there: setting a row of logits aside costs about that.
constexpr auto kMaskGrace = std::chrono::microseconds(300);
// What a late mask may wait for its turn, in mask_deadlines.
constexpr int kTurnDeadlines = 6;
// How often one looks whether a late mask is overdue while nothing else is to be done.
constexpr absl::Duration kLateWait = absl::Milliseconds(100);

template <typename T>
void PushBounded(std::deque<T>& queue, const T& item) {
  if (queue.size() == kObservationsMax) queue.pop_front();
  queue.push_back(item);
}

}  // namespace

struct Engine::Impl {
  explicit Impl(Options o)
      : options(std::move(o)),
        probe(*options.metrics, options.role),
        core({.max_batch = options.config.max_batch,
              .max_step_tokens = options.config.max_step_tokens,
              .order = *ParseQueueOrder(options.config.order),  // Start has seen to it
              .max_running_per_tenant = options.config.max_running_per_tenant,
              .yield_places = options.config.preemption != "off"}),
        mode(*ParsePreemptionMode(options.config.preemption)),
        // Each live sequence asks for one mask at a time.
        masks(size_t{options.config.max_batch} + 2 * size_t{options.config.max_waiting}, probe.mask, [this] {
          {
            std::lock_guard lock(mu);
            mask_ready = true;
          }
          mail_cv.notify_one();
        }) {
    const size_t tokens = options.config.max_step_tokens, batch = options.config.max_batch;
    token_rows.reserve(tokens);
    position_rows.reserve(tokens);
    parts.reserve(batch);
    streaming.reserve(batch);
    views.reserve(batch);
    logit_rows.reserve(batch);
    logits.resize(batch * options.runner->vocab());
  }

  // ---- any thread
  struct Live {
    uint64_t id = 0;
    bool cancelled = false;
    bool preemptible = false;
  };
  struct Mail {
    std::vector<std::pair<uint64_t, std::unique_ptr<Sequence>>> arrivals;
    std::vector<uint64_t> cancels, preempts;
  };

  absl::Status Submit(SequenceSpec spec);
  bool Cancel(const std::string& request_id);
  bool Preempt(const std::string& request_id);
  absl::Status Resume(std::unique_ptr<Sequence> sequence);
  // Under mu: takes a sequence that may come in.
  void Take(std::unique_ptr<Sequence> sequence);

  // ---- the engine's thread
  // A sequence's part of the step at hand.
  struct Part {
    PlanItem item;
    Sequence* sequence = nullptr;
    size_t logits_row = 0;  // where draws()
    size_t hidden_row = 0;  // the first of hidden_rows()
    bool failed = false;
    bool draws() const { return item.last && !sequence->pooled(); }
    uint32_t hidden_rows() const { return sequence->PooledRows(item.tokens, item.last); }
    bool scored() const {
      return sequence->spec().prompt_logprobs >= 0 && sequence->computed() < sequence->prompt_tokens();
    }
  };

  void Run();
  // Takes what other threads left; waits for it where there is nothing else to do. False: stop.
  bool TakeMail(Mail& mail);
  void Admit(uint64_t id, std::unique_ptr<Sequence> sequence);
  void Enqueue(uint64_t id, const Sequence& sequence, uint32_t pending, bool prefilled);
  // The sequence no longer waits to begin. Under mu.
  void Begun(Sequence& sequence);
  // Its sink has it then.
  // `save_tail`: where that is worth it; its slot is free later then.
  void PreemptNow(uint64_t id, bool save_tail);
  // Room for what a sequence of the plan computes next, where need be by a preemption, perhaps of itself.
  // False: it is not in the engine any more.
  bool MakeRoom(const PlanItem& item);
  void Step();
  void BuildBatch(const std::vector<PlanItem>& plan);
  // Runs the parts; those that cannot be computed end here and are marked.
  void Compute();
  // Computes a part of a prompt whose logprobs are wanted, a few rows at a time, and tells the sink.
  absl::Status Score(const Part& part);
  // False: its token cannot be drawn yet, as its mask is not there.
  bool AfterPart(Part& part);
  // Draws the next token from a row of logits; the mask, where there is one, is there.
  void Draw(uint64_t id, Sequence& sequence, std::span<float> row);
  void FailConstraint(uint64_t id, const Sequence& sequence, const absl::Status& status);
  std::span<float> LogitsOf(const Part& part);
  // Asks for the mask of the sequence's next token.
  void AskMask(Sequence& sequence);
  // Those of parts_late whose mask comes within the grace are drawn, the others put aside.
  void DrawLate();
  // Draws what was put aside and can be drawn now; ends what has waited too long.
  void DrawParked();
  // The next token of a sequence: tells the sink, and decides how it goes on. False: it has ended.
  bool Accept(uint64_t id, Sequence& sequence, OutputToken token);
  void Finish(uint64_t id, FinishReason reason, absl::Status status, int32_t stop_token = -1);
  void Observe(absl::Duration elapsed);

  // Collects those parts that end a prompt whose layers are streamed, and announces their blocks.
  void AnnounceLastChunks();

  const Options options;
  EngineProbe probe;
  const std::function<void(uint32_t)> tell_layers = [this](uint32_t layers) {
    layers_told = layers;
    for (Part* p : streaming) p->sequence->sink().OnLayersComputed(layers);
  };

  mutable std::mutex mu;
  std::condition_variable mail_cv;
  mutable std::condition_variable idle_cv;
  // At most max_waiting, and those that resume; at most one of each of the others per live sequence.
  Mail inbox;
  absl::flat_hash_map<std::string, Live> live;  // not yet finished, by request id
  // Of those that wait to begin; only with max_waiting_per_tenant.
  absl::flat_hash_map<std::string, uint32_t> waiting_of_tenant;
  size_t unfinished = 0;  // OnFinished not yet returned
  uint64_t next_id = 1;
  bool draining = false, stopping = false;
  bool mask_ready = false;  // one has become so since TakeMail
  EngineStats core_stats;   // as of the last step
  uint64_t inbox_prefill_tokens = 0;
  uint32_t inbox_batch_class = 0;  // of inbox
  std::deque<PrefillObservation> prefill_observations;
  std::deque<DecodeObservation> decode_observations;

  BatchCore core;
  const PreemptionMode mode;
  const std::shared_ptr<CopySpeed> copy_speed = std::make_shared<CopySpeed>();
  Sampler sampler;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Sequence>> sequences;
  std::vector<int32_t> token_rows, position_rows, logit_rows;
  std::vector<Part> parts;
  std::vector<ForwardSequence> views;
  std::vector<float> logits;        // [max_batch, vocab]
  std::vector<float> score_logits;  // [kScoreRows, vocab] once a prompt is scored
  std::vector<int32_t> hidden_rows;
  std::vector<float> hidden_states;  // [rows that are pooled in a step, hidden]
  std::vector<Part*> streaming;      // of `parts`: their sinks are told of layers
  uint32_t layers_told = 0;          // to them in this step
  std::vector<Part*> late;           // of `parts`: their token waits for its mask
  std::vector<uint64_t> parked;      // sequences whose token is drawn when its mask is there
  double prefill_token_seconds = 0;  // of a prompt's token in a step, lately; 0: none was computed yet
  bool idle = true;                  // nothing was to be computed when last asked
  MaskWorker masks;                  // last: its thread uses what stands above

  std::mutex stop_mu;  // serialises Stop
  std::thread thread;
};

absl::Status Engine::Impl::Submit(SequenceSpec spec) {
  const ModelRunner& runner = *options.runner;
  if (absl::Status s = ValidateSequence(spec, runner.layout(), runner.vocab(), runner.max_model_len());
      !s.ok()) {
    probe.rejected_invalid.Add();
    return s;
  }
  // Such ids (of a tokenizer larger than the model) are never drawn, and must not index a row of logits.
  std::erase_if(spec.stop_token_ids,
                [&](int32_t id) { return id < 0 || static_cast<uint32_t>(id) >= runner.vocab(); });
  // Hashing the prompt is the caller's time, not the engine's.
  auto sequence = std::make_unique<Sequence>(std::move(spec), runner.layout().block_tokens, runner.vocab(),
                                             options.clock->Now());
  {
    std::lock_guard lock(mu);
    if (draining) {
      probe.rejected_draining.Add();
      return absl::UnavailableError("the engine is draining and takes no new requests");
    }
    const std::string& request_id = sequence->spec().request_id;
    if (live.contains(request_id)) {
      probe.rejected_invalid.Add();
      return absl::AlreadyExistsError(absl::StrCat("request_id ", request_id, " is running here already"));
    }
    const bool batch_class = sequence->spec().batch_class;
    const size_t all = inbox.arrivals.size() + core_stats.waiting;
    const size_t of_batches = inbox_batch_class + core_stats.waiting_batch_class;
    const size_t limit = options.config.max_waiting;
    if (batch_class ? all >= (limit + 1) / 2 : all - of_batches >= limit) {
      probe.rejected_full.Add();
      return absl::ResourceExhaustedError(
          absl::StrCat(all, " requests wait in the engine; engine.max_waiting is ", limit,
                       batch_class ? ", of which batches may take half" : ""));
    }
    if (const uint32_t own = options.config.max_waiting_per_tenant; own > 0) {
      uint32_t& waiting = waiting_of_tenant[sequence->spec().tenant];
      if (waiting >= own) {
        probe.rejected_tenant.Add();
        return absl::ResourceExhaustedError(
            absl::StrCat(waiting, " requests of tenant ", sequence->spec().tenant,
                         " wait in the engine; engine.max_waiting_per_tenant is ", own,
                         ": send more when some of them have begun"));
      }
      ++waiting;
    }
    sequence->order = next_id;
    Take(std::move(sequence));
  }
  mail_cv.notify_one();
  return absl::OkStatus();
}

void Engine::Impl::Take(std::unique_ptr<Sequence> sequence) {
  const SequenceSpec& spec = sequence->spec();
  if (spec.batch_class) ++inbox_batch_class;
  const uint64_t id = next_id++;
  live.emplace(spec.request_id,
               Live{.id = id, .preemptible = spec.preemptible && mode != PreemptionMode::kOff});
  ++unfinished;
  inbox_prefill_tokens += sequence->prompt_tokens() - sequence->computed();
  inbox.arrivals.emplace_back(id, std::move(sequence));
}

absl::Status Engine::Impl::Resume(std::unique_ptr<Sequence> sequence) {
  {
    std::lock_guard lock(mu);
    if (stopping) {
      probe.rejected_draining.Add();
      return absl::UnavailableError("the engine has stopped and takes no requests");
    }
    if (live.contains(sequence->spec().request_id)) {
      probe.rejected_invalid.Add();
      return absl::AlreadyExistsError(
          absl::StrCat("request_id ", sequence->spec().request_id, " is running here already"));
    }
    Take(std::move(sequence));
  }
  mail_cv.notify_one();
  return absl::OkStatus();
}

bool Engine::Impl::Preempt(const std::string& request_id) {
  {
    std::lock_guard lock(mu);
    const auto it = live.find(request_id);
    if (it == live.end() || !it->second.preemptible || it->second.cancelled) return false;
    inbox.preempts.push_back(it->second.id);
    it->second.preemptible = false;  // once is enough
  }
  mail_cv.notify_one();
  return true;
}

bool Engine::Impl::Cancel(const std::string& request_id) {
  {
    std::lock_guard lock(mu);
    const auto it = live.find(request_id);
    if (it == live.end()) return false;
    if (it->second.cancelled) return true;
    it->second.cancelled = true;
    inbox.cancels.push_back(it->second.id);
  }
  mail_cv.notify_one();
  return true;
}

bool Engine::Impl::TakeMail(Mail& mail) {
  mail.arrivals.clear();
  mail.cancels.clear();
  mail.preempts.clear();
  std::unique_lock lock(mu);
  core_stats = {.running = core.running(),
                .waiting = core.waiting(),
                .waiting_batch_class = core.waiting_batch_class(),
                .queued_prefill_tokens = core.queued_prefill_tokens(),
                .running_context_tokens = core.running_context_tokens()};
  probe.running.Set(core_stats.running);
  probe.waiting.Set(core_stats.waiting + static_cast<double>(inbox.arrivals.size()));
  if (sequences.empty() || idle) {
    mail_cv.wait_for(lock, absl::ToChronoNanoseconds(parked.empty() ? kIdleWait : kLateWait), [&] {
      return stopping || !inbox.arrivals.empty() || !inbox.cancels.empty() || !inbox.preempts.empty() ||
             (mask_ready && !parked.empty());
    });
  }
  mask_ready = false;
  std::swap(mail, inbox);
  inbox_prefill_tokens = 0;
  core_stats.waiting_batch_class += std::exchange(inbox_batch_class, 0);
  // Until the next call these are in the core: count them there, or max_waiting could be overrun.
  core_stats.waiting += static_cast<uint32_t>(mail.arrivals.size());
  for (const auto& [id, s] : mail.arrivals)
    core_stats.queued_prefill_tokens += s->prompt_tokens() - s->computed();
  return !stopping;
}

void Engine::Impl::Run() {
  Mail mail;
  bool go_on = true;
  while (go_on) {
    go_on = TakeMail(mail);
    for (auto& [id, sequence] : mail.arrivals) Admit(id, std::move(sequence));
    for (uint64_t id : mail.cancels)
      Finish(id, FinishReason::kCancelled, absl::CancelledError("the request was cancelled"));
    for (uint64_t id : mail.preempts) PreemptNow(id, /*save_tail=*/true);
    if (!go_on) break;
    DrawParked();
    Step();
  }
  std::vector<uint64_t> rest;
  for (const auto& [id, s] : sequences) rest.push_back(id);
  std::sort(rest.begin(), rest.end());
  for (uint64_t id : rest)
    Finish(id, FinishReason::kCancelled, absl::UnavailableError("the engine is stopping"));
}

void Engine::Impl::Admit(uint64_t id, std::unique_ptr<Sequence> owned) {
  Sequence& s = *owned;
  sequences.emplace(id, std::move(owned));
  // Fetched blocks become readable here before anything is added to them.
  s.Computed(0, prefill_token_seconds, *options.pool);
  if (s.resumed) {
    const auto pending = static_cast<uint32_t>(s.tokens().size()) - s.computed();
    // The token that was drawn last is none of a prompt: its KV is missing as in any other step.
    const uint32_t again = pending - (s.outputs() > 0 ? 1 : 0);
    probe.recomputed_tokens.Add(
        std::min(again, s.computed_before - std::min(s.computed_before, s.computed())));
    return Enqueue(id, s, pending, /*prefilled=*/pending == 1 && s.outputs() > 0);
  }
  if (s.spec().first_token) {
    if (!Accept(id, s, *s.spec().first_token)) return;
    return Enqueue(id, s, 1, /*prefilled=*/true);
  }
  if (s.constraint()) {
    if (s.constraint()->constraint().MustEnd()) return Finish(id, FinishReason::kStop, absl::OkStatus());
  }
  // Who drew the last of them did not live to say so.
  if (!s.pooled() && !s.spec().prefill_only && s.outputs() >= s.spec().max_tokens) {
    return Finish(id, FinishReason::kLength, absl::OkStatus());
  }
  Enqueue(id, s, s.prompt_tokens() - s.computed(), /*prefilled=*/false);
}

void Engine::Impl::Enqueue(uint64_t id, const Sequence& s, uint32_t pending, bool prefilled) {
  core.Add({.id = id,
            .context = s.computed(),
            .pending = pending,
            .prefilled = prefilled,
            .tenant = s.spec().tenant,
            .priority = s.spec().priority,
            .batch_class = s.spec().batch_class,
            .resumed = s.resumed,
            .fresh = s.outputs() > 0 ? 0 : s.prompt_tokens() - s.computed_before},
           options.clock->Now());
}

void Engine::Impl::PreemptNow(uint64_t id, bool save_tail) {
  const auto it = sequences.find(id);
  if (it == sequences.end()) return;  // ended meanwhile
  const auto begin = std::chrono::steady_clock::now();
  std::unique_ptr<Sequence> s = std::move(it->second);
  sequences.erase(it);
  core.Remove(id);
  const BlockPool& pool = *options.pool;
  const uint32_t sealed = s->sealed_here();
  const PreemptionChoice choice =
      ChoosePreemption(mode, {.sealed_tokens = sealed * pool.layout().block_tokens,
                              .tail_tokens = s->tail_tokens(),
                              .tail_bytes = pool.layout().block_bytes(),
                              .copy_bytes_per_second = copy_speed->bytes_per_second(),
                              .prefill_token_seconds = prefill_token_seconds});
  const bool swap = choice.how == Preemption::kSwap;
  Sequence::Vacated vacated = s->Vacate(swap, choice.save_tail && save_tail, *options.pool);
  (swap ? probe.preempted_swap : probe.preempted_recompute).Add();
  if (swap) probe.swapped_blocks.Add(sealed);
  // One that had not begun goes on waiting for a place as it did.
  if (s->started != absl::InfiniteFuture()) s->computed_before = std::max(s->computed_before, s->computed());
  s->preempted_at = options.clock->Now();
  {
    std::lock_guard lock(mu);
    live.erase(s->spec().request_id);
    Begun(*s);
  }
  spdlog::debug("{} is preempted after {} tokens of its answer", s->spec().request_id, s->outputs());
  EngineSink& sink = s->sink();
  const std::shared_ptr<EngineSink> alive = s->spec().sink;
  auto preempted = std::make_unique<PreemptedSequence>(
      std::move(s),
      PreemptedSequence::Kept{
          .how = choice.how, .blocks = std::move(vacated.blocks), .tail = std::move(vacated.tail)},
      copy_speed, probe.swap_copied_bytes);
  probe.preemption_choice.Observe(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  sink.OnPreempted(std::move(preempted));
  std::lock_guard lock(mu);
  if (--unfinished == 0) idle_cv.notify_all();
}

bool Engine::Impl::MakeRoom(const PlanItem& item) {
  // The last in rank goes first: its class, its priority, its arrival.
  const auto rank = [](const Sequence& s) {
    return std::tuple(s.spec().batch_class, -int64_t{s.spec().priority}, s.order);
  };
  const auto may = [&](const Sequence& s) { return mode != PreemptionMode::kOff && s.preemptible(); };
  for (bool asked = false;; asked = true) {
    Sequence& s = *sequences.at(item.id);
    const absl::Status status = s.EnsureBlocks(s.computed() + item.tokens, *options.pool);
    if (status.ok()) return true;
    if (!asked && options.on_short) {
      options.on_short();
      continue;
    }
    uint64_t last = item.id;
    for (const auto& [id, other] : sequences) {
      if (id == item.id || !may(*other) || other->outputs() < other->keep_until_outputs) continue;
      if (rank(*other) > rank(*sequences.at(last))) last = id;
    }
    if (last == item.id && !may(s)) {
      Finish(item.id, FinishReason::kError,
             Annotate(status, "no KV block for the next tokens of the answer"));
      return false;
    }
    std::erase_if(parts, [&](const Part& p) { return p.item.id == last; });
    PreemptNow(last, /*save_tail=*/false);  // the slot is wanted now
    if (last == item.id) return false;
  }
}

void Engine::Impl::Begun(Sequence& s) {
  if (options.config.max_waiting_per_tenant == 0 || std::exchange(s.begun, true)) return;
  const auto it = waiting_of_tenant.find(s.spec().tenant);
  if (--it->second == 0) waiting_of_tenant.erase(it);
}

void Engine::Impl::AskMask(Sequence& s) {
  s.mask_asked = true;
  // The queue has room for every live sequence, and yet: those that are cancelled may still be in it.
  if (!masks.Submit(s.constraint())) s.constraint()->ComputeMask();
}

void Engine::Impl::BuildBatch(const std::vector<PlanItem>& plan) {
  parts.clear();
  for (const PlanItem& item : plan) {
    // Gone: preempted for the sake of one before it.
    if (!sequences.contains(item.id) || !MakeRoom(item)) continue;
    Sequence& s = *sequences.at(item.id);
    // Of a sequence that is new in the batch: while it waited, its mask would have been in others' way.
    if (s.constraint() && !s.mask_asked) AskMask(s);
    parts.push_back({.item = item, .sequence = &s});
  }
  // Those that are computed apart come last: the others are one range.
  std::stable_partition(parts.begin(), parts.end(), [](const Part& p) { return !p.scored(); });
}

void Engine::Impl::Compute() {
  const size_t hidden = options.runner->hidden();
  auto forward = [&](size_t first, size_t count) {
    token_rows.clear();
    position_rows.clear();
    logit_rows.clear();
    hidden_rows.clear();
    views.clear();
    for (size_t p = first; p < first + count; ++p) {
      const Sequence& s = *parts[p].sequence;
      const uint32_t begin = s.computed(), n = parts[p].item.tokens;
      views.push_back({.blocks = s.block_bases(),
                       .context = static_cast<int32_t>(begin + n),
                       .first_row = static_cast<int32_t>(token_rows.size()),
                       .q_len = static_cast<int32_t>(n)});
      for (uint32_t i = begin; i < begin + n; ++i) {
        token_rows.push_back(s.tokens()[i]);
        position_rows.push_back(static_cast<int32_t>(i));
      }
      const auto end = static_cast<int32_t>(token_rows.size());
      if (parts[p].draws()) logit_rows.push_back(end - 1);
      for (auto r = static_cast<int32_t>(parts[p].hidden_rows()); r > 0; --r) hidden_rows.push_back(end - r);
    }
    float* out = logits.data() + parts[first].logits_row * options.runner->vocab();
    return options.runner->Forward({.tokens = token_rows,
                                    .positions = position_rows,
                                    .sequences = views,
                                    .logit_rows = logit_rows,
                                    .hidden_rows = hidden_rows,
                                    .hidden = hidden_states.data() + parts[first].hidden_row * hidden,
                                    .on_layer = streaming.empty() ? nullptr : &tell_layers},
                                   out);
  };

  size_t row = 0, hidden_row = 0;
  for (Part& p : parts) {
    p.logits_row = row;
    if (p.draws()) ++row;
    p.hidden_row = hidden_row;
    hidden_row += p.hidden_rows();
  }
  // Grows to the longest such step and is kept; nothing where nobody asks for embeddings.
  if (hidden_states.size() < hidden_row * hidden) hidden_states.resize(hidden_row * hidden);
  auto fail = [&](Part& part, const absl::Status& status) {
    part.failed = true;
    spdlog::error("{} failed to compute: {}", part.sequence->spec().request_id, status.ToString());
    Finish(part.item.id, FinishReason::kError, status);
  };
  const size_t together = static_cast<size_t>(
      std::find_if(parts.begin(), parts.end(), [](const Part& p) { return p.scored(); }) - parts.begin());
  for (size_t p = together; p < parts.size(); ++p) {
    if (absl::Status status = Score(parts[p]); !status.ok()) {
      probe.step_failures.Add();
      fail(parts[p], status);
    }
  }
  if (together == 0) return;
  AnnounceLastChunks();
  absl::Status status = forward(0, together);
  if (status.ok()) return;
  const absl::Status together_status = status;
  // Who was told of the last layer may have handed its blocks out: they are not written again.
  std::vector<Part*> handed_out;
  if (layers_told >= options.runner->layout().layers) handed_out = streaming;
  if (!streaming.empty()) tell_layers(0);
  streaming.clear();
  probe.step_failures.Add();
  spdlog::error("a step of {} sequences failed: {}", together, status.ToString());
  // Whoever is at fault takes nobody along: each computes by itself. (KV is written to the same places
  // again, so what the failed step left is overwritten.)
  for (size_t p = 0; p < together; ++p) {
    if (std::find(handed_out.begin(), handed_out.end(), &parts[p]) != handed_out.end()) {
      fail(parts[p], together_status);
      continue;
    }
    if (together > 1) status = forward(p, 1);
    if (status.ok()) continue;
    if (together > 1) probe.step_failures.Add();
    fail(parts[p], status);
  }
}

void Engine::Impl::AnnounceLastChunks() {
  streaming.clear();
  layers_told = 0;
  for (Part& p : parts) {
    // Of one that failed there is nothing left: those that are computed apart come before this.
    if (p.failed || !p.item.last || !p.sequence->spec().stream_layers || p.scored()) continue;
    streaming.push_back(&p);
    p.sequence->sink().OnLastChunk(p.sequence->sealed(), p.sequence->unsealed_blocks());
  }
}

absl::Status Engine::Impl::Score(const Part& part) {
  const Sequence& s = *part.sequence;
  const uint32_t vocab = options.runner->vocab(), end = s.computed() + part.item.tokens;
  // The runner gives as many rows of logits as it takes sequences.
  const uint32_t rows_max = std::min(kScoreRows, options.config.max_batch);
  score_logits.resize(size_t{rows_max} * vocab);
  std::vector<PromptLogprob> scores;
  scores.reserve(part.item.tokens);
  for (uint32_t begin = s.computed(); begin < end; begin += rows_max) {
    const uint32_t n = std::min(rows_max, end - begin);
    token_rows.assign(s.tokens().begin() + begin, s.tokens().begin() + begin + n);
    position_rows.clear();
    logit_rows.clear();
    for (uint32_t i = 0; i < n; ++i) {
      position_rows.push_back(static_cast<int32_t>(begin + i));
      logit_rows.push_back(static_cast<int32_t>(i));
    }
    views.assign(1, {.blocks = s.block_bases(),
                     .context = static_cast<int32_t>(begin + n),
                     .first_row = 0,
                     .q_len = static_cast<int32_t>(n)});
    TP_RETURN_IF_ERROR(options.runner->Forward(
        {.tokens = token_rows, .positions = position_rows, .sequences = views, .logit_rows = logit_rows},
        score_logits.data()));
    for (uint32_t i = 0; i < n; ++i) {
      const std::span<const float> row = std::span(score_logits).subspan(size_t{i} * vocab, vocab);
      if (begin + i + 1 < s.prompt_tokens()) {
        TP_ASSIGN_OR_RETURN(PromptLogprob score,
                            sampler.Score(row, s.tokens()[begin + i + 1], s.spec().prompt_logprobs));
        scores.push_back(std::move(score));
      } else {
        // The prompt's end: these are the logits of the answer's first token.
        std::copy(row.begin(), row.end(),
                  logits.begin() + static_cast<std::ptrdiff_t>(part.logits_row * vocab));
      }
    }
  }
  s.sink().OnPromptLogprobs(std::move(scores));
  return absl::OkStatus();
}

bool Engine::Impl::AfterPart(Part& part) {
  Sequence& s = *part.sequence;
  (part.item.decode ? probe.decode_tokens : probe.prefill_tokens).Add(part.item.tokens);
  if (const uint32_t rows = part.hidden_rows(); rows > 0) {
    const size_t hidden = options.runner->hidden();
    s.Pool(std::span(hidden_states).subspan(part.hidden_row * hidden, rows * hidden),
           static_cast<uint32_t>(hidden));
  }
  s.Computed(part.item.tokens, prefill_token_seconds, *options.pool);
  if (!part.item.last) return true;
  if (s.pooled()) {
    Finish(part.item.id, FinishReason::kPooled, absl::OkStatus());
    return true;
  }
  if (s.constraint() && !masks.Ready(*s.constraint())) return false;
  Draw(part.item.id, s, LogitsOf(part));
  return true;
}

std::span<float> Engine::Impl::LogitsOf(const Part& part) {
  const size_t vocab = options.runner->vocab();
  return std::span(logits).subspan(part.logits_row * vocab, vocab);
}

void Engine::Impl::Draw(uint64_t id, Sequence& s, std::span<float> row) {
  if (s.constraint() && !s.constraint()->status().ok()) {
    return FailConstraint(id, s, s.constraint()->status());
  }
  auto token = sampler.Sample(row, s.spec().sampling, s.sample_input());
  if (!token.ok()) {
    spdlog::error("{} cannot go on: {}", s.spec().request_id, token.status().ToString());
    Finish(id, FinishReason::kError, token.status());
    return;
  }
  if (!Accept(id, s, *std::move(token))) return;
  if (s.constraint()) AskMask(s);
  core.Continue(id);
}

void Engine::Impl::FailConstraint(uint64_t id, const Sequence& s, const absl::Status& status) {
  probe.masks_failed.Add();
  spdlog::error("{} cannot go on: {}", s.spec().request_id, status.ToString());
  Finish(id, FinishReason::kError, Annotate(status, "the answer's grammar"));
}

void Engine::Impl::DrawLate() {
  if (late.empty()) return;
  const auto begin = std::chrono::steady_clock::now();
  for (Part* part : late) {
    Sequence& s = *part->sequence;
    const uint64_t id = part->item.id;
    const std::span<float> row = LogitsOf(*part);
    if (masks.WaitReady(*s.constraint(), begin + kMaskGrace)) {
      Draw(id, s, row);
      continue;
    }
    probe.masks_late.Add();
    s.late_logits.assign(row.begin(), row.end());
    s.late_since = options.clock->Now();
    parked.push_back(id);
  }
  probe.mask_wait.Observe(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  late.clear();
}

void Engine::Impl::DrawParked() {
  if (parked.empty()) return;
  // The deadline is for a mask's own time: who waits behind others' masks is not to blame. They end, too, so
  // that the wait for a turn has an end that is hardly ever met.
  const absl::Time overdue = options.clock->Now() - kTurnDeadlines * options.mask_deadline;
  const auto too_long = absl::ToChronoNanoseconds(options.mask_deadline);
  std::erase_if(parked, [&](uint64_t id) {
    const auto it = sequences.find(id);
    if (it == sequences.end()) return true;  // cancelled
    Sequence& s = *it->second;
    if (masks.Ready(*s.constraint())) {
      Draw(id, s, s.late_logits);
      return true;
    }
    if (s.late_since > overdue && masks.Computing(*s.constraint()) < too_long) return false;
    FailConstraint(
        id, s,
        absl::DeadlineExceededError(absl::StrCat(
            "took more than ", absl::FormatDuration(options.mask_deadline), " to say what may come next")));
    return true;
  });
}

bool Engine::Impl::Accept(uint64_t id, Sequence& s, OutputToken token) {
  const int32_t drawn = token.id;
  if (s.spec().prefill_only) {
    s.sink().OnToken(std::move(token));
    Finish(id, FinishReason::kPrefilled, absl::OkStatus());
    return false;
  }
  if (s.IsStop(drawn)) {
    Finish(id, FinishReason::kStop, absl::OkStatus(), drawn);
    return false;
  }
  const ConstraintRun* const run = s.constraint().get();
  if (run != nullptr) {
    if (absl::Status status = s.constraint()->constraint().Accept(drawn); !status.ok()) {
      FailConstraint(id, s, status);
      return false;
    }
  }
  s.Append(drawn);
  probe.generated.Add();
  s.sink().OnToken(std::move(token));
  if (run != nullptr && s.constraint()->constraint().MustEnd()) {
    Finish(id, FinishReason::kStop, absl::OkStatus());
    return false;
  }
  if (s.outputs() >= s.spec().max_tokens) {
    Finish(id, FinishReason::kLength, absl::OkStatus());
    return false;
  }
  s.mask_asked = false;
  return true;
}

void Engine::Impl::Finish(uint64_t id, FinishReason reason, absl::Status status, int32_t stop_token) {
  const auto it = sequences.find(id);
  if (it == sequences.end()) return;
  const std::unique_ptr<Sequence> s = std::move(it->second);
  sequences.erase(it);
  core.Remove(id);
  probe.Finished(reason);
  {
    std::lock_guard lock(mu);
    live.erase(s->spec().request_id);
    Begun(*s);
  }
  s->sink().OnFinished(s->Finish(reason, std::move(status), stop_token));
  std::lock_guard lock(mu);
  if (--unfinished == 0) idle_cv.notify_all();
}

void Engine::Impl::Step() {
  const absl::Time begin = options.clock->Now();
  const std::vector<PlanItem>& plan = core.Step(begin);
  idle = plan.empty();
  if (idle) return;
  {
    // Who has a place is known now; the tokens count once they are computed.
    std::lock_guard lock(mu);
    core_stats.running = core.running();
    core_stats.waiting = core.waiting();
    core_stats.waiting_batch_class = core.waiting_batch_class();
    if (options.config.max_waiting_per_tenant > 0) {
      for (const PlanItem& item : plan) Begun(*sequences.at(item.id));
    }
  }
  BuildBatch(plan);
  for (Part& p : parts) {
    if (p.sequence->started == absl::InfiniteFuture()) p.sequence->started = begin;
    if (p.sequence->preempted_at != absl::InfiniteFuture()) {
      probe.preempted_seconds.Observe(
          absl::ToDoubleSeconds(begin - std::exchange(p.sequence->preempted_at, absl::InfiniteFuture())));
    }
  }
  if (parts.empty()) return;
  Compute();
  std::erase_if(parts, [](const Part& p) { return p.failed; });
  if (parts.empty()) return;
  Observe(options.clock->Now() - begin);
  for (Part& p : parts) {
    if (!AfterPart(p)) late.push_back(&p);
  }
  DrawLate();
}

void Engine::Impl::Observe(absl::Duration elapsed) {
  const double seconds = absl::ToDoubleSeconds(elapsed);
  const absl::Time now = options.clock->Now();
  uint32_t tokens = 0, decodes = 0;
  uint64_t context = 0;
  bool scored = false;
  for (const Part& p : parts) {
    scored = scored || p.scored();
    tokens += p.item.tokens;
    decodes += p.item.decode ? 1 : 0;
    context += p.sequence->computed() + p.item.tokens;
  }
  const bool all = decodes == parts.size();
  (all ? probe.step_decode : decodes == 0 ? probe.step_prefill : probe.step_mixed).Observe(seconds);
  if (decodes == 0 && !scored) {
    double& mean = prefill_token_seconds;
    mean = mean == 0 ? seconds / tokens : mean + kTokenSecondsGain * (seconds / tokens - mean);
  }

  std::lock_guard lock(mu);
  if (all) {
    PushBounded(decode_observations, {.batch = decodes, .context_tokens = context, .seconds = seconds});
  }
  for (const Part& p : parts) {
    if (p.item.decode) continue;
    Sequence& s = *p.sequence;
    s.compute_seconds += seconds * p.item.tokens / tokens;
    s.timed = s.timed && !scored;
    if (!p.item.last) continue;
    if (s.first_token == absl::InfiniteFuture()) s.first_token = now;
    if (!s.timed) continue;
    PushBounded(prefill_observations, {.new_tokens = s.prompt_tokens() - s.cached_tokens,
                                       .cached_tokens = s.cached_tokens,
                                       .seconds = s.compute_seconds});
  }
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Start(Options options) {
  TP_CHECK(options.runner != nullptr && options.pool != nullptr && options.metrics != nullptr);
  const EngineConfig& c = options.config;
  if (c.max_batch < 1) return absl::InvalidArgumentError("engine.max_batch is 0; it must be at least 1");
  if (c.max_waiting < 1) return absl::InvalidArgumentError("engine.max_waiting is 0; it must be at least 1");
  if (c.max_step_tokens < c.max_batch) {
    return absl::InvalidArgumentError(absl::StrCat("engine.max_step_tokens is ", c.max_step_tokens,
                                                   "; it must be at least engine.max_batch (", c.max_batch,
                                                   "): a step decodes every running sequence"));
  }
  if (!ParseQueueOrder(c.order)) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine.order is '", c.order, "'; it must be vtc, fcfs or dlpm"));
  }
  if (!ParsePreemptionMode(c.preemption)) {
    return absl::InvalidArgumentError(
        absl::StrCat("engine.preemption is '", c.preemption, "'; it must be auto, swap, recompute or off"));
  }
  if (options.pool->layout() != options.runner->layout()) {
    return absl::InvalidArgumentError(absl::StrCat("the pool's block layout is ",
                                                   options.pool->layout().ToString(), ", the model's ",
                                                   options.runner->layout().ToString()));
  }
  auto impl = std::make_unique<Impl>(std::move(options));
  impl->thread = std::thread([p = impl.get()] { p->Run(); });
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() { Stop(); }

absl::Status Engine::Submit(SequenceSpec spec) { return impl_->Submit(std::move(spec)); }

bool Engine::Cancel(std::string_view request_id) { return impl_->Cancel(std::string(request_id)); }

bool Engine::Preempt(std::string_view request_id) { return impl_->Preempt(std::string(request_id)); }

absl::Status Engine::Resume(std::unique_ptr<PreemptedSequence> preempted, ResumeWith with) {
  std::unique_ptr<Sequence> sequence = std::move(preempted->sequence_);
  TP_RETURN_IF_ERROR(ValidateBlocks(with.blocks, sequence->tokens().size(), with.published_blocks,
                                    with.computed_tokens, /*first_token=*/false,
                                    impl_->options.runner->layout()));
  sequence->Resume(std::move(with.blocks), with.published_blocks, with.computed_tokens);
  sequence->keep_until_outputs = with.keep_until_outputs;
  return impl_->Resume(std::move(sequence));
}

EngineStats Engine::stats() const {
  std::lock_guard lock(impl_->mu);
  EngineStats out = impl_->core_stats;
  out.waiting += static_cast<uint32_t>(impl_->inbox.arrivals.size());
  out.waiting_batch_class += impl_->inbox_batch_class;
  out.queued_prefill_tokens += impl_->inbox_prefill_tokens;
  return out;
}

EngineObservations Engine::DrainObservations() {
  std::lock_guard lock(impl_->mu);
  EngineObservations out{.prefills = {impl_->prefill_observations.begin(), impl_->prefill_observations.end()},
                         .decodes = {impl_->decode_observations.begin(), impl_->decode_observations.end()}};
  impl_->prefill_observations.clear();
  impl_->decode_observations.clear();
  return out;
}

void Engine::Drain() {
  std::lock_guard lock(impl_->mu);
  impl_->draining = true;
}

bool Engine::WaitIdle(absl::Duration timeout) const {
  std::unique_lock lock(impl_->mu);
  return impl_->idle_cv.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                                 [&] { return impl_->unfinished == 0; });
}

void Engine::Stop() {
  std::lock_guard stop_lock(impl_->stop_mu);
  {
    std::lock_guard lock(impl_->mu);
    impl_->draining = impl_->stopping = true;
  }
  impl_->mail_cv.notify_all();
  if (impl_->thread.joinable()) impl_->thread.join();
}

}  // namespace tidepool

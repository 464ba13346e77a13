#include "server/bench/load_runner.h"

#include <sys/resource.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <iterator>
#include <mutex>
#include <queue>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "base/clock.h"
#include "server/bench/answer_reader.h"

namespace tidepool {
namespace {

using Json = nlohmann::ordered_json;

constexpr absl::Duration kTick = absl::Milliseconds(200);

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// One conversation under way. Its turns are one after the other, so nothing here is touched by two.
struct Conversation {
  uint64_t number = 0;
  std::vector<Turn> turns;
  std::vector<ChatMessage> history;
};

// A turn that waits for its time.
struct Due {
  absl::Duration planned;
  uint64_t order = 0;  // of equal times: first come first served
  std::shared_ptr<Conversation> conversation;
  uint32_t turn = 0;
  bool unplanned = false;  // of a closed loop: due when its place is free

  bool operator>(const Due& other) const {
    return std::tie(planned, order) > std::tie(other.planned, other.order);
  }
};

uint32_t PlannedTokens(const Turn& turn) {
  uint32_t sum = 0;
  for (const PromptPiece& piece : turn.pieces) sum += piece.tokens;
  return sum;
}

}  // namespace

std::vector<ChatMessage> MessagesOf(const RequestShape& shape, const Turn& turn, bool first) {
  if (!turn.messages.empty()) return turn.messages;
  return {{"user", shape.prompts.Text(turn.pieces, first)}};
}

std::string RequestBody(const RequestShape& shape, const std::vector<ChatMessage>& history,
                        const Turn& turn) {
  Json body;
  body["model"] = shape.model;
  if (shape.prompts.ids() && !turn.pieces.empty()) {
    body["prompt"] = shape.prompts.Tokens(turn.pieces);
  } else {
    std::vector<ChatMessage> messages = history;
    for (ChatMessage& message : MessagesOf(shape, turn, history.empty()))
      messages.push_back(std::move(message));
    if (shape.chat) {
      Json list = Json::array();
      for (ChatMessage& m : messages) {
        list.push_back({{"role", std::move(m.role)}, {"content", std::move(m.content)}});
      }
      body["messages"] = std::move(list);
    } else {
      std::string prompt;
      for (const ChatMessage& m : messages) {
        if (!prompt.empty()) prompt += '\n';
        prompt += m.content;
      }
      body["prompt"] = std::move(prompt);
    }
  }
  body["max_tokens"] = turn.output_tokens;
  if (shape.temperature) body["temperature"] = *shape.temperature;
  if (shape.ignore_eos) body["ignore_eos"] = true;
  body["stream"] = true;
  body["stream_options"] = {{"include_usage", true}};
  if (shape.return_trace) body["return_trace"] = true;
  body.update(shape.extra);
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// One Run. The dispatcher is the caller's thread; answers come in on the client's.
class LoadRunner::Run_ {
 public:
  Run_(HttpClient& client, const RequestShape& shape, SessionSource& source, const LoadOptions& options)
      : client_(client),
        shape_(shape),
        source_(source),
        options_(options),
        arrivals_(options.arrivals, Mix64(options.seed)),
        closed_(options.arrivals.rate <= 0) {
    free_since_.assign(options.concurrency_max, absl::ZeroDuration());
  }

  LoadResult Go(const std::function<void(const LoadProgress&)>& progress, const std::atomic<bool>& stop);

 private:
  class Handler;

  absl::Duration Now() const { return Clock::Real().Now() - start_; }
  bool HasPlace() const { return options_.concurrency_max == 0 || !free_since_.empty(); }
  // Under the cap: in an open loop each request takes a place, in a closed one each conversation.
  bool TakesPlace(const Due& due) const {
    return options_.concurrency_max > 0 && (!closed_ || due.turn == 0);
  }
  // The following hold mu_.
  void Refill();
  // When the next turn is due that has a place; nullopt: there is none.
  std::optional<absl::Duration> NextDue() const;
  bool Take(absl::Duration now, Due& due, absl::Duration& released);
  void GiveUp();
  LoadProgress Progress() const;

  void Dispatch(Due due, absl::Duration released);
  void Finished(Handler& handler);

  HttpClient& client_;
  const RequestShape& shape_;
  SessionSource& source_;
  const LoadOptions options_;
  Arrivals arrivals_;
  const bool closed_;
  absl::Time start_;

  std::mutex mu_;
  std::condition_variable changed_;
  std::optional<Due> next_session_;                                   // the first that has not begun
  bool exhausted_ = false;                                            // the source, or a limit reached
  std::priority_queue<Due, std::vector<Due>, std::greater<>> turns_;  // later turns of conversations
  std::deque<absl::Duration> free_since_;                             // of each free place under the cap
  uint64_t order_ = 0, sessions_ = 0, sent_ = 0, done_ = 0, failed_ = 0, output_tokens_ = 0;
  std::vector<RequestRecord> records_;
  absl::flat_hash_map<uint64_t, std::weak_ptr<HttpClient::InFlight>> in_flight_;
};

class LoadRunner::Run_::Handler final : public HttpReplyHandler {
 public:
  Handler(Run_& run, Due due, RequestRecord planned)
      : record(std::move(planned)),
        due(std::move(due)),
        run_(run),
        reader_(record, run.start_, run.shape_.keep_text || this->due.conversation->turns.size() > 1) {}

  void OnSending(absl::Time at) override { record.sent = at - run_.start_; }
  void OnHead(int status, HttpHeaders headers, absl::Time) override { reader_.Head(status, headers); }
  void OnBody(std::string_view bytes, absl::Time at) override { reader_.Bytes(bytes, at); }
  void OnDone(absl::Status status, absl::Time at) override {
    reader_.End(status, at);
    run_.Finished(*this);
  }

  RequestRecord record;
  const Due due;

 private:
  Run_& run_;
  AnswerReader reader_;
};

void LoadRunner::Run_::Refill() {
  if (next_session_ || exhausted_) return;
  auto session = source_.Next();
  if (!session || session->turns.empty()) {
    exhausted_ = true;
    return;
  }
  Due due;
  due.order = order_++;
  due.conversation = std::make_shared<Conversation>();
  due.conversation->number = sessions_++;
  due.conversation->turns = std::move(session->turns);
  if (session->start) {
    due.planned = *session->start;
  } else if (closed_) {
    due.unplanned = true;
  } else {
    due.planned = arrivals_.Next();
  }
  if (due.planned > options_.duration) {
    exhausted_ = true;
    return;
  }
  next_session_ = std::move(due);
}

std::optional<absl::Duration> LoadRunner::Run_::NextDue() const {
  std::optional<absl::Duration> due;
  if (next_session_ && HasPlace()) due = next_session_->planned;
  if (!turns_.empty() && (closed_ || HasPlace()) && (!due || turns_.top().planned < *due)) {
    due = turns_.top().planned;
  }
  return due;
}

bool LoadRunner::Run_::Take(absl::Duration now, Due& due, absl::Duration& released) {
  const auto at = NextDue();
  if (!at || *at > now) return false;
  if (!turns_.empty() && turns_.top().planned == *at) {
    due = turns_.top();
    turns_.pop();
  } else {
    due = *std::exchange(next_session_, std::nullopt);
  }
  released = due.planned;
  if (TakesPlace(due)) {
    released = std::max(released, free_since_.front());
    free_since_.pop_front();
  }
  // A closed loop plans nothing: a request's time is when its place was free.
  if (due.unplanned) due.planned = released;
  return true;
}

void LoadRunner::Run_::GiveUp() {
  exhausted_ = true;
  next_session_.reset();
  turns_ = {};
}

LoadProgress LoadRunner::Run_::Progress() const {
  return {.elapsed = Now(),
          .planned_max = options_.requests_max,
          .sent = sent_,
          .done = done_,
          .failed = failed_,
          .output_tokens = output_tokens_};
}

void LoadRunner::Run_::Dispatch(Due due, absl::Duration released) {
  Conversation& conversation = *due.conversation;
  const Turn& turn = conversation.turns[due.turn];
  OutboundCall call;
  call.url = shape_.url;
  call.method = "POST";
  call.target = shape_.target;
  call.headers = shape_.headers;
  call.headers.emplace_back("Content-Type", "application/json");
  call.headers.emplace_back("Accept", "text/event-stream");
  call.timeout = shape_.timeout;
  call.body = RequestBody(shape_, conversation.history, turn);

  RequestRecord record;
  record.index = sent_;
  record.session = conversation.number;
  record.turn = due.turn;
  record.planned = due.planned;
  record.released = released;
  record.input_tokens = PlannedTokens(turn);
  record.dispatched = Now();
  const uint64_t index = record.index;
  auto handler = std::make_shared<Handler>(*this, std::move(due), std::move(record));
  std::lock_guard lock(mu_);
  ++sent_;
  in_flight_[index] = client_.Send(std::move(call), std::move(handler));
}

void LoadRunner::Run_::Finished(Handler& handler) {
  std::lock_guard lock(mu_);
  RequestRecord& record = handler.record;
  ++done_;
  failed_ += !record.ok();
  output_tokens_ += record.ok() ? record.output_tokens : 0;
  in_flight_.erase(record.index);
  const auto& conversation = handler.due.conversation;
  const uint32_t next = handler.due.turn + 1;
  const bool more = record.ok() && next < conversation->turns.size();
  const absl::Duration planned = more ? record.end + conversation->turns[next].think : absl::ZeroDuration();
  const bool goes_on = more && planned <= options_.duration;
  if (options_.concurrency_max > 0 && !(closed_ && goes_on)) free_since_.push_back(record.end);
  if (goes_on) {
    auto& history = conversation->history;
    auto said = MessagesOf(shape_, conversation->turns[next - 1], history.empty());
    std::move(said.begin(), said.end(), std::back_inserter(history));
    history.push_back({"assistant", record.text});
    Due due{.planned = planned, .order = order_++, .conversation = conversation, .turn = next};
    turns_.push(std::move(due));
  }
  if (!shape_.keep_text) std::string().swap(record.text);
  const uint64_t index = record.index;
  if (records_.size() <= index) records_.resize(index + 1);
  records_[index] = std::move(record);
  // Under the lock: the run may be gone as soon as the last answer is counted.
  changed_.notify_all();
}

LoadResult LoadRunner::Run_::Go(const std::function<void(const LoadProgress&)>& progress,
                                const std::atomic<bool>& stop) {
  LoadResult result;
  client_.TakeLag();
  const double cpu = CpuSeconds();
  start_ = Clock::Real().Now();
  absl::Duration next_tick = kTick;
  std::unique_lock lock(mu_);
  while (true) {
    if (stop && !result.stopped) {
      result.stopped = true;
      GiveUp();
      for (const auto& [unused, weak] : in_flight_) {
        if (auto call = weak.lock()) call->Cancel();
      }
    }
    const absl::Duration now = Now();
    if (sent_ >= options_.requests_max || (closed_ && now >= options_.duration)) GiveUp();
    Refill();
    const auto at = NextDue();
    if (exhausted_ && !next_session_ && turns_.empty() && done_ == sent_) break;
    Due due;
    absl::Duration released;
    if (Take(now, due, released)) {
      lock.unlock();
      Dispatch(std::move(due), released);
      lock.lock();
    } else {
      // Without a place an answer's end wakes us.
      const absl::Duration until = at ? std::min(next_tick, *at) : next_tick;
      changed_.wait_for(lock, absl::ToChronoNanoseconds(std::max(until - now, absl::ZeroDuration())));
    }
    if (Now() >= next_tick) {
      next_tick = Now() + kTick;
      const LoadProgress seen = Progress();
      lock.unlock();
      if (progress) progress(seen);
      lock.lock();
    }
  }
  const LoadProgress last = Progress();
  lock.unlock();
  if (progress) progress(last);
  result.records = std::move(records_);
  const HttpClient::Lag lag = client_.TakeLag();
  result.health = {
      .cpu_seconds = CpuSeconds() - cpu, .loop_lag_ms_max = lag.ms_max, .loop_lag_ms_mean = lag.ms_mean};
  return result;
}

LoadResult LoadRunner::Run(SessionSource& source, const LoadOptions& options,
                           const std::function<void(const LoadProgress&)>& progress,
                           const std::atomic<bool>& stop) {
  return Run_(client_, shape_, source, options).Go(progress, stop);
}

}  // namespace tidepool

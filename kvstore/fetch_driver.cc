#include "kvstore/fetch_driver.h"

#include "base/log.h"
#include "kvstore/fetch_codec.h"

namespace tidepool {
namespace {

// So many frames that do not decode end their connection.
constexpr int kMaxMalformed = 16;

}  // namespace

void FetchDriver::Do(ClientConnect& a) {
  auto endpoint = transport().Connect(a.address);
  if (!endpoint.ok()) {
    spdlog::warn("kv peer cannot be connected to: {}", std::string(endpoint.status().message()));
    later.push_back([this, lane = a.lane, why = endpoint.status()] {
      Run(client.Step(ClientLaneDown{lane, why}, Now()));
    });
    return;
  }
  endpoint_of[a.lane] = *endpoint;
  lane_of[*endpoint] = a.lane;
}

void FetchDriver::Do(ClientSend& a) {
  auto it = endpoint_of.find(a.lane);
  if (it == endpoint_of.end()) return;  // its LaneDown is on the way
  if (absl::Status s = transport().Send(it->second, a.frame); !s.ok()) {
    later.push_back([this, lane = a.lane, s] { Run(client.Step(ClientLaneDown{lane, s}, Now())); });
  }
}

void FetchDriver::Do(ClientClose& a) {
  auto quiesced = [this, lane = a.lane] {
    if (auto it = endpoint_of.find(lane); it != endpoint_of.end()) {
      lane_of.erase(it->second);
      malformed.erase(it->second);
      endpoint_of.erase(it);
    }
    Run(client.Step(ClientLaneQuiesced{lane}, Now()));
  };
  auto it = endpoint_of.find(a.lane);
  if (it == endpoint_of.end()) {
    later.push_back(quiesced);
  } else {
    transport().Close(it->second, quiesced);
  }
}

void FetchDriver::Do(ClientFinish& a) {
  a.result.transport = transport().Name();
  if (a.result.status.ok()) {
    probe.duration.Observe(absl::ToDoubleSeconds(a.result.elapsed));
    probe.bytes_in.Add(a.result.bytes);
  } else {
    spdlog::debug("fetch ended: {}", a.result.status.ToString());
  }
  auto it = callbacks.find(a.handle);
  std::function<void(FetchResult)> done = std::move(it->second);
  callbacks.erase(it);
  fetches_out.fetch_sub(1);
  done(std::move(a.result));
}

void FetchDriver::Do(ServerSend& a) {
  if (absl::Status s = transport().Send(a.lane, a.frame); !s.ok()) {
    later.push_back([this, lane = a.lane] { Run(server.Step(ServerLaneDown{lane}, Now())); });
  }
}

void FetchDriver::Do(ServerSendBulk& a) {
  auto done = [this, send = a.send](absl::Status s) { Run(server.Step(ServerSendDone{send, s}, Now())); };
  if (absl::Status s = transport().SendBulk(a.lane, a.header, a.payload, done); !s.ok()) {
    later.push_back([done, s] { done(s); });
  }
}

void FetchDriver::Do(ServerClose& a) {
  transport().Close(a.lane, [this, lane = a.lane] {
    malformed.erase(lane);
    Run(server.Step(ServerLaneQuiesced{lane}, Now()));
  });
}

void FetchDriver::Do(ServerLoad& a) {
  auto slot = std::make_shared<BlockLease>(std::move(a.slot));
  auto done = [box = mailbox, slot, load = a.load](absl::StatusOr<BlockTier::Record> record) {
    box->Put(ServerLoaded{load, std::move(*slot), std::move(record)});
  };
  reads[a.load] = options.disk->Read(a.key, {}, slot->data(), a.timeout, std::move(done));
}

void FetchDriver::Do(ServerCancelLoad& a) {
  if (auto it = reads.find(a.load); it != reads.end()) options.disk->CancelRead(it->second);
}

int FetchDriver::DrainLoads() {
  std::vector<ServerLoaded> answers;
  {
    std::lock_guard lock(mailbox->mu);
    answers.swap(mailbox->answers);
  }
  for (ServerLoaded& loaded : answers) {
    reads.erase(loaded.load);
    Run(server.Step(std::move(loaded), Now()));
  }
  return static_cast<int>(answers.size());
}

int FetchDriver::DrainCoder() {
  if (coder == nullptr) return 0;
  std::vector<FetchCoder::Result> results = coder->TakeResults();
  for (FetchCoder::Result& result : results) {
    if (auto* encoded = std::get_if<ServerEncoded>(&result)) {
      Run(server.Step(std::move(*encoded), Now()));
    } else {
      Run(client.Step(std::move(std::get<ClientDecoded>(result)), Now()));
    }
  }
  return static_cast<int>(results.size());
}

void FetchDriver::CloseMailbox() {
  coder.reset();
  std::lock_guard lock(mailbox->mu);
  mailbox->transport = nullptr;
  mailbox->answers.clear();
}

void FetchDriver::Do(ServerLeaseExpired& a) {
  spdlog::warn("{} kv blocks held for peers were given up: their lease ran out", a.blocks);
  probe.leases_expired.Add(a.blocks);
}

void FetchDriver::OnMessage(EndpointId from, std::string_view message) {
  auto frame = DecodeFetchFrame(message);
  auto it = lane_of.find(from);
  if (!frame.ok()) return OnMalformed(from, frame.status());
  if (it != lane_of.end()) {
    Run(client.Step(ClientMessage{it->second, std::move(*frame)}, Now()));
  } else {
    Run(server.Step(ServerMessage{from, std::move(*frame)}, Now()));
  }
}

BulkSink FetchDriver::OnBulk(EndpointId from, std::string_view header, size_t length) {
  auto frame = DecodeFetchFrame(header);
  auto it = lane_of.find(from);
  if (!frame.ok() || it == lane_of.end()) {
    OnMalformed(from, frame.ok() ? absl::InvalidArgumentError("DATA that nobody asked for") : frame.status());
    return {};
  }
  ClientActions actions;
  const BulkVerdict verdict = client.StepBulk(it->second, *frame, length, Now(), actions);
  // The transport is in the middle of its own work: what is to be sent waits.
  for (ClientAction& action : actions) {
    if (auto* count = std::get_if<ClientCount>(&action)) {
      Do(*count);
    } else {
      later.push_back([this, a = std::move(std::get<ClientSend>(action))]() mutable { Do(a); });
    }
  }
  if (verdict.dst.empty()) return {};
  return BulkSink{verdict.dst,
                  [this, receive = verdict.receive](absl::Status s) {
                    Run(client.Step(ClientBulkDone{receive, std::move(s)}, Now()));
                  },
                  verdict.digest};
}

void FetchDriver::OnMalformed(EndpointId from, const absl::Status& why) {
  probe.Count(FetchReason::kMalformed);
  if (Now() >= next_malformed_warning) {
    next_malformed_warning = Now() + absl::Seconds(1);
    spdlog::warn("kv frame dropped: {}", std::string(why.message()));
  }
  if (++malformed[from] != kMaxMalformed) return;
  // The transport is in the middle of its own work.
  later.push_back([this, from] {
    if (!malformed.contains(from)) return;  // gone meanwhile
    OnEndpointDown(from, absl::UnavailableError("the peer sends frames that do not decode"));
  });
}

void FetchDriver::OnEndpointDown(EndpointId endpoint, absl::Status why) {
  if (auto it = lane_of.find(endpoint); it != lane_of.end()) {
    Run(client.Step(ClientLaneDown{it->second, std::move(why)}, Now()));
  } else {
    Run(server.Step(ServerLaneDown{endpoint}, Now()));
  }
}

void FetchDriver::Take(FetchSubmission& s) {
  const uint64_t handle = next_handle++;
  callbacks[handle] = std::move(s.done);
  Run(client.Step(ClientStart{handle, std::move(s.spec)}, Now()));
}

int FetchDriver::DrainSubmissions() {
  int taken = 0;
  while (std::optional<Submission> s = queue.TryPop()) {
    std::visit([&](auto& what) { Take(what); }, *s);
    ++taken;
  }
  return taken;
}

void FetchDriver::Tick(absl::Time now) {
  if (now >= client.next_timer()) Run(client.Step(ClientTick{}, now));
  if (now >= server.next_timer()) Run(server.Step(ServerTick{}, now));
}

void FetchDriver::Publish() {
  fetches_in.store(server.active());
  probe.held_blocks.Set(static_cast<double>(server.held_blocks() + offer_table->size()));
}

int FetchDriver::DrainLater() {
  int taken = 0;
  for (; !later.empty(); ++taken) {
    auto event = std::move(later.front());
    later.pop_front();
    event();
  }
  return taken;
}

int FetchDriver::Poll() {
  int events = transport().Progress();
  events += DrainSubmissions();
  if (offers_moved.exchange(false)) Run(server.Step(ServerOffersMoved{}, Now()));
  events += DrainLoads();
  events += DrainCoder();
  events += DrainLater();
  // After Progress: what has completed in time is not judged late.
  Tick(Now());
  return events + DrainLater();
}

void FetchDriver::BeginShutdown() {
  queue.Close();
  DrainSubmissions();
  Run(client.Step(ClientShutdown{}, Now()));
  Run(server.Step(ServerShutdown{}, Now()));
  // Nobody wants what it has to do any more, and fetches end only when nothing writes to their slots.
  if (coder != nullptr) coder->Cancel();
}

void FetchDriver::ForceShutdown() {
  if (coder != nullptr) coder->Stop();
  DrainCoder();
  if (client.active() + server.active() > 0) {
    const absl::Time late = Now() + 2 * options.timings.close_grace;
    Run(client.Step(ClientTick{}, late));
    Run(server.Step(ServerTick{}, late));
  }
  Publish();
}

}  // namespace tidepool

#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "server/http/exchange.h"
#include "server/http/request_reader.h"
#include "server/http/router.h"

namespace tidepool {

class HttpConnection;

// What the connections of one server share. Outlives the server where a connection does.
struct HttpShared {
  boost::asio::io_context io;
  HttpLimits limits;
  Router router;
  HttpUploads uploads;
  HttpFilter filter;
  HttpBodyWanted body_wanted;
  std::function<void(int, std::string_view, const std::string&)> on_refusal;
  std::atomic<bool> draining{false};
  std::atomic<uint64_t> protocol_errors{0};
  std::atomic<uint64_t> connections_refused{0};
  std::atomic<uint64_t> tls_failures{0};

  std::mutex mu;
  std::condition_variable changed;                 // a connection or a request ended
  size_t inflight = 0;                             // guarded by mu
  std::shared_ptr<boost::asio::ssl::context> tls;  // guarded by mu; null: plain TCP
  absl::flat_hash_map<HttpConnection*, std::weak_ptr<HttpConnection>> connections;  // guarded by mu

  void RequestBegan();
  void RequestEnded();
};

// HttpConnection: one client's socket. All its state lives on its strand; it keeps itself alive through the
// operations in flight and is gone when the last of them ended. There is always at most one read and one
// write.
class HttpConnection : public std::enable_shared_from_this<HttpConnection> {
 public:
  using Strand = boost::asio::strand<boost::asio::io_context::executor_type>;
  using Socket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, Strand>;

  // `tls`: null for plain TCP.
  HttpConnection(std::shared_ptr<HttpShared> shared, Socket socket,
                 std::shared_ptr<boost::asio::ssl::context> tls);

  // From any thread.
  void Start();
  // Instead of Start, for a connection over the limit: 503 and close. It is in no registry and counts
  // nowhere.
  void RefuseConnection();
  // Closes when idle, otherwise after the answer in flight.
  void Drain();
  // Cuts now; the answer in flight learns `reason`.
  void Cut(DisconnectReason reason);

 private:
  enum class State { kHandshake, kHeader, kBody, kResponding, kLingering, kClosed };
  using TlsStream = boost::asio::ssl::stream<Socket&>;
  using Timer =
      boost::asio::basic_waitable_timer<std::chrono::steady_clock,
                                        boost::asio::wait_traits<std::chrono::steady_clock>, Strand>;

  void Handshake();
  void OnHandshake(boost::system::error_code ec);
  void NextRequest();
  void Read();
  void OnRead(boost::system::error_code ec, size_t bytes);
  void Parse();
  void Dispatch();
  void Route(HttpRequest request, bool bad_path, std::shared_ptr<ResponseWriter> writer);
  void Refuse(const HttpErrorKind& kind, std::string_view message);
  std::string Peer() const;
  void Flush();
  bool NextBytes();
  bool WriteNow();
  void WriteSoon();
  void OnWrite(boost::system::error_code ec, size_t bytes);
  void Wrote(size_t bytes);
  void ResponseDone();
  void Linger();
  void Close(DisconnectReason reason);
  void ArmReadTimer(absl::Duration after);
  void OnReadTimeout();

  const std::shared_ptr<HttpShared> shared_;
  Socket socket_;
  const std::shared_ptr<boost::asio::ssl::context> tls_context_;
  std::optional<TlsStream> tls_;  // over socket_; empty: plain TCP
  Timer read_timer_, write_timer_;
  uint64_t read_timer_epoch_ = 0, write_timer_epoch_ = 0;

  State state_ = State::kHeader;
  RequestReader reader_;
  bool reading_ = false;
  size_t lingered_ = 0;
  size_t upload_progress_bytes_ = 0;

  std::shared_ptr<Exchange> exchange_;
  std::string own_out_;  // 100 Continue, and refusals
  bool close_after_own_ = false;
  std::string writing_;  // bytes on their way; empty: no write in flight
  size_t written_ = 0;
  bool write_timer_armed_ = false;
  size_t write_progress_bytes_ = 0;  // since it was armed
  bool writing_answer_ = false;
  bool answer_taken_ = false;  // all of the exchange's bytes are in writing_, or written
};

}  // namespace tidepool

#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <variant>
#include <vector>

#include "server/gateway/choice_group.h"
#include "server/gateway/embeddings.h"

namespace tidepool {

// EmbeddingGroup: the inputs of one embeddings request, each a sequence, as one answer (see
// RequestRunner::StartEmbeddings). The first goes ahead, by the door that all requests take: it is checked
// and counted there, and tokenises all inputs. Once it is placed the others follow, kSequences at a time. One
// that fails ends all. Kept alive by its sequences. Thread-safe.
class EmbeddingGroup final : public RequestRunner::Running,
                             public std::enable_shared_from_this<EmbeddingGroup> {
 public:
  static constexpr size_t kSequences = 16;

  struct Options {
    std::function<std::shared_ptr<ChoiceRun>(std::shared_ptr<OutputSink>)> make;
    std::function<std::variant<TokenLists, ApiError>(const EmbeddingRequest&)> prepare;  // in the pool
    EmbeddingsDone done;
  };
  EmbeddingGroup(EmbeddingRequest request, Options options);

  void Start();
  void Cancel(const ErrorKind& why) override;

 private:
  class Member;

  // What a sequence's sink hears.
  void OnAdmitted(size_t input);
  void OnVector(size_t input, std::vector<float> vector);
  void OnDone(size_t input, const Outcome& outcome);

  std::variant<PreparedPrompt, ApiError> Prepare();
  // Begins what may run now. Without the lock.
  void BeginMore();
  std::shared_ptr<ChoiceRun> Make(size_t input);

  const size_t inputs_;
  const Options options_;

  std::mutex mu_;
  EmbeddingRequest request_;  // its inputs go once they are tokenised
  TokenLists tokens_;
  std::vector<std::shared_ptr<ChoiceRun>> runs_;  // null before it begins and after it ended
  size_t next_ = 1;                               // the next to begin
  size_t open_ = 1;                               // begun and not ended
  bool admitted_ = false;                         // the first is
  std::optional<ErrorKind> cancelled_;
  bool done_ = false;
  EmbeddingsOutcome outcome_;
};

}  // namespace tidepool

// A checkpoint file: what Checkpoint::Open accepts has tensors that fit their shapes, lie inside the file and
// share no byte. An input that begins with '{' is also read as an index over two good shards.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <numeric>

#include "server/model/safetensors.h"
#include "tests/fuzz/fuzz_target.h"

namespace tidepool {
namespace {

// A folder of this process, in memory where the system has such a place.
class Folder {
 public:
  Folder() {
    std::error_code error;
    std::string path = std::filesystem::exists("/dev/shm", error) ? "/dev/shm/tidepool-fuzz-XXXXXX"
                                                                  : "/tmp/tidepool-fuzz-XXXXXX";
    TP_CHECK(mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  const std::string& path() const { return path_; }
  void Write(const std::string& name, std::string_view bytes) const {
    const std::string file = path_ + "/" + name;
    const int fd = open(file.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600);
    TP_CHECK(fd >= 0);
    TP_CHECK(write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
    close(fd);
  }
  void Remove(const std::string& name) const { unlink((path_ + "/" + name).c_str()); }

 private:
  std::string path_;
};

std::string Shard(const std::string& header, size_t data_bytes) {
  std::string out;
  for (int i = 0; i < 8; ++i) out.push_back(static_cast<char>(header.size() >> (8 * i)));
  return out + header + std::string(data_bytes, '\x3C');
}

void Use(const Checkpoint& checkpoint, size_t file_bytes) {
  size_t data_bytes = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    size_t elements = 1;
    for (const int64_t n : tensor.shape) {
      TP_CHECK(n >= 0);
      elements *= static_cast<size_t>(n);
    }
    // Whole elements, as many as the shape says.
    TP_CHECK(elements == 0 ? tensor.data.empty() : tensor.data.size() % elements == 0);
    if (const auto dtype = tensor.dtype(); dtype.ok()) {
      TP_CHECK(tensor.data.size() == elements * DTypeBytes(*dtype));
    }
    data_bytes += tensor.data.size();
    // Every byte can be read.
    volatile unsigned sum = 0;
    for (const std::byte b : tensor.data) sum = sum + std::to_integer<unsigned>(b);
    const auto found = checkpoint.Get(name, tensor.shape);
    TP_CHECK(found.ok() && *found == &tensor);
  }
  // Tensors that share bytes would add up to more than there is.
  TP_CHECK(data_bytes <= file_bytes);
}

void OpenAndUse(const Folder& folder, size_t file_bytes) {
  const auto checkpoint = Checkpoint::Open(folder.path());
  if (checkpoint.ok()) {
    Use(*checkpoint, file_bytes);
  } else {
    const auto message = checkpoint.status().message();
    TP_CHECK(!message.empty() && message.find('\n') == message.npos);
  }
}

}  // namespace

TIDEPOOL_FUZZ_TARGET(safetensors) {
  static const Folder single, sharded;
  static const size_t shard_bytes = [] {
    const std::string a = Shard(R"({"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}})", 8);
    const std::string b = Shard(R"({"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4);
    sharded.Write("a.safetensors", a);
    sharded.Write("b.safetensors", b);
    return a.size() + b.size();
  }();
  single.Write("model.safetensors", input);
  OpenAndUse(single, input.size());
  if (input.starts_with('{')) {
    sharded.Write("model.safetensors.index.json", input);
    OpenAndUse(sharded, shard_bytes);
  }
}

}  // namespace tidepool

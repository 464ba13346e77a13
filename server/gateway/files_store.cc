#include "server/gateway/files_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/small_file.h"
#include "base/status.h"
#include "server/gateway/field_reader.h"

namespace tidepool {
namespace {

constexpr uint64_t kMetadataBytesMax = 64 << 10;
constexpr size_t kFilenameCharsMax = 1024;
constexpr size_t kTenantCharsMax = 1024;
constexpr std::string_view kPrefix = "file-", kData = ".data", kMetadata = ".json";

absl::Status NoSuchFile(std::string_view id) {
  return absl::NotFoundError(absl::StrCat("No such File object: ", std::string(id.substr(0, 64))));
}

// Ours alone: what is in there belongs to tenants.
absl::Status MakeDirectory(const std::string& dir) {
  if (::mkdir(dir.c_str(), 0700) != 0 && errno != EEXIST) return ErrnoStatus(dir, errno);
  struct stat st {};
  if (::lstat(dir.c_str(), &st) != 0) return ErrnoStatus(dir, errno);
  if (!S_ISDIR(st.st_mode) || st.st_uid != ::geteuid() || (st.st_mode & 077) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(dir, ": must be a directory of this user with mode 0700"));
  }
  return absl::OkStatus();
}

absl::Status MakeParents(const std::string& dir) {
  std::error_code error;
  const auto parent = std::filesystem::path(dir).parent_path();
  if (parent.empty() || std::filesystem::exists(parent, error)) return absl::OkStatus();
  const mode_t before = ::umask(077);  // at start, before there are other threads that make files
  std::filesystem::create_directories(parent, error);
  ::umask(before);
  if (error) return absl::FailedPreconditionError(absl::StrCat(parent.string(), ": ", error.message()));
  return absl::OkStatus();
}

std::string MetadataOf(const StoredFile& file) {
  OrderedJson json;
  json["id"] = file.id;
  json["filename"] = file.filename;
  json["purpose"] = file.purpose;
  json["bytes"] = file.bytes;
  json["created_at"] = file.created_at;
  json["expires_at"] = file.expires_at;
  return DumpJson(json) + "\n";
}

absl::StatusOr<StoredFile> ReadMetadata(const std::string& path) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, kMetadataBytesMax));
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  if (!json.is_object()) return absl::DataLossError("is no object");
  const FieldReader fields(json);
  StoredFile file;
  TP_ASSIGN_OR_RETURN(const auto id, fields.String("id", 64));
  TP_ASSIGN_OR_RETURN(const auto filename, fields.String("filename", kFilenameCharsMax));
  TP_ASSIGN_OR_RETURN(const auto purpose, fields.String("purpose", 64));
  TP_ASSIGN_OR_RETURN(const auto bytes, fields.Int("bytes", 0, INT64_MAX));
  TP_ASSIGN_OR_RETURN(const auto created, fields.Int("created_at", 0, INT64_MAX));
  TP_ASSIGN_OR_RETURN(const auto expires, fields.Int("expires_at", 0, INT64_MAX));
  if (!id || !bytes || !created || !expires) return absl::DataLossError("lacks a field");
  return StoredFile{
      *id, filename.value_or(""), purpose.value_or(""), static_cast<uint64_t>(*bytes), *created, *expires};
}

void Remove(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) spdlog::error("{}: {}", path, std::strerror(errno));
}

}  // namespace

absl::StatusOr<std::unique_ptr<FilesStore>> FilesStore::Open(const std::string& dir,
                                                             const FileLimits& limits) {
  TP_RETURN_IF_ERROR(MakeParents(dir));
  TP_RETURN_IF_ERROR(MakeDirectory(dir));
  const std::string lock_path = dir + "/lock";
  FileHandle lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.valid()) return ErrnoStatus(lock_path, errno);
  if (::flock(lock.fd(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(dir, ": another gateway is using it"));
  }
  std::unique_ptr<FilesStore> store(new FilesStore(dir, limits, std::move(lock)));
  TP_RETURN_IF_ERROR(store->Load());
  return store;
}

FilesStore::FilesStore(std::string dir, FileLimits limits, FileHandle lock)
    : dir_(std::move(dir)), limits_(limits), lock_(std::move(lock)) {}

std::string FilesStore::DirOf(std::string_view tenant) const {
  const Sha256Digest digest = Sha256().Update(tenant).Finish();
  return absl::StrCat(dir_, "/", HexEncode(digest).substr(0, 32));
}

absl::Status FilesStore::Load() {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir_, error)) {
    if (!entry.is_directory(error)) continue;
    // One tenant's damage is no reason to serve none.
    if (const absl::Status status = LoadTenant(entry.path().string()); !status.ok()) {
      spdlog::error("{}: {}", entry.path().string(), std::string(status.message()));
    }
  }
  if (error) return absl::UnavailableError(absl::StrCat(dir_, ": ", error.message()));
  return absl::OkStatus();
}

absl::Status FilesStore::LoadTenant(const std::string& dir) {
  TP_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(dir + "/tenant.json", kMetadataBytesMax));
  TP_ASSIGN_OR_RETURN(const OrderedJson json, ParseJson(text));
  if (!json.is_object()) return absl::DataLossError("tenant.json is no object");
  TP_ASSIGN_OR_RETURN(const auto name, FieldReader(json).String("tenant", kTenantCharsMax));
  if (!name || DirOf(*name) != dir) return absl::DataLossError("tenant.json names another tenant");
  Tenant& tenant = tenants_[*name];
  tenant.dir = dir;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(dir, error)) {
    const std::string file_name = entry.path().filename().string();
    if (!file_name.starts_with(kPrefix) || !file_name.ends_with(kMetadata)) continue;
    auto file = ReadMetadata(entry.path().string());
    const std::string id = file_name.substr(0, file_name.size() - kMetadata.size());
    if (file.ok() && file->id != id) file = absl::DataLossError("names another file");
    if (!file.ok()) {
      spdlog::error("{}: {}", entry.path().string(), std::string(file.status().message()));
      continue;
    }
    tenant.bytes += file->bytes;
    tenant.files.emplace(id, Entry{*std::move(file), 0});
  }
  if (error) return absl::UnavailableError(error.message());
  return absl::OkStatus();
}

void FilesStore::RemoveOrphans(const std::set<std::string>& keep) {
  std::lock_guard lock(mu_);
  for (const auto& [name, tenant] : tenants_) {
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(tenant.dir, error)) {
      const std::string path = entry.path().string(), file = entry.path().filename().string();
      const bool half_written = file.ends_with(".new");
      // Where there is metadata that cannot be read, a person may still mend it.
      const bool data = file.starts_with(kPrefix) && file.ends_with(kData) &&
                        !std::filesystem::exists(
                            path.substr(0, path.size() - kData.size()) + std::string(kMetadata), error);
      if ((half_written || data) && !keep.contains(path)) Remove(path);
    }
  }
}

absl::StatusOr<std::string> FilesStore::TenantDirectory(const std::string& tenant) {
  const auto made = [&] {
    std::lock_guard lock(mu_);
    const auto it = tenants_.find(tenant);
    return it == tenants_.end() ? "" : it->second.dir;
  };
  if (std::string dir = made(); !dir.empty()) return dir;
  std::lock_guard making(directories_mu_);
  if (std::string dir = made(); !dir.empty()) return dir;
  const std::string dir = DirOf(tenant);
  TP_RETURN_IF_ERROR(MakeDirectory(dir));
  TP_RETURN_IF_ERROR(
      WriteFileAtomically(dir + "/tenant.json", DumpJson(OrderedJson{{"tenant", tenant}}) + "\n"));
  TP_RETURN_IF_ERROR(SyncDirectoryOf(dir));
  std::lock_guard lock(mu_);
  tenants_[tenant].dir = dir;
  return dir;
}

std::vector<std::string> FilesStore::Tenants() const {
  std::lock_guard lock(mu_);
  std::vector<std::string> out;
  for (const auto& [name, tenant] : tenants_) {
    if (!tenant.dir.empty()) out.push_back(name);
  }
  return out;
}

uint64_t FilesStore::bytes() const {
  std::lock_guard lock(mu_);
  uint64_t bytes = 0;
  for (const auto& [name, tenant] : tenants_) bytes += tenant.bytes;
  return bytes;
}

uint64_t FilesStore::BytesOf(std::string_view tenant) const {
  std::lock_guard lock(mu_);
  const auto it = tenants_.find(tenant);
  return it == tenants_.end() ? 0 : it->second.bytes;
}

std::string FilesStore::NewId() { return absl::StrCat(std::string(kPrefix), RandomHexId()); }

absl::StatusOr<std::unique_ptr<FilesStore::Upload>> FilesStore::Begin(const std::string& tenant) {
  TP_ASSIGN_OR_RETURN(const std::string dir, TenantDirectory(tenant));
  {
    std::lock_guard lock(mu_);
    Tenant& entry = tenants_[tenant];
    if (entry.files.size() + entry.uploads >= limits_.tenant_files_max) {
      return absl::AbortedError(absl::StrCat("there are ", entry.files.size(), " files, and no more than ",
                                             limits_.tenant_files_max, " are kept; delete some"));
    }
    ++entry.uploads;
  }
  const std::string id = NewId(), path = absl::StrCat(dir, "/", id, std::string(kData));
  FileHandle file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  const int error = errno;
  auto upload = std::make_unique<Upload>(this, tenant, id, path, std::move(file));
  if (error != 0 && ::access(path.c_str(), F_OK) != 0) return ErrnoStatus("the file", error);
  return upload;
}

FilesStore::Upload::Upload(FilesStore* store, std::string tenant, std::string id, std::string path,
                           FileHandle file)
    : store_(store),
      tenant_(std::move(tenant)),
      id_(std::move(id)),
      path_(std::move(path)),
      file_(std::move(file)) {}

FilesStore::Upload::~Upload() {
  if (!committed_) Remove(path_);
  std::lock_guard lock(store_->mu_);
  Tenant& entry = store_->tenants_[tenant_];
  --entry.uploads;
  if (!committed_) entry.bytes -= bytes_;
}

absl::Status FilesStore::Reserve(const std::string& tenant, uint64_t have, uint64_t more) {
  if (have + more > limits_.file_bytes_max) {
    return absl::OutOfRangeError(
        absl::StrCat("the file is larger than ", limits_.file_bytes_max, " bytes; split it"));
  }
  Tenant& entry = tenants_[tenant];
  if (entry.bytes + more > limits_.tenant_bytes_max) {
    return absl::AbortedError(absl::StrCat("all files together would be more than ", limits_.tenant_bytes_max,
                                           " bytes; delete some"));
  }
  entry.bytes += more;
  return absl::OkStatus();
}

absl::Status FilesStore::Upload::Append(std::string_view bytes) {
  {
    std::lock_guard lock(store_->mu_);
    TP_RETURN_IF_ERROR(store_->Reserve(tenant_, bytes_, bytes.size()));
  }
  bytes_ += bytes.size();
  // Without our path: the message goes to the client.
  return WriteAll(file_.fd(), bytes, "the file");
}

absl::StatusOr<StoredFile> FilesStore::Upload::Commit(std::string filename, std::string purpose,
                                                      absl::Duration ttl) {
  if (::fsync(file_.fd()) != 0) return ErrnoStatus("the file", errno);
  const int64_t now = absl::ToUnixSeconds(absl::Now());
  StoredFile file{id_, std::move(filename), std::move(purpose), bytes_, now, now + absl::ToInt64Seconds(ttl)};
  TP_ASSIGN_OR_RETURN(StoredFile entered, store_->Enter(tenant_, std::move(file), true));
  committed_ = true;
  return entered;
}

absl::StatusOr<StoredFile> FilesStore::Enter(const std::string& tenant, StoredFile file, bool counted) {
  TP_ASSIGN_OR_RETURN(const std::string dir, TenantDirectory(tenant));
  TP_RETURN_IF_ERROR(
      WriteFileAtomically(absl::StrCat(dir, "/", file.id, std::string(kMetadata)), MetadataOf(file)));
  std::lock_guard lock(mu_);
  Tenant& entry = tenants_[tenant];
  if (!counted) entry.bytes += file.bytes;
  entry.files.insert_or_assign(file.id, Entry{file, 0});
  return file;
}

std::string FilesStore::PendingPath(const std::string& tenant, const std::string& id) const {
  return absl::StrCat(DirOf(tenant), "/", id, std::string(kData));
}

absl::StatusOr<StoredFile> FilesStore::Adopt(const std::string& tenant, const std::string& id,
                                             std::string filename, absl::Duration ttl) {
  {
    std::lock_guard lock(mu_);
    if (const Entry* entry = Find(tenant, id)) return entry->file;  // before a crash
  }
  std::error_code error;
  const uint64_t bytes = std::filesystem::file_size(PendingPath(tenant, id), error);
  if (error) return absl::NotFoundError(error.message());
  const int64_t now = absl::ToUnixSeconds(absl::Now());
  return Enter(tenant, {id, std::move(filename), "batch_output", bytes, now, now + absl::ToInt64Seconds(ttl)},
               false);
}

const FilesStore::Entry* FilesStore::Find(std::string_view tenant, std::string_view id) const {
  const auto owner = tenants_.find(tenant);
  if (owner == tenants_.end()) return nullptr;
  const auto it = owner->second.files.find(id);
  return it == owner->second.files.end() ? nullptr : &it->second;
}

FilesStore::Entry* FilesStore::Find(std::string_view tenant, std::string_view id) {
  return const_cast<Entry*>(std::as_const(*this).Find(tenant, id));
}

absl::StatusOr<StoredFile> FilesStore::Get(std::string_view tenant, std::string_view id) const {
  std::lock_guard lock(mu_);
  const Entry* entry = Find(tenant, id);
  if (entry == nullptr) return NoSuchFile(id);
  return entry->file;
}

absl::StatusOr<std::string> FilesStore::PathOf(std::string_view tenant, std::string_view id) const {
  std::lock_guard lock(mu_);
  const Entry* entry = Find(tenant, id);
  if (entry == nullptr) return NoSuchFile(id);
  return absl::StrCat(DirOf(tenant), "/", entry->file.id, std::string(kData));
}

absl::Status FilesStore::Delete(std::string_view tenant, std::string_view id) {
  std::string base;
  uint64_t bytes = 0;
  {
    std::lock_guard lock(mu_);
    Entry* entry = Find(tenant, id);
    if (entry == nullptr) return NoSuchFile(id);
    if (entry->pins > 0) {
      return absl::FailedPreconditionError("an unfinished batch reads the file; cancel the batch first");
    }
    Tenant& owner = tenants_.find(tenant)->second;
    base = absl::StrCat(owner.dir, "/", entry->file.id);
    bytes = entry->file.bytes;
    owner.files.erase(owner.files.find(id));
  }
  // The metadata first: data without it is no file, and is removed at the next start.
  Remove(absl::StrCat(base, std::string(kMetadata)));
  Remove(absl::StrCat(base, std::string(kData)));
  {
    std::lock_guard lock(mu_);
    tenants_.find(tenant)->second.bytes -= bytes;
  }
  return SyncDirectoryOf(base);
}

std::vector<StoredFile> FilesStore::List(std::string_view tenant) const {
  std::vector<StoredFile> out;
  {
    std::lock_guard lock(mu_);
    const auto owner = tenants_.find(tenant);
    if (owner == tenants_.end()) return out;
    for (const auto& [id, entry] : owner->second.files) out.push_back(entry.file);
  }
  std::ranges::sort(out, [](const StoredFile& a, const StoredFile& b) {
    return a.created_at != b.created_at ? a.created_at < b.created_at : a.id < b.id;
  });
  return out;
}

absl::Status FilesStore::Pin(std::string_view tenant, std::string_view id) {
  std::lock_guard lock(mu_);
  Entry* entry = Find(tenant, id);
  if (entry == nullptr) return NoSuchFile(id);
  ++entry->pins;
  return absl::OkStatus();
}

void FilesStore::Unpin(std::string_view tenant, std::string_view id) {
  std::lock_guard lock(mu_);
  Entry* entry = Find(tenant, id);
  if (entry != nullptr && entry->pins > 0) --entry->pins;
}

void FilesStore::Sweep(absl::Time now) {
  std::vector<std::pair<std::string, std::string>> expired;
  {
    std::lock_guard lock(mu_);
    for (const auto& [name, tenant] : tenants_) {
      for (const auto& [id, entry] : tenant.files) {
        if (entry.pins == 0 && entry.file.expires_at <= absl::ToUnixSeconds(now))
          expired.emplace_back(name, id);
      }
    }
  }
  for (const auto& [tenant, id] : expired) {
    if (const absl::Status status = Delete(tenant, id); !status.ok()) {
      spdlog::warn("{}: not removed: {}", id, std::string(status.message()));
    }
  }
}

}  // namespace tidepool

#include "kvstore/arena.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "base/shared_memory.h"

namespace tidepool {
namespace {

using testing::HasSubstr;

uint64_t CommittedBytes(int fd) {
  struct stat st = {};
  EXPECT_EQ(fstat(fd, &st), 0);
  return static_cast<uint64_t>(st.st_blocks) * 512;
}

TEST(SlotArena, SlotsDoNotOverlapAndKeepWhatIsWritten) {
  auto arena = SlotArena::Map(5000, 16);
  ASSERT_TRUE(arena.ok()) << arena.status();
  EXPECT_EQ(arena->stride(), 8192u);
  for (uint32_t i = 0; i < 16; ++i) std::memset(arena->slot(i).data(), static_cast<int>(i), 5000);
  for (uint32_t i = 0; i < 16; ++i) {
    EXPECT_EQ(arena->slot(i).front(), std::byte(i));
    EXPECT_EQ(arena->slot(i).back(), std::byte(i));
  }
}

TEST(SlotArena, UntouchedPagesCostNothing) {
  auto arena = SlotArena::Map(1 << 20, 1 << 14, {.huge_pages = "off"});  // 16 GiB
  ASSERT_TRUE(arena.ok()) << arena.status();
  ASSERT_GE(arena->fd(), 0);
  EXPECT_EQ(CommittedBytes(arena->fd()), 0u);
  arena->slot(7)[0] = std::byte(1);
  EXPECT_LE(CommittedBytes(arena->fd()), 2u << 20);
}

TEST(SlotArena, NobodyElseCanWriteOrShrinkIt) {
  auto arena = SlotArena::Map(4096, 4);
  ASSERT_TRUE(arena.ok()) << arena.status();
  ASSERT_GE(arena->fd(), 0);
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, arena->fd(), 0), MAP_FAILED);
  EXPECT_EQ(pwrite(arena->fd(), "x", 1, 0), -1);
  EXPECT_EQ(ftruncate(arena->fd(), 0), -1);
  EXPECT_EQ(ftruncate(arena->fd(), 1 << 20), -1);
  EXPECT_EQ(fallocate(arena->fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  void* read = mmap(nullptr, 4096, PROT_READ, MAP_SHARED, arena->fd(), 0);
  ASSERT_NE(read, MAP_FAILED);
  EXPECT_EQ(mprotect(read, 4096, PROT_READ | PROT_WRITE), -1);
  arena->slot(0)[0] = std::byte(42);
  EXPECT_EQ(*static_cast<std::byte*>(read), std::byte(42)) << "the owner still writes, and it is seen";
  munmap(read, 4096);
}

TEST(SlotArena, BadOptionsAreNamed) {
  EXPECT_THAT(SlotArena::Map(4096, 1, {.huge_pages = "yes"}).status().message(),
              HasSubstr("kv.huge_pages is 'yes'; it may be auto, on or off"));
  EXPECT_THAT(SlotArena::Map(4096, 1, {.numa_node = "near"}).status().message(),
              HasSubstr("kv.numa_node is 'near'; it may be auto, interleave or the number of a node"));
  EXPECT_THAT(SlotArena::Map(4096, 1, {.numa_node = "977"}).status().message(),
              HasSubstr("one of this machine's nodes"));
}

TEST(SlotArena, HugePagesThatAreNotReservedAreAnErrorOnlyIfTheyMustBe) {
  auto must = SlotArena::Map(1 << 30, 1 << 14, {.huge_pages = "on"});  // 16 TiB: nobody has so many
  EXPECT_TRUE(absl::IsResourceExhausted(must.status())) << must.status();
  EXPECT_THAT(must.status().message(), HasSubstr("nr_hugepages"));
  EXPECT_TRUE(SlotArena::Map(1 << 20, 4, {.huge_pages = "auto"}).ok());
}

TEST(SlotArena, EveryOptionGivesMemoryThatWorks) {
  for (const char* pages : {"auto", "off"}) {
    for (const char* node : {"auto", "interleave", "0"}) {
      auto arena = SlotArena::Map(4096, 8, {.huge_pages = pages, .numa_node = node, .lock_memory = true});
      ASSERT_TRUE(arena.ok()) << arena.status();
      std::memset(arena->slot(7).data(), 1, 4096);
    }
  }
}

TEST(SlotArena, IsPutOnHugePagesOnlyWhereTheyAreWantedAndFit) {
  const auto bytes = [](const char* pages, uint32_t slots) {
    auto arena = SlotArena::Map(1 << 20, slots, {.huge_pages = pages});
    EXPECT_TRUE(arena.ok()) << arena.status();
    return arena->for_huge_pages().size() + arena->reserved_huge_bytes();
  };
  EXPECT_EQ(bytes("off", 4), 0u);
  EXPECT_EQ(bytes("auto", 1), 0u) << "less than one of them";
  const auto auto_bytes = bytes("auto", 4);
  EXPECT_TRUE(auto_bytes == 0 || auto_bytes == 4u << 20) << "0: a kernel without";
}

TEST(SlotArena, WhatCannotBeMappedSaysWhatToLower) {
  const absl::Status s = SlotArena::Map(size_t{1} << 40, UINT32_MAX).status();
  EXPECT_TRUE(absl::IsResourceExhausted(s)) << s;
  EXPECT_THAT(s.message(), HasSubstr("lower kv.host_bytes"));
}

TEST(SharedMemory, IsOnlyOpenedWithItsSizeAndItsSeals) {
  auto sealed = SharedMemory::Create("test", 8192, /*peer_writes=*/false);
  ASSERT_TRUE(sealed.ok()) << sealed.status();
  EXPECT_TRUE(SharedMemory::Open(sealed->second.get(), 8192, false).ok());
  EXPECT_TRUE(absl::IsDataLoss(SharedMemory::Open(sealed->second.get(), 4096, false).status()));
  EXPECT_TRUE(absl::IsUnavailable(SharedMemory::Open(sealed->second.get(), 8192, true).status()));
  auto claims = SharedMemory::Create("test", 8192, /*peer_writes=*/true);
  ASSERT_TRUE(claims.ok()) << claims.status();
  EXPECT_TRUE(SharedMemory::Open(claims->second.get(), 8192, true).ok());
  EXPECT_TRUE(absl::IsDataLoss(SharedMemory::Open(claims->second.get(), 8192, false).status()))
      << "what others may write is none to be read as if it stood still";
  FileDescriptor plain(memfd_create("test", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(plain.get(), 8192), 0);
  EXPECT_TRUE(absl::IsDataLoss(SharedMemory::Open(plain.get(), 8192, false).status()))
      << "it could shrink under its reader";
}

}  // namespace
}  // namespace tidepool

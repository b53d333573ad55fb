#include "cpu/read_ahead.h"

#include <algorithm>
#include <cstdint>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace tipl {
namespace {

constexpr size_t kStep = 4 << 20;  // bytes that are read between two looks at what is wanted

#if defined(__linux__)
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, from Linux 5.14 on

uintptr_t page_size() { return sysconf(_SC_PAGESIZE); }

bool in_memory(void *begin, size_t bytes) {
  std::vector<unsigned char> pages(bytes / page_size());
  return mincore(begin, bytes, pages.data()) == 0 &&
         std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}
#else
uintptr_t page_size() { return 4096; }
#endif

char *page_of(const void *address) {
  return reinterpret_cast<char *>(reinterpret_cast<uintptr_t>(address) / page_size() * page_size());
}

size_t whole_pages(size_t bytes) { return (bytes + page_size() - 1) / page_size() * page_size(); }

}  // namespace

ReadAhead::ReadAhead(const void *begin, size_t bytes)
    : begin_(page_of(begin)), size_(whole_pages(static_cast<const char *>(begin) + bytes - begin_)) {
#if defined(__linux__)
  madvise(begin_, size_, MADV_SEQUENTIAL);  // large reads
  reader_->thread = std::thread([this] { read(); });
#endif
}

ReadAhead::~ReadAhead() {
  if (depth_ != fork_depth()) {
    static_cast<void>(reader_.release());
    return;
  }
  if (!reader_->thread.joinable()) return;
  {
    const std::lock_guard lock(reader_->mutex);
    reader_->stopped = true;
  }
  reader_->changed.notify_one();
  reader_->thread.join();
#if defined(__linux__)
  madvise(begin_, size_, MADV_NORMAL);
#endif
}

void ReadAhead::want(size_t bytes) {
  if (depth_ != fork_depth()) return;
  {
    const std::lock_guard lock(reader_->mutex);
    reader_->wanted = std::max(reader_->wanted, std::min(bytes, size_));
  }
  reader_->changed.notify_one();
}

void ReadAhead::read() {
#if defined(__linux__)
  for (size_t done = 0; done < size_;) {
    size_t end;
    {
      std::unique_lock lock(reader_->mutex);
      reader_->changed.wait(lock, [&] { return reader_->stopped || reader_->wanted > done; });
      if (reader_->stopped) return;
      end = std::min(done + kStep, reader_->wanted);
    }
    end = whole_pages(end);
    // Where this fails, on an old system or a truncated file, page faults of the workers read the pages.
    if (!in_memory(begin_ + done, end - done) && madvise(begin_ + done, end - done, kPopulateRead) != 0) return;
    done = end;
  }
#endif
}

}  // namespace tipl

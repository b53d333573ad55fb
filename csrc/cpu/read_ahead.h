// A memory-mapped file that is read from front to back: a thread of its own brings the pages in from disk while others
// work on those before. Page faults of the workers themselves would stop them, and read the file in small pieces: on
// the reference machine's disk 0.7 GB/s where this reads 3.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "call.h"

namespace tipl {

class ReadAhead {
 public:
  // The mapping must outlive this. Does nothing where the system cannot, and in a forked child.
  ReadAhead(const void *begin, size_t bytes);
  ~ReadAhead();
  ReadAhead(const ReadAhead &) = delete;
  ReadAhead &operator=(const ReadAhead &) = delete;

  // Asks for the mapping's first `bytes`, and returns at once.
  void want(size_t bytes);

 private:
  struct Reader {
    std::mutex mutex;
    std::condition_variable changed;
    size_t wanted = 0;
    bool stopped = false;
    std::thread thread;
  };

  void read();

  char *const begin_;  // of a page
  const size_t size_;  // whole pages
  const uint32_t depth_ = fork_depth();
  std::unique_ptr<Reader> reader_ = std::make_unique<Reader>();  // leaked in a forked child, where its thread is not
};

}  // namespace tipl

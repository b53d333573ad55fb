// Calls into the engine: one at a time on each object, and with a way to stop a long one.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

namespace tipl {

// The number of forks between the process that loaded the library and this one.
uint32_t fork_depth() noexcept;

// Throws std::bad_alloc where `count` numbers of `bytes` bytes exceed the machine's memory. An allocation alone would
// not show it: systems grant more memory than they have, and kill the process that uses it.
void check_memory(double count, size_t bytes);

// Throws std::bad_alloc: "an array needs 96 GB, and the device has 80".
[[noreturn]] void throw_too_large(double bytes_needed, double bytes_there, const char *owner);

// Marks whether a call is using an object, and which.
class InUse {
 public:
  enum class Holder { kNobody, kThisThread, kOtherThread, kBeforeFork };

  // Takes the object if it is free; returns who had it.
  Holder take() noexcept;
  // In a child that a signal handler forked meanwhile the object stays taken: a part of the work may be missing there.
  void leave() noexcept;

  // Holds the object for as long as this lives. Throws std::runtime_error where another call has it, "step: the decoder
  // is in use by another call": one of another thread, one of this thread that a signal handler has interrupted, or one
  // of a thread that does not exist any more since a fork.
  class Hold {
   public:
    Hold(InUse &object, const char *where, const char *what);
    ~Hold() { object_.leave(); }
    Hold(const Hold &) = delete;
    Hold &operator=(const Hold &) = delete;

   private:
    InUse &object_;
  };

 private:
  std::atomic<uint64_t> holder_{0};  // the fork depth and the number of the thread; 0 if free
};

// Throws std::runtime_error as InUse::Hold does, unless `holder` is nobody.
void check_free(InUse::Holder holder, const char *where, const char *what);

// Thrown to end a call that was told to stop.
struct Interrupted : std::exception {
  const char *what() const noexcept override { return "interrupted"; }
};

// Asks from time to time whether a long call should stop. The threads of one call share a Poll: rank 0, the thread that
// made the call, asks, and the others follow the answer.
class Poll {
 public:
  // The question, asked about every 20 ms on the thread that made the call. Once the answer is true it is not asked
  // again.
  using Stop = std::function<bool()>;

  explicit Poll(const Stop &stop) : stop_(stop) {}
  Poll(const Poll &) = delete;
  Poll &operator=(const Poll &) = delete;

  // Whether to stop. Costs about 20 ns.
  bool stopped(int rank);
  // Whether the answer was to stop, without asking again.
  bool was_stopped() const noexcept { return stopped_.load(std::memory_order_relaxed); }
  // Throws Interrupted if the call should stop.
  void operator()(int rank) {
    if (stopped(rank)) throw Interrupted();
  }

 private:
  const Stop &stop_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace tipl

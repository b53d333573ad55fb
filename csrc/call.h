// A call into the engine: alone on its object, and with a way out where it takes long.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>

namespace tipl {

// How many forks lie between the process that loaded the library and this one.
uint32_t fork_depth() noexcept;

// Throws std::bad_alloc where so many numbers of so many bytes are more than the machine's memory. An allocation alone
// does not tell: systems give out more than they have, and end the process that uses it.
void check_memory(double count, size_t bytes);

// Of one object: which call has it, if any.
class InUse {
 public:
  enum class Holder { kNobody, kThisThread, kOtherThread, kBeforeFork };

  // Takes it if nobody has it; returns who had.
  Holder take() noexcept;
  // In a child that was forked meanwhile, by a signal handler, it stays taken: half of the work may be missing there.
  void leave() noexcept;

  // Has the object as long as it lives. Throws std::runtime_error where another call has it, be it of another thread,
  // of this one that a signal handler has interrupted, or of a thread that a fork has left behind: "step: the decoder
  // is in use by another call".
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
  std::atomic<uint64_t> holder_{0};  // fork depth and number of the thread, or 0
};

// Throws std::runtime_error unless `holder` is nobody, as InUse::Hold does.
void check_free(InUse::Holder holder, const char *where, const char *what);

// What ends a call that was told to stop.
struct Interrupted : std::exception {
  const char *what() const noexcept override { return "interrupted"; }
};

// Asks now and then whether a long call is to stop. A loop on several threads shares one: rank 0, which is the thread
// that made the call, asks, and the others do as it was told.
class Poll {
 public:
  // Asked about every 20 ms, on the caller's thread. True from then on.
  using Stop = std::function<bool()>;

  explicit Poll(const Stop &stop) : stop_(stop) {}
  Poll(const Poll &) = delete;
  Poll &operator=(const Poll &) = delete;

  // Whether to stop. Costs some 20 ns.
  bool stopped(int rank);
  // Throws Interrupted where stopped.
  void operator()(int rank) {
    if (stopped(rank)) throw Interrupted();
  }

 private:
  const Stop &stop_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace tipl

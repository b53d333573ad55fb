#include "call.h"

#include <pthread.h>
#include <unistd.h>

#include <new>
#include <string>
#include <utility>

#include "check.h"

namespace tipl {
namespace {

struct TooLarge : std::bad_alloc {
  explicit TooLarge(std::string text) : text(std::move(text)) {}
  const char *what() const noexcept override { return text.c_str(); }
  const std::string text;
};

constexpr auto kPollInterval = std::chrono::milliseconds(20);

std::atomic<uint32_t> forks{0};

uint32_t thread_number() noexcept {
  static std::atomic<uint32_t> threads{0};
  thread_local const uint32_t number = threads.fetch_add(1) + 1;
  return number;
}

}  // namespace

uint32_t fork_depth() noexcept {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  static_cast<void>(registered);
  return forks.load(std::memory_order_relaxed);
}

void check_memory(double count, size_t bytes) {
  static const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  const double needed = count * static_cast<double>(bytes);
  if (needed > memory) throw_too_large(needed, memory, "this machine");
}

void throw_too_large(double bytes_needed, double bytes_there, const char *owner) {
  throw TooLarge(text("an array needs ", bytes_needed / 1e9, " GB, and ", owner, " has ", bytes_there / 1e9));
}

InUse::Holder InUse::take() noexcept {
  const uint64_t mine = uint64_t{fork_depth()} << 32 | thread_number();
  uint64_t holder = 0;
  if (holder_.compare_exchange_strong(holder, mine)) return Holder::kNobody;
  if (holder == mine) return Holder::kThisThread;
  return holder >> 32 == mine >> 32 ? Holder::kOtherThread : Holder::kBeforeFork;
}

void InUse::leave() noexcept {
  if (holder_.load() >> 32 == fork_depth()) holder_.store(0);
}

void check_free(InUse::Holder holder, const char *where, const char *what) {
  check_state(holder != InUse::Holder::kBeforeFork, where, ": ", what,
              " was in use when this process was forked, and is of no use in it");
  check_state(holder == InUse::Holder::kNobody, where, ": ", what, " is in use by another call");
}

InUse::Hold::Hold(InUse &object, const char *where, const char *what) : object_(object) {
  check_free(object.take(), where, what);
}

bool Poll::stopped(int rank) {
  if (rank != 0 || stopped_.load(std::memory_order_relaxed)) return stopped_.load(std::memory_order_relaxed);
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < kPollInterval) return false;
  last_ = now;
  if (!stop_()) return false;
  stopped_.store(true, std::memory_order_relaxed);
  return true;
}

}  // namespace tipl

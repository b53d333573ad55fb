// An owned array of floats, zeroed, on a cache-line boundary. Pages that are never written are never committed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>

namespace tipl {

class AlignedFloats {
 public:
  AlignedFloats() = default;
  // The product of `shape` in floats. Throws std::bad_alloc where it does not fit into memory.
  explicit AlignedFloats(std::initializer_list<ptrdiff_t> shape) {
    size_t bytes = sizeof(float);
    for (const ptrdiff_t extent : shape) {
      if (__builtin_mul_overflow(bytes, static_cast<size_t>(extent), &bytes)) throw std::bad_alloc();
    }
    if (bytes > PTRDIFF_MAX - kAlignment) throw std::bad_alloc();
    block_.reset(std::calloc(bytes + kAlignment, 1));
    if (!block_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(block_.get());
    data_ = reinterpret_cast<float *>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  float *data() noexcept { return data_; }
  const float *data() const noexcept { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(void *block) const noexcept { std::free(block); }
  };
  std::unique_ptr<void, Free> block_;
  float *data_ = nullptr;
};

}  // namespace tipl

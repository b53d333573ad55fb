// The structs of DLPack, by which libraries hand arrays to each other without a copy: the C ABI of its version 0.8,
// which all of them still write and read (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace tipl::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Device {
  int32_t type;
  int32_t index;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Type {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void *data;
  Device device;
  int32_t ndim;
  Type type;
  int64_t *shape;
  int64_t *strides;  // in elements; null where the array is C-contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void *owner;
  void (*deleter)(ManagedTensor *self);
};

}  // namespace tipl::dlpack

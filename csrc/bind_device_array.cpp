#include "bind_device_array.h"

#include <cstdint>
#include <numeric>
#include <string>
#include <utility>

#include "dlpack.h"

namespace tipl::cuda {
namespace {

constexpr char kCapsule[] = "dltensor";

std::string type_name(dlpack::Type type) {
  const char *kind = type.code == dlpack::kInt      ? "int"
                     : type.code == dlpack::kUInt   ? "uint"
                     : type.code == dlpack::kFloat  ? "float"
                     : type.code == dlpack::kBfloat ? "bfloat"
                                                    : "bits";
  return text(kind, int{type.bits});
}

// Where an object's memory is, by DLPack; nothing where it does not speak DLPack.
std::optional<dlpack::Device> device_of(const py::object &object) {
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) return std::nullopt;
  const auto pair = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  return dlpack::Device{pair.first, pair.second};
}

// What a capsule's owner frees: the shape beside the tensor, and the memory.
struct Exported {
  dlpack::ManagedTensor managed{};
  std::vector<int64_t> shape;
  DeviceArray array;
};

}  // namespace

DeviceArray::DeviceArray(std::vector<py::ssize_t> shape, int device) : shape_(std::move(shape)), device_(device) {
  double count = 1.0;
  for (const py::ssize_t extent : shape_) count *= static_cast<double>(extent);
  buffer_ = std::make_shared<Buffer<float>>(count);
}

py::ssize_t DeviceArray::size() const noexcept {
  return std::accumulate(shape_.begin(), shape_.end(), py::ssize_t{1}, std::multiplies<>());
}

py::array_t<float> DeviceArray::to_numpy() const {
  const OnDevice on(device_);
  py::array_t<float> array(shape_);
  if (size() > 0) {
    succeed(cudaMemcpy(array.mutable_data(), data(), size() * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  return array;
}

DeviceArray DeviceArray::from_numpy(const py::object &object, int device) {
  const auto array = py::array_t<float, py::array::c_style>::ensure(object);
  check(static_cast<bool>(array), "from_numpy: array must be a NumPy array of float32");
  const OnDevice on(device);
  DeviceArray copy(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()), device);
  if (copy.size() > 0) {
    succeed(cudaMemcpy(copy.data(), array.data(), copy.size() * sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  return copy;
}

py::capsule DeviceArray::to_dlpack() const {
  auto *exported = new Exported{{}, {shape_.begin(), shape_.end()}, *this};
  exported->managed.tensor = {data(),
                              {dlpack::kCuda, device_},
                              static_cast<int32_t>(shape_.size()),
                              {dlpack::kFloat, 32, 1},
                              exported->shape.data(),
                              nullptr,
                              0};
  exported->managed.owner = exported;
  exported->managed.deleter = [](dlpack::ManagedTensor *self) { delete static_cast<Exported *>(self->owner); };
  // Whoever takes the tensor over renames the capsule, and frees the tensor itself.
  return py::capsule(&exported->managed, kCapsule, [](PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, kCapsule)) return;
    auto *managed = static_cast<dlpack::ManagedTensor *>(PyCapsule_GetPointer(capsule, kCapsule));
    managed->deleter(managed);
  });
}

DeviceInput::DeviceInput(const char *where, const char *name, const py::object &object, std::initializer_list<Dim> dims,
                         int device, const Stream &stream) {
  py::object host = object;
  const std::optional<dlpack::Device> at = py::isinstance<py::array>(object) ? std::nullopt : device_of(object);
  if (at && (at->type == dlpack::kCpu || at->type == dlpack::kCudaHost)) {
    host = py::module_::import("numpy").attr("from_dlpack")(object);
  } else if (at) {
    check(at->type == dlpack::kCuda || at->type == dlpack::kCudaManaged, where, ": ", name, " must be on cuda:", device,
          " or in the host's memory, got device type ", at->type);
    check(at->type == dlpack::kCudaManaged || at->index == device, where, ": ", name, " must be on cuda:", device,
          ", got cuda:", at->index);
    const auto handle = reinterpret_cast<intptr_t>(static_cast<cudaStream_t>(stream));
    capsule_ = object.attr("__dlpack__")(py::arg("stream") = handle);
    auto *managed = static_cast<dlpack::ManagedTensor *>(PyCapsule_GetPointer(capsule_.ptr(), kCapsule));
    if (managed == nullptr) throw py::error_already_set();
    const dlpack::Tensor &tensor = managed->tensor;
    if (tensor.type.code != dlpack::kFloat || tensor.type.bits != 32 || tensor.type.lanes != 1) {
      throw py::type_error(text(where, ": ", name, " must be an array of float32, got ", type_name(tensor.type)));
    }
    shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
    check_shape(where, name, shape_, dims);
    py::ssize_t stride = 1;
    for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
      check(tensor.strides == nullptr || shape_[axis] == 1 || tensor.strides[axis] == stride, where, ": ", name,
            " must be C-contiguous and aligned");
      stride *= shape_[axis];
    }
    data_ = reinterpret_cast<const float *>(static_cast<const char *>(tensor.data) + tensor.byte_offset);
    check(reinterpret_cast<uintptr_t>(data_) % alignof(float) == 0, where, ": ", name,
          " must be C-contiguous and aligned");
    return;
  }
  const auto array = checked_array<float>(where, name, host, dims);
  shape_.assign(array.shape(), array.shape() + array.ndim());
  copy_.emplace(shape_, device);
  stream.copy(copy_->data(), array.data(), array.size(), cudaMemcpyHostToDevice);
  data_ = copy_->data();
}

DeviceInput::~DeviceInput() = default;

py::object DeviceInput::like(DeviceArray result) const {
  if (copy_) return result.to_numpy();
  return py::cast(std::move(result));
}

void bind_device_array(py::module_ &m) {
  py::class_<DeviceArray>(m, "DeviceArray",
                          "A float32 array on a CUDA device. torch.from_dlpack(array), cupy.from_dlpack(array) and the "
                          "like share its memory.")
      .def_static("from_numpy", &DeviceArray::from_numpy, py::arg("array"), py::arg("device") = 0)
      .def("numpy", &DeviceArray::to_numpy, "A copy in the host's memory.")
      .def("__dlpack__",
           [](const DeviceArray &array, const py::args &, const py::kwargs &) { return array.to_dlpack(); })
      .def("__dlpack_device__",
           [](const DeviceArray &array) { return py::make_tuple(int{dlpack::kCuda}, array.device()); })
      .def_property_readonly("shape", [](const DeviceArray &array) { return py::tuple(py::cast(array.shape())); });
}

}  // namespace tipl::cuda

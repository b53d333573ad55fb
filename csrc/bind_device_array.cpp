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
  std::vector<int64_t> shape, strides;
  DeviceArray array;
};

}  // namespace

DeviceArray::DeviceArray(std::vector<py::ssize_t> shape, int device)
    : shape_(std::move(shape)), strides_(shape_.size()), device_(device) {
  double count = 1.0;
  py::ssize_t stride = 1;
  for (size_t axis = shape_.size(); axis-- > 0; stride *= shape_[axis]) strides_[axis] = stride;
  for (const py::ssize_t extent : shape_) count *= static_cast<double>(extent);
  buffer_ = std::make_shared<Buffer<float>>(count);
}

py::ssize_t DeviceArray::size() const noexcept {
  return std::accumulate(shape_.begin(), shape_.end(), py::ssize_t{1}, std::multiplies<>());
}

DeviceArray DeviceArray::sliced(const py::object &slices) const {
  const py::tuple parts = py::isinstance<py::tuple>(slices) ? slices.cast<py::tuple>() : py::make_tuple(slices);
  check(parts.size() <= shape_.size(), "DeviceArray: there are ", shape_.size(), " axes, got ", parts.size(),
        " slices");
  DeviceArray slice = *this;
  for (size_t axis = 0; axis < parts.size(); ++axis) {
    if (!py::isinstance<py::slice>(parts[axis])) throw py::type_error("DeviceArray: only slices are taken");
    py::ssize_t start = 0, stop = 0, step = 1, length = 0;
    if (!parts[axis].cast<py::slice>().compute(shape_[axis], &start, &stop, &step, &length)) {
      throw py::error_already_set();
    }
    check(step > 0, "DeviceArray: steps must be positive, got ", step);
    slice.offset_ += start * strides_[axis];
    slice.strides_[axis] *= step;
    slice.shape_[axis] = length;
  }
  return slice;
}

py::array_t<float> DeviceArray::to_numpy() const {
  const OnDevice on(device_);
  if (size() == 0) return py::array_t<float>(shape_);
  py::array_t<float> all(static_cast<py::ssize_t>(buffer_->size()));
  succeed(cudaMemcpy(all.mutable_data(), buffer_->data(), all.nbytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  std::vector<py::ssize_t> byte_strides = strides_;
  for (py::ssize_t &stride : byte_strides) stride *= static_cast<py::ssize_t>(sizeof(float));
  return py::array_t<float>(shape_, byte_strides, all.data() + offset_, all);
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
  auto *exported = new Exported{{}, {shape_.begin(), shape_.end()}, {strides_.begin(), strides_.end()}, *this};
  exported->managed.tensor = {data(),
                              {dlpack::kCuda, device_},
                              static_cast<int32_t>(shape_.size()),
                              {dlpack::kFloat, 32, 1},
                              exported->shape.data(),
                              exported->strides.data(),
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

std::optional<DeviceTensor> borrowed(const char *where, const char *name, const py::object &object, int device,
                                     const Stream &stream) {
  const std::optional<dlpack::Device> at = py::isinstance<py::array>(object) ? std::nullopt : device_of(object);
  if (!at || at->type == dlpack::kCpu || at->type == dlpack::kCudaHost) return std::nullopt;
  check(at->type == dlpack::kCuda || at->type == dlpack::kCudaManaged, where, ": ", name, " must be on cuda:", device,
        " or in the host's memory, got device type ", at->type);
  check(at->type == dlpack::kCudaManaged || at->index == device, where, ": ", name, " must be on cuda:", device,
        ", got cuda:", at->index);
  const auto handle = reinterpret_cast<intptr_t>(static_cast<cudaStream_t>(stream));
  DeviceTensor borrowed;
  borrowed.capsule = object.attr("__dlpack__")(py::arg("stream") = handle);
  auto *managed = static_cast<dlpack::ManagedTensor *>(PyCapsule_GetPointer(borrowed.capsule.ptr(), kCapsule));
  if (managed == nullptr) throw py::error_already_set();
  const dlpack::Tensor &tensor = managed->tensor;
  if (tensor.type.code != dlpack::kFloat || tensor.type.bits != 32 || tensor.type.lanes != 1) {
    throw py::type_error(text(where, ": ", name, " must be an array of float32, got ", type_name(tensor.type)));
  }
  borrowed.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  borrowed.strides.resize(tensor.ndim);
  py::ssize_t contiguous = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    const bool given = tensor.strides != nullptr && tensor.shape[axis] != 1;  // the stride of one element says nothing
    borrowed.strides[axis] = given ? tensor.strides[axis] : contiguous;
    contiguous *= tensor.shape[axis];
  }
  borrowed.data = reinterpret_cast<const float *>(static_cast<const char *>(tensor.data) + tensor.byte_offset);
  check(reinterpret_cast<uintptr_t>(borrowed.data) % alignof(float) == 0, where, ": ", name, " must be aligned");
  return borrowed;
}

DeviceInput::DeviceInput(const char *where, const char *name, const py::object &object, std::initializer_list<Dim> dims,
                         int device, const Stream &stream) {
  if (const std::optional<DeviceTensor> tensor = borrowed(where, name, object, device, stream)) {
    shape_ = tensor->shape;
    check_shape(where, name, shape_, dims);
    py::ssize_t stride = 1;
    for (size_t axis = shape_.size(); axis-- > 0;) {
      check(shape_[axis] == 1 || tensor->strides[axis] == stride, where, ": ", name,
            " must be C-contiguous and aligned");
      stride *= shape_[axis];
    }
    data_ = tensor->data;
    capsule_ = tensor->capsule;
    return;
  }
  const bool is_foreign = !py::isinstance<py::array>(object) && device_of(object);
  const py::object host = is_foreign ? py::module_::import("numpy").attr("from_dlpack")(object) : object;
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
      .def("__getitem__", &DeviceArray::sliced, py::arg("slices"), "Slices, which share the memory.")
      .def_property_readonly("dtype", [](const DeviceArray &) { return py::dtype::of<float>(); })
      .def("__dlpack__",
           [](const DeviceArray &array, const py::args &, const py::kwargs &) { return array.to_dlpack(); })
      .def("__dlpack_device__",
           [](const DeviceArray &array) { return py::make_tuple(int{dlpack::kCuda}, array.device()); })
      .def_property_readonly("shape", [](const DeviceArray &array) { return py::tuple(py::cast(array.shape())); });
}

}  // namespace tipl::cuda

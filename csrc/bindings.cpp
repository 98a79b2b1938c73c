// The launchers as Python functions of addresses, on a device that is named: each makes it this
// thread's first. It imports without a driver; a call that fails becomes a RuntimeError that names the
// kernel, the call and its error.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cka_large/cka_large.h"
#include "cka_large/moments.h"
#include "cka_small/cka_small.h"
#include "cka_small/scale.h"
#include "common/driver.h"
#include "common/launch.h"

namespace py = pybind11;

namespace {

using Address = unsigned long long;

rift::ElementType type_of(const char* name, int value) {
  if (value >= 0 && value <= 2) return static_cast<rift::ElementType>(value);
  throw py::value_error(std::string(name) +
                        " must be 0 (bfloat16), 1 (float16) or 2 (float32); got " +
                        std::to_string(value));
}

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The address of something that must be there.
template <typename T>
T* there(const char* name, Address address) {
  if (address != 0) return at<T>(address);
  throw py::value_error(std::string(name) + " must be an address; got 0");
}

int within(const char* name, long long value, long long most) {
  if (value >= 1 && value <= most) return static_cast<int>(value);
  throw py::value_error(std::string(name) + " must be 1 to " + std::to_string(most) + "; got " +
                        std::to_string(value));
}

// x, y, mask, grad_x, grad_y; their strides; rows and widths
using Layer = std::array<long long, 12>;

rift::CkaSmallLayer layer_of(const Layer& v, int rows, int width) {
  rift::CkaSmallLayer layer{};
  layer.x = there<const void>("x", v[0]);
  layer.y = there<const void>("y", v[1]);
  layer.mask = at<const unsigned char>(v[2]);
  layer.grad_x = at<void>(v[3]);
  layer.grad_y = at<void>(v[4]);
  layer.stride_xn = v[5];
  layer.stride_xd = v[6];
  layer.stride_yn = v[7];
  layer.stride_yd = v[8];
  layer.rows = within("rows", v[9], rows);
  layer.width_x = within("width_x", v[10], width);
  layer.width_y = within("width_y", v[11], width);
  return layer;
}

rift::CkaSmallPlan cka_small_plan(int device, int rows, int width) {
  within("rows", rows, rift::MAX_ROWS);
  // Far more than fits, and its bytes still an int.
  within("width", width, 1 << 20);
  const rift::DeviceGuard guard(device);
  rift::CkaSmallPlan plan = rift::cka_small_plan(rows, width);
  plan.device = device;
  return plan;
}

// Strides of a batch in bytes, for the pieces of it that one launch takes.
void advance(rift::CkaSmallLayer& layer, const std::array<long long, 5>& batch, long long entries,
             rift::ElementType type) {
  const long long bytes = type == rift::ElementType::fp32 ? 4 : 2;
  const long long grad_bytes = type == rift::ElementType::bf16 ? 2 : 4;
  const auto move = [&](auto*& pointer, long long by) {
    if (!pointer) return;
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = reinterpret_cast<Pointer>(reinterpret_cast<Address>(pointer) +
                                        static_cast<Address>(by * entries));
  };
  move(layer.x, batch[0] * bytes);
  move(layer.y, batch[1] * bytes);
  move(layer.mask, batch[2]);
  move(layer.grad_x, batch[3] * grad_bytes);
  move(layer.grad_y, batch[4] * grad_bytes);
}

void cka_small(const rift::CkaSmallPlan& plan, const std::vector<Layer>& layers,
               const std::optional<std::array<long long, 5>>& batch, int type_number, int rows,
               int entries, bool debiased, bool distance, Address values, Address workspace,
               Address counters, Address stream) {
  const rift::ElementType type = type_of("type", type_number);
  if (plan.blocks == 0) throw py::value_error("plan must be one that fits; got one of no blocks");
  within("rows", rows, rift::MAX_ROWS);
  if (entries < 0) {
    throw py::value_error("entries must not be negative; got " + std::to_string(entries));
  }
  const int width = plan.block_columns * plan.blocks;
  if (batch ? layers.size() != 1 : static_cast<int>(layers.size()) != entries) {
    throw py::value_error("layers must be one for each entry, or one for a batch; got " +
                          std::to_string(layers.size()) + " for " + std::to_string(entries));
  }
  rift::CkaSmallArguments arguments{};
  arguments.batched = batch.has_value();
  if (batch) {
    arguments.layers[0] = layer_of(layers[0], rows, width);
    arguments.batch_x = (*batch)[0];
    arguments.batch_y = (*batch)[1];
    arguments.batch_mask = (*batch)[2];
    arguments.batch_grad_x = (*batch)[3];
    arguments.batch_grad_y = (*batch)[4];
  }
  arguments.debiased = debiased;
  arguments.distance = distance;
  arguments.block_columns = plan.block_columns;
  if (!plan.cluster) {
    arguments.workspace = there<float>("workspace", workspace);
    arguments.counters = there<unsigned>("counters", counters);
  }
  const rift::DeviceGuard guard(plan.device);
  const int most = batch ? plan.entries : std::min(plan.entries, rift::MAX_LAYERS);
  for (int begin = 0; begin < entries; begin += most) {
    const int count = std::min(most, entries - begin);
    for (int i = 0; !batch && i < count; ++i) {
      arguments.layers[i] = layer_of(layers[static_cast<size_t>(begin + i)], rows, width);
    }
    if (batch && begin > 0) advance(arguments.layers[0], *batch, most, type);
    arguments.values = there<float>("values", values) + begin;
    rift::cka_small(arguments, plan, type, rows, count, reinterpret_cast<cudaStream_t>(stream));
  }
}

// elements, stride of a row, columns
using Features = std::array<long long, 3>;

rift::CkaLargeSide side_of(const char* name, const Features& v) {
  if (v[0] % 16 != 0 || v[1] % 8 != 0) {
    throw py::value_error(std::string(name) + " must have rows at multiples of 16 bytes; got " +
                          std::to_string(v[0]) + " with a stride of " + std::to_string(v[1]) +
                          " elements");
  }
  if (v[1] < v[2]) {
    throw py::value_error(std::string(name) + " must have rows that do not overlap; got " +
                          std::to_string(v[2]) + " columns with a stride of " +
                          std::to_string(v[1]));
  }
  return {there<const void>(name, static_cast<Address>(v[0])), v[1],
          within("width", v[2], 1 << 15)};
}

rift::Schedule moments_schedule(int rows, int width_x, int width_y, int processors, bool pairs) {
  return rift::moments_schedule(within("rows", rows, 1 << 30), within("width_x", width_x, 1 << 20),
                                within("width_y", width_y, 1 << 20),
                                within("processors", processors, 1 << 16), pairs);
}

// Hopper's own kernels are empty but in machine code of "90a", which runs on Hopper alone.
void check_hopper(const char* kernel) {
  const int number = 10 * rift::device_attribute(cudaDevAttrComputeCapabilityMajor) +
                     rift::device_attribute(cudaDevAttrComputeCapabilityMinor);
  const std::string built = ";" + std::string(RIFT_ARCHS) + ";";
  if (number == 90 && built.find(";90a;") != std::string::npos) return;
  throw std::runtime_error(std::string(kernel) +
                           ": needs RIFT_KERNELS_CUDA_ARCHS with 90a and a GPU of " +
                           "compute capability 9.0; got " + RIFT_ARCHS + " and " +
                           std::to_string(number / 10) + "." + std::to_string(number % 10));
}

void moments(const Features& x, const Features& y, int rows, int processors, bool pairs,
             Address tiles, Address spill, int device, Address stream) {
  const auto matrix = [&](const char* name, const Features& v) {
    const rift::CkaLargeSide side = side_of(name, v);
    return rift::Matrix{side.features, side.stride, rows, side.width};
  };
  rift::MomentsArguments arguments{};
  arguments.schedule =
      moments_schedule(rows, static_cast<int>(x[2]), static_cast<int>(y[2]), processors, pairs);
  arguments.tiles = there<float>("tiles", tiles);
  if (rift::spill_floats(arguments.schedule) > 0) arguments.spill = there<float>("spill", spill);
  const rift::Matrix left = matrix("x", x), right = matrix("y", y);
  const rift::DeviceGuard guard(device);
  if (pairs) check_hopper("moments_sm90");
  const auto launcher = pairs ? rift::moments_sm90 : rift::moments_sm80;
  launcher(arguments, left, right, reinterpret_cast<cudaStream_t>(stream));
}

rift::CkaLargeCall cka_large_call(const Features& x, const Features& y, int rows, bool student,
                                  bool teacher, bool debiased, bool distance, bool high,
                                  int processors, bool hopper) {
  return {side_of("x", x),
          side_of("y", y),
          within("rows", rows, 1 << 30),
          student,
          teacher,
          debiased,
          distance,
          high,
          within("processors", processors, 1 << 16),
          hopper};
}

// Bytes of scratch memory, and of memory that the backward needs.
std::array<long long, 2> cka_large_memory(const rift::CkaLargeCall& call) {
  rift::CkaLargeMemory memory{};
  rift::cka_large_arguments(call, memory);
  return {memory.scratch_bytes, memory.saved_bytes};
}

void cka_large_forward(const rift::CkaLargeCall& call, Address scratch, Address saved,
                       Address value, int device, Address stream) {
  rift::CkaLargeMemory memory{there<unsigned char>("scratch", scratch),
                              there<unsigned char>("saved", saved), 0, 0};
  rift::CkaLargeArguments arguments = rift::cka_large_arguments(call, memory);
  arguments.value = there<float>("value", value);
  const rift::DeviceGuard guard(device);
  if (call.hopper) check_hopper("moments_sm90");
  rift::cka_large_forward(arguments, reinterpret_cast<cudaStream_t>(stream));
}

void cka_large_backward(const rift::CkaLargeCall& call, int side, Address saved, Address incoming,
                        Address grad, int device, Address stream) {
  if (side != 0 && side != 1) {
    throw py::value_error("side must be 0 (student) or 1 (teacher); got " + std::to_string(side));
  }
  rift::CkaLargeMemory memory{nullptr, there<unsigned char>("saved", saved), 0, 0};
  const rift::CkaLargeArguments arguments = rift::cka_large_arguments(call, memory);
  if (!(side == 0 ? arguments.planes_x : arguments.planes_y)) {
    throw py::value_error("side must be one whose gradient the forward was asked for; got " +
                          std::to_string(side));
  }
  const auto* from = there<const float>("incoming", incoming);
  void* to = there<void>("grad", grad);
  const rift::DeviceGuard guard(device);
  if (call.hopper) check_hopper("backward_sm90");
  rift::cka_large_backward(arguments, side, from, to, reinterpret_cast<cudaStream_t>(stream));
}

// unit, out, count, entries, incoming
using Tensor = std::array<long long, 5>;

void scale(const std::vector<Tensor>& tensors, int unit, int out, int device, Address stream) {
  const rift::ElementType unit_type = type_of("unit", unit), out_type = type_of("out", out);
  if (unit_type == rift::ElementType::fp16 ||
      (unit_type == rift::ElementType::bf16 && out_type != rift::ElementType::bf16)) {
    throw py::value_error("unit must be 2 (float32), or 0 (bfloat16) as out is; got " +
                          std::to_string(unit) + " and " + std::to_string(out));
  }
  if (tensors.empty()) return;
  const rift::DeviceGuard guard(device);
  rift::ScaledTensors all;
  for (size_t begin = 0; begin < tensors.size(); begin += rift::MAX_TENSORS) {
    all.size = static_cast<int>(std::min<size_t>(rift::MAX_TENSORS, tensors.size() - begin));
    for (int i = 0; i < all.size; ++i) {
      const Tensor& v = tensors[begin + static_cast<size_t>(i)];
      if (v[2] < 0 || v[3] < 0) {
        throw py::value_error("count and entries must not be negative; got " +
                              std::to_string(v[2]) + " and " + std::to_string(v[3]));
      }
      const bool empty = v[2] == 0 || v[3] == 0;
      all.tensors[i] = {empty ? nullptr : there<const void>("unit", v[0]),
                        empty ? nullptr : there<void>("out", v[1]),
                        empty ? nullptr : there<const float>("incoming", v[4]), v[2], v[3]};
    }
    rift::scale(all, unit_type, out_type, reinterpret_cast<cudaStream_t>(stream));
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA C++ kernels as functions of addresses; see csrc/.";
  module.attr("architectures") = RIFT_ARCHS;
  module.attr("MAX_ROWS") = rift::MAX_ROWS;
  module.attr("MAX_LAYERS") = rift::MAX_LAYERS;
  py::class_<rift::CkaSmallPlan>(module, "CkaSmallPlan", py::module_local())
      .def_readonly("cluster", &rift::CkaSmallPlan::cluster)
      .def_readonly("blocks", &rift::CkaSmallPlan::blocks)
      .def_readonly("block_columns", &rift::CkaSmallPlan::block_columns)
      .def_readonly("shared_bytes", &rift::CkaSmallPlan::shared_bytes)
      .def_readonly("entries", &rift::CkaSmallPlan::entries)
      .def_readonly("workspace", &rift::CkaSmallPlan::workspace);
  module.def("cka_small_plan", &cka_small_plan, "How a device runs layers of a size.");
  module.def("cka_small", &cka_small, "Values and gradients; see csrc/cka_small/cka_small.h.");
  py::class_<rift::MomentTile>(module, "MomentTile", py::module_local())
      .def_readonly("left_is_y", &rift::MomentTile::left_is_y)
      .def_readonly("right_is_y", &rift::MomentTile::right_is_y)
      .def_readonly("i", &rift::MomentTile::i)
      .def_readonly("j", &rift::MomentTile::j);
  py::class_<rift::Schedule>(module, "Schedule", py::module_local())
      .def_readonly("chunks", &rift::Schedule::chunks)
      .def_readonly("programs", &rift::Schedule::programs)
      .def_readonly("side", &rift::Schedule::side)
      .def_property_readonly("tiles", &rift::Schedule::tiles)
      .def_property_readonly("squares", &rift::Schedule::squares)
      .def_property_readonly("spill_floats", &rift::spill_floats)
      .def("tile", &rift::Schedule::tile)
      .def("parts", &rift::Schedule::parts)
      .def("spill_index", &rift::Schedule::spill_index)
      .def("piece", [](const rift::Schedule& schedule, int program, int index) {
        const rift::Piece piece = schedule.piece(program, index);
        return std::array<int, 4>{piece.square, piece.part, piece.first, piece.last};
      });
  module.def("moments_schedule", &moments_schedule,
             "Who multiplies what; see csrc/cka_large/schedule.h.");
  module.def("moments", &moments, "Raw second moments; see csrc/cka_large/moments.h.");
  py::class_<rift::CkaLargeCall>(module, "CkaLargeCall", py::module_local())
      .def(py::init(&cka_large_call));
  module.def("cka_large_memory", &cka_large_memory, "Bytes of scratch, and for the backward.");
  module.def("cka_large_forward", &cka_large_forward, "The value; see csrc/cka_large/cka_large.h.");
  module.def("cka_large_backward", &cka_large_backward,
             "A gradient; see csrc/cka_large/cka_large.h.");
  module.def("scale", &scale, "out = incoming * unit; see csrc/cka_small/scale.h.");
}

// The launchers as Python functions of addresses. Each makes the device that it is given current
// for the calling thread. The module can be imported without a driver. A CUDA call that fails
// becomes a RuntimeError that names the kernel, the call and the error.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cka_large/cka_large.h"
#include "cka_large/moments.h"
#include "cka_small/cka_small.h"
#include "cka_small/scale.h"
#include "checks.h"
#include "common/driver.h"

namespace py = pybind11;

namespace {

using rift::Address;
using rift::check_element_type;
using rift::check_hopper;
using rift::check_range;
using rift::optional_pointer;
using rift::required_pointer;

// Addresses of x, y, mask, grad_x and grad_y; row and column strides of x and y; rows; both widths.
using Layer = std::array<long long, 12>;

rift::CkaSmallLayer make_layer(const Layer& v, int rows, int width) {
  rift::CkaSmallLayer layer{};
  layer.sides[0] = {required_pointer<const void>("x", v[0]), optional_pointer<void>(v[3]), v[5],
                    v[6], check_range("width_x", v[10], width)};
  layer.sides[1] = {required_pointer<const void>("y", v[1]), optional_pointer<void>(v[4]), v[7],
                    v[8], check_range("width_y", v[11], width)};
  layer.mask = optional_pointer<const unsigned char>(v[2]);
  layer.rows = check_range("rows", v[9], rows);
  return layer;
}

rift::CkaSmallPlan cka_small_plan(int device, int rows, int width) {
  check_range("rows", rows, rift::MAX_ROWS);
  // Far wider than fits, but its size in bytes is still an int.
  check_range("width", width, 1 << 20);
  const rift::DeviceGuard guard(device);
  rift::CkaSmallPlan plan = rift::cka_small_plan(rows, width);
  plan.device = device;
  return plan;
}

// Advances the addresses by this many entries of a batch, which takes several launches.
void advance(rift::CkaSmallLayer& layer, const std::array<long long, 5>& batch, long long entries,
             rift::ElementType type) {
  const long long bytes = type == rift::ElementType::fp32 ? 4 : 2;
  const long long grad_bytes = type == rift::ElementType::bf16 ? 2 : 4;
  const auto move = [&](auto*& pointer, long long stride) {
    if (!pointer) return;
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = reinterpret_cast<Pointer>(reinterpret_cast<Address>(pointer) +
                                        static_cast<Address>(stride * entries));
  };
  for (size_t side = 0; side < 2; ++side) {
    move(layer.sides[side].features, batch[side] * bytes);
    move(layer.sides[side].grad, batch[3 + side] * grad_bytes);
  }
  move(layer.mask, batch[2]);
}

void cka_small(const rift::CkaSmallPlan& plan, const std::vector<Layer>& layers,
               const std::optional<std::array<long long, 5>>& batch, int type_number, int rows,
               int entries, bool debiased, bool distance, Address values, Address workspace,
               Address counters, Address stream) {
  const rift::ElementType type = check_element_type("type", type_number);
  if (plan.blocks == 0) throw py::value_error("plan must be one that fits; got one without blocks");
  check_range("rows", rows, rift::MAX_ROWS);
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
    arguments.layers[0] = make_layer(layers[0], rows, width);
    for (size_t side = 0; side < 2; ++side) {
      arguments.batch_features[side] = (*batch)[side];
      arguments.batch_grads[side] = (*batch)[3 + side];
    }
    arguments.batch_mask = (*batch)[2];
  }
  arguments.debiased = debiased;
  arguments.distance = distance;
  arguments.block_columns = plan.block_columns;
  if (!plan.cluster) {
    arguments.workspace = required_pointer<float>("workspace", workspace);
    arguments.counters = required_pointer<unsigned>("counters", counters);
  }
  const rift::DeviceGuard guard(plan.device);
  const int limit = batch ? plan.entries : std::min(plan.entries, rift::MAX_LAYERS);
  for (int begin = 0; begin < entries; begin += limit) {
    const int count = std::min(limit, entries - begin);
    for (int i = 0; !batch && i < count; ++i) {
      arguments.layers[i] = make_layer(layers[static_cast<size_t>(begin + i)], rows, width);
    }
    if (batch && begin > 0) advance(arguments.layers[0], *batch, limit, type);
    arguments.values = required_pointer<float>("values", values) + begin;
    rift::cka_small(arguments, plan, type, rows, count, reinterpret_cast<cudaStream_t>(stream));
  }
}

// Address of the elements, stride of rows, columns.
using Features = std::array<long long, 3>;

rift::CkaLargeSide make_side(const char* name, const Features& v) {
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
  return {required_pointer<const void>(name, static_cast<Address>(v[0])), v[1],
          check_range("width", v[2], 1 << 15)};
}

rift::Schedule moments_schedule(int rows, int width_x, int width_y, int processors, bool hopper) {
  return rift::moments_schedule(check_range("rows", rows, 1 << 30),
                                check_range("width_x", width_x, 1 << 20),
                                check_range("width_y", width_y, 1 << 20),
                                check_range("processors", processors, 1 << 16), hopper);
}

void moments(const Features& x, const Features& y, int rows, int processors, bool hopper,
             Address tiles, Address spill, int device, Address stream) {
  const auto matrix = [&](const char* name, const Features& v) {
    const rift::CkaLargeSide side = make_side(name, v);
    return rift::Matrix{side.features, side.stride, rows, side.width};
  };
  rift::MomentsArguments arguments{};
  arguments.schedule =
      moments_schedule(rows, static_cast<int>(x[2]), static_cast<int>(y[2]), processors, hopper);
  arguments.tiles = required_pointer<float>("tiles", tiles);
  if (rift::spill_floats(arguments.schedule) > 0) {
    arguments.spill = required_pointer<float>("spill", spill);
  }
  const rift::Matrix left = matrix("x", x), right = matrix("y", y);
  const rift::DeviceGuard guard(device);
  if (hopper) check_hopper("moments_sm90");
  const auto launcher = hopper ? rift::moments_sm90 : rift::moments_sm80;
  launcher(arguments, left, right, reinterpret_cast<cudaStream_t>(stream));
}

rift::CkaLargeCall cka_large_call(const Features& x, const Features& y, int rows, bool student,
                                  bool teacher, bool debiased, bool distance,
                                  bool may_use_low_halves, int processors, bool hopper) {
  return {make_side("x", x),
          make_side("y", y),
          check_range("rows", rows, 1 << 30),
          student,
          teacher,
          debiased,
          distance,
          may_use_low_halves,
          check_range("processors", processors, 1 << 16),
          hopper};
}

// Bytes of scratch memory, and of what the forward pass saves.
std::array<long long, 2> cka_large_memory(const rift::CkaLargeCall& call) {
  rift::CkaLargeMemory memory{};
  rift::cka_large_arguments(call, memory);
  return {memory.scratch.bytes, memory.saved.bytes};
}

void cka_large_forward(const rift::CkaLargeCall& call, Address scratch, Address saved,
                       Address value, int device, Address stream) {
  rift::CkaLargeMemory memory{{required_pointer<unsigned char>("scratch", scratch), 0},
                              {required_pointer<unsigned char>("saved", saved), 0}};
  rift::CkaLargeArguments arguments = rift::cka_large_arguments(call, memory);
  arguments.value = required_pointer<float>("value", value);
  const rift::DeviceGuard guard(device);
  if (call.hopper) check_hopper("moments_sm90");
  rift::cka_large_forward(arguments, reinterpret_cast<cudaStream_t>(stream));
}

void cka_large_backward(const rift::CkaLargeCall& call, int side, Address saved, Address incoming,
                        Address grad, int device, Address stream) {
  if (side != 0 && side != 1) {
    throw py::value_error("side must be 0 (student) or 1 (teacher); got " + std::to_string(side));
  }
  rift::CkaLargeMemory memory{{}, {required_pointer<unsigned char>("saved", saved), 0}};
  const rift::CkaLargeArguments arguments = rift::cka_large_arguments(call, memory);
  if (!(side == 0 ? arguments.planes_x : arguments.planes_y)) {
    throw py::value_error("side must be one whose gradient the forward was asked for; got " +
                          std::to_string(side));
  }
  const auto* factor = required_pointer<const float>("incoming", incoming);
  void* target = required_pointer<void>("grad", grad);
  const rift::DeviceGuard guard(device);
  if (call.hopper) check_hopper("backward_sm90");
  rift::cka_large_backward(arguments, side, factor, target, reinterpret_cast<cudaStream_t>(stream));
}

// Fields of ScaledTensor: unit, out, count, entries, incoming.
using Tensor = std::array<long long, 5>;

void scale(const std::vector<Tensor>& tensors, int unit, int out, int device, Address stream) {
  const rift::ElementType unit_type = check_element_type("unit", unit);
  const rift::ElementType out_type = check_element_type("out", out);
  if (unit_type == rift::ElementType::fp16 ||
      (unit_type == rift::ElementType::bf16 && out_type != rift::ElementType::bf16)) {
    throw py::value_error("unit must be 2 (float32), or 0 (bfloat16) as out is; got " +
                          std::to_string(unit) + " and " + std::to_string(out));
  }
  if (tensors.empty()) return;
  const rift::DeviceGuard guard(device);
  rift::ScaledTensors arguments;
  for (size_t begin = 0; begin < tensors.size(); begin += rift::MAX_TENSORS) {
    arguments.size = static_cast<int>(std::min<size_t>(rift::MAX_TENSORS, tensors.size() - begin));
    for (int i = 0; i < arguments.size; ++i) {
      const Tensor& v = tensors[begin + static_cast<size_t>(i)];
      if (v[2] < 0 || v[3] < 0) {
        throw py::value_error("count and entries must not be negative; got " +
                              std::to_string(v[2]) + " and " + std::to_string(v[3]));
      }
      const bool empty = v[2] == 0 || v[3] == 0;
      arguments.tensors[i] = {empty ? nullptr : required_pointer<const void>("unit", v[0]),
                              empty ? nullptr : required_pointer<void>("out", v[1]),
                              empty ? nullptr : required_pointer<const float>("incoming", v[4]),
                              v[2], v[3]};
    }
    rift::scale(arguments, unit_type, out_type, reinterpret_cast<cudaStream_t>(stream));
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels as functions of addresses; see csrc/.";
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
  module.def("cka_small_plan", &cka_small_plan,
             "How a device runs layers of a size; see csrc/cka_small/layout.h.");
  module.def("cka_small", &cka_small, "Values and gradients; see csrc/cka_small/cka_small.h.");
  py::class_<rift::MomentTile>(module, "MomentTile", py::module_local())
      .def_readonly("left_is_y", &rift::MomentTile::left_is_y)
      .def_readonly("right_is_y", &rift::MomentTile::right_is_y)
      .def_readonly("i", &rift::MomentTile::i)
      .def_readonly("j", &rift::MomentTile::j);
  py::class_<rift::Schedule>(module, "Schedule", py::module_local())
      .def_readonly("chunks", &rift::Schedule::chunks)
      .def_readonly("programs", &rift::Schedule::programs)
      .def_readonly("square_side", &rift::Schedule::square_side)
      .def_property_readonly("tiles", &rift::Schedule::tiles)
      .def_property_readonly("squares", &rift::Schedule::squares)
      .def_property_readonly("spill_floats", &rift::spill_floats)
      .def("tile", &rift::Schedule::tile)
      .def("parts", &rift::Schedule::parts)
      .def("spill_index", &rift::Schedule::spill_index)
      .def("piece", [](const rift::Schedule& schedule, int program, int index) {
        const rift::Piece piece = schedule.piece(program, index);
        return std::array<int, 4>{piece.square, piece.part, piece.begin, piece.end};
      });
  module.def("moments_schedule", &moments_schedule,
             "How programs share the tiles; see csrc/cka_large/schedule.h.");
  module.def("moments", &moments, "Raw second moments; see csrc/cka_large/moments.h.");
  py::class_<rift::CkaLargeCall>(module, "CkaLargeCall", py::module_local())
      .def(py::init(&cka_large_call));
  module.def("cka_large_memory", &cka_large_memory,
             "Bytes of scratch memory, and of what is saved.");
  module.def("cka_large_forward", &cka_large_forward, "The value; see csrc/cka_large/cka_large.h.");
  module.def("cka_large_backward", &cka_large_backward,
             "A gradient; see csrc/cka_large/cka_large.h.");
  module.def("scale", &scale, "out = incoming * unit; see csrc/cka_small/scale.h.");
}

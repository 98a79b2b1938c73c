// The launchers of csrc on a CPU. The environment says which GPU this is:
//   RIFT_EMULATED_MAJOR    of the compute capability: 8 has no clusters
//   RIFT_EMULATED_SHARED   bytes of shared memory that a block may have
//   RIFT_EMULATED_PROCESSORS
//   RIFT_EMULATED_THREADS  of a block
//   RIFT_EMULATED_SEED     of the order in which threads run
#define RIFT_EMULATOR
#include "../../csrc/backward_sm80.cuh"
#include "../../csrc/backward_sm90.cuh"
#include "../../csrc/cka_small.cuh"
#include "../../csrc/cka_small.h"
#include "../../csrc/covariance.h"
#include "../../csrc/covariance_head.cuh"
#include "../../csrc/moments_sm80.cuh"
#include "../../csrc/moments_sm90.cuh"
#include "../../csrc/moments.h"
#include "../../csrc/scale.cuh"
#include "../../csrc/statistics.cuh"

namespace {

std::string last_error;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

unsigned seed() { return static_cast<unsigned>(setting("RIFT_EMULATED_SEED", 0)); }

template <typename Run>
cudaError_t caught(Run run) {
  try {
    run();
    return cudaSuccess;
  } catch (const std::exception& error) {
    last_error = error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }

namespace rift {
namespace {

template <typename T, typename G, int ROWS>
void run_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, int entries) {
  // Where there are no clusters, a GPU counts on; here nothing is left of the last launch.
  emulator::run(
      [&] {
        plan.cluster ? cka_small_kernel<T, G, ROWS, true>(arguments)
                     : cka_small_kernel<T, G, ROWS, false>(arguments);
      },
      static_cast<unsigned>(plan.blocks), static_cast<unsigned>(entries),
      static_cast<unsigned>(setting("RIFT_EMULATED_THREADS", 64)),
      static_cast<size_t>(plan.shared_bytes), seed());
}

template <typename T, typename G>
void run_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, int rows,
               int entries) {
  switch (padded_rows(rows)) {
    case 16: return run_small<T, G, 16>(arguments, plan, entries);
    case 32: return run_small<T, G, 32>(arguments, plan, entries);
    case 64: return run_small<T, G, 64>(arguments, plan, entries);
    default: return run_small<T, G, 128>(arguments, plan, entries);
  }
}

template <typename Unit, typename Out>
void run_scale(const ScaledTensors& all) {
  emulator::run([&] { scale_kernel<Unit, Out>(all); }, 2, static_cast<unsigned>(all.size), 32, 0,
                seed());
}

}  // namespace

cudaError_t cka_small_plan(int rows, int width, CkaSmallPlan* plan) {
  *plan = cka_small_plan(rows, width, setting("RIFT_EMULATED_MAJOR", 9),
                         setting("RIFT_EMULATED_SHARED", 227 * 1024),
                         setting("RIFT_EMULATED_PROCESSORS", 132));
  return cudaSuccess;
}

cudaError_t cka_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, Type type,
                      int rows, int entries, cudaStream_t) {
  return caught([&] {
    switch (type) {
      case Type::bf16: return run_small<Bf16, Bf16>(arguments, plan, rows, entries);
      case Type::fp16: return run_small<Half, float>(arguments, plan, rows, entries);
      default: return run_small<float, float>(arguments, plan, rows, entries);
    }
  });
}

namespace {

TensorMap map_of(const Matrix& m, int box_rows) {
  const auto* elements = static_cast<const uint16_t*>(m.elements);
  return {elements, m.stride, static_cast<int>(m.rows), m.columns, box_rows};
}

Matrix matrix_of(const CovarianceSide& side, int rows) {
  return {side.features, side.stride, rows, side.width};
}

}  // namespace

cudaError_t covariance_forward(const CovarianceArguments& arguments, cudaStream_t stream) {
  const auto run = [&](auto kernel, int programs, size_t shared) {
    return caught([&] {
      emulator::run([&] { kernel(arguments); }, static_cast<unsigned>(programs), 1,
                    STATISTICS_THREADS, shared, seed());
    });
  };
  cudaError_t error =
      run(statistics_kernel, arguments.statistics_programs(), sizeof(StatisticsScratch));
  if (error != cudaSuccess) return error;
  const MomentsArguments moments{arguments.schedule, arguments.tiles, arguments.spill};
  const Matrix x = matrix_of(arguments.x, arguments.rows), y = matrix_of(arguments.y, arguments.rows);
  error = arguments.hopper ? moments_sm90(moments, x, y, stream) : moments_sm80(moments, x, y, stream);
  if (error == cudaSuccess && arguments.debiased) {
    error = run(rows_kernel, arguments.row_programs,
                static_cast<size_t>(rows_shared(arguments.width)));
  }
  if (error != cudaSuccess) return error;
  return run(covariance_head_kernel, arguments.head_programs(), sizeof(HeadScratch));
}

cudaError_t covariance_backward(const CovarianceArguments& arguments, int side,
                                const float* incoming, void* grad, cudaStream_t) {
  const BackwardArguments all{arguments, incoming, static_cast<unsigned short*>(grad), side};
  const void* planes = side == 0 ? arguments.planes_x : arguments.planes_y;
  const BackwardMatrices matrices{matrix_of(all.own(), arguments.rows),
                                  matrix_of(all.other(), arguments.rows),
                                  {planes, arguments.width, 4LL * arguments.width, arguments.width}};
  if (!arguments.hopper) {
    return caught([&] {
      emulator::run([&] { backward_sm80_kernel(all, matrices); },
                    static_cast<unsigned>(backward_tiles(arguments, side)), 1, TILE_THREADS,
                    BACKWARD_RING_SHARED, seed());
    });
  }
  const BackwardMaps maps{map_of(matrices.own, BACKWARD_ROWS), map_of(matrices.other, BACKWARD_ROWS),
                          map_of(matrices.planes, BOX_COLUMNS)};
  return caught([&] {
    emulator::run([&] { backward_sm90_kernel(all, maps); },
                  static_cast<unsigned>(PAIR * backward_pairs(arguments, side)), 1, MOMENT_THREADS,
                  BACKWARD_SHARED, seed(), PAIR);
  });
}

cudaError_t moments_sm80(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t) {
  return caught([&] {
    emulator::run([&] { moments_sm80_kernel(arguments, x, y); },
                  static_cast<unsigned>(arguments.schedule.programs), 1, TILE_THREADS,
                  MOMENT_RING_SHARED, seed());
  });
}

cudaError_t moments_sm90(const MomentsArguments& arguments, const Matrix& x, const Matrix& y,
                         cudaStream_t) {
  const TensorMap map_x = map_of(x, MOMENT_CHUNK), map_y = map_of(y, MOMENT_CHUNK);
  return caught([&] {
    emulator::run([&] { moments_sm90_kernel(arguments, map_x, map_y); },
                  static_cast<unsigned>(PAIR * arguments.schedule.programs), 1, MOMENT_THREADS,
                  MOMENT_SHARED, seed(), PAIR);
  });
}

cudaError_t scale(const ScaledTensors& all, Type unit, Type out, cudaStream_t) {
  if (all.size == 0) return cudaSuccess;
  return caught([&] {
    if (unit == Type::bf16) return run_scale<Bf16, Bf16>(all);
    switch (out) {
      case Type::bf16: return run_scale<float, Bf16>(all);
      case Type::fp16: return run_scale<float, Half>(all);
      default: return run_scale<float, float>(all);
    }
  });
}

}  // namespace rift

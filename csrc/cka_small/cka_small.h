// Linear CKA of few rows, value and gradients in one launch; see cka_small.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cka_small/layout.h"
#include "common/element_type.h"

namespace rift {

// The plan of layout.h for the current device.
CkaSmallPlan cka_small_plan(int rows, int width);

// Up to MAX_LAYERS layers, or a batch, of up to `rows` rows: `entries` <= plan.entries of them.
// Gradients are for a loss whose own gradient is 1, in bfloat16 for bfloat16 features, else float32.
void cka_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, ElementType type,
               int rows, int entries, cudaStream_t stream);

}  // namespace rift

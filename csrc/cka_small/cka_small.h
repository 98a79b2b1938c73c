// Linear CKA of few rows, value and gradients in one launch; see cka_small.cuh.
#pragma once

#include <cuda_runtime.h>

#include "cka_small/layout.h"
#include "common/element_type.h"

namespace rift {

// The plan of layout.h for the current device.
CkaSmallPlan cka_small_plan(int rows, int width);

// Runs `entries` <= plan.entries entries of up to `rows` rows: up to MAX_LAYERS layers, or a batch.
// Gradients are those of the value itself, in bfloat16 for bfloat16 features, else in float32.
void cka_small(const CkaSmallArguments& arguments, const CkaSmallPlan& plan, ElementType type,
               int rows, int entries, cudaStream_t stream);

}  // namespace rift

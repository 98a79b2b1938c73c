#pragma once

namespace rift {

// Type of the elements of features and gradients.
enum class ElementType { bf16, fp16, fp32 };

}  // namespace rift

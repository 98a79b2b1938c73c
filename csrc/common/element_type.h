#pragma once

namespace rift {

// Of features and gradients.
enum class ElementType { bf16, fp16, fp32 };

}  // namespace rift

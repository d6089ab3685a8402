// What a call writes in place must have memory of its own for every element: an expanded tensor has not. The Python twin
// is in register() of n3kernels/_dispatch.py.
#pragma once
#include <optional>

#include "check.h"

namespace n3 {

inline void check_written(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    N3_CHECK(op, t.stride(d) != 0 || t.size(d) <= 1, name, " must not be expanded, as it is written in place, got ",
             "stride 0 along dimension ", d, " of size ", t.size(d));
  }
}

inline void check_written(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (t) check_written(op, name, *t);
}

}  // namespace n3

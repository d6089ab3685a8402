// Numbers of the mtp family that host, kernels and tests share; n3kernels/mtp/reference.py defines them.
#pragma once
#include <cstdint>

namespace n3::mtp {

constexpr int64_t kTile = 4096;  // tokens per tile of the hierarchical draws
constexpr int64_t kSub = 512;    // a row's maxima are kept for sub-tiles of so many logits
constexpr int64_t kMaxDraftIds = 64;

enum Stream : uint32_t { kDraft, kAccept, kTarget, kResidual, kTileNoise };

enum class VerifyMode : int32_t { kGreedy, kCoupled, kToken, kBlock, kRelaxed, kTypical };
enum class TreeMode : int32_t { kGreedy, kCoupled, kToken };

enum Flag : int32_t {
  kNan = 1,          // an allowed logit is NaN; it counts as -inf
  kEmptyMask = 2,    // the row's bitmask allows no token; it is ignored
  kNoSupport = 4,    // every allowed logit is -inf
  kOutOfRange = 8,   // a slot, bitmask row, forced token or draft lies past its range
  kNotDrawn = 16,    // a draft of probability 0 under its own law
};

}  // namespace n3::mtp

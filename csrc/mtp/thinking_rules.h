// The rules of thinking_budget for one length of one request's output. Host and device, no torch; in words in
// n3kernels/mtp/thinking_budget.py.
#pragma once
#include "../common/numerics.h"

namespace n3::thinking_budget {

struct Args {
  const int32_t *drafts, *cu_rows, *tail;                 // [rows], [B + 1], [B, reach]
  const int32_t *num_output, *active, *budget, *grace;    // [B]
  const int32_t *end_ids, *end_think_ids, *newlines;      // [end_size], by request or not; [strings, string_size];
  int32_t* forced;                                        //   [words]. Output: [rows]
  int64_t rows, requests, reach, end_step, end_size, strings, string_size, words;
};

// A string padded with -1 on the right.
struct Text {
  const int32_t* ids;
  int64_t length;
};

N3_HD Text text_of(const int32_t* ids, int64_t size) {
  int64_t length = 0;
  while (length < size && ids[length] >= 0) ++length;
  return {ids, length};
}

// A request's output: its committed tail and i drafts behind it, and how many tokens it has in all.
struct Output {
  const int32_t *tail_end, *drafts;
  int64_t i, n;

  // The token k places before the last. No string is longer than the tail.
  N3_HD int32_t back(int64_t k) const { return k < i ? drafts[i - 1 - k] : tail_end[i - 1 - k]; }
  N3_HD bool ends_with(const int32_t* ids, int64_t length) const {
    if (length > n) return false;
    for (int64_t k = 0; k < length; ++k) {
      if (ids[length - 1 - k] != back(k)) return false;
    }
    return true;
  }
};

// What one length of the output says, whatever came before.
struct Look {
  bool ended, starts;  // an end of thinking; forcing begins, at the latest
  int32_t wanted;      // the token to force next, -1: the end string is complete
};

struct Request {
  const Args& a;
  int64_t first, last;    // its rows
  int64_t budget, grace;
  Text end;               // what is forced
  bool thinks;            // before its first row

  N3_HD bool spent(int64_t n) const { return budget >= 0 && n >= budget + grace; }

  N3_HD bool newline(int32_t id) const {
    return id >= 0 && id < 32 * a.words && (uint32_t(a.newlines[id >> 5]) >> (id & 31) & 1);
  }

  // Forcing began at the token k places before the last, a newline.
  N3_HD bool starts_at(const Output& o, int64_t k) const {
    const int64_t length = o.n - k;  // when this token was the last
    return budget >= 0 && length >= 1 && length >= budget && newline(o.back(k));
  }

  N3_HD Look look(const Output& o) const {
    bool ended = false;
    for (int64_t s = 0; s < a.strings && !ended; ++s) {
      const Text mark = text_of(a.end_think_ids + s * a.string_size, a.string_size);
      ended = mark.length > 0 && o.ends_with(mark.ids, mark.length);
    }
    int64_t done = end.length;
    while (done > 0 && !o.ends_with(end.ids, done)) --done;
    return {ended, spent(o.n) || starts_at(o, 0), done < end.length ? end.ids[done] : -1};
  }
};

N3_HD int64_t clamp_row(const Args& a, int64_t row) { return row < 0 ? 0 : row < a.rows ? row : a.rows; }

N3_HD Request request_of(const Args& a, int64_t b) {
  return {a, clamp_row(a, a.cu_rows[b]), clamp_row(a, a.cu_rows[b + 1]), a.budget[b], a.grace[b] > 0 ? a.grace[b] : 0,
          text_of(a.end_ids + b * a.end_step, a.end_size), a.active[b] != 0};
}

// The output of a request after i drafts.
N3_HD Output output_of(const Args& a, const Request& r, int64_t b, int64_t i) {
  return {a.tail + (b + 1) * a.reach, a.drafts + r.first, i, a.num_output[b] + i};
}

}  // namespace n3::thinking_budget

// LoraSum: the low-rank branches of all layers that one node computes, added to its output.
//
//     sum = y + [x A1 B1 | x A2 B2 | ...]
//
//     y [..., N]   x [..., K]   A [K, r] or [rows | 1, K, r]   B [r, n] or [rows | 1, r, n]
//
// The n of all pairs are N together. Where a pair has an axis of rows, row i of the batch is
// multiplied with its own. All is float32; ranks may differ, and be 0. Every sum is made in an
// order that does not depend on the number of threads.
//
// Few tokens: x A is made in pieces of K, then y + (x A) B in pieces of columns, so that threads
// share the reading of A and B. Many tokens: each piece is some tokens, with both products.
#include "abi.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define LORA_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define LORA_PAUSE() __asm__ __volatile__("yield")
#else
#define LORA_PAUSE() ((void)0)
#endif

namespace {

using std::int64_t;

typedef float V16 __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));

constexpr int64_t kFew = 16;             // tokens of a row that share A and B piece by piece
constexpr int64_t kBlock = 16;           // tokens of a piece where there are more
constexpr int64_t kInner = 320;          // about so many of K in a piece, and so many columns
constexpr int64_t kStretches = 8;        // most pieces of the columns of a pair
constexpr int64_t kAlone = 192 * 1024;   // bytes that one thread reads sooner than two
constexpr size_t kCalls = 64;            // more threads than that are not asked for
constexpr int64_t kClose = 64;           // most ranks of B whose columns are copied together
constexpr int kSpins = 2048;             // before a thread that waits lets others run

template <class V>
inline V load(const float* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
inline void store(float* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// out[T, lanes of V] = x[T, begin..end) A[begin..end, lanes]; U sums at once, then added up.
template <class V, int T, int U>
void down_tile(const float* x, int64_t width, const float* a, int64_t rank, int64_t begin,
               int64_t end, float* out, int64_t stride) {
  V sums[T][U] = {};
  int64_t k = begin;
  for (; k + U <= end; k += U) {
    for (int u = 0; u < U; ++u) {
      const V row = load<V>(a + (k + u) * rank);
      for (int t = 0; t < T; ++t) sums[t][u] += row * x[t * width + k + u];
    }
  }
  for (; k < end; ++k) {
    const V row = load<V>(a + k * rank);
    for (int t = 0; t < T; ++t) sums[t][0] += row * x[t * width + k];
  }
  for (int t = 0; t < T; ++t) {
    for (int u = 1; u < U; ++u) sums[t][0] += sums[t][u];
    store<V>(out + t * stride, sums[t][0]);
  }
}

template <class V>
void down_lanes(int64_t tokens, const float* x, int64_t width, const float* a, int64_t rank,
                int64_t begin, int64_t end, float* out, int64_t stride) {
  int64_t t = 0;
  for (; t + 8 <= tokens; t += 8)
    down_tile<V, 8, 1>(x + t * width, width, a, rank, begin, end, out + t * stride, stride);
  for (; t + 4 <= tokens; t += 4)
    down_tile<V, 4, 2>(x + t * width, width, a, rank, begin, end, out + t * stride, stride);
  for (; t < tokens; ++t)
    down_tile<V, 1, 8>(x + t * width, width, a, rank, begin, end, out + t * stride, stride);
}

// out[tokens, rank] = x[tokens, begin..end) A[begin..end, rank]
void down(int64_t tokens, const float* x, int64_t width, const float* a, int64_t rank,
          int64_t begin, int64_t end, float* out, int64_t stride) {
  int64_t j = 0;
  for (; j + 16 <= rank; j += 16)
    down_lanes<V16>(tokens, x, width, a + j, rank, begin, end, out + j, stride);
  for (; j + 8 <= rank; j += 8)
    down_lanes<V8>(tokens, x, width, a + j, rank, begin, end, out + j, stride);
  for (; j + 4 <= rank; j += 4)
    down_lanes<V4>(tokens, x, width, a + j, rank, begin, end, out + j, stride);
  for (; j < rank; ++j)
    down_lanes<float>(tokens, x, width, a + j, rank, begin, end, out + j, stride);
}

// out[T, J vectors] = y + d[T, rank] B[rank, J vectors]; columns is the length of a row of B.
template <class V, int T, int J>
void up_tile(const float* d, int64_t stride, const float* b, int64_t rank, int64_t columns,
             const float* y, float* out, int64_t width) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  V sums[T][J] = {};
  for (int64_t p = 0; p < rank; ++p) {
    V row[J];
    for (int j = 0; j < J; ++j) row[j] = load<V>(b + p * columns + j * lanes);
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < J; ++j) sums[t][j] += row[j] * d[t * stride + p];
  }
  for (int t = 0; t < T; ++t)
    for (int j = 0; j < J; ++j) {
      const int64_t at = t * width + j * lanes;
      store<V>(out + at, load<V>(y + at) + sums[t][j]);
    }
}

template <class V, int J>
void up_lanes(int64_t tokens, const float* d, int64_t stride, const float* b, int64_t rank,
              int64_t columns, const float* y, float* out, int64_t width) {
  constexpr int64_t lanes = J * sizeof(V) / sizeof(float);
  int64_t t = 0;
  // Rows of B are often a multiple of 4 KiB apart, and drive each other out of the cache.
  alignas(64) float close[kClose * lanes];
  if (tokens > 4 && rank <= kClose) {
    for (int64_t p = 0; p < rank; ++p)
      std::memcpy(close + p * lanes, b + p * columns, lanes * sizeof(float));
    b = close;
    columns = lanes;
  }
  for (; t + 4 <= tokens; t += 4)
    up_tile<V, 4, J>(d + t * stride, stride, b, rank, columns, y + t * width, out + t * width,
                     width);
  for (; t < tokens; ++t)
    up_tile<V, 1, J>(d + t * stride, stride, b, rank, columns, y + t * width, out + t * width,
                     width);
}

// out[tokens, begin..end) = y + d[tokens, rank] B[rank, begin..end)
void up(int64_t tokens, const float* d, int64_t stride, const float* b, int64_t rank,
        int64_t columns, int64_t begin, int64_t end, const float* y, float* out, int64_t width) {
  int64_t j = begin;
  for (; j + 64 <= end; j += 64)
    up_lanes<V16, 4>(tokens, d, stride, b + j, rank, columns, y + j, out + j, width);
  for (; j + 16 <= end; j += 16)
    up_lanes<V16, 1>(tokens, d, stride, b + j, rank, columns, y + j, out + j, width);
  for (; j + 8 <= end; j += 8)
    up_lanes<V8, 1>(tokens, d, stride, b + j, rank, columns, y + j, out + j, width);
  for (; j + 4 <= end; j += 4)
    up_lanes<V4, 1>(tokens, d, stride, b + j, rank, columns, y + j, out + j, width);
  for (; j < end; ++j)
    up_lanes<float, 1>(tokens, d, stride, b + j, rank, columns, y + j, out + j, width);
}

struct Pair {
  const float* a;
  const float* b;
  int64_t rank, columns;   // of B
  int64_t a_step, b_step;  // from one row of the batch to the next; 0: all rows share it
  int64_t first, first_rank;  // where its columns and its ranks begin
  int64_t first_piece;     // of columns, of all pairs' pieces
};

int64_t pieces(int64_t size) { return std::max<int64_t>(1, (size + kInner / 2) / kInner); }

// Of columns there are fewer: each row of B is read in long stretches.
int64_t column_pieces(int64_t size) { return std::min(kStretches, pieces(size)); }

// A multiple of 16 where one piece ends and the next begins.
int64_t bound(int64_t size, int64_t count, int64_t index) {
  return index == count ? size : size * index / count / 16 * 16;
}

struct Work {
  std::vector<Pair> pairs;
  const float* x;
  const float* y;
  float* out;
  int64_t K, N, rows, tokens;  // tokens of each row
  int64_t rank;                // of all pairs together
  int64_t inner, outer;        // pieces of K, and of columns of all pairs
  int64_t most;                // rank of a pair
  std::unique_ptr<float[]> partial;  // [rows, inner, tokens, rank]
  std::unique_ptr<float[]> sums;     // [pieces after the first ones, tokens of a piece, most]
  int64_t first, all;          // pieces of the first kind, and of both
  std::atomic<int64_t> next{0}, done{0};

  bool few() const { return tokens <= kFew; }
  int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }

  void run(int64_t piece) {
    if (!few()) {
      block(piece / blocks(), piece % blocks(), scratch(piece, kBlock));
    } else if (piece < first) {
      const int64_t own = static_cast<int64_t>(pairs.size()) * inner;
      lower(piece / own, pairs[piece % own / inner], piece % inner);
      done.fetch_add(1, std::memory_order_release);
    } else {
      // Pieces are taken in their order: what is waited for here is being made.
      for (int spins = 0; done.load(std::memory_order_acquire) < first; ++spins) {
        if (spins < kSpins) LORA_PAUSE();
        else std::this_thread::yield();
      }
      raise((piece - first) / outer, (piece - first) % outer, scratch(piece - first, kFew));
    }
  }

  float* scratch(int64_t piece, int64_t room) { return sums.get() + piece * room * most; }

  void lower(int64_t row, const Pair& pair, int64_t piece) {
    if (!pair.rank) return;
    float* to = partial.get() + (row * inner + piece) * tokens * rank + pair.first_rank;
    down(tokens, x + row * tokens * K, K, pair.a + row * pair.a_step, pair.rank,
         bound(K, inner, piece), bound(K, inner, piece + 1), to, rank);
  }

  void raise(int64_t row, int64_t piece, float* d) {
    const auto after = std::upper_bound(
        pairs.begin(), pairs.end(), piece,
        [](int64_t one, const Pair& pair) { return one < pair.first_piece; });
    const Pair& pair = *(after - 1);
    const int64_t count = column_pieces(pair.columns), own = piece - pair.first_piece;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t p = 0; p < pair.rank; ++p) {
        const float* from =
            partial.get() + (row * inner * tokens + t) * rank + pair.first_rank + p;
        float total = from[0];
        for (int64_t i = 1; i < inner; ++i) total += from[i * tokens * rank];
        d[t * pair.rank + p] = total;
      }
    add(row * tokens, tokens, d, row, pair, bound(pair.columns, count, own),
        bound(pair.columns, count, own + 1));
  }

  void block(int64_t row, int64_t index, float* d) {
    const int64_t begin = row * tokens + index * kBlock;
    const int64_t count = std::min(kBlock, tokens - index * kBlock);
    for (const Pair& pair : pairs) {
      if (pair.rank)
        down(count, x + begin * K, K, pair.a + row * pair.a_step, pair.rank, 0, K, d, pair.rank);
      add(begin, count, d, row, pair, 0, pair.columns);
    }
  }

  void add(int64_t token, int64_t count, const float* d, int64_t row, const Pair& pair,
           int64_t begin, int64_t end) {
    const int64_t at = token * N + pair.first;
    if (pair.rank) {
      up(count, d, pair.rank, pair.b + row * pair.b_step, pair.rank, pair.columns, begin, end,
         y + at, out + at, N);
    } else if (out != y) {
      for (int64_t t = 0; t < count; ++t)
        std::memcpy(out + at + t * N + begin, y + at + t * N + begin,
                    (end - begin) * sizeof(float));
    }
  }
};

// Each call takes pieces until there are none: whoever comes late finds nothing to do.
void work_on(void* given, size_t) {
  Work& work = *static_cast<Work*>(given);
  for (int64_t piece; (piece = work.next.fetch_add(1, std::memory_order_relaxed)) < work.all;)
    work.run(piece);
}

struct Failure {
  abi::Status* status;
};

constexpr size_t kDimensions = 8;  // most that an activation has

struct Sizes {
  int64_t of[kDimensions];
  size_t count;
};

struct Kernel {
  abi::Table api;

  void check(abi::Status* status) const {
    if (status) throw Failure{status};
  }

  [[noreturn]] void refuse(const char* text) const {
    throw Failure{abi::CreateStatus::of(api)(abi::kInvalid, text)};
  }

  const float* input(const abi::Context* context, size_t index, Sizes& sizes) const {
    const abi::Value* value = nullptr;
    check(abi::Input::of(api)(context, index, &value));
    if (!value) refuse("LoraSum: an input is missing");
    int type = 0;
    const int64_t* found = nullptr;
    check(abi::Shape::of(api)(value, &type, &found, &sizes.count));
    if (sizes.count > kDimensions) refuse("LoraSum: more than 8 dimensions");
    std::copy_n(found, sizes.count, sizes.of);
    void* data = nullptr;
    check(abi::MutableData::of(api)(const_cast<abi::Value*>(value), &data));
    return static_cast<const float*>(data);
  }

  // A or B of a pair: its two sizes, and the step from one row of the batch to the next.
  const float* factor(const abi::Context* context, size_t index, int64_t rows, Sizes& sizes,
                      int64_t& step) const {
    const float* data = input(context, index, sizes);
    step = 0;
    if (sizes.count == 3) {
      if (sizes.of[0] != 1 && sizes.of[0] != rows)
        refuse("LoraSum: a factor is for another batch");
      if (sizes.of[0] != 1) step = sizes.of[1] * sizes.of[2];
      sizes = {{sizes.of[1], sizes.of[2]}, 2};
    }
    if (sizes.count != 2) refuse("LoraSum: a factor has neither 2 nor 3 dimensions");
    return data;
  }

  void compute(abi::Context* context) const {
    size_t inputs = 0;
    check(abi::InputCount::of(api)(context, &inputs));
    if (inputs < 4 || inputs % 2) refuse("LoraSum: expected y, x and pairs of A and B");
    Work work;
    work.pairs.reserve(inputs / 2 - 1);
    Sizes shape, wide, sizes;
    work.y = input(context, 0, shape);
    work.x = input(context, 1, wide);
    const size_t last = shape.count - 1;
    if (shape.count < 2 || shape.count != wide.count ||
        !std::equal(shape.of, shape.of + last, wide.of))
      refuse("LoraSum: y and x are of unlike shapes");
    work.N = shape.of[last];
    work.K = wide.of[last];
    int64_t tokens = 1;
    for (size_t i = 0; i < last; ++i) tokens *= shape.of[i];
    const int64_t batch = shape.of[0];
    bool unlike = false;
    int64_t columns = 0, read = 0;
    work.rank = work.outer = work.most = 0;
    for (size_t i = 2; i < inputs; i += 2) {
      Pair pair{};
      pair.a = factor(context, i, batch, sizes, pair.a_step);
      const int64_t inner = sizes.of[0];
      pair.rank = sizes.of[1];
      pair.b = factor(context, i + 1, batch, sizes, pair.b_step);
      pair.columns = sizes.of[1];
      if (inner != work.K || sizes.of[0] != pair.rank)
        refuse("LoraSum: A and B do not fit together, or not x");
      pair.first = columns;
      pair.first_rank = work.rank;
      pair.first_piece = work.outer;
      columns += pair.columns;
      work.rank += pair.rank;
      work.most = std::max(work.most, pair.rank);
      work.outer += column_pieces(pair.columns);
      read += (inner + pair.columns) * pair.rank * static_cast<int64_t>(sizeof(float));
      unlike |= pair.a_step || pair.b_step;
      work.pairs.push_back(pair);
    }
    if (columns != work.N) refuse("LoraSum: the columns of all B are not those of y");
    abi::Value* made = nullptr;
    check(abi::Output::of(api)(context, 0, shape.of, shape.count, &made));
    void* data = nullptr;
    check(abi::MutableData::of(api)(made, &data));
    work.out = static_cast<float*>(data);
    if (!tokens || !work.N) return;
    work.rows = unlike ? batch : 1;
    work.tokens = tokens / work.rows;
    work.inner = pieces(work.K);
    if (work.few()) {
      work.partial.reset(new float[work.rows * work.inner * work.tokens * work.rank]);
      work.first = work.rows * static_cast<int64_t>(work.pairs.size()) * work.inner;
      work.all = work.first + work.rows * work.outer;
    } else {
      work.first = 0;
      work.all = work.rows * work.blocks();
    }
    work.sums.reset(new float[(work.all - work.first) * std::max(kFew, kBlock) * work.most]);
    const int64_t load = read * work.rows * (1 + work.tokens / 4);
    if (load <= kAlone) {
      work_on(&work, 0);
    } else {
      const size_t calls = std::min<size_t>(kCalls, static_cast<size_t>(work.all));
      check(abi::Parallel::of(api)(context, work_on, calls, 0, &work));
    }
  }
};

abi::Status* LORA_CALL create(const abi::Operator*, abi::Table api, const abi::Info*,
                              void** kernel) {
  *kernel = new (std::nothrow) Kernel{api};
  return *kernel ? nullptr : abi::CreateStatus::of(api)(abi::kFail, "LoraSum: no memory");
}

abi::Status* LORA_CALL compute(void* given, abi::Context* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(given);
  try {
    kernel.compute(context);
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return abi::CreateStatus::of(kernel.api)(abi::kFail, "LoraSum: no memory");
  }
}

void LORA_CALL destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

size_t LORA_CALL in_place(int** inputs, int** outputs) {
  *inputs = new (std::nothrow) int[1]{0};
  *outputs = new (std::nothrow) int[1]{0};
  return *inputs && *outputs ? 1 : 0;
}

void LORA_CALL release_in_place(int* inputs, int* outputs) {
  delete[] inputs;
  delete[] outputs;
}

abi::Operator lora_sum() {
  abi::Operator made{};
  made.version = abi::kVersion;
  made.name = [](const abi::Operator*) -> const char* { return "LoraSum"; };
  made.provider = [](const abi::Operator*) -> const char* { return nullptr; };
  made.input_type = [](const abi::Operator*, size_t) { return abi::kFloat; };
  made.inputs = [](const abi::Operator*) -> size_t { return 3; };
  made.output_type = [](const abi::Operator*, size_t) { return abi::kFloat; };
  made.outputs = [](const abi::Operator*) -> size_t { return 1; };
  made.destroy = destroy;
  made.input_kind = [](const abi::Operator*, size_t index) {
    return index == 2 ? abi::kVariadic : abi::kRequired;
  };
  made.output_kind = [](const abi::Operator*, size_t) { return abi::kRequired; };
  made.input_memory = [](const abi::Operator*, size_t) { return 0; };
  made.least_inputs = [](const abi::Operator*) { return 2; };
  made.inputs_alike = [](const abi::Operator*) { return 1; };
  made.least_outputs = [](const abi::Operator*) { return 0; };
  made.outputs_alike = [](const abi::Operator*) { return 0; };
  made.create_checked = create;
  made.compute_checked = compute;
  made.first_version = [](const abi::Operator*) { return 1; };
  made.last_version = [](const abi::Operator*) { return INT32_MAX; };
  made.in_place = in_place;
  made.release_in_place = release_in_place;
  return made;
}

}  // namespace

LORA_EXPORT abi::Status* LORA_CALL RegisterCustomOps(abi::Options* options,
                                                     const abi::Base* base) {
  static const abi::Operator kOperator = lora_sum();
  const abi::Table api = base->table(abi::kVersion);
  if (!api) return nullptr;  // an older ONNX Runtime: the graph will say that it lacks LoraSum
  abi::Domain* domain = nullptr;  // lives as long as the process, as the sessions may
  if (abi::Status* status = abi::CreateDomain::of(api)("lora_edge", &domain)) return status;
  if (abi::Status* status = abi::DomainAdd::of(api)(domain, &kOperator)) return status;
  return abi::OptionsAdd::of(api)(options, domain);
}
